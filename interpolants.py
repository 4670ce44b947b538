"""Stochastic interpolants: coefficients, regression targets, and what a network's output implies.

Every interpolant is

    x_s = alpha(s) x_0 + beta(s) x_1 + gamma(s) eps,    s in [0, 1],

with x_0 the reference latent, x_1 the next latent, eps standard normal (arXiv 2403.13724, eq. 2-5;
arXiv 2303.08797). It is written here as

    x_s    = alpha  x_0 + beta  x_1 + sigma  W
    target = alpha' x_0 + beta' x_1 + sigma' W.

For the Föllmer family, W = sqrt(s) eps is a Wiener process, so the target is the drift b of
dX = b ds + sigma dW. For the others, W = eps, so the target is the velocity dx_s/ds. Both equations
are linear in (x_1, W). The network's output therefore yields E[x_1|x] and E[eps|x], and these yield
drift, velocity and score.

To add an interpolant, write a class with six coefficients and add a line to TABLE.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def value(function: Callable, *arguments: float | str):
    """function(*arguments) in float64, as a Python float or a tuple of floats.

    Float arguments are flow times; strings are passed on as they are. Results are cached, because
    solvers take the same steps for every frame. A Python float needs no GPU kernel, whereas a
    coefficient of shape (B,) needs one for each operation.
    """
    times = (torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in arguments)
    result = function(*times)
    return tuple(map(float, result)) if isinstance(result, tuple) else float(result)


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, …), with as many axes as x, to broadcast over x."""
    return coefficient.view(-1, *[1] * (x.ndim - 1))


def divide(a: Tensor | float, b: Tensor | float, at_zero: Tensor | float) -> Tensor | float:
    """a / b where b is not 0, `at_zero` where b = 0."""
    if isinstance(b, float):
        return a / b if b else at_zero
    zero = b == 0
    return torch.where(zero, at_zero, a / torch.where(zero, 1.0, b))


def scale_of(diffusion: str) -> float:
    """The factor on sigma of a diffusion other than `follmer`: 1 for `sigma`, else the number."""
    return 1.0 if diffusion == "sigma" else float(diffusion)


