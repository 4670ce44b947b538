"""Solvers: from s = 0 to 1 by any interpolant's ODE (diffusion 0) or SDE, from one network's output.

A step carries x from s to t. `exact` and `exact2` hold or extrapolate E[x_1|x] and do the rest in closed form; the others
step in time: euler, heun, rk4 and dopri5 the probability flow, em and stochastic_heun the SDE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from interpolants import Interpolant, scale_of, value

Field = Callable[[Tensor, Tensor], Tensor] | Callable[[Tensor, float], Tensor]
ODE, SDE, ANY = ("euler", "heun", "rk4", "dopri5"), ("em", "stochastic_heun"), ("exact", "exact2")
FIRST_MOMENT = (
    1e-5  # where dopri5 takes over from the exact first step, which no tolerance controls
)


def check(solver: str, diffusion: str, grid: str = "uniform") -> None:
    """ValueError, saying what would do, for names that are unknown or do not go together."""
    if solver not in (*ANY, *ODE, *SDE):
        raise ValueError(f"solver must be one of {', '.join((*ANY, *ODE, *SDE))}, got {solver!r}")
    if diffusion not in ("sigma", "follmer") and not 0 <= number(diffusion) < float("inf"):
        raise ValueError(f"diffusion must be 0, sigma, follmer or a number >= 0, got {diffusion!r}")
    if solver in ODE and noisy(diffusion):
        raise ValueError(
            f"solver {solver} solves the ODE, diffusion 0; for {diffusion} take {' or '.join((*SDE, 'exact'))}"
        )
    if solver in SDE and not noisy(diffusion):
        raise ValueError(
            f"solver {solver} solves an SDE; for diffusion 0 take {', '.join(ODE)} or exact"
        )
    if grid not in ("uniform", "cosine") and not 0 < number(grid.removeprefix("power:")) < float(
        "inf"
    ):
        raise ValueError(f"grid must be uniform, cosine or power:P with P > 0, got {grid!r}")


def number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def noisy(diffusion: str) -> bool:
    return diffusion == "follmer" or scale_of(diffusion) > 0


def time_grid(name: str, steps: int, start: float = 0.0) -> Tensor:
    """(steps + 1,) float64 from `start` to 1, both exact: `uniform`, `cosine` (dense at both ends), or `power:P`, (k/N)^P."""
    k = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if name == "cosine":
        k = torch.sin(k * (np.pi / 2)) ** 2
    elif name.startswith("power:"):
        k = k ** float(name.removeprefix("power:"))
    return start + (1 - start) * k


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def integrate(
    field: Field,
    interpolant: Interpolant,
    x0: Tensor,
    steps: int,
    solver: str = "exact",
    diffusion: str | float = "0",
    generator: torch.Generator | None = None,
    *,
    grid: str = "uniform",
    warm_start: float = 0.0,
    first: float = 0.0,
    tolerance: float = 1e-4,
    float_times: bool = False,
) -> Tensor:
    """Carry x_s from s = 0 to 1 in `steps` steps; -> x_1, (B, …) like x0.

    field(x, s) -> network output, s: (B,). x0: the reference (for interpolants that start at noise only its shape
    counts). solver, grid: see `check`. diffusion: see Interpolant.diffusion. warm_start: begin at this s in [0, 1), as
    though x_1 were x0 (RIVER, arXiv 2211.14575). first: `exact` asks the network at this flow time where it stands
    at s = 0, where an output may hold nothing of x_1. tolerance: dopri5's, absolute and relative; it takes as many steps
    as it needs. float_times: call field(x, s) with s as a Python float, the same for the whole batch.

    All coefficients are Python floats, so that a step launches only the operations on x itself.
    """
    diffusion = str(diffusion)
    check(solver, diffusion, grid)
    if not 0 <= warm_start < 1 or steps < 1:
        raise ValueError(
            f"warm_start must be in [0, 1) and steps >= 1, got {warm_start} and {steps}"
        )
    x = x0
    if warm_start or not interpolant.wiener:
        begin = float(warm_start)
        noise = value(interpolant.gamma, begin) * normal(x0, generator)
        x = value(interpolant.centre, begin) * x0 + noise
    dynamics = Dynamics(field, interpolant, x0, diffusion, generator, first, float_times)
    moments = time_grid(grid, steps, warm_start).tolist()
    if solver == "dopri5":
        return dopri5(dynamics, x, moments, tolerance)
    step = Exact2() if solver == "exact2" else STEPS[solver]
    for s, t in zip(moments[:-1], moments[1:]):
        x = (exact_step if dynamics.needs_exact(solver, s, t) else step)(dynamics, x, s, t)
    return x


@dataclass(frozen=True)
class Dynamics:
    """What is integrated: one network's field under one interpolant and diffusion."""

    field: Field
    interpolant: Interpolant
    x0: Tensor
    diffusion: str
    generator: torch.Generator | None
    first: float = 0.0
    float_times: bool = False

    def output(self, x: Tensor, s: float) -> Tensor:
        """What the network gives at x and flow time s."""
        if self.float_times:
            return self.field(x, s)
        return self.field(x, torch.full((len(x),), s, dtype=x.dtype, device=x.device))

    def diffusion_at(self, s: float) -> str:
        """A point mass has no score, so its first step is as trained whatever follows; all share their marginals."""
        return "sigma" if self.interpolant.wiener and s == 0 else self.diffusion

    def needs_exact(self, solver: str, s: float, t: float) -> bool:
        """Ends at which a solver in time has nothing to stand on: an ODE leaving x_0, where the noise grows like sqrt(s)
        (and a bridge's end, where it shrinks so), or a drift that is infinite or close to it at s = 0."""
        it = self.interpolant
        if solver in ODE:
            return it.from_reference and (s == 0 or (t == 1 and not it.wiener))
        if solver in SDE:
            steep = self.diffusion == "follmer" or (it.from_reference and self.diffusion != "sigma")
            return s == 0 and not it.wiener and steep
        return False

    def span(self, s: float, t: float) -> tuple[float, float]:
        """u at s and at t, see Interpolant.u_of."""
        return value(self.interpolant.u_of, s), value(self.interpolant.u_of, t)

    def velocity(self, x: Tensor, u: float) -> Tensor:
        """dx/du of the probability flow, (B, …), at u, see Interpolant.u_of."""
        s, rate = value(self.interpolant.s_of, u)
        return rate * self.interpolant.velocity(self.output(x, s), x, s, self.x0)

    def drift(self, x: Tensor, s: float, diffusion: str) -> tuple[Tensor, float]:
        """(drift (B, …), g) of the SDE."""
        g = value(self.interpolant.diffusion, diffusion, s)
        return self.interpolant.drift(self.output(x, s), x, s, self.x0, g), g


