"""The VQGAN of taming-transformers (arXiv 2012.09841), as published with latent diffusion.

RIVER uses it for KTH and BAIR. Parameter names and shapes are those of the published checkpoints,
which load without renaming.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.layers import Published, apply_in_float32, nearest, norm

# dim: dimensions of a code. mult: width of each level, as a multiple of ch. attention: the level
# with attention, which depends on the image size that the published model was built for.
VARIANTS = {
    "taming_f8_small": {"dim": 4, "mult": (1, 2, 2, 4), "attention": 2},
    "taming_f8": {"dim": 4, "mult": (1, 2, 2, 4), "attention": 3},
    "taming_f16": {"dim": 8, "mult": (1, 1, 2, 2, 4), "attention": 4},
}


class ResBlock(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1 = norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = apply_in_float32(self.nin_shortcut, x)
        return h.float() + x


class Attention(nn.Module):
    """Self-attention with one head over all pixels."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # The fused kernels require (batch, heads, pixels, width) with contiguous channels.
        q, k, v = (
            part(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape)).float()


class Down(nn.Module):
    """Downsampling by a factor of two, with padding on the right and at the bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return apply_in_float32(self.conv, F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Upsampling by a factor of two."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = Attention(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution.

    attention: put attention after each block. resample: {published name: module} that changes the
    resolution; empty at the level that keeps it.
    """

    def __init__(
        self, width: int, out: int, blocks: int, attention: bool, resample: dict[str, nn.Module]
    ):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(out) for _ in range(blocks if attention else 0))
        self.resample = next(iter(resample), "")
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if self.resample:
            x = getattr(self, self.resample)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, dim: int, mult: tuple[int, ...], attention: int, ch: int):
        super().__init__()
        widths = [ch, *(ch * m for m in mult)]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(mult)):
            last = i == len(mult) - 1
            resample = {} if last else {"downsample": Down(widths[i + 1])}
            self.down.append(Level(widths[i], widths[i + 1], 2, i == attention, resample))
        self.mid = Middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = apply_in_float32(self.conv_in, x)
        for level in self.down:
            x = level(x)
        return apply_in_float32(self.conv_out, F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, dim: int, mult: tuple[int, ...], attention: int, ch: int):
        super().__init__()
        # Level i follows level i + 1.
        widths = [*(ch * m for m in mult), ch * mult[-1]]
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i in range(len(mult)):
            resample = {"upsample": Up(widths[i])} if i > 0 else {}
            self.up.append(Level(widths[i + 1], widths[i], 3, i == attention, resample))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(apply_in_float32(self.conv_in, x))
        for level in reversed(self.up):
            x = level(x)
        return apply_in_float32(self.conv_out, F.silu(self.norm_out(x)))


class Quantize(nn.Module):
    """Holds the codebook under its published name."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)


class Taming(Published):
    """(B, 3, H, W) in [-1, 1] <-> (B, dim, H / f, W / f), f = 2^(levels - 1), which is 8 or 16."""

    def __init__(
        self, dim: int, mult: tuple[int, ...], attention: int, codes: int = 16384, ch: int = 128
    ):
        super().__init__()
        self.encoder = Encoder(dim, mult, attention, ch)
        self.decoder = Decoder(dim, mult, attention, ch)
        self.quantize = Quantize(codes, dim)
        self.quant_conv = nn.Conv2d(dim, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, dim, 1)

    def to_latents(self, x: Tensor) -> Tensor:
        return apply_in_float32(self.quant_conv, self.encoder(x))

    def to_pixels(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(nearest(z, self.quantize.embedding.weight)))
