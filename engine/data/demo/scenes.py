"""The scenes of the built-in data set: what moves in them, how it looks and how it sounds.

Textured things move over soft grounds, and what leaves the view enters it opposite. A labelled clip's class is its
motion alone: looks, sizes, places and phases are drawn alike in every class, and no two classes are mirror images of
left and right, since views are flipped. Each is the reverse of another in time, or of itself, but for its knocks. Sound
follows one law: a thing hums the louder the faster it moves, the higher the higher up and the smaller it is, and knocks
at every impact or turning point; every second clip has a noise from off-screen too. Letters: T frames, H W, K points in
time.
"""

from __future__ import annotations

import colorsys
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy import cos, pi, sin
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator

HEIGHT, WIDTH, FPS, SAMPLE_RATE = 84, 112, 25, 16000
UNLABELLED = "unlabelled"
GAP = 16
"""Pixels between a side of the view and where it goes on opposite."""
SPREAD = 28
"""How far from the middle things are at first, in pixels."""
ZOOM = 2.8
"""Largest over smallest radius: zooming things run through it, the others are drawn from it."""


class _Kind(NamedTuple):
    seconds: tuple[float, float]
    """Range of the length of a cycle: a window of 0.6 s shows most of one."""
    knocks: int
    """Impacts or turning points a cycle, evenly spaced, the first at its start."""
    path: Callable[[Array, float], tuple[Any, Any, Any, Any]]
    """(cycles, size) to shift right and down in pixels, zoom (log radius over log ZOOM), angle."""


MOTIONS = {
    "bounce": _Kind((0.6, 0.9), 1, lambda c, s: (0, s * (21 - 128 * (c % 1) * (1 - c % 1)), 0, 0)),
    "grow": _Kind((0.55, 0.8), 1, lambda c, s: (0, 0, c % 1 - 0.5, 0)),
    "orbit": _Kind(
        (0.7, 1.0), 1, lambda c, s: (16 * s * sin(2 * pi * c), 16 * s * cos(2 * pi * c), 0, 0)
    ),
    "rise": _Kind((0.9, 1.2), 0, lambda c, s: (0, -80 * c, 0, 0)),
    "shake": _Kind(
        (0.2, 0.28), 1, lambda c, s: (5 * s * cos(2 * pi * c), 4 * s * cos(8.2 * c + s), 0, 0)
    ),
    "shrink": _Kind((0.55, 0.8), 1, lambda c, s: (0, 0, 0.5 - c % 1, 0)),
    "spin": _Kind((1.1, 1.6), 1, lambda c, s: (0, 0, 0, 2 * pi * c)),
    "swing": _Kind((0.9, 1.2), 2, lambda c, s: _pendulum(0.65 * s * cos(2 * pi * c))),
    "fall": _Kind((0.9, 1.2), 0, lambda c, s: (0, 80 * c, 0, 0)),
    "pulse": _Kind((0.5, 0.8), 1, lambda c, s: (0, 0, 0.5 * cos(2 * pi * c), 0)),
    "slide": _Kind((0.9, 1.3), 0, lambda c, s: (80 * c, 0, 0, 0)),
    "step": _Kind(
        (0.45, 0.7), 1, lambda c, s: (30 * (c // 1 + np.minimum(2 * (c % 1), 1)), 0, 0, 0)
    ),
}
CLASSES = ("fall", "grow", "orbit", "rise", "shake", "shrink", "slide", "spin")
"""The labelled motions; the others are seen in unlabelled clips alone."""


def _pendulum(angle: Array) -> tuple[Array, Array, int, Array]:
    return 36 * sin(angle), 36 * (cos(angle) - 0.9), 0, -angle


@dataclass(frozen=True)
class Scene:
    """One clip before encoding."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3), RGB, 25 frames a second."""
    sound: Array | None
    """(samples,) at 16 kHz in [-1, 1]; None where the clip is silent."""
    knocks: tuple[Array, ...]
    """For each thing in view, the seconds at which it knocks, ascending."""


@dataclass(frozen=True)
class _Motion:
    """One periodic motion of a thing about its place."""

    kind: str
    period: float
    phase: float
    mirror: float
    """1, or -1 for the motion's mirror image."""
    size: float

    def pose(self, seconds: Array) -> Array:
        """(4, K): what ``_Kind.path`` gives."""
        parts = MOTIONS[self.kind].path(seconds / self.period + self.phase, self.size)
        x, y, zoom, angle = (np.broadcast_to(np.float32(part), seconds.shape) for part in parts)
        return np.stack([self.mirror * x, y, zoom, self.mirror * angle])

    def knocks(self, duration: float) -> Array:
        count = MOTIONS[self.kind].knocks
        ends = (math.ceil(c * count) for c in (self.phase, duration / self.period + self.phase))
        at = np.arange(*ends) / max(count, 1)
        return ((at - self.phase) * self.period).astype(np.float32)


@dataclass(frozen=True)
class _Thing:
    """A textured thing: where it is, how it looks, how it moves."""

    x: float
    y: float
    radius: float
    zoom: float
    """Fixed part of the zoom; 0 where a motion zooms."""
    angle: float
    outline: str
    texture: Array
    """(256, 256) in [0, 1], over [-1.5, 1.5] radii."""
    colours: Array
    """(2, 3), RGB in [0, 255]."""
    motions: tuple[_Motion, ...]

    def track(self, seconds: Array) -> Array:
        """(4, K): x, y and radius in pixels, and angle; what leaves the world enters opposite."""
        x, y, zoom, angle = np.sum([m.pose(seconds) for m in self.motions], axis=0)
        radius = self.radius * ZOOM ** (self.zoom + np.clip(zoom, -0.5, 0.5))
        x = (self.x + x) % (WIDTH + GAP)
        y = (self.y + y) % (HEIGHT + GAP)
        return np.stack([x, y, radius, self.angle + angle]).astype(np.float32)

    def knocks(self, duration: float) -> Array:
        return np.sort(np.concatenate([m.knocks(duration) for m in self.motions]))


def _colour(rng: Rng, hue: float, saturation: tuple[float, float], value: float) -> list[float]:
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), min(max(value, 0), 1))
    return [255 * channel for channel in rgb]


