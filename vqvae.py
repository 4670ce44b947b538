"""Load frozen autoencoders; train the small one. Nothing here depends on the interpolant.

Every autoencoder has two methods:
    encode(x) -> z   (B, 3, H, W) in [-1, 1] -> (B, C, h, w), before quantisation
    decode(z) -> x   replaces each latent by its nearest code first

The small one also encodes fields of any number of channels, without limits on their values.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

import configs
import data
from batches.batch import to_pixels
from batches.fields import field_std, limit_frames
from batches.latents import MIRRORS, flip_frames
from batches.windows import draw_windows
from configs import Config
from models import autoencoders
from models.autoencoders.layers import Published
from runtime import checkpoints, logs, published
from runtime.budget import seconds_per_item
from runtime.console import UserError, progress
from runtime.muon import Muon
from runtime.process import (
    Process,
    autocast,
    generator,
    learning_rate,
    numpy_generator,
    seed_of,
    uses_bf16,
)
from shards import Shards

# Number of held-out frames on which the VQVAE is validated.
HELD_OUT = 512


def ensure_vqvae(config: Config, shards: Shards, process: Process) -> nn.Module:
    """Load the frozen autoencoder; without vqvae.ckpt, train the small one first, on rank 0."""
    path = config.vqvae.ckpt
    if not path and not config.vqvae.stored:
        if process.first:
            val = data.open_split(config, data.held_out_split(config))
            path = train(config, shards, val, process.device)
        path = process.agree(path)
    return freeze(load(path, config.vqvae.kind), process.device, config.train.precision)


# ----------------------------------------------------------------------------------- frozen weights
def build(vqvae: configs.Vqvae, fields: int = 0) -> nn.Module:
    """Build the autoencoder of a config, with initial weights. fields: see SmallVQVAE."""
    if vqvae.kind != "small":
        return autoencoders.build(vqvae.kind)
    return autoencoders.build(
        "small",
        downsample=vqvae.downsample,
        channels=vqvae.channels,
        codes=vqvae.codes,
        width=vqvae.width,
        depth=vqvae.depth,
        noise=vqvae.noise,
        sharpness=vqvae.sharpness,
        fields=fields,
    )


def field_channels(weights: dict) -> int:
    """The number of channels of the fields that a small VQVAE encodes; 0 if it encodes frames."""
    return len(weights["mean"]) if "mean" in weights else 0


def freeze(
    module: nn.Module, device: torch.device | str = "cpu", precision: str = "float32"
) -> nn.Module:
    """Move a module to the device, set it to evaluation mode, and turn its gradients off.

    precision: as train.precision, for published autoencoders. The small one stays in float32.
    """
    if isinstance(module, Published):
        module.bf16 = uses_bf16(precision, torch.device(device))
    return module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load(path: str | Path, kind: str = "small") -> nn.Module:
    """Load a frozen autoencoder, with encode(x) -> z and decode(z) -> x.

    kind: one of autoencoders.KINDS. path: a checkpoint of `train` for `small`; a folder for
    diffusers, or "", for `latents`, see models/autoencoders/latents.py; unused for `none`; a
    published file otherwise.
    """
    if kind == "latents":
        return freeze(autoencoders.build(kind, folder=str(path)))
    if kind == "none":
        return freeze(autoencoders.build(kind))
    state = checkpoints.load_checkpoint(path)
    if kind == "small":
        if "model" not in state or not isinstance(state.get("config"), dict):
            raise UserError(f"{path}: not a VQVAE checkpoint (it lacks `model` or `config`)")
        vqvae = configs.from_dict(state["config"]).vqvae
        weights = state["model"]
        if vqvae.kind != kind:
            raise UserError(f"{path}: holds a VQVAE of kind {vqvae.kind}, not {kind}")
    else:
        vqvae = configs.Vqvae(kind=kind)
        weights = published.autoencoder_weights(state, path)
    module = build(vqvae, field_channels(weights) if kind == "small" else 0)
    checkpoints.load_weights(module, weights, path)
    return freeze(module)


# ----------------------------------------------------------------------------------------- training
def updates_left(config: Config, shards: Shards | None) -> int:
    """Number of updates that `ensure_vqvae` would make. shards: the training split, or None."""
    if config.vqvae.ckpt or config.vqvae.stored:
        return 0
    state = checkpoints.load_latest(run_dir(config, shards)) if shards else None
    return max(0, config.vqvae.steps - (state["step"] if state else 0))


def load_or_build(config: Config, shards: Shards | None, device: torch.device) -> nn.Module:
    """The frozen autoencoder if its training is over, else one with new weights."""
    precision = config.train.precision
    # Enough to measure speed before the training.
    if updates_left(config, shards):
        fields = channels_of(data.example_frames(config, shards, 1))
        return freeze(build(config.vqvae, fields), device, precision)
    path = config.vqvae.ckpt
    if not path and not config.vqvae.stored:
        path = run_dir(config, shards) / "latest.pt"
    return freeze(load(path, config.vqvae.kind), device, precision)


def channels_of(frames: np.ndarray) -> int:
    """The argument `fields` of `build` for frames (n, H, W, 3) uint8 or fields (n, C, H, W)."""
    return 0 if frames.dtype == np.uint8 else frames.shape[1]


def measure_update(config: Config, device: torch.device, shards: Shards | None = None) -> float:
    """Seconds per update of `train` on this machine, validations included. Changes no file.
    shards: the training split, if it exists."""
    vqvae = config.vqvae
    pool = data.example_frames(config, shards, 64)
    module = build(vqvae, channels_of(pool)).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(module, vqvae)

    def make_update(n: int) -> None:
        batch = dataclasses.replace(config, vqvae=dataclasses.replace(vqvae, batch_size=n))
        update(module, optimizer, pool, 0, batch, device)

    per_frame = seconds_per_item(make_update, vqvae.batch_size, device)
    validation = seconds_per_item(lambda n: validate(module, pool[:n], device), 64, device)
    return per_frame * vqvae.batch_size + validation * HELD_OUT / validate_every(config)


def validate_every(config: Config) -> int:
    """Number of updates between two validations, which also save a checkpoint."""
    return min(config.train.save_every, 200)


def make_optimizer(module: nn.Module, vqvae: configs.Vqvae) -> torch.optim.Optimizer:
    options = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    if vqvae.optimizer == "muon":
        return Muon(module, vqvae.lr, vqvae.muon_lr, **options)
    return torch.optim.AdamW(module.parameters(), vqvae.lr, **options)


def run_dir(config: Config, shards: Shards) -> Path:
    """The checkpoint folder of this configuration, trained on these frames."""
    size, flips = config.data.image_size, config.data.flips
    key = repr((config.vqvae, size, flips, config.train.seed, shards.fingerprint()))
    name = f"vqvae-{config.dataset}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
    return Path(config.output.root) / "checkpoints" / name


def frame_pool(shards: Shards, rng: np.random.Generator, max_bytes: int = 1 << 29) -> np.ndarray:
    """Read frames to train on, (n, H, W, 3) uint8 or fields (n, C, H, W), at most `max_bytes`.

    The whole split if it fits, else random runs of up to 16 consecutive frames. The frames are read
    in one pass, because reading single random frames would take longer than a training step.
    """
    fits = max(1, max_bytes // (int(np.prod(shards.shape)) * shards.dtype.itemsize))
    if shards.lengths.sum() <= fits:
        return np.concatenate([shards.read(v, slice(None)) for v in range(len(shards))])
    run = min(16, fits, int(shards.lengths.max()))
    windows = draw_windows(shards.lengths, run, 0, fits // run, rng)
    # Filled in place: concatenation would take twice the memory.
    pool = np.empty((len(windows.video), run, *shards.shape), shards.dtype)
    for part, v, a in zip(pool, windows.video, windows.start):
        part[:] = shards.read(v, slice(a, a + run))
    return pool.reshape(-1, *shards.shape)


@torch.no_grad()
def validate(module: nn.Module, frames: np.ndarray, device: torch.device) -> float:
    """PSNR in dB of reconstructions, from the mean squared error over all frames. Of fields the
    signal-to-noise ratio in dB: their variance takes the place of the peak."""
    parts = [to_pixels(part, device) for part in np.array_split(frames, max(1, len(frames) // 64))]
    errors = [module.squared_error(x) for x in parts]
    return float(-10 * torch.cat(errors).mean().log10())


def set_statistics(module: nn.Module, pool: np.ndarray) -> None:
    """Measure the mean and the standard deviation of each channel of fields (n, C, H, W), by which
    the VQVAE normalises them. UserError for values that are not finite."""
    # Channel by channel: float64 sums without a float64 copy of the pool.
    means = [pool[:, c].mean(dtype=np.float64) for c in range(pool.shape[1])]
    stds = [pool[:, c].std(dtype=np.float64) for c in range(pool.shape[1])]
    if not np.isfinite([means, stds]).all():
        raise UserError("the fields hold values that are not finite; prepare them again")
    mean, std = torch.tensor(means), torch.tensor(stds)
    module.set_statistics(mean, field_std(mean, std))


def train(config: Config, shards: Shards, val: Shards, device: torch.device) -> Path:
    """Train the small VQVAE, or resume its training. -> the path of the finished checkpoint.

    Logs the PSNR on held-out frames and the perplexity of the codebook.
    """
    dir = run_dir(config, shards)
    vqvae = config.vqvae
    state = checkpoints.load_latest(dir)
    step = state["step"] if state else 0
    if step >= vqvae.steps:
        return dir / "latest.pt"
    torch.manual_seed(seed_of(config.train.seed, "vqvae"))
    fields = shards.shape[0] if shards.key == "fields" else 0
    module = build(vqvae, fields).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(module, vqvae)
    if state:
        checkpoints.load_weights(module, state["model"], dir)
        optimizer.load_state_dict(state["opt"])
    pool = frame_pool(shards, numpy_generator(config.train.seed, "vqvae-pool"))
    if fields and not state:
        set_statistics(module, pool)
    # The same held-out frames for every seed, so that runs are comparable.
    count = HELD_OUT
    if fields:
        count = limit_frames(count, val.shape)
    held_out = data.random_frames(val, count, numpy_generator(0, "vqvae-val"))
    log = logs.Log(dir, config, step)
    with progress(vqvae.steps, "train VQVAE", "step", step) as bar:
        while step < vqvae.steps:
            values = update(module, optimizer, pool, step, config, device)
            step += 1
            bar.update()
            if step % validate_every(config) == 0 or step == vqvae.steps:
                psnr = validate(module.eval(), held_out, device)
                module.train()
                row = {"vqvae_psnr": psnr, "vqvae_mse": values["mse"].item()}
                shown = f"{'SNR' if fields else 'PSNR'} {psnr:.1f} dB"
                if "perplexity" in values:
                    row["codebook_perplexity"] = values["perplexity"].item()
                    shown += f", perplexity {row['codebook_perplexity']:.0f}"
                log.row(step, **row)
                bar.set_postfix_str(shown)
                state = {
                    "model": module.state_dict(),
                    "opt": optimizer.state_dict(),
                    "step": step,
                    "config": configs.to_dict(config),
                    "psnr": psnr,
                }
                checkpoints.save_checkpoint(dir, state, keep=1)
    log.close()
    return dir / "latest.pt"


def flip_randomly(frames: np.ndarray, flips: str, rng: np.random.Generator) -> None:
    """Replace frames (n, H, W, 3) in place by random copies of themselves, see data.flips."""
    drawn = rng.integers(1 + len(MIRRORS[flips]), size=len(frames))
    for copy in range(1, 1 + len(MIRRORS[flips])):
        frames[drawn == copy] = flip_frames(frames[drawn == copy], flips, copy)


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    pool: np.ndarray,
    step: int,
    config: Config,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Make update number `step` on a random batch of the pool. -> the values to log."""
    vqvae = config.vqvae
    seed = config.train.seed
    for group in optimizer.param_groups:
        warmup = min(50, vqvae.steps // 10)
        group["lr"] = learning_rate(step, vqvae.lr, vqvae.steps, warmup)
    # Seeded by the step, so that a resumed training sees the same batches.
    rng = numpy_generator(seed, "vqvae", step)
    frames = pool[rng.integers(len(pool), size=vqvae.batch_size)]
    if config.data.flips:
        flip_randomly(frames, config.data.flips, rng)
    with autocast(config.train.precision, device):
        x = to_pixels(frames, device)
        loss, values = module.loss(x, generator(device, seed, "codes", step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values
