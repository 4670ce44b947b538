"""Velocity networks, one per file.

module(z, s, reference, contexts, gaps, noise=None, step=None) -> (m B, C, h, w)

z: (m B, C, h, w) and s: (m B,), flow time in [0, 1], for m >= 1 draws of the noise per item, the
draws of an item one after the other. reference: (B, C, h, w). contexts: (B, K, C, h, w).
gaps: (B, K), frames from each context to the reference, >= 1. noise: (B,), level of the noise on
the given frames; `trunk` takes it, the others ignore it. step: (m B,), size of the solver step as
a share of the path; taken by the networks of STEP_SIZE if they are built with step_size=True. No
network depends on the interpolant.
"""

from __future__ import annotations

from torch import nn

from models.convnet import ConvNet
from models.joint import Joint
from models.trunk import Trunk
from models.unet import UNet
from models.uvit import UViT

TABLE = {"convnet": ConvNet, "joint": Joint, "trunk": Trunk, "unet": UNet, "uvit": UViT}
# Networks that can take the size of the solver step as a further input.
STEP_SIZE = ("convnet", "trunk", "unet", "uvit")


def build(name: str, latent_shape: tuple[int, int, int], **sizes) -> nn.Module:
    """Build a network for latents (C, h, w). KeyError for an unknown name.

    sizes: width, depth, mid_depth, heads, dropout, each with a default of the network's own. For
    all but `joint` also contexts = K; for `joint` given and future, numbers of frames; for `unet`
    also multipliers, padding and patch; for the networks of STEP_SIZE also step_size, a bool.
    """
    return TABLE[name](latent_shape, **sizes)
