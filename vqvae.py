"""Autoencoders: a small VQVAE of our own and its training. Nothing in here knows about flows.

Every autoencoder has the frozen interface that the video model works through:
    encode(x) -> z   (B, 3, H, W) in [-1, 1] -> (B, C, h, w), before quantisation
    decode(z) -> x   snaps each latent to its nearest code first
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import configs
import data
import runtime
from configs import Config
from console import UserError, progress
from shards import Shards


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Codebook(nn.Module):
    """K codes of C dimensions, followed as exponential moving averages of the latents assigned to them (van den Oord et
    al. 2017, appendix A.1). Codes that no latent has chosen for long restart at a latent of the batch at hand."""

    def __init__(self, codes: int, dim: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(codes, dim))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", torch.zeros(codes, dim))

    def nearest(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> index of the nearest code, (B * h * w,) int64. In float32 also under autocast: bf16 distances
        would choose another code here and there."""
        flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        with torch.autocast(z.device.type, enabled=False):  # |z - e|^2 less the |z|^2 that all codes share
            return torch.addmm(self.codes.square().sum(1), flat, self.codes.T, alpha=-2).argmin(1)

    def lookup(self, index: Tensor, like: Tensor) -> Tensor:
        B, C, h, w = like.shape
        return self.codes[index].view(B, h, w, C).movedim(-1, 1)

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, generator: torch.Generator | None) -> None:
        flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        first = not bool(self.count.any())
        count = torch.bincount(index, minlength=len(self.codes)).to(flat)
        total = torch.zeros_like(self.total).index_add_(0, index, flat)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        dead = torch.ones_like(self.count, dtype=torch.bool) if first else self.count < 0.01 * self.count.mean()
        pick = torch.randint(len(flat), (len(self.codes),), generator=generator, device=flat.device)
        mean = self.count.mean()
        self.total.copy_(torch.where(dead[:, None], flat[pick] * mean, self.total))
        self.count.copy_(torch.where(dead, mean, self.count))
        self.codes.copy_(self.total / self.count[:, None])


class SmallVQVAE(nn.Module):
    """A VQVAE small enough to train on two cores in two minutes: all of its blocks work at latent resolution.

    (B, 3, H, W) in [-1, 1] <-> (B, channels, H / downsample, W / downsample).
    """

    def __init__(self, downsample: int = 4, channels: int = 4, codes: int = 1024, width: int = 96, depth: int = 2):
        super().__init__()
        f = downsample
        # Patches overlap by half their size on each side, so that a shape crossing a border is seen whole.
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 2 * f, stride=f, padding=f // 2),
                                     *[ResBlock(width) for _ in range(depth)],
                                     nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 1))
        self.codebook = Codebook(codes, channels)
        self.decoder = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1),
                                     *[ResBlock(width) for _ in range(depth + 1)],
                                     nn.GroupNorm(8, width), nn.SiLU(),
                                     nn.Conv2d(width, 3 * f * f, 3, padding=1), nn.PixelShuffle(f))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.codebook.lookup(self.codebook.nearest(z), z).to(z)).clamp(-1, 1)

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss and what to log of it: reconstruction MSE in [0, 1] pixel units, codebook perplexity."""
        z = self.encoder(x).float()
        index = self.codebook.nearest(z)
        if self.training:
            self.codebook.update(z.detach(), index, generator)
        code = self.codebook.lookup(index, z)
        reconstruction = self.decoder(z + (code - z).detach()).float()  # straight-through
        error, commitment = F.mse_loss(reconstruction, x), F.mse_loss(z, code)
        share = torch.bincount(index, minlength=len(self.codebook.codes)).float() / len(index)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        # The commitment is weighed by the error's own size, so that its share stays the same as both shrink.
        return error + 0.25 * error.detach() * commitment, {"mse": error.detach() / 4, "perplexity": perplexity}


# ------------------------------------------------------------------------------------------------------ frozen weights
def build(vqvae: configs.Vqvae) -> SmallVQVAE:
    if vqvae.kind != "small":
        raise UserError(f"vqvae.kind={vqvae.kind}: published autoencoders cannot be loaded yet; "
                        "--set vqvae.kind=small trains our own")
    return SmallVQVAE(vqvae.downsample, vqvae.channels, vqvae.codes, vqvae.width, vqvae.depth)


def freeze(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    return module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load(path: str | Path, kind: str = "small") -> nn.Module:
    """A frozen autoencoder from a checkpoint of `train`, with encode(x) -> z and decode(z) -> x."""
    state = runtime.load_checkpoint(path)
    if not {"model", "config"} <= state.keys():
        raise UserError(f"{path}: not a VQVAE checkpoint (it lacks `model` or `config`)")
    vqvae = configs.from_dict(state["config"]).vqvae
    if vqvae.kind != kind:
        raise UserError(f"{path}: holds a VQVAE of kind {vqvae.kind}, not {kind}")
    module = build(vqvae)
    runtime.load_weights(module, state["model"], path)
    return freeze(module)


# ------------------------------------------------------------------------------------------------------------ training
def run_dir(config: Config, shards: Shards) -> Path:
    """Where the weights of this configuration on these frames live."""
    key = repr((config.vqvae, config.data.image_size, config.train.seed, shards.fingerprint()))
    name = f"vqvae-{config.dataset}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
    return Path(config.output.root) / "checkpoints" / name


def random_frames(shards: Shards, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, H, W, 3) uint8, uniform over all frames of a split."""
    flat = np.sort(rng.integers(shards.lengths.sum(), size=n))
    videos = np.searchsorted(shards.starts, flat, side="right") - 1
    return np.concatenate([shards.read(v, flat[videos == v] - shards.starts[v]) for v in np.unique(videos)])