def _pattern(rng: Rng, u: Array, v: Array, *, frequency: float) -> Array:
    """A texture in [0, 1] on the grid (u, v): cloudy, striped, chequered or dotted."""
    kind = str(rng.choice(["cloud", "stripes", "checker", "dots"]))
    turn, warp = rng.uniform(0, pi), rng.uniform(0.07, 0.32)
    f = 2 * pi * frequency * rng.uniform(0.7, 1.3)
    a, b = f * (u * cos(turn) + v * sin(turn)), f * (v * cos(turn) - u * sin(turn))
    cloud = np.zeros_like(u)
    for way, shift, octave in rng.uniform((0, 0, 0.4), (2 * pi, 2 * pi, 1.5), (8, 3)):
        cloud += cos(octave * (a * cos(way) + b * sin(way)) + shift)
    a, b = a + warp * cloud + rng.uniform(0, 6), b + rng.uniform(0, 6)
    waves = {"cloud": 0.6 * cloud, "stripes": 2.5 * sin(a), "checker": 4 * sin(a) * sin(b)}
    return np.asarray(0.5 + 0.5 * np.tanh(waves.get(kind, 3 * (cos(a) + cos(b) - 0.6))), np.float32)


def _thing(
    rng: Rng, kinds: Iterable[str], *, place: int, places: int, hue: float, wild: bool
) -> _Thing:
    """Draw a thing by lot, ``place`` of ``places`` from the left; wild ones have more outlines."""
    motions = tuple(
        _Motion(
            k,
            rng.uniform(*MOTIONS[k].seconds),
            rng.uniform(),
            rng.choice([-1, 1]),
            rng.uniform(0.85, 1.15),
        )
        for k in kinds
    )
    zoom = rng.uniform(-0.2, 0.2)
    grid = np.linspace(-1.5, 1.5, 256, dtype=np.float32)
    own, bright = hue + rng.uniform(0.25, 0.75), rng.uniform(0.75, 1.0)
    dark = bright - rng.uniform(0.35, 0.6)
    light_dark = (
        _colour(rng, own, (0.5, 1.0), bright),
        _colour(rng, own + rng.uniform(-0.2, 0.2), (0.2, 0.9), dark),
    )
    return _Thing(
        x=WIDTH / 2
        + (place - (places - 1) / 2) * (0, 44, 34)[places - 1]
        + rng.uniform(-SPREAD, SPREAD),
        y=HEIGHT / 2 + rng.uniform(-SPREAD, SPREAD),
        radius=rng.uniform(22, 27) * (1, 0.7, 0.7)[places - 1],
        zoom=0.0 if {m.kind for m in motions} & {"grow", "shrink", "pulse"} else zoom,
        angle=rng.uniform(0, 2 * pi),
        outline=str(
            rng.choice(["disc", "box", "blob", "ring", "cross", "triangle"][: 6 if wild else 3])
        ),
        texture=_pattern(rng, *np.meshgrid(grid, grid), frequency=rng.uniform(0.5, 1.0)),
        colours=np.array(light_dark, np.float32),
        motions=motions,
    )


