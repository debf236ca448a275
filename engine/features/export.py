"""The RGB network with its preprocessing as a portable file: raw frames in, features out.

Its input is uint8 (N, T, H, W, 3), RGB, cut and resized to the card's input; the frames' scaling and normalisation
are inside. Its output is float32 (N, D), equal to the engine's within 1e-4 of the largest feature: every export
is run before it is written. N is free in both formats; so are T, H and W in ONNX. In torch they are as long as
the last stage keeps several frames (rows, columns) where it had several, and one where it had one.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import engine
from engine.core.files import write_atomic
from engine.core.recipe import Readout
from engine.features.readout import NAMES, scaling, statistics_of
from engine.model.network_file import Card, card_text
from engine.model.resnet3d import ResNet3D

FORMATS = {".pt2": "torch", ".onnx": "onnx"}
"""Suffix to format."""
AXES = ("clips", "frames", "height", "width")
"""The input's axes that are free; the last one is RGB."""
TOLERANCE = 1e-4
"""Largest difference from the engine's features that an export may have, as a share of the largest one, or of 1."""


class FramesToFeatures(nn.Module):
    """An RGB network between its own preprocessing and a read-out, in operations that every runtime has."""

    def __init__(self, network: ResNet3D, card: Card, readout: Readout = "raw") -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(card.mean))
        self.register_buffer("std", torch.tensor(card.std))
        self.readout = readout
        self.feature_mean: Tensor
        self.feature_scale: Tensor
        mean, scale = statistics_of(card, readout)
        self.register_buffer("feature_mean", mean)
        self.register_buffer("feature_scale", scale)

    def forward(self, frames: Tensor) -> Tensor:
        """Features (N, D) of uint8 (N, T, H, W, 3)."""
        rgb = (frames.float() / 255 - self.mean) / self.std
        features: Tensor = self.network(rgb.permute(0, 4, 1, 2, 3))
        return scaling(self.readout, self.feature_mean, self.feature_scale)(features)


@dataclass(frozen=True)
class ExportReport:
    """The outcome of an export."""

    format: str
    difference: float | None
    """Largest difference from the engine's features on random clips; None where nothing here runs the format."""
    bytes: int


def export(
    network: ResNet3D,
    card: Card,
    *,
    out: Path,
    format: str | None = None,
    readout: Readout = "raw",
) -> ExportReport:
    """Write ``network`` as ``out``, with its card inside (``card.json``, or metadata ``card``) and as ``out``.json.

    ``format`` is "torch" (a torch.export program) or "onnx"; None: as the suffix says, .pt2 or .onnx. ``readout``
    scales the features by the card's mean and scale of them: "unit" or "zscore". Raises ValueError for another
    format, a missing package and a card without these numbers, OSError where it can't be written, and RuntimeError
    where the exported network computes something else.
    """
    chosen = format_of(out, format)
    model = FramesToFeatures(copy.deepcopy(network), card, readout).cpu().float().eval()
    clip = card.input
    shape = (clip.num_frames, clip.size, clip.size, 3)
    metadata = {
        **msgspec.to_builtins(card),
        "format": chosen,
        "engine_version": engine.__version__,
        "torch_version": torch.__version__,
        "frames": f"uint8 ({', '.join(AXES)}, 3), RGB, resized and cut to input; normalised inside",
        "features": f"float32 (clips, {network.feature_dim}), {NAMES[readout]}",
        "readout": readout,
    }
    write = _write_torch if chosen == "torch" else _write_onnx
    with torch.no_grad(), _quiet():
        data, run = write(model, _random_frames(2, shape, seed=0), json.dumps(metadata))
        difference = None if run is None else _checked(model, run, shape)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"can't write there: {error.strerror}", str(out)) from None
    write_atomic(out, data)
    write_atomic(out.with_name(f"{out.name}.json"), card_text(metadata).encode())
    return ExportReport(chosen, difference, len(data))


def format_of(out: Path, format: str | None) -> str:
    """The format asked for, or else that of the suffix; raises ValueError where there is none."""
    chosen = FORMATS.get(out.suffix) if format is None else format
    if chosen is None or chosen not in FORMATS.values():
        what = f"--format {format}" if format else f"{out}, by its suffix,"
        raise ValueError(f"{what} is no format: use torch (.pt2) or onnx (.onnx)")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if chosen == "onnx" and missing:
        raise ValueError(
            f"exporting to ONNX needs {' and '.join(missing)}: pip install 'evolved-losses[onnx]'"
        )
    return chosen


Runner = Callable[[Tensor], Tensor]


def _write_torch(model: nn.Module, example: Tensor, card: str) -> tuple[bytes, Runner]:
    free = dict.fromkeys(range(4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (example,), dynamic_shapes={"frames": free})
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"card.json": card})
    run: Runner = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), run


def _write_onnx(model: nn.Module, example: Tensor, card: str) -> tuple[bytes, Runner | None]:
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["frames"],
        output_names=["features"],
        dynamic_shapes={"frames": dict(enumerate(AXES))},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    proto.metadata_props.add(key="card", value=card)
    data = proto.SerializeToString()
    if find_spec("onnxruntime") is None:
        return data, None
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda frames: torch.from_numpy(session.run(None, {"frames": frames.numpy()})[0])


def _checked(model: nn.Module, run: Runner, shape: tuple[int, ...]) -> float:
    """The largest difference on random clips, in other numbers than the example's; raises RuntimeError."""
    worst = 0.0
    for count in (1, 3):
        frames = _random_frames(count, shape, seed=count)
        expected = model(frames)
        difference = float((run(frames) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RuntimeError(
                f"the exported network differs from the engine's by {difference:.2g}: nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _random_frames(count: int, shape: tuple[int, ...], *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the warnings of torch's exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
