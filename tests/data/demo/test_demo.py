"""The built-in set: made once and whole, told apart by motion and not by looks, heard where it knocks."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.data.demo import demo
from engine.data.demo.demo import make_demo
from engine.data.demo.scenes import CLASSES, FPS, SAMPLE_RATE, UNLABELLED, Scene, draw_scene

CHANCE = 1 / len(CLASSES)
SMALL = {"clips_per_class": 1, "unlabelled_clips": 1}


def read_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])


def read_sound(path: Path) -> np.ndarray:
    """Samples at their time stamps, 0 being the first video frame's."""
    sound = np.zeros(4 * SAMPLE_RATE, np.float32)
    with av.open(str(path)) as file:
        start = next(file.decode(video=0)).time
    with av.open(str(path)) as file:
        for frame in file.decode(audio=0):
            at = round((frame.time - start) * SAMPLE_RATE)
            samples = frame.to_ndarray()[0]
            sound[max(at, 0) : at + len(samples)] = samples[max(-at, 0) :]
    return sound


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Twelve labelled clips a class (a share of the default's) and ten unlabelled ones, with every call to progress."""
    calls = []
    folder = tmp_path_factory.mktemp("cache") / "demo"
    found = make_demo(
        folder,
        clips_per_class=12,
        unlabelled_clips=10,
        progress=lambda *call: calls.append(call),
    )
    return found, calls


@pytest.fixture(scope="session")
def labelled(made):
    """Decoded frames and class numbers of all labelled clips."""
    paths = [p for name in CLASSES for p in sorted((made[0].labelled / name).iterdir())]
    return [read_frames(p) for p in paths], np.array([CLASSES.index(p.parent.name) for p in paths])


@pytest.fixture
def fast(monkeypatch):
    """Replace drawing and encoding; returns the names of the files that were written."""
    written = []

    def write(path, frames, **_):
        path.write_bytes(b"clip")
        written.append(path.name)

    scene = Scene(np.zeros((1, 2, 2, 3), np.uint8), None, ())
    monkeypatch.setattr(demo, "draw_scene", lambda *_, **__: scene)
    monkeypatch.setattr(demo, "write_video", write)
    return written


def accuracy(model, features, y):
    return np.mean(cross_val_predict(model, np.array(features), y, cv=12) == y)


def flow_statistics(frames):
    """How a window moves against its ground: means of its flow, divergence, curl and changes in time."""
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flow = np.stack([dis.calc(a, b, None) for a, b in pairwise(grey)])
    flow -= np.median(flow, (1, 2), keepdims=True)
    speed = np.linalg.norm(flow, axis=-1)
    moving = speed > 0.7

    def mean(values):
        return (values * moving).sum((1, 2)) / (moving.sum((1, 2)) + 20)

    x, y = flow[..., 0], flow[..., 1]
    vx, vy, ax, ay = mean(x), mean(y), mean(np.abs(x)).mean(), mean(np.abs(y)).mean()
    div = mean(np.clip(np.gradient(x, axis=2) + np.gradient(y, axis=1), -0.5, 0.5))
    curl = np.abs(mean(np.clip(np.gradient(y, axis=2) - np.gradient(x, axis=1), -1.5, 1.5)))
    energy = (vx**2 + vy**2).sum() + 0.1
    again = [(vx[:-k] * vx[k:] + vy[:-k] * vy[k:]).sum() / energy for k in (1, 2, 3)]
    turn = np.mean(vx[1:] * vy[:-1] - vx[:-1] * vy[1:]) ** 2 / (energy / len(vx) + 0.2) ** 2
    together = np.hypot(vx, vy).mean() / (mean(speed).mean() + 0.1)
    spread = [np.median(vy), vy.mean(), vy.std(), vx.std(), ax, ay, (ax - ay) / (ax + ay + 0.1)]
    swirl = np.log((curl.mean() + 0.005) / (np.abs(div).mean() + 0.005))
    return [*spread, np.median(div), curl.mean(), swirl, *again, turn, together]


def test_a_scene_is_a_pure_function_of_seed_group_and_number():
    one, two = draw_scene("orbit", 3, seed=5), draw_scene("orbit", 3, seed=5)
    np.testing.assert_array_equal(one.frames, two.frames)
    np.testing.assert_array_equal(one.sound, two.sound)
    for other in (
        draw_scene("orbit", 3, seed=6),
        draw_scene("orbit", 4, seed=5),
        draw_scene(UNLABELLED, 3, seed=5),
    ):
        assert np.abs(other.frames[0].astype(int) - one.frames[0]).mean() > 5


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match=r"'jump'.*fall.*unlabelled"):
        draw_scene("jump", 0)