def frame_pool(shards: Shards, rng: np.random.Generator, max_bytes: int = 1 << 29) -> np.ndarray:
    """(n, H, W, 3) uint8 to train on: the whole split where it fits, else runs of frames from all over it. One pass over
    the files: single frames at random cost more than a training step."""
    fits = max_bytes // int(np.prod(shards.shape))
    if shards.lengths.sum() <= fits:
        return np.concatenate([shards.read(v, slice(None)) for v in range(len(shards))])
    run = min(16, int(shards.lengths.max()))
    windows = data.draw_windows(shards.lengths, run, 0, fits // run, rng)
    return np.concatenate([shards.read(v, slice(a, a + run)) for v, a in zip(windows.video, windows.start)])


@torch.no_grad()
def validate(module: nn.Module, frames: np.ndarray, device: torch.device) -> float:
    """PSNR in dB of reconstructions, from the squared error over all frames together."""
    parts = [data.to_pixels(part, device) for part in np.array_split(frames, max(1, len(frames) // 64))]
    errors = [(module.decode(module.encode(x)) - x).square().mean((1, 2, 3)) / 4 for x in parts]
    return float(-10 * torch.cat(errors).mean().log10())


def train(config: Config, shards: Shards, val: Shards, device: torch.device) -> Path:
    """Train the small VQVAE, or go on where it stopped; -> its finished checkpoint. Logs PSNR and codebook perplexity."""
    dir, vqvae = run_dir(config, shards), config.vqvae
    state = runtime.resume(dir)
    step = state["step"] if state else 0
    if step >= vqvae.steps:
        return dir / "latest.pt"
    torch.manual_seed(runtime.seed_of(config.train.seed, "vqvae"))
    module = build(vqvae).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), vqvae.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if state:
        runtime.load_weights(module, state["model"], dir)
        optimizer.load_state_dict(state["opt"])
    pool = frame_pool(shards, runtime.rng(config.train.seed, "vqvae-pool"))
    held_out = random_frames(val, 512, runtime.rng(0, "vqvae-val"))
    log = runtime.Log(dir, config, step)
    with progress(vqvae.steps, "train VQVAE", "step", step) as bar:
        while step < vqvae.steps:
            for group in optimizer.param_groups:
                group["lr"] = runtime.learning_rate(step, vqvae.lr, vqvae.steps, warmup=min(50, vqvae.steps // 10))
            frames = pool[runtime.rng(config.train.seed, "vqvae", step).integers(len(pool), size=vqvae.batch_size)]
            with runtime.autocast(config.train.precision, device):
                loss, values = module.loss(data.to_pixels(frames, device),
                                           runtime.generator(device, config.train.seed, "codes", step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            if step % min(config.train.save_every, 200) == 0 or step == vqvae.steps:
                quality = validate(module.eval(), held_out, device)
                module.train()
                log.row(step, vqvae_psnr=quality, vqvae_mse=values["mse"].item(),
                        codebook_perplexity=values["perplexity"].item())
                bar.set_postfix_str(f"PSNR {quality:.1f} dB, perplexity {values['perplexity'].item():.0f}")
                runtime.save_checkpoint(dir, {"model": module.state_dict(), "opt": optimizer.state_dict(), "step": step,
                                              "config": configs.to_dict(config), "psnr": quality}, keep=1)
    log.close()
    return dir / "latest.pt"
