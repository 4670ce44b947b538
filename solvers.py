"""Solvers: integrate an interpolant's ODE (diffusion 0) or SDE from s = 0 to 1.

A step carries x from s to t. `exact` and `exact2` hold or extrapolate E[x_1|x] and compute the rest
in closed form. The others discretise flow time: euler, heun, rk4 and dopri5 solve the
probability-flow ODE, em and stochastic_heun the SDE. All use the output of the same network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from interpolants import Interpolant, scale_of, value

# field(x, s) -> the network's output. s: (B,), or a float shared by the batch.
Field = Callable[[Tensor, Tensor], Tensor] | Callable[[Tensor, float], Tensor]
# Source of the noise: a generator (None: the global one), or a function that draws noise like x.
Noise = torch.Generator | Callable[[Tensor], Tensor] | None
ODE = ("euler", "heun", "rk4", "dopri5")
SDE = ("em", "stochastic_heun")
ANY = ("exact", "exact2")
# The flow time at which dopri5 starts, after an exact first step that no tolerance controls.
DOPRI5_START = 1e-5


def check(solver: str, diffusion: str, grid: str = "uniform") -> None:
    """Raise ValueError, with the valid choices, for unknown or incompatible names."""
    if solver not in (*ANY, *ODE, *SDE):
        raise ValueError(f"solver must be one of {', '.join((*ANY, *ODE, *SDE))}, got {solver!r}")
    if diffusion not in ("sigma", "follmer") and not 0 <= parse_number(diffusion) < float("inf"):
        raise ValueError(f"diffusion must be 0, sigma, follmer or a number >= 0, got {diffusion!r}")
    if solver in ODE and is_stochastic(diffusion):
        raise ValueError(
            f"solver {solver} solves the ODE, diffusion 0; for diffusion {diffusion} "
            f"use {' or '.join((*SDE, 'exact'))}"
        )
    if solver in SDE and not is_stochastic(diffusion):
        raise ValueError(
            f"solver {solver} solves an SDE; for diffusion 0 use {', '.join(ODE)} or exact"
        )
    power = parse_number(grid.removeprefix("power:"))
    if grid not in ("uniform", "cosine") and not 0 < power < float("inf"):
        raise ValueError(f"grid must be uniform, cosine or power:P with P > 0, got {grid!r}")


def parse_number(text: str) -> float:
    """Parse a float; NaN if `text` is not a number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def is_stochastic(diffusion: str) -> bool:
    """True if the diffusion is not 0 everywhere."""
    return diffusion == "follmer" or scale_of(diffusion) > 0


def time_grid(name: str, steps: int, start: float = 0.0) -> Tensor:
    """Flow times from `start` to 1, both exact, (steps + 1,) float64.

    name: `uniform`, `cosine` (dense at both ends), or `power:P`, which is (k/N)^P.
    """
    k = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if name == "cosine":
        k = torch.sin(k * (np.pi / 2)) ** 2
    elif name.startswith("power:"):
        k = k ** float(name.removeprefix("power:"))
    return start + (1 - start) * k


def draw_normal(like: Tensor, generator: Noise) -> Tensor:
    """Standard normal noise with the shape, dtype and device of `like`."""
    if callable(generator):
        return generator(like)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def integrate(
    field: Field,
    interpolant: Interpolant,
    x0: Tensor,
    steps: int,
    solver: str = "exact",
    diffusion: str | float = "0",
    generator: Noise = None,
    *,
    grid: str = "uniform",
    warm_start: float = 0.0,
    first: float = 0.0,
    tolerance: float = 1e-4,
    float_times: bool = False,
) -> Tensor:
    """Integrate x_s from s = 0 to 1 in `steps` steps. -> x_1, (B, …) like x0.

    field(x, s): the network's output, s: (B,).
    x0: the reference. For interpolants that start at noise only its shape matters.
    solver, grid: see `check` and `time_grid`. diffusion: see Interpolant.diffusion.
    warm_start: start at this s in [0, 1), with x0 in place of x_1 (RIVER, arXiv 2211.14575).
    generator: source of the noise, or a function that draws noise of the shape of its argument.
    first: exact and exact2 evaluate the network at this flow time in place of s = 0.
    tolerance: absolute and relative tolerance of dopri5, which chooses its own steps.
    float_times: call field(x, s) with s as a Python float, shared by the whole batch.
    All coefficients are Python floats, so a step launches only the GPU kernels that act on x.
    """
    diffusion = str(diffusion)
    check(solver, diffusion, grid)
    if not 0 <= warm_start < 1 or steps < 1:
        raise ValueError(
            f"warm_start must be in [0, 1) and steps >= 1, got {warm_start} and {steps}"
        )
    # A path from a point mass starts at x_0. Any other start has noise: x_s with x_0 as x_1.
    x = x0
    if warm_start or not interpolant.wiener:
        begin = float(warm_start)
        noise = value(interpolant.gamma, begin) * draw_normal(x0, generator)
        x = value(interpolant.centre, begin) * x0 + noise
    dynamics = Dynamics(field, interpolant, x0, diffusion, generator, first, float_times)
    times = time_grid(grid, steps, warm_start).tolist()
    if solver == "dopri5":
        return dopri5(dynamics, x, times, tolerance)
    step = Exact2() if solver == "exact2" else STEPS[solver]
    for s, t in zip(times[:-1], times[1:]):
        if dynamics.needs_exact(solver, s, t):
            x = exact_step(dynamics, x, s, t)
        else:
            x = step(dynamics, x, s, t)
    return x


