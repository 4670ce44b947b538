"""A network that predicts several future frames at once, given several past frames: the conv net,
with all frames stacked along its channels.

Outside the network the future frames are stacked along the height, (B, C, frames x h, w), so that
every computation per channel, or on latents of any size, applies to them as to one frame.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.convnet import ConvNet


def stack_frames(frames: Tensor) -> Tensor:
    """Stack frames along the height: (B, T, C, h, w) -> (B, C, T h, w)."""
    return frames.transpose(1, 2).flatten(2, 3)


def split_frames(x: Tensor, h: int) -> Tensor:
    """Invert stack_frames for frames of height h: (B, C, T h, w) -> (B, T, C, h, w)."""
    return x.unflatten(2, (-1, h)).transpose(1, 2)


class Joint(ConvNet):
    """z: (B, C, future h, w). contexts: (B, given, C, h, w), the past in order. reference and gaps
    are ignored: the last context is the reference, and the gaps are constant."""

    def __init__(
        self, latent_shape: tuple[int, int, int], given: int, future: int, width: int = 128, **sizes
    ):
        C, h, w = latent_shape
        super().__init__((future * C, h, w), width, **sizes)
        self.h = h
        self.conv_in = nn.Conv2d((future + given) * C, width, 3, padding=1)

    def forward(
        self,
        z: Tensor,
        s: Tensor,
        reference: Tensor,
        contexts: Tensor,
        gaps: Tensor,
        noise: Tensor | None = None,
    ) -> Tensor:
        # Inside, frames are channels. All past frames are contexts, so the reference is left empty.
        frames = split_frames(z, self.h).flatten(1, 2)
        no_reference = frames[:, :0]
        one_gap = gaps.new_ones(len(gaps), 1)
        out = super().forward(frames, s, no_reference, contexts, one_gap)
        return stack_frames(out.unflatten(1, (-1, z.shape[1])))
