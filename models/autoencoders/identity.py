"""Stand-in for an autoencoder, for fields that are their own latents (vqvae.kind=none)."""

from __future__ import annotations

from torch import Tensor, nn


class Identity(nn.Module):
    """encode and decode return their input, (B, C, H, W). The network forecasts the field itself,
    normalised per channel as any latent is."""

    # It encodes fields, not RGB frames.
    of_fields = True

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, z: Tensor) -> Tensor:
        return z
