"""Training for one or two evaluations: the fair energy score, the trained sampler, consistency of
steps, roll-outs, what is refused."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_levers import K, perturbed, random_batch, small_config

import configs
import interpolants
import models
import solvers
import train
from batches.batch import Later
from batches.latents import LatentTriples
from evaluation import metrics
from forecaster import Forecaster
from forecaster import load as load_forecaster
from objectives import energy, shortcut
from runtime import checkpoints, resume
from runtime.console import UserError
from runtime.process import Process
from shards import write_packed

CPU = torch.device("cpu")
PROCESS = Process(0, 1, CPU)


def trained_config(**changes) -> configs.Config:
    """The small config of test_levers with another objective, energy by default, and the settings
    of the sampler that it trains."""
    values = {"flow.objective": "energy"} | changes
    flow = {name[5:]: value for name, value in values.items() if name.startswith("flow.")}
    return small_config(**values | configs.trained_sampler(configs.Flow(**flow)))


# -------------------------------------------------------------------- scores
def test_the_scores_are_those_of_the_metrics():
    x = torch.randn(3, 4, 2, 8, 8, dtype=torch.float64)
    y = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    # The metrics take pixels (V, S, T, H, W, C).
    samples = x.movedim(2, -1)[:, :, None].numpy()
    truth = y.movedim(1, -1)[:, None].numpy()
    found = energy.fair_energy(energy.whole(x), energy.whole(y))
    assert np.allclose(found, metrics.energy(samples, truth)[:, 0])
    found = energy.fair_energy(energy.values(x), energy.values(y))
    assert np.allclose(found, metrics.crps(samples, truth)[:, 0])
    corner = metrics.energy(samples[..., :4, 4:, :], truth[..., :4, 4:, :])[:, 0]
    parts = energy.patches(x)[:, :, 1:2], energy.patches(y)[:, 1:2]
    assert energy.patches(x).shape == (3, 4, 4, 2 * 16)
    assert np.allclose(energy.fair_energy(*parts), corner)
    assert energy.patches(y[..., :3, :]).shape == (3, 2, 2 * 9)


def test_the_loss_adds_the_scores_of_patches_and_values():
    x, y = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 4, 8, 8)
    found = energy.score(x, y, 0.5)
    parts = [energy.fair_energy(part(x), part(y)) for part in (energy.patches, energy.values)]
    whole = found["distance"] - found["spread"] / 2
    assert torch.allclose(found["loss"], whole + 0.5 * (parts[0] + parts[1]))
    assert torch.equal(energy.score(x, y, 0.0)["loss"], whole)


def test_the_gradient_of_equal_members_is_finite_and_pulls_to_the_truth():
    y = torch.zeros(1, 1, 4)
    x = torch.ones(1, 2, 1, 4, requires_grad=True)
    energy.fair_energy(x, y).sum().backward()
    assert x.grad.isfinite().all() and (x.grad > 0).all()
    same = torch.zeros(1, 2, 1, 4, requires_grad=True)
    energy.fair_energy(same, y).sum().backward()
    assert (same.grad == 0).all()


def test_the_gradient_is_unbiased_in_the_number_of_members():
    """The mean gradient over 10,000 draws with 2 members is that with 8, within 3 standard
    errors."""
    n, D = 10_000, 3
    torch.manual_seed(0)

    def gradients(M: int) -> torch.Tensor:
        """(n, 2 D): the gradients with respect to mean and scale of the members."""
        theta = torch.cat([torch.full((n, D), 0.3), torch.full((n, D), 0.6)], 1).double()
        theta.requires_grad_()
        mean, scale = theta[:, None, None].split(D, -1)
        x = mean + scale * torch.randn(n, M, 1, D, dtype=torch.float64)
        y = torch.randn(n, 1, D, dtype=torch.float64)
        (found,) = torch.autograd.grad(energy.fair_energy(x, y).sum(), theta)
        return found

    few, many = gradients(2), gradients(8)
    error = ((few.var(0) + many.var(0)) / n).sqrt()
    assert ((few.mean(0) - many.mean(0)).abs() < 3 * error).all()
    # The scale is too small, which the gradient corrects in every coordinate.
    assert (many.mean(0)[D:] < -3 * error[D:]).all()


# -------------------------------------------------------------------- a Gaussian
class LinearNet(torch.nn.Module):
    """output = a z + b x_0 + c for latents of one value."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.1, 0.0, 0.0]))

    def forward(self, z, s, reference, contexts, gaps):
        m = len(z) // len(reference)
        a, b, c = self.weights
        return a * z + b * reference.repeat_interleave(m, 0) + c


