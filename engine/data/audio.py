"""Sound to log-mel features, by torchaudio."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.core.recipe import Audio

if TYPE_CHECKING:
    from torchaudio.transforms import MelSpectrogram
else:
    try:
        from torchaudio.transforms import MelSpectrogram
    except OSError:
        # Registries carry a CUDA build only, whose shared libraries do not load under a CPU torch. Nothing here
        # needs them: import the pure-torch part without its extension.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        extension = types.ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = extension
        from torchaudio.transforms import MelSpectrogram

FLOOR = 1e-5
LOG_MEAN, LOG_SCALE = -5.0, 4.0
"""Bring log energies of speech-level sound to about zero mean and unit scale."""


class LogMel(nn.Module):
    """Waveform to log-mel features: log(mel energy + 1e-5), shifted and scaled by constants.

    (N, samples) float32 at ``settings.sample_rate`` Hz -> (N, 1, F, mels) float32, F = samples // hop + 1.
    """

    def __init__(self, settings: Audio) -> None:
        super().__init__()
        self.mel = MelSpectrogram(
            sample_rate=settings.sample_rate,
            n_fft=settings.fft_size,
            hop_length=settings.hop,
            n_mels=settings.num_mels,
        )

    def forward(self, wave: Tensor) -> Tensor:
        energy: Tensor = self.mel(wave)
        return ((torch.log(energy + FLOOR) - LOG_MEAN) / LOG_SCALE).transpose(1, 2).unsqueeze(1)
