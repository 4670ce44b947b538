"""RIVER's own VQVAE (arXiv 2211.14575), which it uses for CLEVRER.

Parameter names and shapes are those of the published checkpoint, which loads without renaming.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.layers import Published, apply_in_float32, nearest, norm


class ResBlock(nn.Module):
    """Two convolutions, the first followed by average pooling over factor x factor pixels."""

    def __init__(self, width: int, out: int, factor: int = 1):
        super().__init__()
        self.factor = factor
        # `bn1` and `bn2` are the published names of these group norms.
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = norm(out)
        if factor == 1 and width == out:
            self.downsample = nn.Identity()
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, out, 1, bias=False), nn.AvgPool2d(factor), norm(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(F.avg_pool2d(self.conv1(x), self.factor)), 0.2)
        return F.leaky_relu(
            self.bn2(self.conv2(h)).float() + apply_in_float32(self.downsample, x), 0.2
        )


class Up(nn.Module):
    """Upsampling by a factor of two."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Attended(nn.Module):
    """Base of encoder and decoder: residual block, attention over all pixels, residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.pre_attn_residual = ResBlock(width, width)
        self.post_attn_residual = ResBlock(width, width)
        self.attn_norm = norm(width)
        self.attn = nn.MultiheadAttention(width, 1, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        x = self.pre_attn_residual(x)
        pixels = self.attn_norm(x).flatten(2).transpose(1, 2)
        mixed = self.attn(pixels, pixels, pixels, need_weights=False)[0]
        return self.post_attn_residual(x + mixed.transpose(1, 2).reshape(x.shape))


class Encoder(Attended):
    def __init__(self, dim: int, widths: tuple[int, ...]):
        super().__init__(widths[-1])
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.residuals = nn.Sequential(*(ResBlock(a, b, 2) for a, b in zip(widths, widths[1:])))
        self.out_norm = norm(widths[-1])
        self.out_conv = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.residuals(apply_in_float32(self.conv_in, x)))
        return apply_in_float32(self.out_conv, F.silu(self.out_norm(x)))


class Decoder(Attended):
    def __init__(self, dim: int, widths: tuple[int, ...]):
        super().__init__(widths[-1])
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        pairs = list(zip(widths, widths[1:]))[::-1]
        self.residuals = nn.Sequential(*(nn.Sequential(ResBlock(b, a), Up(a)) for a, b in pairs))
        self.out_norm = norm(widths[0])
        self.out_conv = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residuals(self.attend(apply_in_float32(self.conv_in, x)))
        return apply_in_float32(self.out_conv, F.silu(self.out_norm(x))).tanh()


class Quantizer(nn.Module):
    """Holds the codebook under its published name."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)


class River(Published):
    """(B, 3, H, W) in [-1, 1] <-> (B, 4, H / 8, W / 8)."""

    def __init__(
        self, dim: int = 4, codes: int = 8192, widths: tuple[int, ...] = (32, 64, 128, 256)
    ):
        super().__init__()
        self.encoder = Encoder(dim, widths)
        self.decoder = Decoder(dim, widths)
        self.vector_quantizer = Quantizer(codes, dim)

    def to_latents(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def to_pixels(self, z: Tensor) -> Tensor:
        return self.decoder(nearest(z, self.vector_quantizer.embedding.weight))
