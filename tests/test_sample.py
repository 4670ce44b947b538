"""Solvers on a Gaussian whose exact network output is known, the roll-out, and the scores."""

import itertools

import numpy as np
import pytest
import torch

import configs
import interpolants
import sample
from console import UserError
from interpolants import across

MEAN, DEVIATION, REFERENCE, N = 1.3, 0.5, -0.4, 20_000
PROCESSES = list(itertools.product(interpolants.TABLE, ("drift", "residual"), ("0", "sigma", "0.5", "follmer")))


def exact_output(it, x, s, x0):
    """E[target | x_s = x] for x_1 ~ N(MEAN, DEVIATION^2): the regression of (x_1, W) on x_s, put into the target."""
    beta, gamma = it.beta(s), it.gamma(s)
    variance = (beta * DEVIATION) ** 2 + gamma**2
    surprise = x - across(it.alpha(s), x) * x0 - across(beta, x) * MEAN
    gain = lambda covariance: across(interpolants.divide(covariance, variance, 0.0), x)  # noqa: E731
    x1 = MEAN + gain(beta * DEVIATION**2) * surprise
    eps = gain(gamma) * surprise
    if it.output == "residual":
        return (x1 - (x0 if it.from_reference else 0)) / it.k
    w = across(s.sqrt(), x) * eps if it.wiener else eps
    return across(it.d_alpha(s), x) * x0 + across(it.d_beta(s), x) * x1 + across(it.d_sigma(s), x) * w


def sample_gaussian(it, steps, solver, diffusion, n=N):
    x0 = torch.full((n, 1), REFERENCE, dtype=torch.float64)
    x = sample.integrate(lambda x, s: exact_output(it, x, s, x0), it, x0, steps, solver, diffusion,
                         torch.Generator().manual_seed(1))
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("name, output, diffusion", PROCESSES)
def test_exact_solver_reaches_the_gaussian(name, output, diffusion):
    mean, deviation = sample_gaussian(interpolants.get(name, c=1.0, output=output, k=0.8), 400, "exact", diffusion)
    assert abs(mean / MEAN - 1) < 0.02 and abs(deviation / DEVIATION - 1) < 0.02


def test_exact_solver_is_first_order():
    """No bias in the mean here; that of the deviation halves with the step."""
    errors = [abs(sample_gaussian(interpolants.get("linear"), n, "exact", "0", 100_000)[1] - DEVIATION) for n in (5, 10, 20)]
    assert 1.6 < errors[0] / errors[1] < 2.6 and 1.6 < errors[1] / errors[2] < 2.6


@pytest.mark.parametrize("name, solver, diffusion", [("linear", "euler", "0"), ("linear", "em", "0.5"),
                                                     ("follmer", "em", "sigma"), ("follmer", "em", "follmer")])
def test_plain_solvers_reach_the_gaussian(name, solver, diffusion):
    mean, deviation = sample_gaussian(interpolants.get(name, c=1.0), 200, solver, diffusion)
    assert abs(mean / MEAN - 1) < 0.02 and abs(deviation / DEVIATION - 1) < 0.03


