"""Formulas in float64 against autograd and closed forms."""

import itertools

import pytest
import torch

import interpolants
from interpolants import across

S = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
KINDS = list(itertools.product(interpolants.TABLE, ("drift", "residual")))


def make(name, output="drift", c=0.7, k=0.6):
    return interpolants.get(name, c=c, output=output, k=k)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, len(S), 2, 3, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("name", interpolants.TABLE)
@pytest.mark.parametrize("coefficient", ["alpha", "beta", "sigma", "gamma"])
def test_derivatives_against_autograd(name, coefficient):
    s, it = S.clone().requires_grad_(), make(name)
    (by_autograd,) = torch.autograd.grad(getattr(it, coefficient)(s).sum() + 0 * s.sum(), s)
    assert torch.allclose(getattr(it, f"d_{coefficient}")(S), by_autograd, atol=1e-12)


def test_coefficients_are_the_published_ones():
    follmer, linear = make("follmer", c=0.1), make("linear")
    assert torch.allclose(follmer.alpha(S), 1 - S) and torch.allclose(follmer.beta(S), S**2)
    assert torch.allclose(follmer.gamma(S), 0.1 * (1 - S) * S.sqrt())
    assert torch.allclose(linear.beta(S), S) and torch.allclose(linear.gamma(S), 1 - S) and not linear.alpha(S).any()


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_interpolants_run_from_start_to_x1(name):
    it, (x0, x1, eps) = make(name), batch()
    start, _ = it.interpolate(torch.zeros_like(S), x0, x1, eps)
    end, _ = it.interpolate(torch.ones_like(S), x0, x1, eps)
    assert torch.allclose(start, x0 if it.from_reference else eps) and torch.allclose(end, x1)


def test_published_targets():
    x0, x1, eps = batch()
    s = across(S, x0)
    _, drift = make("follmer", c=0.1).interpolate(S, x0, x1, eps)
    assert torch.allclose(drift, -x0 + 2 * s * x1 - 0.1 * s.sqrt() * eps)
    _, velocity = make("linear").interpolate(S, x0, x1, eps)
    assert torch.allclose(velocity, x1 - eps)
    _, residual = make("follmer", "residual").interpolate(S, x0, x1, eps)
    assert torch.allclose(x0 + 0.6 * residual, x1)


@pytest.mark.parametrize("name, output", KINDS)
def test_an_exact_output_gives_back_x1_and_eps(name, output):
    """Where x_1 and eps are known, the target itself is the exact output."""
    it, (x0, x1, eps) = make(name, output), batch()
    x, target = it.interpolate(S, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, S, x0), x1)
    assert torch.allclose(it.noise(target, x, S, x0), eps)
    assert torch.allclose(it.score(target, x, S, x0), -eps / across(it.gamma(S), x))
    velocity = sum(across(d(S), x) * part for d, part in ((it.d_alpha, x0), (it.d_beta, x1), (it.d_gamma, eps)))
    assert torch.allclose(it.velocity(target, x, S, x0), velocity)
    for g in (it.sigma(S), 0.3 + S):
        wanted = velocity + across(g**2 / 2, x) * it.score(target, x, S, x0)
        assert torch.allclose(it.drift(target, x, S, x0, g), wanted)


def test_drift_as_trained_is_the_network_output():
    it, (x0, x1, eps) = make("follmer"), batch()
    x, target = it.interpolate(S, x0, x1, eps)
    assert torch.allclose(it.drift(target, x, S, x0, it.sigma(S)), target)


@pytest.mark.parametrize("name, output", KINDS)
def test_everything_is_finite_at_the_start(name, output):
    it, (x0, x1, eps) = make(name, output), batch()
    s = torch.zeros_like(S)
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.isfinite(it.network_input(x, s, x0)).all()
    assert torch.isfinite(it.denoise(target, x, s, x0)).all() and torch.isfinite(it.noise(target, x, s, x0)).all()
    assert torch.isfinite(it.drift(target, x, s, x0, it.sigma(s))).all()
    if name == "follmer" and output == "drift":
        assert torch.equal(it.denoise(target, x, s, x0), x0)  # beta'(0) = 0: the output carries no x_1


@pytest.mark.parametrize("name, output", KINDS)
def test_everything_is_finite_at_the_end(name, output):
    it, (x0, x1, eps) = make(name, output), batch()
    s = torch.ones_like(S)
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, s, x0), x1)
    if output == "drift":
        assert torch.allclose(it.noise(target, x, s, x0), eps)


def test_follmer_diffusion_and_memory_closed_forms():
    it, c = make("follmer", c=0.7), 0.7
    assert torch.allclose(it.diffusion("follmer", S), c * ((3 - S) * (1 - S)).sqrt())
    assert torch.allclose(it.diffusion("0.5", S), 0.5 * it.sigma(S))
    s, t = S[:-1], S[1:]
    assert torch.allclose(it.memory("sigma", s, t), (s / t).sqrt())
    assert torch.allclose(it.memory("0", s, t), torch.ones_like(s))
    assert torch.allclose(it.memory("follmer", s, t), (s / t) ** 1.5 * (1 - t) / (1 - s))
    assert not it.memory("0", torch.zeros_like(s), t).any()  # from a point mass there is nothing to keep


@pytest.mark.parametrize("name, diffusion", list(itertools.product(interpolants.TABLE, ("0", "sigma", "0.5", "follmer"))))
def test_memory_is_the_integral_of_g_over_gamma(name, diffusion):
    it, s, t = make(name), torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    u = torch.linspace(0.2, 0.9, 20_001, dtype=torch.float64)
    rate = it.diffusion(diffusion, u) ** 2 / it.gamma(u) ** 2
    assert torch.allclose(it.memory(diffusion, s, t), torch.exp(-torch.trapezoid(rate, u) / 2), rtol=1e-6)


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_network_input_is_centred_and_scaled(name):
    it, k, n = make(name, "residual"), 0.6, 200_000
    torch.manual_seed(0)
    x0 = torch.full((n, 1), 3.0, dtype=torch.float64)
    x1 = k * torch.randn(n, 1, dtype=torch.float64) + (x0 if it.from_reference else 0)
    for s in (1e-4, 0.3, 0.9, 1.0):
        moment = torch.full((n,), s, dtype=torch.float64)
        x, _ = it.interpolate(moment, x0, x1, torch.randn(n, 1, dtype=torch.float64))
        z = it.network_input(x, moment, x0)
        assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01


def test_weights():
    assert (make("follmer").weight(S) == 1).all()
    weight = make("follmer", "residual").weight(torch.tensor([0.0, 0.5, 0.9, 1.0]))
    assert torch.allclose(weight, torch.tensor([1.0, 4.0, 25.0, 25.0]))