class Interpolant:
    """Base class: everything that follows from alpha, beta, sigma and their derivatives.

    Coefficients map s: (B,) in [0, 1] to (B,). x, x0, x1, eps and output have one shape, (B, …).
    `network_input`, `solve` and the methods that follow `solve`, up to `drift`, also accept a
    Python float for s, shared by the whole batch.

    c: size of the noise.
    output: what the network learns. `drift`: the target above, as published. `residual`: F, with
        x_1 = x_0 + k F, or x_1 = k F for interpolants that start at noise. `v`: F of `shares`.
    k: the standard deviation of x_1 - x_0, or of x_1; unused by `drift`.
    weighting: weight of the squared error, see `weight`.
    """

    wiener = False  # True: W = sqrt(s) eps, and X_0 = x_0 exactly. False: W = eps
    from_reference = True  # True: the path starts at x_0. False: it starts at noise

    def __init__(
        self, c: float = 0.1, output: str = "drift", k: float = 1.0, weighting: str = "published"
    ):
        if output not in OUTPUTS or weighting not in WEIGHTINGS:
            raise ValueError(
                f"output must be one of {', '.join(OUTPUTS)} and weighting one of "
                f"{', '.join(WEIGHTINGS)}, got {output!r} and {weighting!r}"
            )
        self.c = c
        self.output = output
        self.k = k
        self.weighting = weighting

    def at(
        self, coefficient: Callable[[Tensor], Tensor], s: Tensor | float, x: Tensor
    ) -> Tensor | float:
        """coefficient(s) as a factor of x: a float for a float s, (B, 1, …) for s of shape (B,)."""
        return value(coefficient, s) if isinstance(s, float) else broadcast(coefficient(s), x)

    # ------------------------------------------------------------------------------ coefficients
    # Each interpolant defines alpha, beta, sigma and d_alpha, d_beta, d_sigma, the derivatives.
    def gamma(self, s: Tensor) -> Tensor:
        return self.sigma(s) * s.sqrt() if self.wiener else self.sigma(s)

    def d_gamma(self, s: Tensor) -> Tensor:
        """Infinite at s = 0 for the Föllmer family, whose gamma grows like sqrt(s)."""
        if self.wiener:
            return self.d_sigma(s) * s.sqrt() + self.sigma(s) / (2 * s.sqrt())
        return self.d_sigma(s)

    # ---------------------------------------------------------------------------------- training
    def interpolate(self, s: Tensor, x0: Tensor, x1: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """-> (x_s, target). The loss compares the network's output with the target."""
        alpha, beta, sigma = (broadcast(f(s), x1) for f in (self.alpha, self.beta, self.sigma))
        w = broadcast(s.sqrt(), x1) * eps if self.wiener else eps
        x = alpha * x0 + beta * x1 + sigma * w
        if self.output != "drift":
            residual = (x1 - x0 if self.from_reference else x1) / self.k
            if self.output == "residual":
                return x, residual
            signal, noise = (broadcast(share, x1) for share in self.shares(s))
            return x, noise * residual - signal * eps
        derivatives = (self.d_alpha, self.d_beta, self.d_sigma)
        d_alpha, d_beta, d_sigma = (broadcast(f(s), x1) for f in derivatives)
        return x, d_alpha * x0 + d_beta * x1 + d_sigma * w

    def weight_of_x1(self, s: Tensor) -> Tensor:
        """Weight w(s) of the squared error of E[x_1|x] / k, (B,), set by `weighting`.

        published: weight 1 on the error of the target. uniform: weight 1 on the error of E[x_1|x].
        velocity: weight 1 / (1-s)^2 on the error of E[x_1|x], because an error e in E[x_1|x]
        changes the velocity of a path that ends at x_1 by e / (1-s).
        Weights are at most 25, because some of them are unbounded on [0, 1].
        """
        weights = {
            "published": self.slope(s) ** 2,
            "velocity": (1 - s).clamp(min=0.2) ** -2,
            "uniform": torch.ones_like(s),
        }
        return weights[self.weighting].clamp(max=25)

    def weight(self, s: Tensor) -> Tensor:
        """`weight_of_x1`, as a weight of the squared error of the network's output, at most 25."""
        weight = self.weight_of_x1(s)
        if self.output == "v":
            # An error e of the output is one of k noise e in E[x_1|x].
            return weight * self.shares(s)[1] ** 2
        if self.output == "residual":
            return weight
        if self.weighting == "published":
            return torch.ones_like(s)
        return (weight / self.slope(s).abs().clamp(min=1e-6) ** 2).clamp(max=25)

    def slope(self, s: Tensor) -> Tensor:
        """d target / d x_1 at fixed x_s, the ratio of their errors."""
        return self.d_beta(s) - divide(self.d_sigma(s) * self.beta(s), self.sigma(s), 0.0)

    # ------------------------------------------------------------------- the network's input
    def network_input(self, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """The network's input for the state x.

        For output `drift`: x itself, as published. For the others: x minus the mean of x_s given
        x_0, divided by the standard deviation of x_s given x_0. Both assume that x_1 - x_0 (from
        noise: x_1) has mean 0 and standard deviation k. At s = 0 of a path that starts at x_0, this
        input is 0.
        """
        if self.output == "drift":
            return x
        centre = self.at(self.centre, s, x) * x0 if self.from_reference else 0
        return (x - centre) / self.at(self.deviation, s, x)

    def centre(self, s: Tensor) -> Tensor:
        """Factor on x_0 in the mean of x_s given x_0, where x_1 has the mean x_0."""
        return self.alpha(s) + self.beta(s)

    def deviation(self, s: Tensor) -> Tensor:
        """Standard deviation of x_s given x_0, at least 1e-8."""
        return (self.beta(s) ** 2 * self.k**2 + self.gamma(s) ** 2).sqrt().clamp(min=1e-8)

    def shares(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of signal and noise in the network's input, whose squares add up to 1.

        With R = (x_1 - x_0) / k, or x_1 / k from noise, input and output `v` are a rotation of R
        and eps (v-prediction, arXiv 2202.00512):

            input  = signal R + noise eps,
            output = noise R - signal eps.

        Towards s = 1 the input itself is R, and an error of the output no longer matters.
        """
        deviation = self.deviation(s)
        # At s = 0 of the Föllmer family both are 0: the limit of the noise is 1.
        noise = torch.where(s > 0, self.gamma(s) / deviation, 1.0)
        return self.k * self.beta(s) / deviation, noise

    # ---------------------------------------------------------- what the network's output implies
    def solve(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve the two linear equations for x_s and the target. -> (E[x_1|x], E[W|x]).

        Where the output does not depend on x_1 (s = 0 with beta'(0) = 0), x_0 replaces E[x_1|x].
        """
        alpha, beta, sigma = (self.at(f, s, x) for f in (self.alpha, self.beta, self.sigma))
        rest = x - alpha * x0
        if self.output == "residual":
            x1 = self.k * output + (x0 if self.from_reference else 0)
            return x1, divide(rest - beta * x1, sigma, 0.0)
        if self.output == "v":
            share = value(self.shares, s) if isinstance(s, float) else self.shares(s)
            signal, noise = (broadcast(a, x) if isinstance(a, Tensor) else a for a in share)
            inputs = self.network_input(x, s, x0)
            x1 = self.k * (signal * inputs + noise * output)
            w = noise * inputs - signal * output
            if self.wiener:
                w = self.at(torch.sqrt, s, x) * w
            return x1 + (x0 if self.from_reference else 0), w
        # rest   = beta  x_1 + sigma  W
        # d_rest = beta' x_1 + sigma' W,    solved by Cramer's rule
        derivatives = (self.d_alpha, self.d_beta, self.d_sigma)
        d_alpha, d_beta, d_sigma = (self.at(f, s, x) for f in derivatives)
        d_rest = output - d_alpha * x0
        determinant = beta * d_sigma - d_beta * sigma
        # The determinant is 0 in two cases. At s = 0 with beta'(0) = 0, beta is 0 too, and x_0
        # takes the place of x_1. Where x_s contains no noise, as on some paths at s = 1,
        # x_1 = rest / beta.
        x1_if_singular = divide(rest, beta, x0)
        x1 = divide(d_sigma * rest - sigma * d_rest, determinant, x1_if_singular)
        w = divide(beta * d_rest - d_beta * rest, determinant, 0.0)
        return x1, w

    def estimate(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> (E[x_1|x], E[eps|x]).

        At s = 0 of the Föllmer family x_s contains no noise, and the returned E[eps|x] is 0.
        """
        x1, w = self.solve(output, x, s, x0)
        eps = divide(w, self.at(torch.sqrt, s, x), 0.0) if self.wiener else w
        return x1, eps

    def denoise(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """E[x_1 | x_s = x]."""
        return self.estimate(output, x, s, x0)[0]

    def noise(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """E[eps | x_s = x]."""
        return self.estimate(output, x, s, x0)[1]

    def score(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """grad log p_s(x | x_0) = -E[eps|x] / gamma; 0 where gamma = 0 and no score exists."""
        return -divide(self.noise(output, x, s, x0), self.at(self.gamma, s, x), 0.0)

    def velocity(self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor) -> Tensor:
        """Drift of the probability-flow ODE, E[dx_s/ds | x_s = x]."""
        return self.drift(output, x, s, x0, 0.0)

    def drift(
        self, output: Tensor, x: Tensor, s: Tensor | float, x0: Tensor, g: Tensor | float
    ) -> Tensor:
        """Drift of dX = drift ds + g dW with the marginals of x_s: velocity + g^2/2 score.

        g: (B,) or a float, >= 0. With E[x_1|x] and E[W|x] of `solve`,

            drift = alpha' x_0 + beta' E[x_1|x] + n E[W|x],
            n = sigma' + (sigma^2 - g^2) / (2 sigma s)    for the Föllmer family,
            n = sigma' - g^2 / (2 sigma)                  for the others.

        n contains the noise of the velocity and the score. Written in this way, the drift of the
        Föllmer family has no singularity at s = 0 for g = sigma.
        """
        x1, w = self.solve(output, x, s, x0)
        sigma = self.at(self.sigma, s, x)
        g = broadcast(g, x) if isinstance(g, Tensor) else g
        if self.wiener:
            time = broadcast(s, x) if isinstance(s, Tensor) else s
            extra = divide(sigma**2 - g**2, 2 * sigma * time, 0.0) * w
        else:
            extra = divide(-(g**2), 2 * sigma, 0.0) * w
        # The output is the drift for g = sigma (Föllmer family) or g = 0, where `extra` is 0.
        if self.output == "drift":
            return output + extra
        derivatives = (self.d_alpha, self.d_beta, self.d_sigma)
        d_alpha, d_beta, d_sigma = (self.at(f, s, x) for f in derivatives)
        return d_alpha * x0 + d_beta * x1 + d_sigma * w + extra

    # ---------------------------------------------------------------------- diffusions
    def diffusion(self, name: str, s: Tensor) -> Tensor:
        """g(s), (B,). name: `0`, `sigma`, `follmer`, or a number that scales sigma.

        The Föllmer process has the least path KL divergence (arXiv 2403.13724, thm. 3.1):
        g_F^2 = 2 gamma (gamma beta'/beta - gamma'), infinite at s = 0 of a path from noise.
        """
        if name != "follmer":
            return scale_of(name) * self.process_sigma(s)
        if self.wiener:
            # The limit at s = 0 is finite; gamma' is not.
            s = s.clamp(min=1e-12)
        gamma = self.gamma(s)
        g_squared = 2 * gamma * (gamma * self.d_beta(s) / self.beta(s) - self.d_gamma(s))
        return g_squared.clamp(min=0).sqrt()

    def noise_correlation(self, name: str, s: Tensor, t: Tensor) -> Tensor:
        """rho = exp(-1/2 int_s^t g^2 / gamma^2 du), (B,), with g the diffusion `name`.

        rho is the correlation of the noise at s and at t: eps_t = rho eps_s + sqrt(1 - rho^2) xi.
        """
        if name == "follmer":
            rho = divide(self.beta(s) * self.gamma(t), self.beta(t) * self.gamma(s), 0.0)
        else:
            rho = self.process_correlation(s, t) ** scale_of(name) ** 2
        # A path from a point mass has no noise at s = 0. Its first step follows the trained SDE,
        # for every g.
        return torch.where(s > 0, rho, torch.zeros_like(rho)) if self.wiener else rho

    def process_sigma(self, s: Tensor) -> Tensor:
        """The diffusion named `sigma`.

        For the Föllmer family it is that of the trained SDE. For interpolants that are trained as
        an ODE it is, by analogy, the coefficient of W.
        """
        return self.sigma(s)

    def process_correlation(self, s: Tensor, t: Tensor) -> Tensor:
        """`noise_correlation` for the diffusion `sigma`."""
        return (s / t).sqrt() if self.wiener else torch.exp(-(t - s) / 2)

    # -------------------------------------------------------------------- time variable of solvers
    # ODE solvers integrate in a variable u in which the paths of the probability flow are smooth.
    # u = s, unless the noise grows like sqrt(s). In that case the velocity is x / (2s) near s = 0,
    # and Euler's method in s does not converge: with step size h the standard deviation becomes
    # sigma sqrt(h) prod_k (1 + 1 / (2k)), which tends to 2 / sqrt(pi) = 1.128 times the right one.
    def u_of(self, s: Tensor) -> Tensor:
        return s.sqrt() if self.wiener else s

    def s_of(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """-> (s, ds/du)."""
        return (u**2, 2 * u) if self.wiener else (u, torch.ones_like(u))


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
    """x_s = sin(pi s/2) x_1 + cos(pi s/2) eps: from noise, of constant variance (arXiv 2303.08797).

    The cosine is computed as sin(pi (1-s)/2), which is exactly 0 at s = 1.
    """

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
    """x_s = (1-s) x_0 + s x_1 + c (1-s) W_s: Follmer with beta = s.

    With beta'(0) = 1, the drift at s = 0 determines E[x_1|x_0].
    """

    def beta(self, s):
        return s

    def d_beta(self, s):
        return torch.ones_like(s)


class Bridge(Interpolant):
    """x_s = (1-s) x_0 + s x_1 + sqrt(m^2 + c^2 s (1-s)) eps (arXiv 2410.03229).

    A Brownian bridge of diffusion c, with noise of standard deviation m at both ends.
    """

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

    def process_correlation(self, s, t):
        """int_s^t c^2 / gamma^2 du by partial fractions: gamma^2 = c^2 (u - low) (high - u)."""
        width = (1 + 4 * (self.m / self.c) ** 2) ** 0.5
        low = (1 - width) / 2
        high = (1 + width) / 2
        return ((s - low) * (high - t) / ((high - s) * (t - low))) ** (1 / (2 * width))

    # Near both ends the standard deviation of the noise varies like a square root of s or of 1 - s.
    # In this u it is smooth.
    def u_of(self, s):
        return torch.asin(s.sqrt()) * (2 / math.pi)

    def s_of(self, u):
        s = torch.sin(u * (math.pi / 2)) ** 2
        return s, torch.sin(u * math.pi) * (math.pi / 2)


OUTPUTS = ("drift", "residual", "v")
WEIGHTINGS = ("published", "velocity", "uniform")
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
    """Build the interpolant `name`, one of TABLE; raises KeyError for an unknown name."""
    return TABLE[name](c=c, output=output, k=k, weighting=weighting)
