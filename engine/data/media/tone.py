"""High dynamic range and wide gamut to what a standard display shows: BT.709 primaries, BT.1886 gamma.

PQ and HLG are turned to display light in cd/m2 (ITU-R BT.2100; HLG for a display of 1000 cd/m2), the brightest
of R, G and B is brought below 203 cd/m2, the reference white of BT.2408, by the roll-off of BT.2390 Annex 5 from
a peak of 1000 cd/m2, with the ratios of the three kept; then BT.2020's or P3's primaries become BT.709's, what lies
outside is clipped, and light becomes signal by BT.1886's gamma of 2.4. Shapes: H height, W width.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

PQ, HLG = 16, 18
"""FFmpeg's codes (AVCOL_TRC) of the two transfer functions of high dynamic range."""
BT709, UNKNOWN, BT2020, DCI_P3, DISPLAY_P3 = 1, 2, 9, 11, 12
"""FFmpeg's codes (AVCOL_PRI) of primaries."""
PEAK, WHITE = 1000.0, 203.0
"""cd/m2: the brightest light that is kept apart, and the white that it is brought to."""
GAMMA = 2.4
TO_BT709 = {
    # ITU-R BT.2087
    BT2020: [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    # SMPTE RP 431-2, whose white is brought to D65 by Bradford's transform
    DCI_P3: [[1.1575, -0.1550, -0.0025], [-0.0415, 1.0456, -0.0041], [-0.0181, -0.0786, 1.0966]],
    # SMPTE EG 432-1
    DISPLAY_P3: [[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]],
}
"""Linear light of wide primaries to BT.709's."""
LUMA = {
    BT709: [0.2126, 0.7152, 0.0722],
    BT2020: [0.2627, 0.6780, 0.0593],
    DCI_P3: [0.2152, 0.7091, 0.0757],
    DISPLAY_P3: [0.2290, 0.6917, 0.0793],
}
"""Shares of linear R, G and B in luminance."""

M1, M2 = 2610 / 16384, 2523 / 32
C1, C2, C3 = 3424 / 4096, 2413 / 128, 2392 / 128
A, B, C = 0.17883277, 0.28466892, 0.55991073

Light = NDArray[np.floating]


def needs_tone(transfer: int, primaries: int) -> bool:
    """Whether pictures of this transfer function and these primaries look wrong on a standard display."""
    return transfer in (PQ, HLG) or primaries in TO_BT709


def to_standard(
    rgb: NDArray[np.uint16], transfer: int, primaries: int = BT2020
) -> NDArray[np.float32]:
    """R'G'B' uint16 (H, W, 3), full range -> R'G'B' float32 (H, W, 3) in [0, 1], BT.709 primaries.

    High dynamic range that names no primaries has BT.2020's.
    """
    if primaries == UNKNOWN and transfer in (PQ, HLG):
        primaries = BT2020
    light = _curve(transfer)[rgb]
    if transfer == HLG:  # from the scene's light to the display's
        luma = light @ np.array(LUMA.get(primaries, LUMA[BT709]), np.float32)
        light = PEAK * light * np.power(luma, 0.2)[..., None]
    if transfer in (PQ, HLG):
        brightest = light.max(axis=-1)
        nits, share = _roll_off()
        light = light * np.interp(brightest, nits, share).astype(np.float32)[..., None]
    if primaries in TO_BT709:
        light = light @ np.array(TO_BT709[primaries], np.float32).T
    shown = np.clip(light, 0.0, 1.0)
    signal: NDArray[np.float32] = np.power(shown, 1 / GAMMA)
    return signal


def to_i420(rgb: NDArray[np.float32]) -> NDArray[np.uint8]:
    """R'G'B' in [0, 1] (H, W, 3), H and W even -> uint8 (3H/2, W): I420, full range, BT.601."""
    h, w, _ = rgb.shape
    y = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    planes = [y * 255]
    for channel, span in ((2, 1.772), (0, 1.402)):
        fine = (rgb[..., channel] - y) / span * 255 + 128
        planes.append(fine.reshape(h // 2, 2, w // 2, 2).mean(axis=(1, 3)))
    flat = np.concatenate([p.ravel() for p in planes]).reshape(h * 3 // 2, w)
    whole: NDArray[np.uint8] = np.clip(np.rint(flat), 0, 255).astype(np.uint8)
    return whole


def pq_light(signal: Light) -> Light:
    """BT.2100's PQ: signal in [0, 1] -> cd/m2."""
    power = np.power(np.maximum(signal, 0), 1 / M2)
    return 1e4 * np.power(np.maximum(power - C1, 0) / (C2 - C3 * power), 1 / M1)


def pq_signal(light: Light) -> Light:
    """The inverse of ``pq_light``."""
    power = np.power(np.maximum(light, 0) / 1e4, M1)
    return np.power((C1 + C2 * power) / (1 + C3 * power), M2)


def roll_off(light: Light) -> Light:
    """BT.2390 Annex 5: light of up to PEAK cd/m2 -> light of up to WHITE; unchanged below the knee."""
    top = pq_signal(np.asarray(PEAK))
    e = np.minimum(pq_signal(light) / top, 1.0)
    most = pq_signal(np.asarray(WHITE)) / top
    knee = 1.5 * most - 0.5
    t = np.maximum(e - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * most
    )
    return pq_light(np.where(e < knee, e, spline) * top)


@cache
def _curve(transfer: int) -> NDArray[np.float32]:
    """Light for each of 65536 signal values: cd/m2 for PQ, the scene's for HLG, WHITE = 1 for all others."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        return pq_light(signal).astype(np.float32)
    if transfer == HLG:
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - C) / A) + B) / 12)
        return scene.astype(np.float32)
    return (signal**GAMMA).astype(np.float32)


@cache
def _roll_off() -> tuple[Light, Light]:
    """Points of light in cd/m2, and the factor that brings each to [0, 1]."""
    nits = np.concatenate([[1e-4], np.geomspace(1e-2, 1e4, 2000)])
    return nits, roll_off(nits) / nits / WHITE
