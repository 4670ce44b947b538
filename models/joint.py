"""Several future frames at once, given several past ones: the conv net with frames stacked along its channels.

Outside the network frames lie below one another, (B, C, frames x h, w), so that whatever is done channel by channel, or to
a batch of latents of any size, is done to them as to one frame.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.convnet import ConvNet


def below(frames: Tensor) -> Tensor:
    """(B, T, C, h, w) -> (B, C, T h, w): frames below one another."""
    return frames.transpose(1, 2).flatten(2, 3)


def apart(x: Tensor, h: int) -> Tensor:
    """(B, C, T h, w) -> (B, T, C, h, w), the inverse of `below`."""
    return x.unflatten(2, (-1, h)).transpose(1, 2)


class Joint(ConvNet):
    """z: (B, C, future h, w); context: (B, C, given h, w), the past. The reference, the last given frame, is in the context
    already, and gap is always 1: neither is looked at."""

    def __init__(
        self, latent_shape: tuple[int, int, int], given: int, future: int, width: int = 128, **sizes
    ):
        C, h, w = latent_shape
        super().__init__((future * C, h, w), width, **sizes)
        self.h = h
        self.conv_in = nn.Conv2d((future + given) * C, width, 3, padding=1)

    def forward(
        self, z: Tensor, s: Tensor, reference: Tensor, context: Tensor, gap: Tensor
    ) -> Tensor:
        stacked, past = (apart(x, self.h).flatten(1, 2) for x in (z, context))
        out = super().forward(stacked, s, past, past[:, :0], gap)
        return below(out.unflatten(1, (-1, z.shape[1])))