def _ground(rng: Rng, num_frames: int, *, hue: float) -> Array:
    """(T, H, W, 3): a lit ground of low contrast, and a camera at rest."""
    rows, columns = (np.arange(side, dtype=np.float32) / HEIGHT for side in (HEIGHT, WIDTH))
    u, v = np.meshgrid(columns, rows)
    mix = _pattern(rng, u, v, frequency=rng.uniform(1.5, 3))[..., None]
    value, step = rng.uniform(0.35, 0.75), rng.choice([-1, 1]) * rng.uniform(0.03, 0.08)
    first = np.array(_colour(rng, hue, (0.1, 0.5), value))
    second = np.array(_colour(rng, hue + rng.uniform(-0.12, 0.12), (0.1, 0.6), value + step))
    light = 1 + rng.uniform(-0.3, 0.3) * (u - 0.66) + rng.uniform(-0.3, 0.3) * (v - 0.5)
    ground = np.clip((first * (1 - mix) + second * mix) * light[..., None], 0, 255)
    return np.repeat(ground[None].astype(np.float32), num_frames, axis=0)


def _edge(outline: str, u: Array, v: Array) -> Array:
    """Signed distance, about, to the outline, in radii: below 0 inside."""
    a, b, rho = np.abs(u), np.abs(v), np.sqrt(u * u + v * v)
    edge: Array = rho - 1
    if outline == "box":
        edge = np.maximum(a, b) - 0.88
    elif outline == "blob":  # three lobes: u^3 - 3 u v^2 is rho^3 cos 3 phi
        edge = edge - 0.16 * (u * u - 3 * v * v) * u / (rho**3 + 1e-6)
    elif outline == "ring":
        edge = np.abs(rho - 0.8) - 0.35
    elif outline == "cross":
        edge = np.minimum(np.maximum(a - 1.1, b - 0.45), np.maximum(a - 0.45, b - 1.1))
    elif outline == "triangle":
        edge = np.maximum(0.866 * a - 0.5 * v, v) - 0.62
    return edge


def _paint(frames: Array, thing: _Thing) -> None:
    """Draw a thing, lit from the upper left, and its shadow onto (T, H, W, 3), with soft edges."""
    x, y, radius, angle = thing.track(np.arange(len(frames), dtype=np.float32) / FPS)
    half = math.ceil(1.35 * float(radius.max())) + 2
    box = np.arange(-half, half + 1, dtype=np.float32)
    column, row = ((box - (p % 1)[:, None]) / radius[:, None] for p in (x, y))
    px, py = np.broadcast_arrays(column[:, None, :], row[:, :, None])
    c, s = cos(angle)[:, None, None], sin(angle)[:, None, None]
    u, v = px * c + py * s, py * c - px * s
    edge = _edge(thing.outline, u, v) * radius[:, None, None]
    inside, shadow = np.clip(0.5 - edge, 0, 1), np.clip(0.5 - edge / 6, 0, 0.4)
    i, j = (((np.clip(p, -1.49, 1.49) + 1.5) * 85).astype(np.intp) for p in (v, u))
    mix = thing.texture[i, j][..., None]
    light = (1 - 0.22 * (px + py) - 0.12 * (px * px + py * py))[..., None]
    colour = (thing.colours[0] * mix + thing.colours[1] * (1 - mix)) * light
    black = np.zeros_like(colour[0])
    for t, frame in enumerate(frames):
        top, left = math.floor(y[t]) - half, math.floor(x[t]) - half
        for down, right in product((0, HEIGHT + GAP), (0, WIDTH + GAP)):
            _blend(frame, black, shadow[t], top=top + 4 - down, left=left + 3 - right)
            _blend(frame, colour[t], inside[t], top=top - down, left=left - right)


