import torch
from torch import nn

from engine.train.ema import RunningAverage


def test_the_average_is_the_recursion_by_hand() -> None:
    network = nn.BatchNorm1d(1)
    average = RunningAverage(network, 0.5)
    expected = 1.0
    for step in range(30):
        with torch.no_grad():
            network.weight.fill_(float(step))
        network.running_mean.fill_(float(step))
        network.num_batches_tracked.fill_(step)
        average.update(network, step=step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        torch.testing.assert_close(average.tensors["weight"].item(), expected, rtol=1e-5, atol=1e-5)
        assert average.tensors["num_batches_tracked"] == step
    assert 27.9 < average.tensors["running_mean"] < 29
    assert network.weight.item() == 29.0
