"""Autoencoders, each a file: encode(x) -> z before quantisation, decode(z) -> x from the nearest codes."""

from __future__ import annotations

from torch import nn

from models.autoencoders.latents import Latents
from models.autoencoders.river import River
from models.autoencoders.small import SmallVQVAE
from models.autoencoders.taming import VARIANTS, Taming

KINDS = ("small", *VARIANTS, "river", "latents")


def build(kind: str, **sizes) -> nn.Module:
    """The autoencoder of that kind, with weights to be loaded. sizes: those of `small`, or `latents`' folder; the others' are
    as published."""
    if kind in ("small", "latents"):
        return (SmallVQVAE if kind == "small" else Latents)(**sizes)
    return River() if kind == "river" else Taming(**VARIANTS[kind])