def _blend(frame: Array, patch: Array, alpha: Array, *, top: int, left: int) -> None:
    """Lay a square patch over a frame, as far as it lies within."""
    rows = slice(max(top, 0), max(min(top + len(patch), HEIGHT), 0))
    columns = slice(max(left, 0), max(min(left + len(patch), WIDTH), 0))
    area = frame[rows, columns]
    part = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if area.size:
        area += alpha[part][..., None] * (patch[part] - area)


def _voice(rng: Rng, thing: _Thing, samples: int) -> Array:
    """(samples,): a thing's hum, rich or pure, and its knocks: sharp, decaying, tone and noise."""
    coarse = np.arange(0, samples + 160, 64, dtype=np.float32) / SAMPLE_RATE
    x, y, radius, angle = thing.track(coarse)
    step = [np.gradient(x), np.gradient(y), np.gradient(radius), 0.6 * radius * np.gradient(angle)]
    speed = np.minimum(np.linalg.norm(step, axis=0) * SAMPLE_RATE / 64, 250) / 250
    octave = rng.uniform(0.3, 1) * (0.5 - y / HEIGHT - np.log2(radius / thing.radius))
    at = np.arange(samples) / SAMPLE_RATE
    phase = (
        2 * pi * np.cumsum(rng.uniform(140, 420) * 2 ** np.interp(at, coarse, octave)) / SAMPLE_RATE
    )
    falloff, breath = rng.uniform(0.15, 0.7), rng.uniform(0, 0.4)
    tone = breath * rng.standard_normal(samples)
    for k in range(5):
        tone += falloff**k * sin((k + 1) * phase)
    sound = 0.09 * tone * np.interp(at, coarse, 0.1 + 0.9 * speed)

    decay, pitch, noise = rng.uniform(0.015, 0.05), rng.uniform(250, 1400), rng.uniform(0.1, 0.9)
    at = at[: SAMPLE_RATE // 4]
    for second in thing.knocks(samples / SAMPLE_RATE):
        burst = (1 - noise) * cos(2 * pi * pitch * at) + noise * rng.uniform(-1, 1, len(at))
        room = sound[round(float(second) * SAMPLE_RATE) :][: len(at)]
        room += 0.5 * (burst * np.exp(-at / decay))[: len(room)]
    return np.asarray(sound, np.float32)


def draw_scene(group: str, number: int, *, seed: int = 0) -> Scene:
    """Draw one clip of ``group`` (a name in CLASSES, or UNLABELLED): a pure function of its arguments.

    A labelled clip holds one thing of one motion. An unlabelled one holds one or two, each with its own motion, or two
    at once, and outlines that no labelled clip shows; every fifth is
    silent. Raises ValueError for an unknown group.
    """
    wild = group == UNLABELLED
    if not wild and group not in CLASSES:
        names = ", ".join((*CLASSES, UNLABELLED))
        raise ValueError(f"no group {group!r} in the demo set; use one of {names}")
    rng = np.random.default_rng([seed, zlib.crc32(group.encode()), number])
    num_frames, hue = int(rng.integers(48, 65)), rng.uniform()
    places = 1 if not wild else int(rng.integers(1, 3))

    def kinds() -> list[str]:
        return [str(k) for k in rng.choice(list(MOTIONS), 1 + (rng.random() < 0.25), replace=False)]

    things = [
        _thing(rng, kinds() if wild else [group], place=i, places=places, hue=hue, wild=wild)
        for i in range(places)
    ]
    canvas = _ground(rng, num_frames, hue=hue)
    for thing in things:
        _paint(canvas, thing)
    frames = (np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)

    samples = num_frames * SAMPLE_RATE // FPS
    sound = (rng.uniform(0.001, 0.006) * rng.standard_normal(samples)).astype(np.float32)
    for thing in things:
        sound += _voice(rng, thing, samples)
    if rng.random() < 0.5:  # so that sound alone does not tell the class
        unseen = _thing(rng, kinds(), place=0, places=1, hue=hue, wild=wild)
        sound += rng.uniform(0.2, 0.5) * _voice(rng, unseen, samples)
    sound *= rng.uniform(0.5, 0.9) / float(np.abs(sound).max())
    knocks = tuple(thing.knocks(num_frames / FPS) for thing in things)
    return Scene(frames, None if wild and number % 5 == 4 else sound, knocks)
