"""Settings that make forecasts better: draws per item, a draw at s = 0, fixed gaps, the trunk
network, noise on the given frames, training on own forecasts."""

import dataclasses

import numpy as np
import pytest
import torch

import configs
import interpolants
import models
import train
from batches.batch import Batch
from batches.latents import LatentTriples
from batches.windows import draw_gaps, lookback
from forecaster import Forecaster
from runtime.console import UserError
from runtime.muon import orthogonalize
from runtime.process import Process
from shards import write_packed

CPU = torch.device("cpu")
K = 3
NET = {"latent_shape": (4, 8, 8), "width": 32, "depth": 2, "mid_depth": 1, "heads": 2}


def small_config(**changes) -> configs.Config:
    values = {
        "model.name": "trunk",
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 2,
        "data.contexts": K,
        "data.context": "at:1,2,3",
        "sample.redraw": "frame",
        "sample.reencode": False,
        "sample.steps": 3,
        "train.batch_size": 8,
        "train.precision": "float32",
        "flow.draws": 2,
        "flow.start": 2.0,
    }
    config = configs.build(overrides=values | changes)
    latent = configs.Latent((4, 8, 8), (0.0,) * 4, (1.0,) * 4, 1.0, 1.0)
    return dataclasses.replace(config, latent=latent)


def random_batch(B: int) -> Batch:
    x = torch.randn(2, B, 4, 8, 8)
    return Batch(x[0], x[1], torch.randn(B, K, 4, 8, 8), torch.tensor([[1.0, 2.0, 3.0]] * B))


def perturbed(net: torch.nn.Module) -> torch.nn.Module:
    """The network with all weights changed, since some are zero at the start."""
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