# ------------------------------------------------------------------------------------------------------- closed form
def exact_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Hold E[x_1|x] over the step. Plain Euler would end at (1 - 1/N) x_1 for beta = s^2 and fade a roll-out."""
    return hold(dynamics, x, s, t)[0]


def hold(dynamics: Dynamics, x: Tensor, s: float, t: float) -> tuple[Tensor, Tensor]:
    """(x_t, E[x_1|x_s]), with the coefficients at t, and the part rho of E[eps|x] that the diffusion leaves, the rest
    drawn anew: x_t = alpha x_0 + beta E[x_1|x] + gamma (rho E[eps|x] + sqrt(1 - rho^2) xi)."""
    it, x0 = dynamics.interpolant, dynamics.x0
    asked = max(s, float(dynamics.first))
    x1, eps = it.estimate(dynamics.output(x, asked), x, asked, x0)
    alpha, beta, gamma = (value(f, t) for f in (it.alpha, it.beta, it.gamma))
    if noisy(dynamics.diffusion_at(s)):
        rho = value(it.memory, dynamics.diffusion, s, t)
        eps = rho * eps + max(1 - rho**2, 0) ** 0.5 * normal(x, dynamics.generator)
    return alpha * x0 + beta * x1 + gamma * eps, x1


class Exact2:
    """`exact`, with E[x_1|x] continued in a straight line through its last two values (second order for the ODE).

    Between s and t, x_1 at time tau enters x_t with the weight dP(tau), P = gamma(t) memory(tau, t) beta(tau) / gamma(tau), so
    that a slope adds int (tau - s) dP = (t - s) beta(t) - int P dtau, by parts.
    """

    def __init__(self):
        self.before: tuple[Tensor, Tensor] | None = None

    def __call__(self, dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
        it, before = dynamics.interpolant, self.before
        after, x1 = hold(dynamics, x, s, t)
        s = max(s, float(dynamics.first))
        # A drift output holds nothing of x_1 where beta' = 0.
        blind = it.output == "drift" and value(it.d_beta, s) == 0
        self.before = None if blind else (x1, s)
        if before is None:
            return after
        return after + lever(it, dynamics.diffusion, s, t) / (s - before[1]) * (x1 - before[0])


NODES, WEIGHTS = (torch.from_numpy(part) / 2 for part in np.polynomial.legendre.leggauss(16))


@lru_cache(maxsize=1024)
def lever(it: Interpolant, diffusion: str, s: float, t: float) -> float:
    """(t - s) beta(t) - int_s^t P dtau, see Exact2, by Gauss-Legendre quadrature."""
    tau, end = s + (t - s) * (NODES + 0.5), torch.tensor([t], dtype=torch.float64)
    P = it.gamma(end) * it.memory(diffusion, tau, end) * it.beta(tau) / it.gamma(tau)
    return (t - s) * (it.beta(end) - (WEIGHTS * P).sum()).item()


# ------------------------------------------------------------------------------------------------------------ in time
# The probability flow, in the variable u (see Interpolant.u_of). From a point mass heun and rk4 lose their order: the exact
# first step leaves the variance of x_1 out, of which the ODE keeps the mark, and paths have a kink at u = 0.
def euler_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    u, end = dynamics.span(s, t)
    return x + (end - u) * dynamics.velocity(x, u)


def heun_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    u, end = dynamics.span(s, t)
    h = end - u
    first = dynamics.velocity(x, u)
    return x + h / 2 * (first + dynamics.velocity(x + h * first, end))


def rk4_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    u, end = dynamics.span(s, t)
    h, middle = end - u, (u + end) / 2
    one = dynamics.velocity(x, u)
    two = dynamics.velocity(x + h / 2 * one, middle)
    three = dynamics.velocity(x + h / 2 * two, middle)
    return x + h / 6 * (one + 2 * two + 2 * three + dynamics.velocity(x + h * three, end))


def dopri5(dynamics: Dynamics, x: Tensor, moments: list[float], tolerance: float) -> Tensor:
    from torchdiffeq import odeint  # imported late: no other solver needs it

    s = moments[0]
    if s == 0 and dynamics.interpolant.from_reference:
        x, s = exact_step(dynamics, x, s, FIRST_MOMENT), FIRST_MOMENT
    span = torch.tensor(dynamics.span(s, 1.0), dtype=x.dtype, device=x.device)
    flow = lambda u, x: dynamics.velocity(x, float(u))  # noqa: E731
    return odeint(flow, x, span, rtol=tolerance, atol=tolerance, method="dopri5")[-1]


def em_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """Euler and Maruyama: weak order 1. The last step adds no noise: its end is the sample."""
    drift, g = dynamics.drift(x, s, dynamics.diffusion_at(s))
    x = x + (t - s) * drift
    return x if t == 1 else x + g * (t - s) ** 0.5 * normal(x, dynamics.generator)


def stochastic_heun_step(dynamics: Dynamics, x: Tensor, s: float, t: float) -> Tensor:
    """The drift's mean over both ends, with one draw of the noise int g dW in both: weak order 2, since g depends on s
    alone (Kloeden and Platen 1992, sec. 15.1). The last step is em's."""
    if t == 1:
        return em_step(dynamics, x, s, t)
    name, h = dynamics.diffusion_at(s), t - s
    drift, g = dynamics.drift(x, s, name)
    g_end = value(dynamics.interpolant.diffusion, name, t)
    moved = x + ((g**2 + g_end**2) / 2 * h) ** 0.5 * normal(x, dynamics.generator)
    return moved + h / 2 * (drift + dynamics.drift(moved + h * drift, t, name)[0])


STEPS = {
    "exact": exact_step,
    "euler": euler_step,
    "heun": heun_step,
    "rk4": rk4_step,
    "em": em_step,
    "stochastic_heun": stochastic_heun_step,
}
