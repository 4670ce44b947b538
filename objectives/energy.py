"""Train the sampler itself, of one or two evaluations, on the fair energy score.

The energy score E|X - y| - E|X - X'| / 2 is strictly proper: its expectation over y is least if the
samples X have the distribution of y (Gneiting and Raftery 2007, eq. 22). With M samples, the second
expectation is the mean over pairs of different samples, so that the score, and with it the
gradient, is unbiased for every M >= 2 (Ferro 2014).

A sample must depend on noise. The sampler solves the probability-flow ODE by `exact` steps, whose
only noise is that of the start:

- Interpolants from noise, and the bridge, start at s = 0, where x_0 has noise.
- An interpolant with gamma(0) = 0 starts at x_0 exactly. One exact step from s = 0 to s = 1 gives
  E[x_1|x_0], the same for all noise. So the sampler starts at a small s_0 = flow.begin, at

      x = (alpha + beta) x_0 + gamma eps,    coefficients at s_0,

  which is the marginal of x_{s_0} with x_0 in place of the unknown x_1 (`warm_start`). The error is
  beta (x_1 - x_0), against noise of size gamma. For follmer it is s_0^1.5 k / (c (1 - s_0)) in
  units of the noise, with k the deviation of x_1 - x_0: one percent for s_0 = 0.05 and k = c. So
  the untrained sampler is that of the trained interpolant, for any number of steps, and starts the
  training. The larger s_0, the larger this error, and the more the network trusts a state that
  holds no x_1. Leaving out beta x_0 would only shift the network's input by a function of x_0. The
  alternative, one evaluation at s = 0 for E[x_1|x_0], then noise, spends an evaluation without
  noise.

The residual network's input is scaled to unit variance, so the noise is of size 1 in it. That of
flow.output=drift is the state itself, with noise of size gamma: there a larger flow.begin helps.

Members of an item share the given frames, which `trunk` reads once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import configs
from batches.batch import Batch, Later
from forecaster import Forecaster
from models.shared import repeat_given
from objectives.given import read_given
from runtime.process import generator
from solvers import integrate

# Height and width of the patches of flow.local, in values of the latent.
PATCH = 4


# -------------------------------------------------------------------- scores
def distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distances from the members to the truth, and between different members, (B,) each.

    x: (B, M, P, D), M >= 2 members of P parts with D values each. y: (B, P, D). A distance is the
    root mean square over D, and the result a mean over P. The gradient of a distance of 0 is 0.
    """
    M, D = x.shape[1], x.shape[3]
    # torch defines the gradient of this norm as 0 at 0, unlike that of a square root.
    norm = torch.linalg.vector_norm
    error = norm(x - y[:, None], dim=-1).mean((1, 2))
    pairs = torch.zeros_like(error)
    for lag in range(1, M):
        pairs = pairs + norm(x[:, lag:] - x[:, :-lag], dim=-1).mean(2).sum(1)
    return error / D**0.5, pairs * (2 / (M * (M - 1)) / D**0.5)


def fair_energy(x: Tensor, y: Tensor) -> Tensor:
    """Fair energy score (B,) of members x: (B, M, P, D) for the truth y: (B, P, D), the mean over
    the P parts. For D = 1 it is the fair CRPS."""
    error, pairs = distances(x, y)
    return error - pairs / 2


def whole(z: Tensor) -> Tensor:
    """(…, C, h, w) -> (…, 1, C h w)."""
    return z.flatten(-3).unsqueeze(-2)


def values(z: Tensor) -> Tensor:
    """(…, C, h, w) -> (…, C h w, 1)."""
    return z.flatten(-3).unsqueeze(-1)


def patches(z: Tensor) -> Tensor:
    """(…, C, h, w) -> (…, patches, C PATCH^2): patches side by side. Rows and columns that fill no
    patch are left out; a latent smaller than a patch is one patch."""
    size = min(PATCH, *z.shape[-2:])
    cut = F.unfold(z.reshape(-1, *z.shape[-3:]), size, stride=size)
    return cut.mT.reshape(*z.shape[:-3], *cut.mT.shape[1:])


