"""Muon (Jordan et al. 2024): orthogonalised momentum for the weight matrices of the blocks, AdamW
for all other weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, which brings all singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) -> nearly orthogonal matrices with the same singular vectors.

    The singular values of the result lie in about [0.7, 1.2].
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    # The Frobenius norm bounds the largest singular value.
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups with `muon`: there, Nesterov momentum, orthogonalised.

    Convolutions count as matrices (out, in x height x width). Like fused AdamW, `step` leaves all
    weights and moments unchanged where `found_inf` is 1, and does not wait for the device.
    """

    def __init__(
        self, net: nn.Module, lr: float, muon_lr: float, momentum: float = 0.95, **options
    ):
        hidden = []
        for block in net.blocks:
            hidden += [weight for weight in block.parameters() if weight.ndim >= 2]
        known = {id(weight) for weight in hidden}
        rest = [weight for weight in net.parameters() if id(weight) not in known]
        groups = [
            {"params": rest, "muon": False},
            {"params": hidden, "muon": True, "ratio": muon_lr / lr, "momentum": momentum},
        ]
        super().__init__(groups, lr, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group["muon"]:
                self.update_matrices(group)
        return super().step(closure)

    def update_matrices(self, group: dict) -> None:
        """Update the weights of a group, and drop their gradients, so that AdamW skips them."""
        # Matrices of one shape are orthogonalised in one call.
        by_shape: dict[tuple, list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                shape = (len(weight), weight[0].numel())
                by_shape.setdefault(shape, []).append(weight)
        bad = getattr(self, "found_inf", torch.zeros((), device=group["params"][0].device))
        for (rows, columns), weights in by_shape.items():
            moments = [self.moment(weight) for weight in weights]
            grads = torch.stack([weight.grad.reshape(rows, columns) for weight in weights])
            old = torch.stack([moment.reshape(rows, columns) for moment in moments])
            new = torch.where(bad > 0, old, old.lerp(grads, 1 - group["momentum"]))
            ahead = torch.where(bad > 0, 0.0, grads.lerp(new, group["momentum"]))
            # The scale of an update does not depend on the shape of the matrix.
            size = group["lr"] * group["ratio"] * max(1, rows / columns) ** 0.5
            change = orthogonalize(ahead) * -size
            for weight, moment, value, delta in zip(weights, moments, new, change):
                moment.copy_(value.view(moment.shape))
                weight.add_(delta.view(weight.shape))
                weight.grad = None
                self.state[weight]["step"] += 1 - bad

    def moment(self, weight: Tensor) -> Tensor:
        """The momentum of a weight, 0 before the first update."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
            # As AdamW counts them: updates that changed the weight.
            state["step"] = torch.zeros((), device=weight.device)
        return state["momentum_buffer"]