@dataclass(frozen=True)
class Dynamics:
    """The equation to integrate: a network's field, an interpolant and a diffusion."""

    field: Field
    interpolant: Interpolant
    x0: Tensor
    diffusion: str
    generator: Noise
    first: float = 0.0
    float_times: bool = False

    def output(self, x: Tensor, s: float) -> Tensor:
        """The network's output at x and flow time s."""
        if self.float_times:
            return self.field(x, s)
        return self.field(x, torch.full((len(x),), s, dtype=x.dtype, device=x.device))

    def diffusion_at(self, s: float) -> str:
        """The diffusion of a step that starts at s.

        A path from a point mass has no score at s = 0, so its first step uses the trained
        diffusion. All diffusions have the same marginals, so another one may follow without an
        error.
        """
        return "sigma" if self.interpolant.wiener and s == 0 else self.diffusion

    def needs_exact(self, solver: str, s: float, t: float) -> bool:
        """True for a step that this solver cannot take; exact_step takes it instead.

        For ODE solvers: the first step from x_0, where the noise grows like sqrt(s), and the last
        step of a bridge, where the noise falls like sqrt(1 - s). For SDE solvers: the first step if
        the drift at s = 0 is infinite or very large.
        """
        wiener = self.interpolant.wiener
        from_reference = self.interpolant.from_reference
        if solver in ODE:
            return from_reference and (s == 0 or (t == 1 and not wiener))
        if solver in SDE:
            steep = self.diffusion == "follmer" or (from_reference and self.diffusion != "sigma")
            return s == 0 and not wiener and steep
        return False

    def span(self, s: float, t: float) -> tuple[float, float]:
        """-> u at s and u at t, see Interpolant.u_of."""
        return value(self.interpolant.u_of, s), value(self.interpolant.u_of, t)

    def velocity(self, x: Tensor, u: float) -> Tensor:
        """dx/du of the probability-flow ODE at u, (B, …), see Interpolant.u_of."""
        s, rate = value(self.interpolant.s_of, u)
        return rate * self.interpolant.velocity(self.output(x, s), x, s, self.x0)

    def drift(self, x: Tensor, s: float, diffusion: str) -> tuple[Tensor, float]:
        """-> (drift (B, …), g) of the SDE dX = drift ds + g dW."""
        g = value(self.interpolant.diffusion, diffusion, s)
        return self.interpolant.drift(self.output(x, s), x, s, self.x0, g), g


