"""The network as a function of its state, for given frames that are read once where possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from runtime import parallel

# evaluate(z, s) or evaluate(z, s, step) -> the network's output, (m B, C, h, w) float32
Evaluate = Callable[..., Tensor]


def read_given(
    net: nn.Module,
    reference: Tensor,
    contexts: Tensor,
    gaps: Tensor,
    level: Tensor | None = None,
) -> Evaluate:
    """A function evaluate(z, s, step=None) of states z (m B, C, h, w), at flow times s and for step
    sizes (m B,), see models. The caller sets the precision (autocast).

    A network with a trunk reads the given frames here, once for all evaluations. A data-parallel or
    compiled network reads them in each evaluation, because only its call may be used.
    """
    if hasattr(net, "encode") and parallel.is_plain(net):
        return partial(decode, net, net.encode(reference, contexts, gaps, level))
    return partial(call, net, (reference, contexts, gaps), level)


def decode(
    net: nn.Module, read: tuple[Tensor, Tensor], z: Tensor, s: Tensor, step: Tensor | None = None
) -> Tensor:
    return net.decode(z, s, *read, *(() if step is None else (step,))).float()


def call(
    net: nn.Module,
    given: tuple[Tensor, ...],
    level: Tensor | None,
    z: Tensor,
    s: Tensor,
    step: Tensor | None = None,
) -> Tensor:
    if step is not None:
        return net(z, s, *given, level, step).float()
    return net(z, s, *given, *(() if level is None else (level,))).float()