def score(x: Tensor, y: Tensor, local: float) -> dict[str, Tensor]:
    """Scores of members x: (B, M, C, h, w) for the truth y: (B, C, h, w), each (B,).

    loss: the fair energy score of the whole latent, and `local` times those of patches and of
    single values. distance, spread: mean distances from the members to the truth and between
    members, of the whole latent; they are equal if the members have the distribution of the truth.
    """
    distance, spread = distances(whole(x), whole(y))
    loss = distance - spread / 2
    if local:
        for part in (patches, values):
            loss = loss + local * fair_energy(part(x), part(y))
    return {"loss": loss, "distance": distance.detach(), "spread": spread.detach()}


# -------------------------------------------------------------------- the sampler
def draw_members(
    config: configs.Config, shape: tuple[int, ...], step: int, device: torch.device, own: slice
) -> Tensor:
    """Noise of the members for this process's b items of a batch: (b, flow.unroll, flow.members,
    C, h, w)."""
    flow = config.flow
    # Drawn for the whole batch, so that it does not depend on the number of processes.
    noise = generator(device, config.train.seed, "noise", step, 0)
    size = (config.train.batch_size, flow.unroll, flow.members, *shape)
    return torch.randn(size, generator=noise, device=device)[own]


def sample_members(
    net: nn.Module, forecaster: Forecaster, batch: Batch, eps: Tensor, level: Tensor | None = None
) -> Tensor:
    """Sample m members of the next frame of each of B items by the trained sampler, with gradient
    -> (m B, C, h, w), the members of an item one after the other.

    batch: normalised; its target is not read. eps: (m B, C, h, w), the noise. level: as for
    train.flow_loss.
    """
    config, interpolant = forecaster.config, forecaster.interpolant
    evaluate = read_given(net, *batch[1:], level)
    (x0,) = repeat_given(len(eps), batch.reference)

    def field(x: Tensor, s: float) -> Tensor:
        times = torch.full((len(x),), s, device=x.device)
        return evaluate(interpolant.network_input(x, s, x0), times)

    return integrate(
        field,
        interpolant,
        x0,
        config.flow.evaluations,
        generator=lambda like: eps,
        warm_start=config.sample.warm_start,
        float_times=True,
    )


def member_losses(
    net: nn.Module,
    forecaster: Forecaster,
    batch: Batch,
    eps: Tensor,
    level: Tensor | None,
    later: Later | None,
) -> dict[str, Tensor]:
    """Entries of `score` per item of a normalised batch, (B,) each, which carry the gradient.

    eps: see draw_members. later: normalised, for flow.unroll > 1: each member is rolled out from
    its own forecasts, with gradient, and the loss is the mean over the frames.
    """
    B, frames, M = eps.shape[:3]
    local = forecaster.config.flow.local
    x = sample_members(net, forecaster, batch, eps[:, 0].flatten(0, 1), level)
    found = [score(x.unflatten(0, (B, M)), batch.target, local)]
    weights = [torch.ones(B, device=x.device)]
    for k in range(1, frames):
        batch = advance(forecaster, batch, x)
        x = sample_members(net, forecaster, batch, eps[:, k].flatten(0, 1))
        found.append(score(x.unflatten(0, (B, M)), later.frames[:, k - 1], local))
        weights.append(later.valid[:, k - 1])
    total = torch.stack(weights).sum(0)
    sums = {}
    for name in found[0]:
        parts = [weight * part[name] for weight, part in zip(weights, found)]
        sums[name] = torch.stack(parts).sum(0) / total
    return sums


def advance(forecaster: Forecaster, batch: Batch, x: Tensor) -> Batch:
    """The given frames of the next frame of a roll-out, for data.context=last: the forecast x
    (m B, C, h, w) becomes the reference, and the reference the first context.

    With sample.reencode the forecast is decoded and encoded, as in sampling. The gradient passes
    this step unchanged (straight-through).
    """
    if forecaster.config.sample.reencode:
        with torch.no_grad():
            change = forecaster.encode_again(x.detach()) - x.detach()
        x = x + change
    reference, contexts, gaps = repeat_given(len(x), *batch[1:])
    return Batch(
        x,
        x,
        torch.cat([reference[:, None], contexts[:, :-1]], 1),
        torch.cat([torch.ones_like(gaps[:, :1]), gaps[:, :-1] + 1], 1),
    )
