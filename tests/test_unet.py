"""The U-Net: its symmetry, its inputs, its settings, and the operations of an update."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import configs
import models
from runtime.console import UserError

TINY = {"width": 16, "depth": 1, "mid_depth": 2, "heads": 2, "multipliers": (1, 2)}


def randomised(shape, **sizes) -> torch.nn.Module:
    """A U-Net in float64 whose weights are all random: at the start some of them are zero."""
    torch.manual_seed(0)
    net = models.build("unet", shape, **{**TINY, **sizes})
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net.double().eval()


def inputs(shape, K: int = 1, B: int = 2) -> list:
    torch.manual_seed(1)
    z, reference = torch.randn(2, B, *shape, dtype=torch.float64)
    contexts = torch.randn(B, K, *shape, dtype=torch.float64)
    s = torch.rand(B, dtype=torch.float64)
    return [z, s, reference, contexts, torch.randint(1, 6, (B, K)).double()]


@pytest.mark.parametrize("patch", [1, 2])
def test_a_circular_shift_of_the_inputs_shifts_the_output(patch):
    shape = (2, 16, 24)
    z, s, reference, contexts, gaps = inputs(shape)
    for padding, equal in (("circular", True), ("zeros", False)):
        net = randomised(shape, padding=padding, patch=patch)
        shift = (net.stride, -2 * net.stride)
        moved = [x.roll(shift, (-2, -1)) for x in (z, reference, contexts)]
        out = net(z, s, reference, contexts, gaps).roll(shift, (-2, -1))
        error = (net(moved[0], s, *moved[1:], gaps) - out).abs().max() / out.abs().max()
        assert (error < 1e-5) == equal, (padding, error)


def test_the_circular_convolution_is_that_of_torch():
    from models.unet import CircularConv

    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    ours, theirs = CircularConv(3, 4), torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("K", [1, 3])
def test_the_output_depends_on_every_input_at_every_point(K):
    shape = (3, 8, 12)
    net = randomised(shape, contexts=K, padding="circular")
    given = inputs(shape, K)
    out = net(*given)
    assert out.shape == (2, *shape)
    last = torch.zeros(K, dtype=torch.float64)
    last[-1] = 1
    steps = (1.0, -0.3, 1.0, last.view(K, 1, 1, 1), last)
    for k, step in enumerate(steps):
        changed = [*given[:k], given[k] + step, *given[k + 1 :]]
        assert not torch.allclose(net(*changed), out, atol=1e-6)
    # Attention carries the change of one pixel to all others.
    z = given[0].clone()
    z[0, 0, 0, 0] += 1
    changed = (net(z, *given[1:]) - out).abs()
    assert (changed[0] > 0).all() and (changed[1] == 0).all()


def test_gradients_reach_all_parameters_and_the_first_output_is_zero():
    shape = (2, 8, 8)
    given = inputs(shape, K=2)
    net = models.build("unet", shape, **TINY, contexts=2, padding="circular").double()
    assert net(*given).abs().max() == 0
    net = randomised(shape, contexts=2, padding="circular")
    net(*given).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert len(net.blocks) == 6


def test_several_draws_share_the_given_frames_and_checkpointing_changes_nothing():
    shape = (2, 8, 8)
    z, s, *rest = inputs(shape)
    net = randomised(shape)
    both = net(torch.cat([z[:1], z[:1] + 1, z[1:], z[1:] + 1]), s.repeat_interleave(2), *rest)
    assert torch.allclose(both[::2], net(z, s, *rest))
    assert torch.allclose(both[1::2], net(z + 1, s, *rest))
    gradients = []
    for net.recompute in (False, True):
        net.zero_grad()
        net(z, s, *rest).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_bf16_and_channels_last_agree_with_float32():
    shape = (2, 16, 16)
    net = randomised(shape, padding="circular").float()
    given = [x.float() for x in inputs(shape)]
    out = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        half = net.to(memory_format=torch.channels_last)(*given)
    assert (half.float() - out).norm() < 0.03 * out.norm()


def test_settings_are_checked_and_reach_the_network():
    config = configs.build("ball_stn", {"model.size": "unet_small", "model.padding": "circular"})
    net = models.build(config.model.name, (1, 16, 24), **config.network_sizes)
    assert net.stride == 8 and net.patch == 2
    for values, message in (
        ({"model.padding": "circular"}, "model.padding must be zeros for trunk, got 'circular'"),
        ({"model.name": "unet", "model.multipliers": "1,0"}, "model.multipliers must be numbers"),
        ({"model.size": "unet", "model.name": "convnet"}, "must be unet for model.size=unet"),
    ):
        with pytest.raises(UserError, match=message):
            configs.build("ball_stn", values)
    with pytest.raises(UserError, match="needs multiples of 8 as height and width, got 12 x 16"):
        models.build("unet", (1, 12, 16), **config.network_sizes)


def test_the_published_size_has_its_widths_and_the_small_one_fits_two_cores():
    found = {}
    for size in ("unet", "unet_small"):
        config = configs.build("ball_stn", {"model.size": size, "data.contexts": 1})
        with torch.device("meta"):
            net = models.build("unet", (1, 64, 64), **config.network_sizes)
            x, s, gaps = torch.zeros(32, 1, 64, 64), torch.zeros(32), torch.ones(32, 1)
            with FlopCounterMode(display=False) as counter:
                net(x, s, x, x[:, None], gaps).sum().backward()
        found[size] = counter.get_total_flops()
    # The small one makes at least 5,000 updates of 32 within 1e15 operations, the budget of
    # benchmarks/navier_stokes.py.
    assert found["unet_small"] < 1e15 / 5_000
    assert found["unet"] > 10 * found["unet_small"]
    widths = [block.conv1.in_channels for block in net.blocks]
    assert widths == [64, 128, 128, 128, 128, 128, 128, 64]
