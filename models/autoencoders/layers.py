"""What the autoencoders share: normalisation, precision, vector quantisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Published(nn.Module):
    """encode and decode by the subclass's to_latents and to_pixels, in bf16 where `bf16` is set."""

    bf16 = False

    def encode(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.to_latents(x).float()

    def decode(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            return self.to_pixels(z).float()


def norm(width: int) -> nn.GroupNorm:
    """The published ones' normalisation."""
    return nn.GroupNorm(32, width, eps=1e-6)


def precise(layer: nn.Module, x: Tensor) -> Tensor:
    """In float32 also under autocast, for what adds to or stands in for the sum over all blocks: in bf16 its roundings would
    put the latents 1.5 % off."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


@torch.no_grad()
def nearest_index(z: Tensor, codes: Tensor) -> Tensor:
    """(B, C, h, w), (K, C) -> index of the nearest code by squared distance, (B * h * w,) int64.

    Distances are float32 also under autocast and where TF32 is on: there is no matrix product in
    them. The differences themselves are squared: |e|^2 - 2 z.e cancels the digits that tell close
    codes apart where |e| is large.
    """
    flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
    channels = codes.float().T.contiguous()
    # Chunks of rows bound the memory: small enough for a CPU's cache, large enough for a GPU.
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
    """Indices of nearest_index -> codes, of the shape of `like`, (B, C, h, w)."""
    B, C, h, w = like.shape
    return codes[index].view(B, h, w, C).movedim(-1, 1)


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Each latent of (B, C, h, w) replaced by its nearest code."""
    return lookup(nearest_index(z, codes), codes, z).to(z)
