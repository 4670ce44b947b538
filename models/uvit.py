"""The published velocity network of RIVER (arXiv 2211.14575): a U-ViT, which is a transformer with
long skips.

Parameter names and shapes are those of the published checkpoints, which therefore load without
renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from models.shared import StepSize, repeat_given, run_block, sinusoidal

POSITIONS = 512  # size of the position embedding in rows and in columns


class PositionEncoding(nn.Module):
    """Learned 2-D embedding: half of the channels encode the column, the others the row."""

    def __init__(self, width: int):
        super().__init__()
        self.row_embed = nn.Embedding(POSITIONS, width // 2)
        self.col_embed = nn.Embedding(POSITIONS, width // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, h: int, w: int) -> Tensor:
        """-> (1, h * w, width)"""
        column = self.col_embed.weight[:w].expand(h, -1, -1)
        row = self.row_embed.weight[:h, None].expand(-1, w, -1)
        return torch.cat([column, row], -1).flatten(0, 1)[None]


class Block(nn.TransformerEncoderLayer):
    """A pre-norm transformer block. The torch layer holds the weights under the published names.
    The forward pass is written out here for speed, and so that torch.compile traces all of it."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout1(self.attend(self.norm1(x)))
        return x + self.dropout2(self.linear2(self.dropout(F.gelu(self.linear1(self.norm2(x))))))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention: (B, tokens, width) -> (B, tokens, width)."""
        B, T, W = x.shape
        layer = self.self_attn
        qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        q, k, v = qkv.view(B, T, 3, layer.num_heads, W // layer.num_heads).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, layer.dropout if self.training else 0.0)
        return layer.out_proj(mixed.transpose(1, 2).reshape(B, T, W))


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, heads, tokens, d)."""
    # In bf16 on CPUs with AMX, the backward pass of torch's fused attention is slower than this
    # explicit form. Without AMX both take equally long.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        weights = torch.softmax(
            (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1, dtype=torch.float32
        )
        return F.dropout(weights, dropout).to(v) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class UViT(nn.Module):
    """`depth` input blocks, `mid_depth` middle blocks, `depth` output blocks; output block i also
    takes the output of input block depth - 1 - i (long skip).

    Defaults are the published sizes, 98.1 M parameters at C = 4. width must be a multiple of heads
    and of 2. out_norm: normalisation in the projection to latents, `ln`, or `bn` as in RIVER on
    BAIR at 256 pixels. contexts: K. recompute: activation checkpointing, which stores only the
    input of each block and computes the block again in the backward pass. It takes less memory and
    a third more computation."""

    recompute = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        width: int = 768,
        depth: int = 4,
        mid_depth: int = 5,
        heads: int = 8,
        dropout: float = 0.05,
        out_norm: str = "ln",
        contexts: int = 1,
        step_size: bool = False,
    ):
        super().__init__()
        C, h, w = latent_shape
        self.width = width

        def block() -> nn.Module:
            return Block(width, heads, dropout)

        self.position_encoding = PositionEncoding(width)
        self.project_in = nn.Sequential(
            Rearrange("b c h w -> b (h w) c"), nn.Linear((2 + contexts) * C, width)
        )
        # The published name is misleading: the input is log(gap), not the flow time.
        self.time_projection = nn.Sequential(nn.Linear(1, 256), nn.ReLU(), nn.Linear(256, width))
        self.in_blocks = nn.ModuleList(block() for _ in range(depth))
        self.mid_blocks = nn.ModuleList(block() for _ in range(mid_depth))
        self.out_blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(2 * width, width), block()]) for _ in range(depth)
        )
        # The order of the modules gives their weights the published names.
        to_grid = Rearrange("b (h w) c -> b c h w", h=h, w=w)
        between = {
            "ln": [nn.GELU(), nn.LayerNorm(width), to_grid],
            "bn": [to_grid, nn.GELU(), nn.BatchNorm2d(width)],
        }
        self.project_out = nn.Sequential(
            nn.Linear(width, width), *between[out_norm], nn.Conv2d(width, C, 3, padding=1)
        )
        self.step_size = StepSize(width, width) if step_size else None

    def forward(
        self,
        z: Tensor,
        s: Tensor,
        reference: Tensor,
        contexts: Tensor,
        gaps: Tensor,
        noise: Tensor | None = None,
        step: Tensor | None = None,
    ) -> Tensor:
        reference, contexts, gaps = repeat_given(len(z), reference, contexts, gaps)
        h, w = z.shape[-2:]
        tokens = self.project_in(torch.cat([z, reference, contexts.flatten(1, 2)], 1))
        tokens = tokens + self.position_encoding(h, w)
        # The gap embedding is the mean over the K contexts, the same for all tokens.
        gap_embedding = self.time_projection(gaps.log().reshape(-1, 1))
        tokens = tokens + gap_embedding.unflatten(0, gaps.shape).mean(1)[:, None]
        # The flow time is a token of its own.
        time = sinusoidal(s, self.width, 200.0)
        if self.step_size is not None:
            time = time + self.step_size(step, s)
        tokens = torch.cat([time[:, None].to(tokens), tokens], 1)
        # The outputs of the input blocks, for the long skips.
        stored = []
        for block in self.in_blocks:
            tokens = run_block(block, self.recompute, tokens)
            stored.append(tokens)
        for block in self.mid_blocks:
            tokens = run_block(block, self.recompute, tokens)
        for join, block in self.out_blocks:
            tokens = run_block(block, self.recompute, join(torch.cat([stored.pop(), tokens], -1)))
        return self.project_out(tokens[:, 1:])

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are compiled, sharded and checkpointed one by one."""
        return [*self.in_blocks, *self.mid_blocks, *(block for _, block in self.out_blocks)]