# -------------------------------------------------------------------- the network
@pytest.mark.parametrize("name", ["trunk", "convnet", "uvit"])
def test_several_draws_of_an_item_give_what_single_draws_give(name):
    torch.manual_seed(0)
    net = perturbed(models.build(name, **NET, contexts=K)).double().eval()
    batch = [part.double() for part in random_batch(2)]
    z = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    s = torch.rand(6, dtype=torch.float64)
    out = net(z, s, *batch[1:])
    for row in range(6):
        given = [part[row // 3 : row // 3 + 1] for part in batch[1:]]
        alone = net(z[row : row + 1], s[row : row + 1], *given)
        assert torch.allclose(out[row : row + 1], alone, atol=1e-12)


def test_the_trunk_sees_the_level_of_the_noise_and_each_gap():
    torch.manual_seed(0)
    net = perturbed(models.build("trunk", **NET, contexts=K)).eval()
    batch = random_batch(2)
    z, s = torch.randn(2, 4, 8, 8), torch.rand(2)
    given = (batch.reference, batch.contexts)
    out = net(z, s, *given, batch.gaps)
    assert torch.equal(out, net(z, s, *given, batch.gaps, torch.zeros(2)))
    assert not torch.allclose(out, net(z, s, *given, batch.gaps, torch.full((2,), 0.2)))
    assert not torch.allclose(out, net(z, s, *given, batch.gaps.flip(1)))


def test_a_roll_out_reads_the_given_frames_once_for_all_evaluations_of_a_frame(monkeypatch):
    torch.manual_seed(0)
    config = small_config()
    net = perturbed(models.build("trunk", **NET, contexts=K)).eval()
    calls = []
    encode = net.encode

    def count(*given):
        calls.append(len(given[0]))
        return encode(*given)

    monkeypatch.setattr(net, "encode", count)
    forecaster = Forecaster(config, net, None, CPU)
    given = torch.randn(2, 5, 4, 8, 8)
    once = forecaster.roll_out(given, 4, ("key",))
    assert calls == [2] * 4
    step = dataclasses.replace(config.sample, redraw="step")
    forecaster.config = dataclasses.replace(config, sample=step)
    # Fixed gaps draw the same contexts for every evaluation.
    assert torch.allclose(forecaster.roll_out(given, 4, ("key",)), once, atol=1e-5)
    assert len(calls) == 4 + 4 * 3


# -------------------------------------------------------------------- contexts
def test_fixed_gaps_reach_back_no_further_than_the_first_frame():
    gaps = draw_gaps(torch.rand(3, 4), torch.tensor([1, 3, 20]), "at:1,2,4,8")
    assert gaps.tolist() == [[1, 1, 1, 1], [1, 2, 3, 3], [1, 2, 4, 8]]
    assert draw_gaps(torch.rand(2, 1), 5, "at:3").tolist() == [[3], [3]]
    assert draw_gaps(torch.rand(1, 4), 3, "last").tolist() == [[1, 2, 3, 3]]
    assert [lookback(rule, 3) for rule in ("last", "at:2,9,4", "recent:5", "log")] == [3, 9, 5, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.context": "at:1,2"}, "data.context must be 3 gaps"),
        ({"sample.context": "at:1"}, "sample.context must be 3 gaps"),
        ({"flow.noise": 0.1, "model.name": "convnet"}, "model.name must be trunk for flow.noise"),
        ({"sample.noise": 0.1}, "sample.noise must be <= flow.noise = 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        small_config(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sampling_draws_contexts_as_training_does_unless_it_is_set():
    assert small_config().context == "at:1,2,3"
    assert small_config(**{"sample.context": "recent:5"}).context == "recent:5"


# -------------------------------------------------------------------- draws
def test_the_loss_of_an_item_is_the_mean_of_its_draws_and_the_weighted_start():
    flow = configs.Flow(draws=2, start=3.0)
    errors = torch.tensor([1.0, 3.0, 10.0, 2.0, 4.0, 20.0])
    assert train.item_losses(errors, flow).tolist() == [2 + 30, 3 + 60]
    assert train.item_losses(errors, configs.Flow()).tolist() == errors.tolist()


@pytest.mark.parametrize("interpolant", ["follmer", "linear", "bridge"])
def test_the_draw_at_the_start_is_the_one_step_error(interpolant):
    torch.manual_seed(0)
    config = small_config(**{"flow.interpolant": interpolant})
    process = Process(0, 1, CPU)
    learner = train.build_learner(config, process)
    perturbed(learner.net)
    forecaster = Forecaster(config, learner.net, None, CPU)
    batch = random_batch(8)
    s, eps = train.draw_noise(config, batch.target, 0, CPU, slice(0, 8))
    assert (s.view(8, 3)[:, 2] == 0).all() and (s.view(8, 3)[:, :2] > 0).all()
    # Before the update: E[x_1 | x at s = 0], in units of k = 1.
    x0, x1 = batch.reference, batch.target
    start = x0
    if interpolant == "linear":
        start = eps.view(8, 3, 4, 8, 8)[:, 2]
    if interpolant == "bridge":
        start = x0 + forecaster.interpolant.m * eps.view(8, 3, 4, 8, 8)[:, 2]
    field = forecaster.field(x0, lambda: (batch.contexts, batch.gaps))
    mean = forecaster.interpolant.denoise(field(start, 0.0), start, 0.0, x0)
    expected = (mean - x1).square().mean()
    scalars = train.update(learner, forecaster, batch, 0, process)
    assert torch.allclose(scalars["one_step"], expected, rtol=1e-4)


def test_draws_do_not_depend_on_the_number_of_processes():
    config = small_config(**{"flow.noise": 0.3})
    batch = random_batch(8)
    halves = (slice(0, 4), slice(4, 8))
    whole = train.draw_noise(config, batch.target, 5, CPU, slice(0, 8))
    parts = [train.draw_noise(config, batch.target, 5, CPU, own) for own in halves]
    for value, pair in zip(whole, zip(*parts)):
        assert torch.equal(value, torch.cat(pair))
    noisy, level = train.add_noise(config, batch, 5, CPU, slice(0, 8))
    for own in halves:
        part = Batch(*(values[own] for values in batch))
        own_noisy, own_level = train.add_noise(config, part, 5, CPU, own)
        assert torch.equal(own_level, level[own])
        assert torch.equal(own_noisy.contexts, noisy.contexts[own])
    # The noise has the level of its item, on the reference as on the contexts.
    spread = (noisy.reference - batch.reference).std((1, 2, 3))
    assert torch.allclose(spread, level, rtol=0.25)
    assert torch.equal(noisy.target, batch.target) and (level <= 0.3).all()


# -------------------------------------------------------------------- own forecasts
@pytest.fixture
def latents(tmp_path):
    z = np.random.default_rng(0).standard_normal((120, 4, 8, 8)).astype(np.float16)
    attributes = {"continues": False, "fps": 5.0}
    write_packed(tmp_path / "shard_0001.hdf5", "latents", z, np.full(2, 60), attributes)
    return tmp_path


def test_own_forecasts_replace_the_last_given_frames_of_every_nth_item(latents):
    levers = {"train.own": 2, "train.own_steps": 3, "flow.noise": 0.2, "sample.noise": 0.1}
    config = small_config(**levers)
    source = LatentTriples(config, latents, CPU)
    torch.manual_seed(0)
    net = perturbed(models.build("trunk", **NET, contexts=K)).eval()
    forecaster = Forecaster(config, net, None, CPU)
    replaced = set()
    for k in range(12):
        at, batch, earlier = source.frames(k), source.batch(k), source.earlier(k)
        rows = earlier.rows.numpy()
        assert (rows % 2 == 0).all()
        # Seven frames: the reference, and three contexts of the first of three forecasts.
        assert (at.reference[rows] >= 6).all() and earlier.frames.shape[1] == 7
        assert torch.equal(earlier.frames[:, -1], batch.reference[rows])
        items = torch.arange(len(rows))
        places = 6 - batch.gaps[rows, 1].long()
        assert torch.equal(earlier.frames[items, places], batch.contexts[rows, 1])

        own = train.replace_given(net, forecaster, batch, earlier, k, slice(0, 8))
        kept = np.setdiff1d(np.arange(8), rows)
        assert torch.equal(own.reference[kept], batch.reference[kept])
        assert torch.equal(own.contexts[kept], batch.contexts[kept])
        assert torch.equal(own.target, batch.target) and not own.reference.requires_grad
        # The reference and the contexts less than n frames before it are forecasts.
        changed = (own.contexts[rows] != batch.contexts[rows]).flatten(2).any(2)
        n = 1 + int(batch.gaps[rows][changed].max().item() if changed.any() else 0)
        assert torch.equal(changed, (batch.gaps[rows] < n))
        assert (own.reference[rows] != batch.reference[rows]).flatten(1).any(1).all()
        replaced.add(n)

        # Two processes forecast what one does.
        for rank, part in enumerate((slice(0, 4), slice(4, 8))):
            half = LatentTriples(config, latents, CPU, rank, 2)
            given = (half.batch(k), half.earlier(k), k, part)
            part_own = train.replace_given(net, forecaster, *given)
            assert torch.allclose(part_own.reference, own.reference[part], atol=1e-5)
            assert torch.allclose(part_own.contexts, own.contexts[part], atol=1e-5)
    assert replaced == {1, 2, 3}


def test_a_batch_without_enough_frames_before_its_items_stays_as_it_is(latents):
    config = small_config(**{"train.own": 1, "train.own_steps": 58})
    source = LatentTriples(config, latents, CPU)
    batch, earlier = source.batch(0), source.earlier(0)
    assert not len(earlier.rows)
    net = models.build("trunk", **NET, contexts=K)
    forecaster = Forecaster(config, net, None, CPU)
    assert train.replace_given(net, forecaster, batch, earlier, 0, slice(0, 8)) is batch


def test_an_update_with_all_levers_is_finite_and_changes_every_weight(latents):
    config = small_config(**{"train.own": 2, "flow.noise": 0.2, "train.accumulate": 2})
    process = Process(0, 1, CPU)
    learner = train.build_learner(config, process)
    before = {name: value.clone() for name, value in learner.weights.items()}
    source = LatentTriples(config, latents, CPU)
    forecaster = Forecaster(config, learner.net, None, CPU)
    for step in range(3):
        given = (source.batch(step), step, process, source.earlier(step))
        scalars = train.update(learner, forecaster, *given)
    assert all(scalar.isfinite() for scalar in scalars.values())
    same = [name for name, value in learner.weights.items() if torch.equal(before[name], value)]
    assert not same


def test_an_interpolant_from_the_reference_starts_at_the_noisy_reference():
    interpolant = interpolants.get("follmer", 1.0, "residual", 1.0, "velocity")
    config = small_config(**{"flow.noise": 0.5})
    batch, level = train.add_noise(config, random_batch(8), 0, CPU, slice(0, 8))
    seen = {}

    def net(z, s, reference, contexts, gaps, noise):
        seen.update(reference=reference, noise=noise)
        return torch.zeros_like(z)

    s = torch.zeros(8)
    error = train.flow_loss(net, interpolant, batch, s, torch.randn_like(batch.target), level)
    # The target is x_1 - x_0 with the noisy x_0, so the network learns to remove the noise.
    expected = (batch.target - batch.reference).square().mean((1, 2, 3))
    assert torch.allclose(error, expected) and torch.equal(seen["reference"], batch.reference)
    assert torch.equal(seen["noise"], level)


# -------------------------------------------------------------------- Muon
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(orthogonalize(g), full_matrices=False)
    # The iteration brings the singular values near 1, not to 1.
    assert (values > 0.6).all() and (values < 1.3).all()
    u0, _, vh0 = torch.linalg.svd(g, full_matrices=False)
    assert (u @ vh - u0 @ vh0).abs().max() < 1e-6


def test_muon_updates_matrices_by_momentum_and_the_rest_by_adamw(latents):
    config = small_config(**{"train.optimizer": "muon", "train.muon_lr": 0.1})
    process = Process(0, 1, CPU)
    learner = train.build_learner(config, process)
    source = LatentTriples(config, latents, CPU)
    forecaster = Forecaster(config, learner.net, None, CPU)
    weight = learner.net.trunk_blocks[0].conv1.weight
    # The second convolution is 0 at first, so the first one has a gradient from update 1 on.
    for step in range(3):
        before = weight.detach().clone()
        train.update(learner, forecaster, source.batch(step), step, process)
    change = (weight.detach() - before).reshape(len(weight), -1)
    values = torch.linalg.svdvals(change)
    lr = learner.optimizer.param_groups[1]["lr"] * 0.1 / config.train.lr
    assert (values > 0.6 * lr).all() and (values < 1.3 * lr).all()
    state = learner.optimizer.state
    assert "momentum_buffer" in state[weight] and "exp_avg" not in state[weight]
    assert {"exp_avg", "exp_avg_sq"} <= set(state[learner.net.conv_in.weight])


def test_a_gradient_that_is_not_finite_changes_nothing_under_muon(latents):
    config = small_config(**{"train.optimizer": "muon"})
    process = Process(0, 1, CPU)
    learner = train.build_learner(config, process)
    forecaster = Forecaster(config, learner.net, None, CPU)
    source = LatentTriples(config, latents, CPU)
    for step in range(2):
        train.update(learner, forecaster, source.batch(step), step, process)
    weights = {name: value.clone() for name, value in learner.weights.items()}
    moments = [state["momentum_buffer"].clone() for state in muon_states(learner)]
    bad = source.batch(2)
    bad.target.fill_(float("nan"))
    train.update(learner, forecaster, bad, 2, process)
    assert all(torch.equal(weights[name], value) for name, value in learner.weights.items())
    after = [state["momentum_buffer"] for state in muon_states(learner)]
    assert all(torch.equal(old, new) for old, new in zip(moments, after)) and moments


def muon_states(learner: train.Learner) -> list[dict]:
    return [state for state in learner.optimizer.state.values() if "momentum_buffer" in state]


def test_muon_resumes_bit_for_bit(latents):
    config = small_config(**{"train.optimizer": "muon"})
    process = Process(0, 1, CPU)
    source = LatentTriples(config, latents, CPU)

    def go_on(learner: train.Learner, first: int, last: int) -> None:
        forecaster = Forecaster(config, learner.net, None, CPU)
        for step in range(first, last):
            train.update(learner, forecaster, source.batch(step), step, process)

    through = train.build_learner(config, process)
    go_on(through, 0, 4)
    half = train.build_learner(config, process)
    go_on(half, 0, 2)
    saved = {name: part.save(2) for name, part in train.learner_parts(half, latents).items()}
    saved = torch.load(write(saved, latents / "state.pt"), weights_only=True)
    again = train.build_learner(config, process)
    for name, part in train.learner_parts(again, latents).items():
        part.load(saved[name])
    go_on(again, 2, 4)
    for name, value in through.weights.items():
        assert torch.equal(value, again.weights[name]), name


def write(state: dict, path):
    torch.save(state, path)
    return path


def test_muon_is_refused_for_sharded_weights():
    with pytest.raises(UserError, match="needs whole matrices"):
        small_config(**{"train.optimizer": "muon", "train.shard": True})
    with pytest.raises(UserError, match="train.own and train.shard cannot be combined"):
        small_config(**{"train.optimizer": "adamw", "train.own": 4, "train.shard": True})
