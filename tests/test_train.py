"""The parts of the training loop. test_commands.py runs the loop itself."""

import dataclasses

import numpy as np
import pytest
import torch

import configs
import interpolants
import train
from batches.batch import Batch
from batches.latents import LatentTriples
from forecaster import Forecaster, build_net, make_interpolant
from runtime import logs
from runtime.process import Process, autocast
from shards import write_packed

CPU = torch.device("cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        train.update_ema(ema, net.state_dict(), step, 0.999)
    assert abs(ema["weight"].item() - 3) < 1e-3 and ema["num_batches_tracked"] == 7
    net.weight.data.fill_(0.0)
    train.update_ema(ema, net.state_dict(), 1_000_000, 0.9)
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
            "data.contexts": 1,
            "data.context": "recent:3",
        }
        config = dataclasses.replace(
            configs.build(overrides=sizes), latent=configs.Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4)
        )
        torch.manual_seed(0)
        net = build_net(config, torch.device("cpu"))
        for weight in net.parameters():
            weight.data += 0.05 * torch.randn(weight.shape)
        x1, x0, context, eps = torch.randn(4, 16, 4, 8, 8, generator=seeded(1))
        batch = Batch(x1, x0, context[:, None], torch.ones(16, 1))
        s = torch.rand(16, generator=seeded(2))
        with autocast(precision, CPU):
            losses.append(train.flow_loss(net, make_interpolant(config), batch, s, eps))
    plain, fast = losses
    assert plain.shape == (16,) and not torch.equal(plain, fast)
    assert torch.allclose(plain, fast, rtol=0.05)


def test_the_loss_is_the_squared_error_of_the_drift():
    """Equation 11 of arXiv 2403.13724 in float64, with the published Föllmer interpolant."""

    class Reference(torch.nn.Module):
        def forward(self, z, s, reference, contexts, gaps):
            return z + reference + contexts.sum(1) + gaps.sum(1)[:, None, None, None]

    x1, x0, a, b, eps = torch.randn(5, 3, 4, 2, 2, dtype=torch.float64, generator=seeded(0))
    s = torch.rand(3, dtype=torch.float64, generator=seeded(1))
    gaps = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    batch = Batch(x1, x0, torch.stack([a, b], 1), gaps)
    found = train.flow_loss(Reference(), interpolants.get("follmer", c=0.3), batch, s, eps)
    for k, t in enumerate(s):
        w = t.sqrt() * eps[k]
        x = (1 - t) * x0[k] + t**2 * x1[k] + 0.3 * (1 - t) * w
        drift = -x0[k] + 2 * t * x1[k] - 0.3 * w
        error = x + x0[k] + a[k] + b[k] + gaps[k].sum() - drift
        assert torch.allclose(found[k], error.square().mean(), rtol=1e-6)


def test_a_batch_is_normalised_and_split_but_for_its_gaps():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    batch = Batch(x, x + 1, torch.stack([x, x + 2], 1), torch.full((4, 2), 5.0))
    mean, std = torch.ones(2, 1, 1), torch.full((2, 1, 1), 2.0)
    normal = batch.normalize(mean, std)
    assert torch.equal(normal.contexts[:, 1], (x + 1) / 2) and (normal.gaps == 5).all()
    parts = normal.to(CPU).chunk(2)
    assert [part.contexts.shape for part in parts] == [(2, 2, 2, 3, 3)] * 2
    assert all(torch.equal(torch.cat(pair), whole) for *pair, whole in zip(*parts, normal))


def test_logged_scalars_survive_a_checkpoint_and_old_checkpoints_load():
    recent = logs.Recent(batch_size=4)
    for value, norm in ((1.0, 2.0), (3.0, float("nan")), (5.0, 4.0)):
        recent.add({"loss": torch.tensor(value), "grad_norm": torch.tensor(norm)})
    wanted = recent.state_dict()
    again = logs.Recent(batch_size=4)
    again.load_state_dict(wanted, CPU, ())
    old = logs.Recent(batch_size=4)
    pairs = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, float("nan")]), torch.tensor([5.0, 4.0])]
    state = {"pairs": pairs, "counted": 0, "bad": 0, "bad_in_a_row": 0}
    old.load_state_dict(state, CPU, ["loss", "grad_norm", "loss_live"])
    for restored in (recent, again, old):
        restored.add(
            {"loss": torch.tensor(6.0), "grad_norm": torch.tensor(1.0), "new": torch.tensor(8.0)}
        )
        values = restored.summary()
        assert values["loss"] == 4 and values["bad_steps"] == 1 and values["new"] == 8
        assert values["grad_norm"] == pytest.approx(7 / 3)


@pytest.mark.parametrize("name", ["convnet", "uvit"])
def test_several_contexts_go_through_an_update_and_a_roll_out(name, tmp_path):
    K = 3
    sizes = {"model.name": name, "model.width": 32, "model.heads": 2, "model.depth": 1}
    own = {"train.batch_size": 4, "train.precision": "float32", "train.accumulate": 2}
    sampling = {"sample.steps": 2, "sample.reencode": False}
    config = configs.build(overrides={**sizes, **own, **sampling})
    object.__setattr__(config.data, "contexts", K)
    latent = configs.Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4, 1.0, 1.0)
    config = dataclasses.replace(config, latent=latent)
    z = np.random.default_rng(0).standard_normal((60, 4, 8, 8)).astype(np.float16)
    attributes = {"continues": False, "fps": 5.0}
    write_packed(tmp_path / "shard_0001.hdf5", "latents", z, np.full(2, 30), attributes)

    batch = LatentTriples(config, tmp_path, CPU).batch(0)
    assert batch.contexts.shape == (4, K, 4, 8, 8) and batch.gaps.shape == (4, K)
    process = Process(0, 1, CPU)
    learner = train.build_learner(config, process)
    forecaster = Forecaster(config, learner.net, None, CPU)
    scalars = train.update(learner, forecaster, batch, 0, process)
    assert all(scalar.isfinite() for scalar in scalars.values())
    given = batch.contexts[:2]
    assert forecaster.roll_out(given, 2, ("key",)).shape == (2, 2, 4, 8, 8)
