"""Autoencoders, the latent cache, colour jitter and I3D: speed, and the GPU against the CPU."""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import configs
import vqvae
from batches.batch import to_pixels
from batches.frames import apply_jitter, draw_jitter
from batches.latents import cache_latents
from benchmarks.gpu_steps.record import Failed, Steps, require
from benchmarks.gpu_steps.setup import (
    Trial,
    clear,
    no_host_waits,
    peak_gib,
    relative_difference,
    start_trial,
    time_calls,
    time_first,
)
from evaluation import networks
from models import autoencoders
from models.autoencoders import layers
from runtime.process import autocast, generator
from shards import Shards, write_packed

# kind: (pixels, batch size)
AUTOENCODERS = {"taming_f8_small": (64, 168), "river": (128, 40), "taming_f16": (256, 8)}
TINY_AUTOENCODERS = {"river": (32, 2)}
# Distances nearer to each other than this, in units of |z - e|^2, count as a tie in float32.
TIE = 1e-6


# ------------------------------------------------------------------------------------- autoencoders
class Comparison:
    """An autoencoder in float32, contiguous, then in bf16, channels last, with the same weights."""

    def __init__(self, trial: Trial, kind: str, size: int, batch: int):
        self.trial = trial
        self.kind = kind
        self.shape = (batch, 3, size, size)

    def draw_frames(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(self.shape, generator=generator).to(self.trial.device) * 2 - 1

    def time_plain(self) -> dict:
        clear(self.trial)
        torch.manual_seed(0)
        plain = autoencoders.build(self.kind)
        self.weights = plain.state_dict()
        plain = plain.to(self.trial.device).eval().requires_grad_(False)
        x = self.draw_frames()
        self.expected = plain.encode(x).cpu()
        values = self.time_both_ways(plain, x)
        self.base = values["encode_frames_per_s"]
        return {**values, "ratio": 1.0}

    def time_fast(self) -> dict:
        clear(self.trial)
        fast = autoencoders.build(self.kind)
        fast.load_state_dict(self.weights)
        fast = vqvae.freeze(fast, self.trial.device, "bf16")
        x = self.draw_frames().contiguous(memory_format=torch.channels_last)
        difference = relative_difference(fast.encode(x), self.expected)
        values = self.time_both_ways(fast, x)
        values["ratio"] = values["encode_frames_per_s"] / self.base
        values["relative_difference"] = difference
        require(difference < 0.1, f"relative difference {difference:.2g} of the latents", values)
        return values

    @torch.no_grad()
    def time_both_ways(self, module: nn.Module, x: torch.Tensor) -> dict:
        z = module.encode(x)
        encoding = time_calls(self.trial, partial(module.encode, x), 10)
        decoding = time_calls(self.trial, partial(module.decode, z), 10)
        return {
            "encode_frames_per_s": 1e3 * len(x) / encoding["ms"],
            "decode_frames_per_s": 1e3 * len(x) / decoding["ms"],
            "ms_host": encoding["ms_host"],
            "peak_gib": peak_gib(self.trial),
        }


def check_nearest_codes(trial: Trial) -> dict:
    """Codes chosen in float32 against float64. A tie may be decided either way."""
    torch.manual_seed(0)
    K = 1024 if trial.tiny else 16384
    z = torch.randn(8, 4, 16, 16, device=trial.device)
    codes = torch.randn(K, 4, device=trial.device)
    found = layers.nearest_index(z, codes)
    flat = z.movedim(1, -1).reshape(-1, 4).double()
    distances = torch.cdist(flat, codes.double()).square()
    least, expected = distances.min(1)
    other = found != expected
    excess = distances.gather(1, found[:, None])[:, 0] - least
    wrong = float((other & (excess > TIE * (1 + least))).float().mean())
    require(wrong <= 1e-4, f"{wrong:.2%} of the codes are wrong")
    return {"wrong": wrong, "other_code_at_a_tie": float(other.float().mean()) - wrong}


def update_vqvae(trial: Trial) -> dict:
    """An update of our own VQVAE, which must not wait for the GPU."""
    config = configs.build("kth", {"vqvae.kind": "small", "vqvae.ckpt": ""})
    device = trial.device
    module = vqvae.build(config.vqvae).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, fused=True)
    batch = 4 if trial.tiny else 32
    frames = random_frames(batch, 64)
    counter = itertools.count()

    def step() -> torch.Tensor:
        # As vqvae.train computes it.
        with autocast("auto", device):
            noise = generator(device, "codes", next(counter))
            loss, _ = module.loss(to_pixels(frames, device), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    times = time_calls(trial, step, 20)
    values = {"frames_per_s": 1e3 * batch / times["ms"], **times}
    try:
        with no_host_waits(trial):
            loss = step()
    except RuntimeError as error:
        raise Failed(f"the host waits: {error}", values) from error
    require(bool(loss.isfinite()), f"loss {float(loss)}", values)
    return {**values, "loss": float(loss)}


# --------------------------------------------------------------------------------- the latent cache
def random_frames(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8"""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_frames(dir: Path, files: int, count: int, size: int) -> Shards:
    """Shards of random frames, the same in each, in videos of 64."""
    dir.mkdir(parents=True)
    rows = random_frames(count, size)
    for k in range(files):
        path = dir / f"shard_{k + 1:04d}.hdf5"
        write_packed(
            path, "frames", rows, np.full(count // 64, 64), {"continues": False, "fps": 25.0}
        )
    return Shards(dir)


@torch.no_grad()
def time_cache(trial: Trial) -> dict:
    """Frames/s of encoding a split into the latent cache, and of encoding frames on the device."""
    clear(trial)
    kind, size, files, count = "taming_f8_small", 64, 4, 4096
    if trial.tiny:
        kind, size, files, count = "river", 32, 2, 64
    module = vqvae.freeze(autoencoders.build(kind), trial.device, "auto")
    batch = min(count, 168)
    x = torch.rand(batch, 3, size, size, device=trial.device) * 2 - 1
    x = x.contiguous(memory_format=torch.channels_last)
    alone = 1e3 * batch / time_calls(trial, partial(module.encode, x), 20)["ms"]
    with tempfile.TemporaryDirectory() as folder:
        shards = write_frames(Path(folder) / "train", files, count, size)
        began = time.perf_counter()
        out = cache_latents(shards, module.encode, "trial", folder, trial.device)
        cached = files * count / (time.perf_counter() - began)
        shape = Shards(out, "latents").map_file(0).shape
    require(shape[0] == count, f"{shape[0]} latents of {count} frames")
    return {
        "cached_frames_per_s": cached,
        "encoding_alone_frames_per_s": alone,
        "share": cached / alone,
    }


# ---------------------------------------------------------------------------------- against the CPU
def compare_jitter(trial: Trial) -> dict:
    settings = configs.Data(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    jitter = draw_jitter(settings, 16, np.random.default_rng(0))
    frames = torch.rand(16, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    there = frames.to(trial.device)
    difference = float(
        (apply_jitter(there, jitter).cpu() - apply_jitter(frames, jitter)).abs().max()
    )
    require(difference < 1e-3, f"largest difference {difference:.2g}")
    with no_host_waits(trial):
        apply_jitter(there, jitter)
    return {
        "largest_difference": difference,
        **time_calls(trial, partial(apply_jitter, there, jitter), 10),
    }


def build_i3d() -> nn.Module:
    """Random weights that keep the size of activations, folded as load_i3d does it."""
    model = networks.I3D()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name.endswith("var"):
                value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
                continue
            scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return model.fold().eval().requires_grad_(False)


def compare_i3d(trial: Trial) -> dict:
    """Features in float32 of one clip against the CPU's; clips/s of several."""
    model = build_i3d()
    clips = np.stack([random_frames(10, 64)] * (1 if trial.tiny else 8))
    expected = torch.from_numpy(networks.i3d_features(model, clips[:1], "cpu"))
    model = model.to(trial.device)
    compute = partial(networks.i3d_features, model, clips, trial.device)
    first = time_first(trial, compute)
    difference = relative_difference(torch.from_numpy(compute()[:1]), expected)
    require(difference < 1e-3, f"relative difference {difference:.2g}")
    seconds = time_first(trial, compute)
    rate = len(clips) / seconds
    return {"relative_difference_to_cpu": difference, "first_s": first, "clips_per_s": rate}


def run(steps: Steps) -> None:
    trial = start_trial()
    kinds = TINY_AUTOENCODERS if trial.tiny else AUTOENCODERS
    for kind, (size, batch) in kinds.items():
        comparison = Comparison(trial, kind, size, batch)
        name = f"{kind}, {batch} frames of {size} px"
        steps.run(f"{name}: float32, contiguous", comparison.time_plain)
        steps.run(f"{name}: bf16, channels last", comparison.time_fast)
    steps.run("nearest codes against float64", check_nearest_codes, trial)
    steps.run("an update of our VQVAE, without waits", update_vqvae, trial)
    steps.run("latent cache", time_cache, trial)
    steps.run("colour jitter against the CPU", compare_jitter, trial)
    steps.run("I3D against the CPU", compare_i3d, trial)
