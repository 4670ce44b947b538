"""What the loop is made of; the loop itself is run in test_commands.py."""

import dataclasses

import pytest
import torch

import configs
import train


@pytest.mark.parametrize("times, deviation", [("uniform", 12**-0.5), ("logit_normal", 0.2083)])
def test_flow_times_have_their_density(times, deviation):
    flow = dataclasses.replace(configs.build().flow, times=times, s_min=0.01)
    s = train.flow_times(flow, 100_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert s.min() >= 0.01 and s.max() <= 0.99
    assert abs(s.mean() - 0.5) < 0.003 and abs(s.std() - deviation) < 0.01


def test_averaged_weights_forget_the_first_ones_soon_and_copy_integers():
    net = torch.nn.BatchNorm1d(1)
    ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
    net.weight.data.fill_(3.0)
    net.num_batches_tracked.fill_(7)
    for step in range(30):
        train.average(ema, net.state_dict(), step, 0.999)
    assert abs(ema["weight"].item() - 3) < 1e-3 and ema["num_batches_tracked"] == 7
    net.weight.data.fill_(0.0)
    train.average(ema, net.state_dict(), 1_000_000, 0.9)
    assert ema["weight"].item() == pytest.approx(2.7, abs=1e-2)