@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("interpolant", ["follmer", "linear", "bridge"])
def test_a_tuned_linear_network_samples_the_mean_and_variance_of_a_gaussian(
    interpolant, evaluations
):
    """x_1 = 0.5 x_0 + 0.8 + 0.4 eps, given x_0."""
    changes = {"flow.interpolant": interpolant, "flow.evaluations": evaluations}
    config = trained_config(**changes, **{"train.batch_size": 2048})
    latent = configs.Latent((1, 1, 1), (0.0,), (1.0,), 0.9, 0.9)
    config = dataclasses.replace(config, latent=latent)
    net = LinearNet()
    forecaster = Forecaster(config, net, None, CPU)
    updates = 400
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 0.05, (0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    def draw(B: int):
        x0 = torch.randn(B, 1, 1, 1)
        x1 = 0.5 * x0 + 0.8 + 0.4 * torch.randn_like(x0)
        return train.Batch(x1, x0, x0[:, None], torch.ones(B, 1))

    for step in range(updates):
        eps = energy.draw_members(config, (1, 1, 1), step, CPU, slice(None))
        loss = energy.member_losses(net, forecaster, draw(2048), eps, None, None)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        batch = draw(20)
        x = energy.sample_members(net, forecaster, batch, torch.randn(200_000, 1, 1, 1))
    x = x.view(20, -1)
    assert (x.mean(1) - (0.5 * batch.reference.flatten() + 0.8)).abs().max() < 0.02 * 0.8
    assert abs(x.var(1).mean() / 0.4**2 - 1) < 0.02


# -------------------------------------------------------------------- the trained sampler
@pytest.mark.parametrize("evaluations", [1, 2])
@pytest.mark.parametrize("interpolant", interpolants.TABLE)
@pytest.mark.parametrize("name", ["trunk", "convnet"])
def test_training_samples_as_the_forecaster_does(interpolant, evaluations, name):
    changes = {"flow.interpolant": interpolant, "flow.evaluations": evaluations}
    config = trained_config(**changes, **{"model.name": name})
    torch.manual_seed(0)
    net = perturbed(models.build(name, (4, 8, 8), **config.network_sizes)).eval()
    forecaster = Forecaster(config, net, None, CPU)
    batch, eps = random_batch(3), torch.randn(6, 4, 8, 8)
    x = energy.sample_members(net, forecaster, batch, eps)
    given = [part.repeat_interleave(2, 0) for part in (batch.contexts, batch.gaps)]
    x0 = batch.reference.repeat_interleave(2, 0)
    with torch.no_grad():
        same = forecaster.sample_frame(x0, lambda: given, lambda like: eps)
    assert torch.allclose(x, same, atol=1e-5)
    assert forecaster.evaluations == 6 * evaluations
    # Every path has noise.
    assert (x[::2] - x[1::2]).abs().mean() > 1e-4


def test_a_trunk_reads_the_given_frames_once_for_all_members_and_evaluations(monkeypatch):
    config = trained_config(**{"flow.members": 3, "flow.evaluations": 2})
    net = models.build("trunk", (4, 8, 8), **config.network_sizes)
    calls = []
    encode = net.encode

    def count(*given):
        calls.append(len(given[0]))
        return encode(*given)

    monkeypatch.setattr(net, "encode", count)
    eps = energy.draw_members(config, (4, 8, 8), 0, CPU, slice(0, 8))
    forecaster = Forecaster(config, net, None, CPU)
    energy.member_losses(net, forecaster, random_batch(8), eps, None, None)
    assert calls == [8]


# -------------------------------------------------------------------- updates
@pytest.fixture
def latents(tmp_path):
    z = np.random.default_rng(0).standard_normal((120, 4, 8, 8)).astype(np.float16)
    attributes = {"continues": False, "fps": 5.0}
    write_packed(tmp_path / "shard_0001.hdf5", "latents", z, np.full(2, 60), attributes)
    return tmp_path


OBJECTIVES = [
    {"flow.objective": "energy"},
    {"flow.objective": "energy", "flow.evaluations": 2, "flow.members": 3, "flow.local": 0.5},
    {"flow.objective": "energy", "flow.unroll": 3, "data.context": "last"},
    {"flow.objective": "energy", "flow.interpolant": "linear", "flow.noise": 0.2},
    {"flow.objective": "shortcut"},
    {"flow.objective": "shortcut", "flow.interpolant": "bridge", "model.name": "convnet"},
]


@pytest.mark.parametrize("changes", OBJECTIVES, ids=str)
def test_updates_are_finite_change_every_weight_and_leave_out_a_bad_batch(latents, changes):
    config = trained_config(**changes, **{"train.own": 2, "train.accumulate": 2})
    learner = train.build_learner(config, PROCESS)
    perturbed(learner.net)
    before = {name: value.clone() for name, value in learner.weights.items()}
    source = LatentTriples(config, latents, CPU)
    forecaster = Forecaster(config, learner.net, None, CPU)

    def make(step: int, batch) -> dict:
        later = source.later(step) if train.train_unrolled(config) else None
        given = (step, PROCESS, source.earlier(step), later)
        return train.update(learner, forecaster, batch, *given)

    for step in range(3):
        scalars = make(step, source.batch(step))
    assert all(scalar.isfinite() for scalar in scalars.values())
    assert not [name for name, value in before.items() if torch.equal(value, learner.weights[name])]
    weights = {name: value.clone() for name, value in learner.weights.items()}
    bad = source.batch(3)
    bad.target.fill_(float("inf"))
    assert not make(3, bad)["grad_norm"].isfinite()
    assert all(torch.equal(value, learner.weights[name]) for name, value in weights.items())


def test_members_of_new_weights_are_equal_and_training_separates_them(latents):
    """New weights give x_0, whatever the noise. The latents are white noise, so the spread of a
    calibrated forecast is the distance of two independent frames, the square root of 2."""
    changes = {"train.optimizer": "adamw", "train.lr": 3e-3, "train.warmup": 0, "flow.members": 4}
    config = trained_config(**changes)
    learner = train.build_learner(config, PROCESS)
    source = LatentTriples(config, latents, CPU)
    forecaster = Forecaster(config, learner.net, None, CPU)
    spread = []
    for step in range(40):
        scalars = train.update(learner, forecaster, source.batch(step), step, PROCESS)
        spread.append(scalars["spread"].item())
    assert spread[0] == 0 and spread[-1] > 0.3


@pytest.mark.parametrize("changes", OBJECTIVES, ids=str)
def test_two_processes_compute_what_one_does(latents, changes):
    config = trained_config(**changes, **{"flow.consistency": 3})
    torch.manual_seed(0)
    net = perturbed(train.build_net(config, CPU)).eval()
    forecaster = Forecaster(config, net, None, CPU)

    def values(rank: int, world: int) -> dict:
        own = slice(8 * rank // world, 8 * (rank + 1) // world)
        source = LatentTriples(config, latents, CPU, rank, world)
        batch = source.batch(4)
        level = None
        if config.flow.noise:
            batch, level = train.add_noise(config, batch, 4, CPU, own)
        draws = train.draw_all(config, batch.target, 4, CPU, own)
        later = source.later(4)
        given = (net, forecaster, batch, draws, level, later, own.start)
        return train.compute_gradient(*given)

    one, two = values(0, 1), [values(rank, 2) for rank in range(2)]
    for name, value in one.items():
        both = torch.cat([part[name] for part in two])
        assert torch.allclose(value, both, rtol=1e-4, atol=1e-5), name
        assert len(value) == 8


def test_frames_after_the_targets_stop_at_the_end_of_the_video(latents):
    changes = {"flow.unroll": 3, "data.context": "last", "data.clip": 60, "train.batch_size": 64}
    config = trained_config(**changes)
    source = LatentTriples(config, latents, CPU)
    videos = [torch.from_numpy(source.shards.read(v, np.arange(60))).float() for v in range(2)]
    ended = 0
    for batch in range(4):
        at, later = source.frames(batch), source.later(batch)
        for k, (v, target) in enumerate(zip(at.video, at.target)):
            for n, frame in enumerate((target + 1, target + 2)):
                assert later.valid[k, n] == (frame < 60)
                assert torch.equal(later.frames[k, n], videos[v][min(frame, 59)])
                ended += frame >= 60
    assert ended


def test_frames_after_the_end_do_not_count():
    config = trained_config(**{"flow.unroll": 2, "data.context": "last"})
    torch.manual_seed(0)
    net = perturbed(train.build_net(config, CPU)).eval()
    forecaster = Forecaster(config, net, None, CPU)
    batch = random_batch(8)
    eps = energy.draw_members(config, (4, 8, 8), 0, CPU, slice(0, 8))
    frames = torch.randn(8, 1, 4, 8, 8)
    valid = torch.zeros(8, 1)
    valid[:4] = 1

    def losses(later):
        return energy.member_losses(net, forecaster, batch, eps, None, later)["loss"]

    found = losses(Later(frames, valid))
    others = losses(Later(frames + 1, valid))
    assert torch.equal(found[4:], others[4:]) and not torch.isclose(found[:4], others[:4]).any()
    single = energy.member_losses(net, forecaster, batch, eps[:, :1], None, None)["loss"]
    assert torch.allclose(found[4:], single[4:])


def test_a_roll_out_in_training_is_that_of_the_forecaster():
    """With one item, and members that are rolled out one by one."""
    config = trained_config(**{"flow.unroll": 3, "data.context": "last"})
    torch.manual_seed(0)
    net = perturbed(train.build_net(config, CPU)).eval()
    forecaster = Forecaster(config, net, None, CPU)
    frames = torch.randn(1, 5, 4, 8, 8)
    contexts, gaps = frames[:, [3, 2, 1]], torch.tensor([[1.0, 2.0, 3.0]])
    batch = train.Batch(frames[:, 4], frames[:, 4], contexts, gaps)
    eps = torch.randn(1, 3, 2, 4, 8, 8)
    seen = []
    score = energy.score

    def keep(x, y, local):
        seen.append(x[0])
        return score(x, y, local)

    later = Later(torch.zeros(1, 2, 4, 8, 8), torch.ones(1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "score", keep)
        energy.member_losses(net, forecaster, batch, eps, None, later)
    for m in range(2):
        noise = iter(eps[0, :, m])

        class Stored(train.Draws):
            def normal(self, like, noise=noise):
                return next(noise)[None]

        future = forecaster.roll_out(frames, 3, Stored(CPU, "key"))
        assert torch.allclose(torch.stack([x[m] for x in seen]), future[0], atol=1e-4)


# -------------------------------------------------------------------- consistency of steps
@pytest.mark.parametrize("name", interpolants.TABLE)
def test_one_step_with_the_weighted_estimates_equals_two_steps(name):
    interpolant = interpolants.get(name, 0.7, "residual", 0.8)
    generator = torch.Generator().manual_seed(0)
    x, x0, a, b = torch.randn(4, 1, 1, 1, 1, generator=generator, dtype=torch.float64)

    def estimates(values):
        values = iter(values)

        def field(x, s):
            base = x0 if interpolant.from_reference else 0
            return (next(values) - base) / interpolant.k

        return field

    for s, m, t in ((0.05, 0.4, 0.7), (0.3, 0.5, 0.9), (0.2, 0.6, 1.0)):
        times = [torch.tensor([u], dtype=torch.float64) for u in (s, m, t)]
        w = shortcut.step_weight(interpolant, *times).view(1, 1, 1, 1)
        # Rounding may exceed the bounds.
        assert -1e-12 <= w <= 1 + 1e-12
        two = solvers.Dynamics(estimates([a, b]), interpolant, x0, "0", None, float_times=True)
        one = solvers.Dynamics(
            estimates([w * a + (1 - w) * b]), interpolant, x0, "0", None, float_times=True
        )
        half = solvers.exact_step(two, x, s, m)
        expected = solvers.exact_step(two, half, m, t)
        assert torch.allclose(solvers.exact_step(one, x, s, t), expected, atol=1e-9)


class StepNet(torch.nn.Module):
    """A small network of (z, s, x_0, step) for latents of one value."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)]
        self.layers = torch.nn.Sequential(*layers, torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, z, s, reference, contexts, gaps, noise=None, step=None):
        step = torch.zeros_like(s) if step is None else step
        inputs = torch.stack([z.flatten(), s, reference.flatten(), step], 1)
        return self.layers(inputs).view_as(z)


def test_one_step_of_a_trained_shortcut_has_the_variance_of_a_gaussian():
    """x_1 = 0.5 x_0 + 0.8 + 0.4 eps. One step of the regression alone gives its mean, almost
    without variance."""
    changes = {"flow.objective": "shortcut", "flow.consistency": 1, "flow.start": 0.0}
    config = trained_config(**changes, **{"train.batch_size": 512, "flow.draws": 1})
    latent = configs.Latent((1, 1, 1), (0.0,), (1.0,), 0.9, 0.9)
    config = dataclasses.replace(config, latent=latent)
    torch.manual_seed(0)
    net = StepNet()
    forecaster = Forecaster(config, net, None, CPU)
    forecaster.ready = True
    updates = 1000
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    def draw(B: int):
        x0 = torch.randn(B, 1, 1, 1)
        x1 = 0.5 * x0 + 0.8 + 0.4 * torch.randn_like(x0)
        return train.Batch(x1, x0, x0[:, None], torch.ones(B, 1))

    for step in range(updates):
        batch = draw(512)
        draws = train.draw_all(config, batch.target, step, CPU, slice(None))
        values = train.objective_values(net, forecaster, batch, draws, None, None, 0)
        optimizer.zero_grad()
        values["loss"].mean().backward()
        optimizer.step()
        schedule.step()
    x0 = torch.linspace(-1, 1, 5).repeat_interleave(4000).view(-1, 1, 1, 1)
    given = (x0[:, None], torch.ones(len(x0), 1))
    mean = 0.5 * x0.view(5, -1)[:, 0] + 0.8

    def sample() -> torch.Tensor:
        with torch.no_grad():
            return forecaster.sample_frame(x0, lambda: given, torch.randn_like).view(5, -1)

    x = sample()
    assert (x.mean(1) - mean).abs().max() < 0.08
    assert 0.8 < x.std(1).mean() / 0.4 < 1.1
    # The same network, as if the step had size 0.
    forecaster.config = configs.update(config, {"flow.objective": "interpolant"})
    assert sample().std(1).mean() / 0.4 < 0.5


def test_steps_are_drawn_on_the_grids_of_all_sizes():
    config = trained_config(**{"flow.objective": "shortcut", "train.batch_size": 4096})
    d, place, eps = shortcut.draw_steps(config, (1, 1, 1), 0, CPU, slice(None))
    sizes, counts = d.unique(return_counts=True)
    assert sizes.tolist() == [1 / 8, 1 / 4, 1 / 2, 1] and counts.min() > 900
    for size in sizes:
        found, counts = place[d == size].unique(return_counts=True)
        assert torch.equal(found, torch.arange(0, 1, size)) and counts.min() > 60
    assert eps.shape == (4096, 1, 1, 1)


def test_the_errors_vanish_where_the_network_is_consistent_and_only_chosen_items_count():
    """A network that gives the same x_1 for all states and step sizes is consistent."""
    config = trained_config(**{"flow.objective": "shortcut", "flow.consistency": 3})
    forecaster = Forecaster(config, None, None, CPU)
    batch = random_batch(8)
    draws = shortcut.draw_steps(config, (4, 8, 8), 0, CPU, slice(0, 8))

    def constant(z, s, reference, contexts, gaps, level=None, step=None):
        return torch.ones_like(z)

    def by_step(z, s, reference, contexts, gaps, level=None, step=None):
        return step.view(-1, 1, 1, 1).expand_as(z)

    given = (forecaster, batch, draws, None)
    assert shortcut.consistency_errors(constant, *given, 0).abs().max() < 1e-9
    for first in (0, 1, 2):
        found = shortcut.consistency_errors(by_step, *given, first)
        chosen = (torch.arange(8) + first) % 3 == 0
        assert (found[~chosen] == 0).all() and (found[chosen] > 0).all()
        # The target is half the step size, or 0 for half the smallest one.
        d = draws[0]
        half = torch.where(d > 1 / 8, d / 2, 0.0)
        s = config.flow.begin + (1 - config.flow.begin) * draws[1]
        expected = forecaster.interpolant.weight(s) * (d - half) ** 2
        assert torch.allclose(found[chosen], expected[chosen], rtol=1e-4)


@pytest.mark.parametrize("name", models.STEP_SIZE)
def test_a_network_with_a_new_step_size_input_gives_the_outputs_of_one_without(name):
    sizes = {"width": 32, "depth": 2, "mid_depth": 1, "heads": 2, "contexts": K}
    torch.manual_seed(0)
    plain = perturbed(models.build(name, (4, 8, 8), **sizes)).eval()
    net = models.build(name, (4, 8, 8), **sizes, step_size=True).eval()
    added = set(net.state_dict()) - set(plain.state_dict())
    assert added == {"step_size.project.weight", "step_size.project.bias"}
    new = {name: net.state_dict()[name] for name in added}
    net.load_state_dict(plain.state_dict() | new)
    batch, z, s = random_batch(2), torch.randn(4, 4, 8, 8), torch.rand(4)
    expected = plain(z, s, *batch[1:])
    assert torch.equal(net(z, s, *batch[1:], None, torch.rand(4)), expected)
    assert torch.equal(net(z, s, *batch[1:]), expected)
    perturbed(net.step_size)
    changed = net(z, s, *batch[1:], None, torch.rand(4))
    assert not torch.allclose(changed, expected, atol=1e-4)
    zero = net(z, s, *batch[1:], None, torch.zeros(4))
    assert torch.equal(net(z, s, *batch[1:]), zero)


def test_the_forecaster_passes_the_step_size():
    config = trained_config(**{"flow.objective": "shortcut", "flow.evaluations": 2})
    seen = []

    def net(z, s, reference, contexts, gaps, noise, step):
        seen.append((s[0].item(), step[0].item()))
        return torch.zeros_like(z)

    for steps in (2, 4):
        config = configs.update(config, {"sample.steps": steps})
        forecaster = Forecaster(config, net, None, CPU)
        forecaster.ready = True
        forecaster.roll_out(torch.randn(2, 5, 4, 8, 8), 1, ("key",))
    first, second = seen[:2], seen[2:]
    assert np.allclose(first, [(0.05, 0.5), (0.525, 0.5)])
    assert np.allclose(second, [(0.05 + 0.2375 * k, 0.25) for k in range(4)])


# -------------------------------------------------------------------- settings
def test_the_sampler_of_a_trained_sampler_is_the_default():
    values = {"flow.objective": "energy", "flow.evaluations": 2}
    sample = configs.build("wmaze", values).sample
    found = (sample.steps, sample.solver, sample.grid, sample.diffusion, sample.warm_start)
    assert found == (2, "exact", "uniform", "0", 0.05)
    assert configs.build("wmaze", values | {"flow.interpolant": "linear"}).sample.warm_start == 0
    assert configs.build("wmaze").sample.steps == 10


ENERGY_1 = {"flow.objective": "energy"}
REFUSED = [
    (ENERGY_1 | {"sample.steps": 5}, "sample.steps must be 1 for flow.objective=energy"),
    (ENERGY_1 | {"sample.solver": "em"}, "sample.solver must be exact for flow.objective=energy"),
    (ENERGY_1 | {"sample.diffusion": "sigma"}, "sample.diffusion must be 0 for"),
    (ENERGY_1 | {"sample.grid": "cosine"}, "sample.grid must be uniform for"),
    (ENERGY_1 | {"sample.warm_start": 0.5}, "sample.warm_start must be 0.05 for"),
    (ENERGY_1 | {"flow.members": 1}, "flow.members must be in [2, 16], got 1"),
    (ENERGY_1 | {"flow.evaluations": 3}, "flow.evaluations must be 1 or 2, got 3"),
    (
        ENERGY_1 | {"flow.unroll": 2, "data.context": "at:1,2,4"},
        "data.context must be last for flow.unroll=2",
    ),
    (ENERGY_1 | {"flow.unroll": 2, "data.hue": 0.1}, "flow.unroll must be 1 for frames that are"),
    ({"flow.objective": "shortcut", "sample.steps": 3}, "sample.steps must be 1, 2, 4 or 8 for"),
    ({"flow.objective": "shortcut", "flow.output": "drift"}, "flow.output must be residual or v"),
    (
        {"flow.objective": "shortcut", "data.mode": "stream", "model.name": "joint"}
        | {"data.condition": 5, "data.contexts": 1},
        "model.name must be convnet or trunk or unet or uvit for flow.objective=shortcut",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_an_objective_cannot_do_is_refused_in_one_line(values, message):
    with pytest.raises(UserError) as caught:
        configs.build("ball_stn", values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def save_checkpoint(path, config, net) -> None:
    autoencoder = {
        "data.flips": "",
        "sample.restore": 0.0,
        "vqvae.kind": "latents",
        "vqvae.downsample": 8,
        "data.image_size": 64,
    }
    config = configs.update(config, autoencoder)
    state = {"ema": net.state_dict(), "config": configs.to_dict(config), "step": 3}
    torch.save(state, path)


def test_sampling_flags_that_were_not_trained_are_refused(tmp_path):
    config = trained_config()
    net = train.build_net(config, CPU)
    save_checkpoint(tmp_path / "latest.pt", config, net)
    forecaster, _ = load_forecaster(tmp_path / "latest.pt", CPU)
    assert forecaster.config.sample.steps == 1
    for change in ({"sample.steps": 4}, {"sample.solver": "heun"}, {"sample.diffusion": "sigma"}):
        with pytest.raises(UserError, match="for flow.objective=energy, as trained, got"):
            load_forecaster(tmp_path / "latest.pt", CPU, change)


def test_a_run_starts_from_the_weights_of_another_objective(tmp_path):
    config = small_config()
    net = train.build_net(config, CPU)
    path = tmp_path / "latest.pt"
    save_checkpoint(path, config, net)
    found = resume.check_start(trained_config(), str(path))["ema"]
    assert found.keys() == net.state_dict().keys()
    target = trained_config(**{"flow.objective": "shortcut"})
    found = resume.check_start(target, str(path))["ema"]
    own = train.build_net(target, CPU)
    checkpoints.load_weights(own, found, path)
    assert (own.step_size.project.weight == 0).all()
    # The other way, the network would lack an input.
    save_checkpoint(path, target, own)
    assert resume.check_start(target, str(path))["ema"].keys() == own.state_dict().keys()
    with pytest.raises(UserError, match="only flow.objective=shortcut uses, not energy"):
        resume.check_start(trained_config(), str(path))


def test_the_start_has_the_stated_error():
    """beta k / gamma at flow.begin is one percent of the noise for follmer with k = c."""
    s = torch.tensor([configs.Flow().begin], dtype=torch.float64)
    follmer = interpolants.get("follmer", 1.0)
    ratio = (follmer.beta(s) / follmer.gamma(s)).item()
    assert ratio == pytest.approx(0.05**1.5 / 0.95) and math.isclose(ratio, 0.0118, rel_tol=0.01)