# -------------------------------------------------------------------------------------- closed form
def exact_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Hold E[x_1|x] over the step: first order.

    Euler's method ends at (1 - 1/N) x_1 for beta = s^2, so a roll-out would fade.
    """
    return hold(dynamics, x, s, t)[0]


def hold(dynamics: Dynamics, x: Tensor, s: float, t: float) -> tuple[Tensor, Tensor]:
    """-> (x_t, E[x_1|x_s]), with E[x_1|x_s] and E[eps|x_s] held over the step:

    x_t = alpha x_0 + beta E[x_1|x] + gamma (rho E[eps|x] + sqrt(1 - rho^2) xi),

    with the coefficients at t, xi standard normal, and rho the correlation of the noise at s and at
    t, see Interpolant.noise_correlation. rho = 1 for the ODE.
    """
    interpolant = dynamics.interpolant
    x0 = dynamics.x0
    at = max(s, float(dynamics.first))
    x1, eps = interpolant.estimate(dynamics.output(x, at), x, at, x0)
    coefficients = (interpolant.alpha, interpolant.beta, interpolant.gamma)
    alpha, beta, gamma = (value(f, t) for f in coefficients)
    if is_stochastic(dynamics.diffusion_at(s)):
        rho = value(interpolant.noise_correlation, dynamics.diffusion, s, t)
        eps = rho * eps + max(1 - rho**2, 0) ** 0.5 * draw_normal(x, dynamics.generator)
    return alpha * x0 + beta * x1 + gamma * eps, x1


class Exact2:
    """`exact`, with E[x_1|x] extrapolated linearly from its last two values: second order (ODE).

    If E[x_1|x] varies over the step, its value at time tau enters x_t with the weight dP(tau),
    where P(tau) = gamma(t) rho(tau, t) beta(tau) / gamma(tau), with rho the noise correlation. A
    value that grows linearly from s, by v per unit of time, therefore adds v int_s^t (tau - s) dP
    to the result of `exact`. Integration by parts gives int_s^t (tau - s) dP =
    (t - s) beta(t) - int_s^t P dtau, which `slope_weight` computes.
    """

    def __init__(self):
        # E[x_1|x] of the step before, and its flow time
        self.before: tuple[Tensor, float] | None = None

    def __call__(self, dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
        interpolant = dynamics.interpolant
        before = self.before
        after, x1 = hold(dynamics, x, s, t)
        s = max(s, float(dynamics.first))
        # A drift output does not depend on x_1 where beta' = 0: there is nothing to extrapolate.
        blind = interpolant.output == "drift" and value(interpolant.d_beta, s) == 0
        self.before = None if blind else (x1, s)
        if before is None:
            return after
        x1_before, s_before = before
        weight = slope_weight(interpolant, dynamics.diffusion, s, t)
        return after + weight / (s - s_before) * (x1 - x1_before)


# Gauss-Legendre quadrature with 16 points, on [-1/2, 1/2].
NODES, WEIGHTS = (torch.from_numpy(part) / 2 for part in np.polynomial.legendre.leggauss(16))


@lru_cache(maxsize=1024)
def slope_weight(interpolant: Interpolant, diffusion: str, s: float, t: float) -> float:
    """(t - s) beta(t) - int_s^t P dtau, see Exact2, by Gauss-Legendre quadrature."""
    tau = s + (t - s) * (NODES + 0.5)
    end = torch.tensor([t], dtype=torch.float64)
    rho = interpolant.noise_correlation(diffusion, tau, end)
    P = interpolant.gamma(end) * rho * interpolant.beta(tau) / interpolant.gamma(tau)
    return (t - s) * (interpolant.beta(end) - (WEIGHTS * P).sum()).item()


# ------------------------------------------------------------------------------------- ODE, in time
# These steps integrate the probability-flow ODE in the variable u, see Interpolant.u_of. On paths
# from a point mass, heun and rk4 have a lower order than stated, for two reasons: the exact first
# step neglects the variance of x_1, an error that the ODE carries to the end, and the paths have a
# kink at u = 0.
def euler_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Euler's method: order 1."""
    u, end = dynamics.span(s, t)
    return x + (end - u) * dynamics.velocity(x, u)


def heun_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Heun's method, the explicit trapezoidal rule: order 2."""
    u, end = dynamics.span(s, t)
    h = end - u
    v1 = dynamics.velocity(x, u)
    v2 = dynamics.velocity(x + h * v1, end)
    return x + h / 2 * (v1 + v2)


def rk4_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """The classical Runge-Kutta method: order 4."""
    u, end = dynamics.span(s, t)
    h = end - u
    middle = (u + end) / 2
    v1 = dynamics.velocity(x, u)
    v2 = dynamics.velocity(x + h / 2 * v1, middle)
    v3 = dynamics.velocity(x + h / 2 * v2, middle)
    v4 = dynamics.velocity(x + h * v3, end)
    return x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)


def dopri5(dynamics: Dynamics, x: Tensor, times: list[float], tolerance: float) -> Tensor:
    """Dormand and Prince's method of order 5 with adaptive steps, from times[0] to 1."""
    # Imported late, because no other solver needs it.
    from torchdiffeq import odeint

    s = times[0]
    if s == 0 and dynamics.interpolant.from_reference:
        x = exact_step(dynamics, x, s, DOPRI5_START)
        s = DOPRI5_START
    span = torch.tensor(dynamics.span(s, 1.0), dtype=x.dtype, device=x.device)

    def flow(u: Tensor, x: Tensor) -> Tensor:
        return dynamics.velocity(x, float(u))

    return odeint(flow, x, span, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


# ------------------------------------------------------------------------------------- SDE, in time
def em_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Euler-Maruyama method: weak order 1. The last step, to s = 1, adds no noise."""
    drift, g = dynamics.drift(x, s, dynamics.diffusion_at(s))
    x = x + (t - s) * drift
    return x if t == 1 else x + g * (t - s) ** 0.5 * draw_normal(x, dynamics.generator)


def stochastic_heun_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Average the drift over both ends of the step, with the same noise int g dW: weak order 2.

    The order holds because g depends on s alone (Kloeden and Platen 1992, sec. 15.1). The last step
    is em_step.
    """
    if t == 1:
        return em_step(dynamics, x, s, t)
    name = dynamics.diffusion_at(s)
    h = t - s
    drift, g = dynamics.drift(x, s, name)
    g_end = value(dynamics.interpolant.diffusion, name, t)
    # The variance of int g dW over the step, by the trapezoidal rule.
    moved = x + ((g**2 + g_end**2) / 2 * h) ** 0.5 * draw_normal(x, dynamics.generator)
    drift_end, _ = dynamics.drift(moved + h * drift, t, name)
    return moved + h / 2 * (drift + drift_end)


STEPS = {
    "exact": exact_step,
    "euler": euler_step,
    "heun": heun_step,
    "rk4": rk4_step,
    "em": em_step,
    "stochastic_heun": stochastic_heun_step,
}
