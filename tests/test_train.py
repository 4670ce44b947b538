"""What the loop is made of; the loop itself is run in test_commands.py."""

import dataclasses

import pytest
import torch

import configs
import train
from forecaster import Forecaster, build_net


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


@pytest.mark.parametrize("name", ["convnet", "uvit"])
def test_the_loss_in_bf16_is_that_of_float32_but_for_its_rounding(name):
    torch.manual_seed(0)
    losses = []
    for precision in ("float32", "bf16"):
        sizes = {
            "model.name": name,
            "model.width": 32,
            "model.heads": 2,
            "train.batch_size": 16,
            "train.precision": precision,
        }
        config = dataclasses.replace(
            configs.build(overrides=sizes), latent=configs.Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4)
        )
        torch.manual_seed(0)
        net = build_net(config, torch.device("cpu"))
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn(weight.shape)
        batch = (
            *torch.randn(3, 16, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
            torch.ones(16),
        )
        forecaster = Forecaster(config, net, None, torch.device("cpu"))
        (part,) = train.flow_batch(forecaster, batch, torch.Generator().manual_seed(2), slice(16))
        losses.append(train.flow_loss(net, forecaster, *part))
    plain, fast = losses
    assert (
        plain.shape == (16,)
        and not torch.equal(plain, fast)
        and torch.allclose(plain, fast, rtol=0.05)
    )
