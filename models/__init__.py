"""Velocity networks, each a file: module(z, s, reference, context, gap) -> (B, C, h, w).

z, reference, context: (B, C, h, w); s: (B,) flow time in [0, 1]; gap: (B,) frames from context to reference, >= 1.
None of them knows what an interpolant is.
"""

from __future__ import annotations

from torch import nn

from models.convnet import ConvNet
from models.joint import Joint
from models.uvit import UViT

TABLE = {"convnet": ConvNet, "joint": Joint, "uvit": UViT}


def build(name: str, latent_shape: tuple[int, int, int], **sizes) -> nn.Module:
    """The network of that name for latents (C, h, w); sizes: width, depth, mid_depth, heads, dropout, each with the
    network's own default; for `joint` also given and future, its numbers of frames. KeyError for an unknown name."""
    return TABLE[name](latent_shape, **sizes)
