"""A small labelled data set whose classes are colours, laid out as UCF101 unpacks; and networks to judge on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.data.media.encode import write_video
from engine.model.network_file import Card, ClipInput, save_network
from engine.model.resnet3d import ResNet3D

COLOURS = {
    "Archery": (220, 40, 40),
    "Biking": (40, 200, 60),
    "Diving": (50, 60, 220),
    "Fencing": (210, 200, 50),
    "HandStandPushups": (180, 60, 200),
}
GROUPS, CLIPS = 6, 2
TEST_GROUPS = {1: (1, 2), 2: (3, 4), 3: (5, 6)}
INPUT = ClipInput(num_frames=4, frame_stride=2, size=32)


def names() -> list[tuple[str, int, str]]:
    """(class, group, file name) of every video."""
    return [
        (label, group, f"v_{label}_g{group:02d}_c{clip:02d}.avi")
        for label in COLOURS
        for group in range(1, GROUPS + 1)
        for clip in range(1, CLIPS + 1)
    ]


def make_ucf101(root: Path, *, lists: str = "ucfTrainTestlist", videos: str = "UCF-101") -> Path:
    """Sixty videos of twelve frames below ``videos``, and three splits in ``lists``; gives the videos' folder."""
    rng = np.random.default_rng(0)
    for label, _, name in names():
        # as in the real set, where one class's folder is spelled otherwise
        folder = root / videos / label.replace("HandStand", "Handstand")
        folder.mkdir(parents=True, exist_ok=True)
        frames = [
            np.clip(np.array(COLOURS[label]) + rng.normal(0, 25, (32, 48, 3)), 0, 255).astype(
                np.uint8
            )
            for _ in range(12)
        ]
        write_video(folder / name, frames, fps=25)
    make_lists(root / lists)
    return root / videos


def make_lists(folder: Path) -> None:
    """UCF101's lists for these videos, with its line ends."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {label: i for i, label in enumerate(COLOURS, start=1)}
    (folder / "classInd.txt").write_text("".join(f"{i} {c}\r\n" for c, i in ids.items()))
    for split, held in TEST_GROUPS.items():
        train = [f"{c}/{n} {ids[c]}\r\n" for c, g, n in names() if g not in held]
        test = [f"{c}/{n}\r\n" for c, g, n in names() if g in held]
        (folder / f"trainlist0{split}.txt").write_text("".join(train))
        (folder / f"testlist0{split}.txt").write_text("".join(test))


def network(seed: int = 0) -> tuple[ResNet3D, Card]:
    """A small untrained network and its card."""
    torch.manual_seed(seed)
    card = Card(
        arch="r3d_18", width=0.125, pool=True, input=INPUT, labels_used=False, source=f"net{seed}"
    )
    net = ResNet3D(card.arch, 3, width=card.width, pool=card.pool)
    net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return net.eval(), card


def save(path: Path, seed: int = 0) -> Path:
    """The same network as a file."""
    net, card = network(seed)
    save_network(path, net.state_dict(), card)
    return path
