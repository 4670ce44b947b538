"""In place of an autoencoder, for shards that hold latents already: those of Stable Diffusion's, as PLAICraft has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.console import UserError

SCALE = 0.18215  # that Stable Diffusion multiplies its latents by; those of PLAICraft are taken as not multiplied
RGB = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)


class Latents(nn.Module):
    """encode leaves latents as they are. decode shows them: through the AutoencoderKL in `folder`, by diffusers, at eight times
    their size; without one, as a preview of their own size, each of four channels a colour (RGB, the linear map in common use,
    of latents that are scaled). Of latents of another number of channels it shows the first as grey."""

    def __init__(self, folder: str = ""):
        super().__init__()
        self.register_buffer("rgb", torch.tensor(RGB).T)
        self.kl = autoencoder_kl(folder) if folder else None

    def encode(self, z: Tensor) -> Tensor:
        return z

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1]"""
        if self.kl is not None:
            return self.kl.decode(z).sample.clamp(-1, 1)
        if z.shape[1] != len(RGB):
            return (z[:, :1] / 3).expand(-1, 3, -1, -1).clamp(-1, 1)
        return torch.einsum("ij,bjhw->bihw", self.rgb, SCALE * z).clamp(-1, 1)


def autoencoder_kl(folder: str) -> nn.Module:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(
            f"vqvae.ckpt={folder} is decoded by diffusers, which is not installed: pip install diffusers, or leave "
            "vqvae.ckpt empty"
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: not a folder of an AutoencoderKL (it has no config.json)")
    return AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