def steps_to_a_known_end(output, steps, solver) -> float:
    """x(1) by a solver for a network that knows x_1 = 2, with hardly any noise, from x_0 = 0."""
    it, x1 = interpolants.get("follmer", c=1e-6, output=output, k=0.5), torch.tensor([[2.0]], dtype=torch.float64)
    answer = (lambda x, s: x1 / 0.5) if output == "residual" else (lambda x, s: 2 * across(s, x) * x1)
    return sample.integrate(answer, it, torch.zeros_like(x1), steps, solver, "sigma", torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_exact_solver_does_not_fade_the_picture_as_euler_does(steps):
    assert steps_to_a_known_end("residual", steps, "exact") == pytest.approx(2.0, abs=1e-4)
    assert steps_to_a_known_end("drift", steps, "em") == pytest.approx(2 * (1 - 1 / steps), abs=1e-4)
    if steps > 2:  # as published, the output at s = 0 says nothing of x_1, which costs the first step
        assert 2 - steps_to_a_known_end("drift", steps, "exact") < 0.4 * (2 / steps)


def test_steps_cover_the_unit_interval_exactly():
    seen = []
    x0 = torch.zeros(2, 3)
    sample.integrate(lambda x, s: seen.append(s.tolist()) or torch.zeros_like(x), interpolants.get("linear"), x0, 4, "exact")
    assert seen == [[k / 4] * 2 for k in range(4)]


@pytest.mark.parametrize("solver, diffusion", [("rk5", "0"), ("euler", "sigma")])
def test_impossible_combinations_are_named(solver, diffusion):
    with pytest.raises(ValueError, match=solver):
        sample.integrate(lambda x, s: x, interpolants.get("linear"), torch.zeros(1, 1), 2, solver, diffusion)


def test_an_infinite_diffusion_is_named():
    with pytest.raises(ValueError, match="infinite at s = 0; take solver exact"):
        sample.integrate(lambda x, s: x, interpolants.get("linear"), torch.zeros(1, 1), 2, "em", "follmer")


class NextIsContext(torch.nn.Module):
    """Answers with a known residual and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, s, reference, context, gap):
        self.calls.append((s[0].item(), reference.clone(), context.clone(), gap.clone()))
        return torch.ones_like(z)


class Grey(torch.nn.Module):
    def encode(self, x):
        return torch.nn.functional.avg_pool2d(x[:, :1], 4)

    def decode(self, z):
        return torch.nn.functional.interpolate(z, scale_factor=4).expand(-1, 3, -1, -1)


def forecaster(**values) -> sample.Forecaster:
    config = configs.build(overrides={"sample.steps": 2, **values})
    latent = configs.Latent(shape=(1, 2, 2), mean=(0.1,), std=(0.5,), delta=0.2)
    return sample.Forecaster(configs.dataclasses.replace(config, latent=latent), NextIsContext(), Grey(), torch.device("cpu"))


def test_roll_out_gives_each_frame_its_reference_and_a_near_context():
    model = forecaster()
    given = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(2, 4, 1, 2, 2)
    future = model.roll_out(given, 3, ("key",))
    # x_1 = x_0 + k F with k = 0.2 and F = 1: every frame is the last plus 0.2
    assert torch.allclose(future[:, :, 0, 0, 0], torch.tensor([3.2, 3.4, 3.6]).expand(2, 3), atol=1e-5)
    history = torch.cat([given, future], 1)
    assert len(model.net.calls) == 6
    for call, (s, reference, context, gap) in enumerate(model.net.calls):
        t = 4 + call // 2
        assert s == [0, 0.5][call % 2] and torch.equal(reference, history[:, t - 1])
        for b in range(2):
            assert 1 <= gap[b] <= 3 and torch.equal(context[b], history[b, t - 1 - int(gap[b])])


@pytest.mark.parametrize("reencode, wanted", [(True, [3.3, 3.55, 3.8]), (False, [3.2, 3.4, 3.6])])
def test_forecasts_go_through_pixels_before_they_are_forecast_from(reencode, wanted):
    model = forecaster(**{"sample.reencode": reencode})
    exact, model.autoencoder.decode = model.autoencoder.decode, lambda z: exact((z * 8).round() / 8)
    future = model.roll_out(torch.full((2, 4, 1, 2, 2), 3.0), 3, ("key",))
    assert torch.allclose(future[:, :, 0, 0, 0], torch.tensor(wanted).expand(2, 3), atol=1e-5)


@pytest.mark.parametrize("redraw, differ", [("step", True), ("frame", False)])
def test_context_is_redrawn_per_step_or_per_frame(redraw, differ):
    model = forecaster(**{"sample.redraw": redraw, "sample.context": "uniform"})
    model.roll_out(torch.randn(16, 12, 1, 2, 2), 1, ("key",))
    (_, _, _, first), (_, _, _, second) = model.net.calls
    assert (not torch.equal(first, second)) == differ


def test_one_given_frame_is_its_own_context():
    model = forecaster()
    model.roll_out(torch.full((1, 1, 1, 2, 2), 7.0), 1, ("key",))
    assert all((context == 7).all() and gap == 1 for _, _, context, gap in model.net.calls)


def test_forecast_from_pixels_to_pixels_is_seeded():
    model = forecaster()
    frames = np.full((2, 4, 8, 8, 3), 100, np.uint8)
    frames[1] += 50
    out = model.forecast(frames, 2, 3, ("key",), quiet=True)
    assert out.shape == (2, 3, 2, 8, 8, 3) and out.dtype == np.uint8
    step = 0.2 * 0.5 * 127.5  # k F in latents, times their deviation, in grey levels
    assert np.abs(out[0, :, 0].astype(float) - 100 - step).max() <= 1.1
    assert np.abs(out[1, :, 1].astype(float) - 150 - 2 * step).max() <= 1.1


def test_scores_against_baselines():
    truth = np.zeros((2, 3, 4, 4, 3), np.uint8)
    truth[:, 1], truth[:, 2] = 51, 102  # after one given frame: 0.2, then 0.4
    samples = truth[:, None, 1:].repeat(2, 1)
    result = sample.score(truth, samples, np.full((4, 4, 3), 51, np.uint8))
    horizon = result["horizon"]
    assert np.allclose(horizon["mse"], 0) and np.allclose(horizon["mse_repeat_last"], [0.04, 0.16])
    assert np.allclose(horizon["mse_mean_frame"], [0, 0.04]) and np.allclose(horizon["crps_repeat_last"], [0.2, 0.4])
    assert result["ratio_to_repeat_last"]["mse"]["all"] == 0
    assert np.isclose(result["summary"]["mse_repeat_last"]["mean"], 0.1)


def test_foreign_and_hostile_checkpoints_are_refused_in_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))
    torch.save({"ema": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (("evil.pt", "safely"), ("text.pt", "safely"), ("other.pt", "lacks"), ("absent.pt", "no such")):
        with pytest.raises(UserError, match=message) as caught:
            sample.load(tmp_path / name, torch.device("cpu"))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
