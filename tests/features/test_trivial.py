"""Features that take no learning, against numpy."""

from __future__ import annotations

import numpy as np
import torch

from engine.features.trivial import TRIVIAL, FrameDifferences, MeanFrame


def test_pictures_and_changes_are_cell_means() -> None:
    x = torch.randn(2, 3, 5, 12, 12, generator=torch.Generator().manual_seed(0))
    cells = x.double().numpy().reshape(2, 3, 5, 6, 2, 6, 2).mean((4, 6))
    np.testing.assert_allclose(MeanFrame()(x), cells.mean(2).reshape(2, -1), atol=1e-6)
    change = np.abs(np.diff(x.double().numpy(), axis=2)).mean((1, 2))
    expected = change.reshape(2, 6, 2, 6, 2).mean((2, 4)).reshape(2, -1)
    np.testing.assert_allclose(FrameDifferences()(x), expected, atol=1e-6)


def test_a_still_clip_has_no_differences_and_one_that_moves_has_no_other_mean() -> None:
    still = torch.randn(1, 3, 1, 12, 12).expand(1, 3, 6, 12, 12)
    assert not FrameDifferences()(still).any()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moving = torch.randn(1, 3, 6, 12, 12)
    torch.testing.assert_close(MeanFrame()(moving), MeanFrame()(moving[:, :, order]))
    assert set(TRIVIAL) == {"mean frame", "frame differences"}
