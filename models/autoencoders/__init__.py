"""Autoencoders, one file each.

encode(x) -> z, before quantisation. decode(z) -> x, from the nearest codes. `of_fields` is true of
those that encode fields instead of RGB frames.
"""

from __future__ import annotations

from torch import nn

from models.autoencoders.identity import Identity
from models.autoencoders.latents import Latents
from models.autoencoders.river import River
from models.autoencoders.small import SmallVQVAE
from models.autoencoders.taming import VARIANTS, Taming

KINDS = ("small", *VARIANTS, "river", "latents", "none")


def build(kind: str, **sizes) -> nn.Module:
    """Build the autoencoder `kind`, one of KINDS, with initial weights.

    sizes: keyword arguments of `small` or `latents`. The other kinds have their published sizes.
    """
    if kind == "small":
        return SmallVQVAE(**sizes)
    if kind == "latents":
        return Latents(**sizes)
    if kind == "none":
        return Identity()
    if kind == "river":
        return River()
    return Taming(**VARIANTS[kind])
