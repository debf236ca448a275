import numpy as np
import torch

from engine.core.recipe import Audio
from engine.data.audio import FLOOR, LOG_MEAN, LOG_SCALE, LogMel


def mel_by_hand(wave: np.ndarray, settings: Audio) -> np.ndarray:
    """Log-mel in float64 from the definition: Hann window, power spectrum, HTK triangles."""
    n, hop, rate = settings.fft_size, settings.hop, settings.sample_rate
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)
    padded = np.pad(wave.astype(np.float64), n // 2, mode="reflect")
    frames = np.stack([padded[i : i + n] for i in range(0, len(wave) + 1, hop)])
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, settings.num_mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, n // 2 + 1)
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(up, down))
    return (np.log(power @ triangles + FLOOR) - LOG_MEAN) / LOG_SCALE


def test_log_mel_follows_its_definition() -> None:
    settings = Audio()
    time = np.arange(8000) / settings.sample_rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * np.random.default_rng(0).standard_normal(
        8000
    )
    features = LogMel(settings)(torch.from_numpy(wave).float()[None])
    assert features.shape == (1, 1, 8000 // settings.hop + 1, settings.num_mels)
    np.testing.assert_allclose(features[0, 0].numpy(), mel_by_hand(wave, settings), atol=2e-3)


def test_silence_is_finite_and_low() -> None:
    features = LogMel(Audio())(torch.zeros(1, 4000))
    assert torch.isfinite(features).all()
    assert (features < -1.5).all()
