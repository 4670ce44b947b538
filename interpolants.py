"""Stochastic interpolants: coefficients beside their derivatives, targets, and what a trained network's output implies.

Every interpolant is x_s = alpha(s) x_0 + beta(s) x_1 + gamma(s) eps over flow time s in [0, 1], x_0 the reference
latent, x_1 the next one, eps standard normal (arXiv 2403.13724, eq. 2-5; arXiv 2303.08797). It is written here as

    x_s    = alpha  x_0 + beta  x_1 + sigma  W
    target = alpha' x_0 + beta' x_1 + sigma' W

where W = sqrt(s) eps is a Wiener process for the Föllmer family (so that the target is the drift b of
dX = b ds + sigma dW) and W = eps for the others (so that it is the velocity dx_s/ds). These two equations are linear in
(x_1, W): an output of the network yields E[x_1|x] and E[eps|x], and those yield drift, velocity and score.

To add one: a class with six coefficients, and a line in TABLE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def value(function: Callable, *arguments: float | str):
    """function(*arguments) of flow times, as a Python float (or a tuple of them), computed in float64.

    Solvers take the same steps for every frame, so the results are cached. A float costs a GPU nothing, where a
    coefficient of shape (B,) costs a kernel for each of its operations.
    """
    times = (torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in arguments)
    result = function(*times)
    return tuple(map(float, result)) if isinstance(result, tuple) else float(result)


def across(coefficient: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …), to multiply a batch of the shape of x."""
    return coefficient.view(-1, *[1] * (x.ndim - 1))


def scale_of(diffusion: str) -> float:
    """How much of sigma a diffusion other than `follmer` is: 1 for `sigma`, else the number itself."""
    return 1.0 if diffusion == "sigma" else float(diffusion)


