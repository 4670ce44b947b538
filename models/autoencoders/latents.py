"""Stand-in for an autoencoder, for shards that hold latents, such as those of PLAICraft."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.console import UserError

# Stable Diffusion multiplies its latents by this factor. PLAICraft's are assumed to be unscaled.
SCALE = 0.18215
# A linear approximation of the decoder, in common use: the RGB colour of one unit of each scaled
# latent channel.
RGB = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)


class Latents(nn.Module):
    """encode is the identity; decode renders latents as RGB images.

    With a `folder`, decode uses the AutoencoderKL of diffusers in it, and images are eight times as
    large as the latents. Without one, images have the size of the latents: a linear map of four
    channels to RGB, or the first channel in grey for any other number of channels.
    """

    def __init__(self, folder: str = ""):
        super().__init__()
        self.register_buffer("rgb", torch.tensor(RGB).T)
        self.kl = autoencoder_kl(folder) if folder else None

    def encode(self, z: Tensor) -> Tensor:
        return z

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) in [-1, 1]."""
        if self.kl is not None:
            return self.kl.decode(z).sample.clamp(-1, 1)
        if z.shape[1] != len(RGB):
            return (z[:, :1] / 3).expand(-1, 3, -1, -1).clamp(-1, 1)
        return torch.einsum("ij,bjhw->bihw", self.rgb, SCALE * z).clamp(-1, 1)


def autoencoder_kl(folder: str) -> nn.Module:
    """Load the AutoencoderKL of diffusers in a local folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(
            f"vqvae.ckpt={folder} is decoded by diffusers, which is not installed: "
            "pip install diffusers, or leave vqvae.ckpt empty"
        ) from None
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: not the folder of an AutoencoderKL (it has no config.json)")
    return AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
