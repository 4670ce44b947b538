"""Consistency of solver steps: one step of size d leads where two steps of size d / 2 lead
(shortcut models, arXiv 2410.12557), for the `exact` step of every interpolant.

An exact ODE step from s to t holds E[x_1|x] and E[eps|x]. With x_s given, it depends on the
network's estimate of x_1 alone, linearly:

    x_t = alpha_t x_0 + (gamma_t / gamma_s) (x_s - alpha_s x_0) + A(s, t) x1_hat,
    A(s, t) = beta_t - beta_s gamma_t / gamma_s.

Two steps, s to m with x1_a and m to t with x1_b, therefore equal one step from s to t with

    x1_hat = w x1_a + (1 - w) x1_b,    w = (gamma_t / gamma_m) A(s, m) / A(s, t),

where w is in [0, 1], and 0 for t = 1 where gamma_1 = 0. The network has the step size, a share of
the path from the start to s = 1, as a further input, and is trained to give this x1_hat for it.
Step size 0 stands for the instantaneous E[x_1|x], which the regression of train.flow_loss trains,
and which the two steps of half the smallest size take.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import configs
from batches.batch import Batch
from forecaster import Forecaster
from interpolants import Interpolant, broadcast
from objectives.given import read_given
from runtime.process import generator

# Step sizes that are trained: 1, 1/2, …, 1 / 2^(LEVELS - 1).
LEVELS = 4


def draw_steps(
    config: configs.Config, shape: tuple[int, ...], step: int, device: torch.device, own: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes d (b,), places (b,) and noise (b, C, h, w) for this process's b items of a batch.

    d is 1, 1/2, … with equal probability. A place is the start of a step, as a share of the path:
    one of 0, d, 2 d, …, 1 - d.
    """
    # Drawn for the whole batch, so that they do not depend on the number of processes.
    noise = generator(device, config.train.seed, "steps", step)
    B = config.train.batch_size
    u = torch.rand(2, B, generator=noise, device=device)
    size = 2.0 ** -(u[0] * LEVELS).floor().clamp(max=LEVELS - 1)
    place = torch.minimum((u[1] / size).floor() * size, 1 - size)
    eps = torch.randn(B, *shape, generator=noise, device=device)
    return size[own], place[own], eps[own]


def step_weight(interpolant: Interpolant, s: Tensor, m: Tensor, t: Tensor) -> Tensor:
    """w of the module's docstring, (B,), for s < m < t with gamma(s) > 0 and gamma(m) > 0."""
    beta, gamma = interpolant.beta, interpolant.gamma

    def slope(a: Tensor, b: Tensor) -> Tensor:
        return beta(b) - beta(a) * gamma(b) / gamma(a)

    return gamma(t) / gamma(m) * slope(s, m) / slope(s, t)


def consistency_errors(
    net: nn.Module,
    forecaster: Forecaster,
    batch: Batch,
    draws: tuple[Tensor, Tensor, Tensor],
    level: Tensor | None,
    first: int,
) -> Tensor:
    """Weighted squared errors (B,) of the network's x_1 for a step of size d, against that of two
    steps of size d / 2, in units of the residual; 0 for items that are not chosen.

    batch, level: as for train.flow_loss. draws: see draw_steps. first: the number of the first item
    in the batch of all processes. Every flow.consistency-th item is chosen.
    """
    config, interpolant = forecaster.config, forecaster.interpolant
    every = config.flow.consistency
    rows = slice(-first % every, None, every)
    batch = Batch(*(part[rows] for part in batch))
    errors = torch.zeros(len(draws[0]), device=draws[0].device)
    if not len(batch.target):
        return errors
    d, place, eps = (part[rows] for part in draws)
    begin = config.sample.warm_start
    s, m, t = (begin + (1 - begin) * (place + share * d) for share in (0, 0.5, 1))
    x0 = batch.reference
    x, _ = interpolant.interpolate(s, x0, batch.target, eps)
    evaluate = read_given(net, *batch[1:], None if level is None else level[rows])

    def estimate(x: Tensor, s: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """-> (E[x_1|x], E[eps|x]) for this step size."""
        output = evaluate(interpolant.network_input(x, s, x0), s, step)
        return interpolant.estimate(output, x, s, x0)

    with torch.no_grad():
        half = torch.where(d > 2.0 ** (1 - LEVELS), d / 2, 0.0)
        x1_a, eps_a = estimate(x, s, half)
        alpha, beta, gamma = (
            broadcast(f(m), x) for f in (interpolant.alpha, interpolant.beta, interpolant.gamma)
        )
        x1_b, _ = estimate(alpha * x0 + beta * x1_a + gamma * eps_a, m, half)
        w = broadcast(step_weight(interpolant, s, m, t), x)
        target = w * x1_a + (1 - w) * x1_b
    x1, _ = estimate(x, s, d)
    found = ((x1 - target) / interpolant.k).square().mean((1, 2, 3))
    errors[rows] = interpolant.weight_of_x1(s) * found
    return errors
