"""Code shared by the autoencoders: normalisation, precision, vector quantisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Published(nn.Module):
    """Base class of the published autoencoders; subclasses define to_latents and to_pixels.

    bf16: run both under autocast to bf16.
    """

    bf16 = False

    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.to_latents(x).float()

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            return self.to_pixels(z).float()


def norm(width: int) -> nn.GroupNorm:
    """The normalisation of the published autoencoders."""
    return nn.GroupNorm(32, width, eps=1e-6)


def apply_in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in float32, also under autocast.

    For layers on the residual stream, which in bf16 would change the latents by 1.5 %.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


@torch.no_grad()
def nearest_index(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code by squared distance: (B, C, h, w), (K, C) -> (B * h * w,) int64.

    Distances are sums of squared differences. The usual |e|^2 - 2 z.e would lose the digits that
    distinguish close codes of large |e|, and its matrix product would be computed in bf16
    (autocast) or TF32.
    """
    flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
    channels = codes.float().T.contiguous()
    # Chunks of rows limit the memory. They fit into a CPU's cache, and are large enough to keep a
    # GPU busy.
    entries = 1 << 18 if z.device.type == "cpu" else 1 << 24
    index = []
    for rows in flat.split(max(1, entries // len(codes))):
        distance = (rows[:, 0, None] - channels[0]).square_()
        for c in range(1, len(channels)):
            difference = rows[:, c, None] - channels[c]
            distance.addcmul_(difference, difference)
        index.append(distance.argmin(1))
    return torch.cat(index)


def lookup(index: Tensor, codes: Tensor, like: Tensor) -> Tensor:
    """The codes at the indices of nearest_index, in the shape of `like`, (B, C, h, w)."""
    B, C, h, w = like.shape
    return codes[index].view(B, h, w, C).movedim(-1, 1)


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Replace each latent of (B, C, h, w) by its nearest code."""
    return lookup(nearest_index(z, codes), codes, z).to(z)