class Interpolant:
    """Coefficients take s: (B,) in [0, 1] and return (B,). Batches x, x0, x1, eps, output are (B, …) alike.

    What a network's output implies (network_input and everything from `solve` to `drift`) also takes a Python float
    for s, the same for the whole batch.

    c: size of the noise. output: what the network is taught, `drift` (the target above, as published) or `residual`
    (F with x_1 = x_0 + k F, or k F for interpolants that start at noise). k: the standard deviation of x_1 - x_0, or of
    x_1; used by `residual` only. weighting: of the squared error, see `weight`.
    """

    wiener = False  # W = sqrt(s) eps and X_0 = x_0 exactly; otherwise W = eps
    from_reference = True  # starts at x_0; otherwise at noise

    def __init__(
        self, c: float = 0.1, output: str = "drift", k: float = 1.0, weighting: str = "published"
    ):
        if output not in OUTPUTS or weighting not in WEIGHTINGS:
            raise ValueError(
                f"output must be one of {', '.join(OUTPUTS)} and weighting one of {', '.join(WEIGHTINGS)}, "
                f"got {output!r} and {weighting!r}"
            )
        self.c, self.output, self.k, self.weighting = c, output, k, weighting

    def at(
        self, coefficient: Callable[[Tensor], Tensor], s: Tensor | float, x: Tensor
    ) -> Tensor | float:
        """coefficient(s), to multiply x: a float for a float s, (B, 1, …) for s of shape (B,)."""
        return value(coefficient, s) if isinstance(s, float) else across(coefficient(s), x)

    # alpha, beta, sigma and their derivatives: each interpolant's own
    def gamma(self, s: Tensor) -> Tensor:
        return self.sigma(s) * s.sqrt() if self.wiener else self.sigma(s)

    def d_gamma(self, s: Tensor) -> Tensor:
        """Infinite at s = 0 for the Föllmer family, whose gamma grows like sqrt(s)."""
        return (
            self.d_sigma(s) * s.sqrt() + self.sigma(s) / (2 * s.sqrt())
            if self.wiener
            else self.d_sigma(s)
        )

    def interpolate(self, s: Tensor, x0: Tensor, x1: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(x_s, target), the target being what the network's output is compared with."""
        w = across(s.sqrt(), x1) * eps if self.wiener else eps
        x = (
            across(self.alpha(s), x1) * x0
            + across(self.beta(s), x1) * x1
            + across(self.sigma(s), x1) * w
        )
        if self.output == "residual":
            return x, (x1 - x0 if self.from_reference else x1) / self.k
        return x, across(self.d_alpha(s), x1) * x0 + across(self.d_beta(s), x1) * x1 + across(
            self.d_sigma(s), x1
        ) * w

    def weight(self, s: Tensor) -> Tensor:
        """Weight of the squared error of the output, (B,), by `weighting`: `published`, 1 on the error of the target;
        `velocity`, 1 / (1-s)^2 on that of E[x_1|x], which is how it enters the velocity of a path that ends at x_1;
        `uniform`, 1 on that of E[x_1|x]. At most 25, since each grows without bound somewhere in [0, 1]."""
        share = self.d_beta(s) - divide(
            self.d_sigma(s) * self.beta(s), self.sigma(s), 0.0
        )  # d target / d x_1, at fixed x_s
        of_x1 = {
            "published": share**2,
            "velocity": (1 - s).clamp(min=0.2) ** -2,
            "uniform": torch.ones_like(s),
        }
        weight = of_x1[self.weighting]
        if self.output == "drift":
            weight = (
                torch.ones_like(s)
                if self.weighting == "published"
                else weight / share.abs().clamp(min=1e-6) ** 2
            )
        return weight.clamp(max=25)

    def network_input(self, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """What the network is shown of x: x itself as published; for `residual`, centred and scaled by the moments of
        x_s given x_0 (x_1 - x_0, or x_1, having standard deviation k). At s = 0 there is nothing to show: zeros."""
        if self.output == "drift":
            return x
        centre = self.at(self.centre, s, x) * x0 if self.from_reference else 0
        return (x - centre) / self.at(self.deviation, s, x)

    def centre(self, s: Tensor) -> Tensor:
        """Mean of x_s given x_0, as a multiple of x_0, where x_1 has the mean x_0."""
        return self.alpha(s) + self.beta(s)

    def deviation(self, s: Tensor) -> Tensor:
        """Standard deviation of x_s given x_0, at least 1e-8."""
        return (self.beta(s) ** 2 * self.k**2 + self.gamma(s) ** 2).sqrt().clamp(min=1e-8)

    def solve(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(E[x_1|x], E[W|x]) from the network's output. Where s = 0 carries no x_1 (beta'(0) = 0), x_0 stands for it."""
        alpha, beta, sigma = (self.at(f, s, x) for f in (self.alpha, self.beta, self.sigma))
        rest = x - alpha * x0
        if self.output == "residual":
            x1 = self.k * output + (x0 if self.from_reference else 0)
            return x1, divide(rest - beta * x1, sigma, 0.0)
        derivatives = (self.d_alpha, self.d_beta, self.d_sigma)
        d_alpha, d_beta, d_sigma = (self.at(f, s, x) for f in derivatives)
        d_rest = output - d_alpha * x0
        determinant = beta * d_sigma - d_beta * sigma
        unknown = divide(rest, beta, x0)  # at s = 1 of some, x_s is x_1
        return (
            divide(d_sigma * rest - sigma * d_rest, determinant, unknown),
            divide(beta * d_rest - d_beta * rest, determinant, 0.0),
        )

    def estimate(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(E[x_1|x], E[eps|x]); the latter is 0 at s = 0 of the Föllmer family, where x_s holds no noise yet."""
        x1, w = self.solve(output, x, s, x0)
        return x1, divide(w, self.at(torch.sqrt, s, x), 0.0) if self.wiener else w

    def denoise(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """E[x_1 | x_s = x]."""
        return self.estimate(output, x, s, x0)[0]

    def noise(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """E[eps | x_s = x]."""
        return self.estimate(output, x, s, x0)[1]

    def score(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """grad log p_s(x | x_0) = -E[eps|x] / gamma; 0 where gamma = 0, where the output does not tell it."""
        return -divide(self.noise(output, x, s, x0), self.at(self.gamma, s, x), 0.0)

    def velocity(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """Drift of the probability-flow ODE, E[dx_s/ds | x_s = x]."""
        return self.drift(output, x, s, x0, 0.0)

    def drift(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor, g: Tensor | float
    ) -> Tensor:
        """Drift of dX = drift ds + g dW with the marginals of x_s: velocity + g^2/2 score. g: (B,) or a float, >= 0.

        In terms of W the noise part is (sigma' + (sigma^2 - g^2) / (2 sigma q)) W with q = s for the Föllmer family
        (from gamma' and score together), so that g = sigma gives sigma' W without a singularity at s = 0.
        """
        x1, w = self.solve(output, x, s, x0)
        sigma = self.at(self.sigma, s, x)
        g = across(g, x) if isinstance(g, Tensor) else g
        if self.wiener:
            q = across(s, x) if isinstance(s, Tensor) else s
            extra = divide(sigma**2 - g**2, 2 * sigma * q, 0.0) * w
        else:
            extra = divide(-(g**2), 2 * sigma, 0.0) * w
        if self.output == "drift":
            return output + extra
        derivatives = (self.d_alpha, self.d_beta, self.d_sigma)
        d_alpha, d_beta, d_sigma = (self.at(f, s, x) for f in derivatives)
        return d_alpha * x0 + d_beta * x1 + d_sigma * w + extra

    def diffusion(self, name: str, s: Tensor) -> Tensor:
        """g(s), (B,): `0`, `sigma`, `follmer`, or a number scaling sigma. Föllmer's, which has the least path KL, is
        g^2 = 2 gamma (gamma beta'/beta - gamma') (arXiv 2403.13724, thm. 3.1), infinite at s = 0 from noise."""
        if name != "follmer":
            return scale_of(name) * self.process_sigma(s)
        if self.wiener:
            s = s.clamp(min=1e-12)  # the limit at 0
        gamma = self.gamma(s)
        return (
            (2 * gamma * (gamma * self.d_beta(s) / self.beta(s) - self.d_gamma(s)))
            .clamp(min=0)
            .sqrt()
        )

    def memory(self, name: str, s: Tensor, t: Tensor) -> Tensor:
        """rho = exp(-1/2 int_s^t g^2 / gamma^2 du), (B,): how much of eps at s is left at t, under diffusion `name`."""
        if name == "follmer":
            rho = divide(self.beta(s) * self.gamma(t), self.beta(t) * self.gamma(s), 0.0)
        else:
            rho = self.process_memory(s, t) ** scale_of(name) ** 2
        # From a point mass there is no noise to keep: the first step is as trained, whatever g follows.
        return torch.where(s > 0, rho, torch.zeros_like(rho)) if self.wiener else rho

    def process_sigma(self, s: Tensor) -> Tensor:
        """The diffusion that `sigma` names: of the SDE as trained for the Föllmer family, in that family's likeness
        (the coefficient of W) for interpolants that are trained as an ODE."""
        return self.sigma(s)

    def process_memory(self, s: Tensor, t: Tensor) -> Tensor:
        """`memory` under process_sigma."""
        return (s / t).sqrt() if self.wiener else torch.exp(-(t - s) / 2)

    # A variable u in which paths of the probability flow are smooth, for solvers that step in time: s = u unless the noise
    # grows like sqrt(s). There Euler's step in s would be wrong however many are taken: from a point mass with
    # velocity x / (2s) it gives prod (1 + 1 / (2k)) sigma sqrt(h) -> 2 / sqrt(pi) = 1.128 times the deviation.
    def u_of(self, s: Tensor) -> Tensor:
        return s.sqrt() if self.wiener else s

    def s_of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(s, ds/du)"""
        return (u**2, 2 * u) if self.wiener else (u, torch.ones_like(u))


def divide(a: Tensor | float, b: Tensor | float, at_zero: Tensor | float) -> Tensor | float:
    """a / b, and `at_zero` where b = 0."""
    if isinstance(b, float):
        return a / b if b else at_zero
    zero = b == 0
    return torch.where(zero, at_zero, a / torch.where(zero, 1.0, b))


class Linear(Interpolant):
    """x_s = s x_1 + (1-s) eps: flow matching from noise, as in RIVER (arXiv 2211.14575)."""

    from_reference = False

    def alpha(self, s):
        return torch.zeros_like(s)

    def d_alpha(self, s):
        return torch.zeros_like(s)

    def beta(self, s):
        return s

    def d_beta(self, s):
        return torch.ones_like(s)

    def sigma(self, s):
        return 1 - s

    def d_sigma(self, s):
        return -torch.ones_like(s)


class Trig(Linear):
    """x_s = sin(pi s/2) x_1 + cos(pi s/2) eps: from noise at constant variance (arXiv 2303.08797)."""

    # sines only, since a sine is 0 exactly where it should be
    def beta(self, s):
        return torch.sin(s * (math.pi / 2))

    def d_beta(self, s):
        return torch.sin((1 - s) * (math.pi / 2)) * (math.pi / 2)

    def sigma(self, s):
        return torch.sin((1 - s) * (math.pi / 2))

    def d_sigma(self, s):
        return -torch.sin(s * (math.pi / 2)) * (math.pi / 2)


class Follmer(Interpolant):
    """x_s = (1-s) x_0 + s^2 x_1 + c (1-s) W_s: from the reference (arXiv 2403.13724, eq. 20)."""

    wiener = True

    def alpha(self, s):
        return 1 - s

    def d_alpha(self, s):
        return -torch.ones_like(s)

    def beta(self, s):
        return s**2

    def d_beta(self, s):
        return 2 * s

    def sigma(self, s):
        return self.c * (1 - s)

    def d_sigma(self, s):
        return torch.full_like(s, -self.c)


class FollmerLinear(Follmer):
    """x_s = (1-s) x_0 + s x_1 + c (1-s) W_s: the same with beta = s, so that the drift at s = 0 tells of x_1."""

    def beta(self, s):
        return s

    def d_beta(self, s):
        return torch.ones_like(s)


class Bridge(Interpolant):
    """x_s = (1-s) x_0 + s x_1 + sqrt(m^2 + c^2 s (1-s)) eps: a Brownian bridge of diffusion c, blurred by m at both ends
    (arXiv 2410.03229)."""

    m = 0.01

    def alpha(self, s):
        return 1 - s

    def d_alpha(self, s):
        return -torch.ones_like(s)

    def beta(self, s):
        return s

    def d_beta(self, s):
        return torch.ones_like(s)

    def sigma(self, s):
        return (self.m**2 + self.c**2 * s * (1 - s)).sqrt()

    def d_sigma(self, s):
        return self.c**2 * (1 - 2 * s) / (2 * self.sigma(s))

    def process_sigma(self, s):
        return torch.full_like(s, self.c)

    def process_memory(self, s, t):
        """int c^2 / gamma^2 du in partial fractions, gamma^2 = c^2 (u - low) (high - u)."""
        width = (1 + 4 * (self.m / self.c) ** 2) ** 0.5
        low, high = (1 - width) / 2, (1 + width) / 2
        return ((s - low) * (high - t) / ((high - s) * (t - low))) ** (1 / (2 * width))

    # the noise grows and shrinks like a square root at the two ends
    def u_of(self, s):
        return torch.asin(s.sqrt()) * (2 / math.pi)

    def s_of(self, u):
        return torch.sin(u * (math.pi / 2)) ** 2, torch.sin(u * math.pi) * (math.pi / 2)


OUTPUTS, WEIGHTINGS = ("drift", "residual"), ("published", "velocity", "uniform")
TABLE = {
    "linear": Linear,
    "follmer": Follmer,
    "follmer_linear": FollmerLinear,
    "bridge": Bridge,
    "trig": Trig,
}


def get(
    name: str, c: float = 0.1, output: str = "drift", k: float = 1.0, weighting: str = "published"
) -> Interpolant:
    """The interpolant of that name. KeyError for an unknown one."""
    return TABLE[name](c=c, output=output, k=k, weighting=weighting)