def test_the_set_holds_what_it_says(made):
    found, calls = made
    assert sorted(p.name for p in found.labelled.iterdir()) == list(CLASSES)
    assert len(list(found.labelled.rglob("*.mp4"))) == 12 * len(CLASSES)
    unlabelled = sorted(found.unlabelled.iterdir())
    assert [p.name for p in unlabelled] == [f"{n:03d}.mp4" for n in range(10)]
    total = 12 * len(CLASSES) + 10
    assert calls == [(n, total) for n in range(1, total + 1)]
    silent = []
    for path in unlabelled:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            assert (video.width, video.height, video.average_rate) == (112, 84, FPS)
            assert 1.9 <= video.frames / FPS <= 2.6
            silent += [] if file.streams.audio else [path.stem]
    assert silent == ["004", "009"]


def test_the_files_hold_the_scenes(made):
    found = made[0]
    for group, path in (
        ("orbit", found.labelled / "orbit" / "007.mp4"),
        (UNLABELLED, found.unlabelled / "003.mp4"),
    ):
        scene = draw_scene(group, int(path.stem))
        frames, sound = read_frames(path), read_sound(path)[: len(scene.sound)]
        assert frames.shape == scene.frames.shape
        assert np.abs(frames.astype(int) - scene.frames).mean() < 4
        assert np.corrcoef(sound, scene.sound)[0, 1] > 0.9


def test_a_finished_set_is_kept_and_any_other_made_again(fast, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "demo"
    count = len(CLASSES) + 1
    make_demo(folder, **SMALL)
    assert len(fast) == count
    make_demo(folder, **SMALL)
    assert len(fast) == count
    make_demo(folder, seed=1, **SMALL)
    assert len(fast) == 2 * count
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    make_demo(folder, seed=1, **SMALL)
    assert len(fast) == 3 * count
    assert json.loads((folder / demo.MARKER).read_text())["version"] == demo.VERSION
    (folder / "labelled" / "spin" / "000.mp4").unlink()
    make_demo(folder, seed=1, **SMALL)
    assert len(fast) == 4 * count
    assert sorted(p.name for p in folder.parent.iterdir()) == [".demo.lock", "demo"]


def test_a_kill_half_way_leaves_nothing_that_counts(fast, tmp_path):
    folder = tmp_path / "demo"
    code = (
        "import os, signal, sys; from pathlib import Path; from engine.data.demo.demo import make_demo\n"
        "def kill(done, total): os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None\n"
        "make_demo(Path(sys.argv[1]), clips_per_class=1, unlabelled_clips=1, progress=kill)"
    )
    root = Path(demo.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, timeout=60)
    assert ended.returncode == -9
    assert not folder.exists()
    assert list((tmp_path / ".demo.part").rglob("*.mp4"))
    make_demo(folder, **SMALL)
    assert len(fast) == len(CLASSES) + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".demo.lock", "demo"]


