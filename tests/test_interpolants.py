"""Formulas of the interpolants, in float64, against autograd and closed forms."""

import itertools
import math

import pytest
import torch

import interpolants
from interpolants import broadcast

S = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
KINDS = list(itertools.product(interpolants.TABLE, interpolants.OUTPUTS))


def make(name, output="drift", c=0.7, k=0.6):
    return interpolants.get(name, c=c, output=output, k=k)


def batch(seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, len(S), 2, 3, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("name", interpolants.TABLE)
@pytest.mark.parametrize("coefficient", ["alpha", "beta", "sigma", "gamma"])
def test_derivatives_against_autograd(name, coefficient):
    s = S.clone().requires_grad_()
    it = make(name)
    (by_autograd,) = torch.autograd.grad(getattr(it, coefficient)(s).sum() + 0 * s.sum(), s)
    assert torch.allclose(getattr(it, f"d_{coefficient}")(S), by_autograd, atol=1e-12)


# (alpha, beta, gamma) as published, at c = 0.1.
COEFFICIENTS = {
    "linear": lambda s: (0 * s, s, 1 - s),
    "follmer": lambda s: (1 - s, s**2, 0.1 * (1 - s) * s.sqrt()),
    "follmer_linear": lambda s: (1 - s, s, 0.1 * (1 - s) * s.sqrt()),
    "bridge": lambda s: (1 - s, s, (1e-4 + 0.01 * s * (1 - s)).sqrt()),
    "trig": lambda s: (0 * s, torch.sin(math.pi / 2 * s), torch.cos(math.pi / 2 * s)),
}


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_coefficients_are_the_published_ones(name):
    it = make(name, c=0.1)
    for own, published in zip((it.alpha, it.beta, it.gamma), COEFFICIENTS[name](S)):
        assert torch.allclose(own(S), published, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_interpolants_go_from_the_start_to_x1(name):
    it = make(name)
    x0, x1, eps = batch()
    start, _ = it.interpolate(torch.zeros_like(S), x0, x1, eps)
    end, _ = it.interpolate(torch.ones_like(S), x0, x1, eps)
    blur = 0.01 * eps if name == "bridge" else 0 * eps
    assert torch.allclose(start, x0 + blur if it.from_reference else eps)
    assert torch.allclose(end, x1 + blur, atol=1e-15)


def test_published_targets():
    x0, x1, eps = batch()
    s = broadcast(S, x0)
    _, drift = make("follmer", c=0.1).interpolate(S, x0, x1, eps)
    assert torch.allclose(drift, -x0 + 2 * s * x1 - 0.1 * s.sqrt() * eps)
    _, velocity = make("linear").interpolate(S, x0, x1, eps)
    assert torch.allclose(velocity, x1 - eps)
    _, residual = make("follmer", "residual").interpolate(S, x0, x1, eps)
    assert torch.allclose(x0 + 0.6 * residual, x1)
    _, residual = make("trig", "residual").interpolate(S, x0, x1, eps)
    assert torch.allclose(0.6 * residual, x1)


@pytest.mark.parametrize("name, output", KINDS)
def test_the_exact_output_recovers_x1_and_eps(name, output):
    """With x_1 and eps known, the exact output is the target."""
    it = make(name, output)
    x0, x1, eps = batch()
    x, target = it.interpolate(S, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, S, x0), x1)
    assert torch.allclose(it.noise(target, x, S, x0), eps)
    assert torch.allclose(it.score(target, x, S, x0), -eps / broadcast(it.gamma(S), x))
    d_alpha, d_beta, d_gamma = (broadcast(d(S), x) for d in (it.d_alpha, it.d_beta, it.d_gamma))
    velocity = d_alpha * x0 + d_beta * x1 + d_gamma * eps
    assert torch.allclose(it.velocity(target, x, S, x0), velocity)
    for g in (it.sigma(S), 0.3 + S):
        expected = velocity + broadcast(g**2 / 2, x) * it.score(target, x, S, x0)
        assert torch.allclose(it.drift(target, x, S, x0, g), expected)


@pytest.mark.parametrize("name", ("follmer", "follmer_linear"))
def test_drift_as_trained_is_the_network_output(name):
    it = make(name)
    x0, x1, eps = batch()
    x, target = it.interpolate(S, x0, x1, eps)
    assert torch.allclose(it.drift(target, x, S, x0, it.sigma(S)), target)


@pytest.mark.parametrize("name, output", KINDS)
def test_everything_is_finite_at_the_start(name, output):
    it = make(name, output)
    x0, x1, eps = batch()
    s = torch.zeros_like(S)
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.isfinite(it.network_input(x, s, x0)).all()
    for quantity in (it.denoise, it.noise, it.velocity, it.score):
        assert torch.isfinite(quantity(target, x, s, x0)).all()
    assert torch.isfinite(it.drift(target, x, s, x0, it.sigma(s))).all()
    if it.wiener:
        assert torch.isfinite(it.drift(target, x, s, x0, it.diffusion("follmer", s))).all()
    if name == "follmer" and output == "drift":
        # beta'(0) = 0: the output does not depend on x_1.
        assert torch.equal(it.denoise(target, x, s, x0), x0)


@pytest.mark.parametrize("name, output", KINDS)
def test_everything_is_finite_at_the_end(name, output):
    it = make(name, output)
    x0, x1, eps = batch()
    s = torch.ones_like(S)
    x, target = it.interpolate(s, x0, x1, eps)
    assert torch.allclose(it.denoise(target, x, s, x0), x1)
    assert torch.isfinite(it.velocity(target, x, s, x0)).all()
    assert torch.isfinite(it.score(target, x, s, x0)).all()
    assert torch.isfinite(it.drift(target, x, s, x0, it.diffusion("follmer", s))).all()
    if output == "drift":
        assert torch.allclose(it.noise(target, x, s, x0), eps)


@pytest.mark.parametrize("name, output", KINDS)
def test_score_of_a_gaussian_is_the_analytic_one(name, output):
    """x_1 ~ N(1.3, 0.25): x_s is Gaussian; its score is the gradient of the log density."""
    it = make(name, output)
    x0, x, _ = batch()
    variance = (it.beta(S) * 0.5) ** 2 + it.gamma(S) ** 2
    mean = broadcast(it.alpha(S), x) * x0 + broadcast(it.beta(S), x) * 1.3
    x = (mean + broadcast(variance.sqrt(), x) * x).requires_grad_()
    log_density = -((x - mean) ** 2 / broadcast(2 * variance, x)).sum()
    (expected,) = torch.autograd.grad(log_density, x)
    surprise = (x.detach() - mean) / broadcast(variance, x)
    x1 = 1.3 + broadcast(it.beta(S) * 0.25, x) * surprise
    eps = broadcast(it.gamma(S), x) * surprise
    _, output = it.interpolate(S, x0, x1, eps)
    assert torch.allclose(it.score(output, x.detach(), S, x0), expected)


def test_diffusion_and_memory_closed_forms():
    c = 0.7
    s = S[:-1]
    t = S[1:]
    linear, follmer, flat, bridge, trig = (make(name, c=c) for name in interpolants.TABLE)
    assert torch.allclose(follmer.diffusion("follmer", S), c * ((3 - S) * (1 - S)).sqrt())
    assert torch.allclose(flat.diffusion("follmer", S), c * (1 - S**2).sqrt())
    assert torch.allclose(bridge.diffusion("follmer", S), (c**2 + 2 * 0.01**2 / S).sqrt())
    assert torch.allclose(linear.diffusion("follmer", S), (2 * (1 - S) / S).sqrt())
    of_trig = (math.pi / torch.tan(math.pi / 2 * S)).sqrt()
    assert torch.allclose(trig.diffusion("follmer", S), of_trig)
    assert torch.allclose(bridge.diffusion("sigma", S), torch.full_like(S, c))
    for it in (follmer, flat):
        assert torch.allclose(it.diffusion("0.5", S), 0.5 * c * (1 - S))
        assert torch.allclose(it.noise_correlation("sigma", s, t), (s / t).sqrt())
        assert torch.allclose(it.noise_correlation("0", s, t), torch.ones_like(s))
        # A point mass has no noise to keep.
        assert not it.noise_correlation("0", torch.zeros_like(s), t).any()
    assert torch.allclose(
        follmer.noise_correlation("follmer", s, t), (s / t) ** 1.5 * (1 - t) / (1 - s)
    )
    assert torch.allclose(
        flat.noise_correlation("follmer", s, t), (s / t) ** 0.5 * (1 - t) / (1 - s)
    )


@pytest.mark.parametrize(
    "name, diffusion", list(itertools.product(interpolants.TABLE, ("0", "sigma", "0.5", "follmer")))
)
def test_memory_is_the_integral_of_g_over_gamma(name, diffusion):
    it = make(name)
    u = torch.linspace(0.2, 0.9, 20_001, dtype=torch.float64)
    rate = it.diffusion(diffusion, u) ** 2 / it.gamma(u) ** 2
    rho = torch.exp(-torch.trapezoid(rate, u) / 2)
    assert torch.allclose(it.noise_correlation(diffusion, u[:1], u[-1:]), rho, rtol=1e-6)


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_network_input_is_centred_and_scaled(name):
    it = make(name, "residual")
    k = 0.6
    n = 200_000
    torch.manual_seed(0)
    x0 = torch.full((n, 1), 3.0, dtype=torch.float64)
    x1 = k * torch.randn(n, 1, dtype=torch.float64) + (x0 if it.from_reference else 0)
    for s in (1e-4, 0.3, 0.9, 1.0):
        moment = torch.full((n,), s, dtype=torch.float64)
        x, _ = it.interpolate(moment, x0, x1, torch.randn(n, 1, dtype=torch.float64))
        z = it.network_input(x, moment, x0)
        assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01


def test_weights():
    s = torch.tensor([0.0, 0.5, 0.9, 1.0])

    def weight(name, output, weighting):
        return interpolants.get(name, 0.7, output, 0.6, weighting).weight(s)

    for name in interpolants.TABLE:
        assert (weight(name, "drift", "published") == 1).all()
        assert (weight(name, "residual", "uniform") == 1).all()
        limited = torch.tensor([1.0, 4.0, 25.0, 25.0])
        assert torch.allclose(weight(name, "residual", "velocity"), limited)
    # d target / d x_1 at fixed x_s: 1 / (1-s) for linear, 2s + s^2 / (1-s) for follmer. The last
    # weight of linear's drift is 25 / 100.
    for name, output, weighting, first, expected in (
        ("linear", "residual", "published", 0, [1.0, 4.0]),
        ("follmer", "residual", "published", 0, [0.0, 2.25]),
        ("linear", "drift", "velocity", 0, [1.0, 1.0, 0.25]),
        ("follmer", "drift", "uniform", 1, [1 / 2.25, (1.8 + 8.1) ** -2]),
    ):
        found = weight(name, output, weighting)[first : first + len(expected)]
        assert torch.allclose(found, torch.tensor(expected))


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_the_weighted_loss_does_not_depend_on_the_output(name):
    """An error of E[x_1|x] has the same loss with every output, up to the constant k."""
    s = S[S > 0.22]
    x0, x1, eps = (part[:15] for part in batch())
    wrong = x1 + 0.01
    costs = []
    for output in interpolants.OUTPUTS:
        it = interpolants.get(name, 0.7, output, 0.6, "velocity")
        x, target = it.interpolate(s, x0, x1, eps)
        # The output that implies `wrong` in place of x_1 at the same x_s.
        rest = x - broadcast(it.alpha(s), x) * x0 - broadcast(it.beta(s), x) * wrong
        _, off = it.interpolate(s, x0, wrong, rest / broadcast(it.gamma(s), x))
        unit = 1 if output == "drift" else it.k**2
        costs.append(it.weight(s) * (off - target).square().mean((1, 2)) * unit)
    assert torch.allclose(costs[1], costs[0], rtol=1e-6)
    assert torch.allclose(costs[2], costs[0], rtol=1e-6)


@pytest.mark.parametrize("name", interpolants.TABLE)
def test_input_and_output_v_are_a_rotation(name):
    """Both have unit variance and are uncorrelated, if x_1 - x_0 (from noise: x_1) is Gaussian."""
    it = make(name, "v")
    n = 200_000
    torch.manual_seed(0)
    x0, d, eps = torch.randn(3, n, 1, dtype=torch.float64)
    x1 = it.k * d + (x0 if it.from_reference else 0)
    for s in (0.0, 1e-4, 0.3, 0.9, 1.0):
        moment = torch.full((n,), s, dtype=torch.float64)
        x, target = it.interpolate(moment, x0, x1, eps)
        assert abs(target.std() - 1) < 0.01
        assert abs((it.network_input(x, moment, x0) * target).mean()) < 0.01
        assert torch.allclose(it.denoise(target, x, moment, x0), x1, atol=1e-6)