def test_two_at_once_make_it_once(fast, tmp_path):
    makers = [
        threading.Thread(target=make_demo, args=(tmp_path / "demo",), kwargs=SMALL) for _ in "ab"
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(fast) == len(CLASSES) + 1


@pytest.mark.parametrize("name", ["notes.txt", "labelled", "demo.json and notes.txt"])
def test_a_folder_of_other_files_is_left_alone(fast, tmp_path, name):
    for part in name.split(" and "):
        (tmp_path / part).write_text("{}")
    with pytest.raises(ValueError, match="new or empty folder"):
        make_demo(tmp_path, **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(name.split(" and "))
    assert not fast


def test_a_full_disk_is_one_clear_error(fast, tmp_path, monkeypatch):
    def full(path, frames, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(demo, "write_video", full)
    with pytest.raises(OSError, match=r"disk is full.*XDG_CACHE_HOME") as caught:
        make_demo(tmp_path / "demo", **SMALL)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "demo")
    assert [p.name for p in tmp_path.iterdir()] == [".demo.lock"]


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    name = f"demo-v{demo.VERSION}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.default_cache() == tmp_path / "evolved-losses" / name
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert demo.default_cache() == Path.home() / ".cache" / "evolved-losses" / name


def test_a_frame_tells_next_to_nothing(labelled):
    clips, y = labelled
    views = {
        "mean": [clip.mean(0) for clip in clips],
        "first": [clip[0] for clip in clips],
        "middle": [clip[len(clip) // 2] for clip in clips],
    }
    models = (
        make_pipeline(StandardScaler(), RidgeClassifier(100.0)),
        NearestCentroid(),
        KNeighborsClassifier(5),
    )
    for view, frames in views.items():
        small = [
            cv2.resize(f.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA).ravel()
            for f in frames
        ]
        for model in models:
            assert accuracy(model, small, y) <= CHANCE + 0.1, (view, model)


def test_motion_tells_the_classes_apart(labelled):
    clips, y = labelled
    features = []
    for clip in clips:
        starts = np.linspace(0, len(clip) - 15, 3).astype(int)
        windows = [flow_statistics(clip[s : s + 15 : 2]) for s in starts]
        features.append(np.median(windows, 0))
    assert accuracy(make_pipeline(StandardScaler(), RidgeClassifier(1.0)), features, y) >= 0.65
    assert accuracy(make_pipeline(StandardScaler(), KNeighborsClassifier(5)), features, y) >= 0.65
    found = KMeans(len(CLASSES), n_init=10, random_state=0).fit_predict(
        StandardScaler().fit_transform(features)
    )
    table = np.zeros((len(CLASSES), len(CLASSES)))
    np.add.at(table, (y, found), 1)
    assert table[linear_sum_assignment(-table)].sum() / len(y) >= 0.4


def test_labelled_clips_sound_and_their_loudness_varies(made):
    for path in sorted(made[0].labelled.rglob("000.mp4")):
        sound = read_sound(path)[: 2 * SAMPLE_RATE]
        assert np.abs(sound).max() <= 1.05
        envelope = np.sqrt((sound.reshape(-1, 320) ** 2).mean(1))
        assert np.sqrt((sound**2).mean()) > 0.01, path
        assert envelope.std() / envelope.mean() > 0.15, path


def turning_points(frames):
    """Seconds at which what moves on the screen turns from down to up."""
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    down = []
    for a, b in pairwise(grey):
        flow = dis.calc(a, b, None)[..., 1]
        flow -= np.median(flow)
        fast = np.abs(flow) > max(0.5, 0.5 * np.abs(flow).max())
        down.append(flow[fast].mean() if fast.any() else 0.0)
    found = []
    for k in range(1, len(down) - 2):
        if down[k] > 0 >= down[k + 1] and down[k - 1] > 1 and down[k + 2] < -0.5:
            found.append((k + 0.5 + down[k] / (down[k] - down[k + 1])) / FPS)
    return np.array(found)


def onsets(sound):
    """Seconds at which loudness leaps: 4 ms twice as loud as any of the 20 ms before."""
    level = np.sqrt((sound[: len(sound) // 64 * 64].reshape(-1, 64) ** 2).mean(1))
    before = np.max([level[5 - k : len(level) - k] for k in range(1, 6)], axis=0)
    return (5 + np.flatnonzero(level[5:] > 2 * before + 0.01)) * 64 / SAMPLE_RATE


def test_what_circles_is_heard_at_its_lowest_point(made):
    seen = heard = chance = 0
    for number in range(12):
        path = made[0].labelled / "orbit" / f"{number:03d}.mp4"
        turns, starts = turning_points(read_frames(path)), onsets(read_sound(path))
        gap = np.abs(turns[:, None] - starts).min(1)
        late = np.abs(turns[:, None] + 0.25 - starts).min(1)
        seen, heard, chance = (
            seen + len(turns),
            heard + (gap <= 0.04).sum(),
            chance + (late <= 0.04).sum(),
        )
    assert seen >= 8
    assert heard >= 0.9 * seen
    assert chance <= 0.5 * seen
