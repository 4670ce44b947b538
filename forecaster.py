"""The autoregressive roll-out of a trained network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import interpolants
import models
import vqvae
from batches.batch import to_frames
from batches.latents import encode_frames
from batches.windows import gaps
from configs import Config
from interpolants import Interpolant
from models.joint import apart, below
from runtime import checkpoints, parallel, published
from runtime.console import UserError, progress
from runtime.process import autocast, cast_weights, generator, uses_bf16
from solvers import integrate


# ------------------------------------------------------------------------------------------------------------- roll-out
class Forecaster:
    """A trained network with all that it takes to forecast pixels: config, interpolant, autoencoder, normalisation."""

    def __init__(
        self, config: Config, net: nn.Module, autoencoder: nn.Module, device: torch.device
    ):
        self.config, self.net, self.autoencoder, self.device = config, net, autoencoder, device
        self.interpolant = make_interpolant(config)
        self.latents: list[np.ndarray] = []  # of the last forecast, where the data are latents
        self.evaluations = 0  # of the network, over the forecasts made so far
        self.ready = False  # has `prepare` been called
        self.compiled, self.graphs = (
            False,
            False,
        )  # is the network compiled; is it replayed as CUDA graphs
        self.rows = 0  # of the batch that a compiled network takes
        self.mean, self.std = (
            torch.tensor(v, device=device).view(-1, 1, 1)
            for v in (config.latent.mean, config.latent.std)
        )

    def prepare(self, rows: int) -> None:
        """Before a roll-out of `rows` videos: cast and compile the network at the first call."""
        self.rows = max(self.rows, rows)
        if self.ready:
            return
        if uses_bf16(self.config.train.precision, self.device):
            cast_weights(self.net, torch.bfloat16)
        mode = parallel.compiled(
            [self.net], self.config.sample.compile, self.config.model.name, self.device
        )
        self.ready, self.compiled, self.graphs = True, mode != "off", mode in configs.GRAPHS

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def to_pixels(self, z: Tensor) -> Tensor:
        parts = (z * self.std + self.mean).split(
            max(1, (1 << 21) // self.config.data.image_size**2)
        )  # as memory allows
        return torch.cat([self.autoencoder.decode(part) for part in parts])

    def field(
        self, x0: Tensor, context: Callable[[], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor, float], Tensor]:
        """field(x, s) for one frame; context() -> (context latents, gap), drawn anew at each call or not."""
        B = len(x0)

        def evaluate(x: Tensor, s: float) -> Tensor:
            self.evaluations += B
            z = self.interpolant.network_input(x, s, x0)
            frame, gap = context()
            inputs = (z, torch.full((B,), s, device=self.device), x0, frame, gap)
            if self.compiled:
                # A graph is compiled for one batch size, for one layout in memory, and for inputs that share no
                # memory. So a smaller batch repeats its last row, and every input is a copy.
                rows = torch.arange(self.rows, device=self.device).clamp(max=B - 1)
                inputs = [part[rows] for part in inputs]
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(self.config.train.precision, self.device):
                output = self.net(*inputs)
            # A CUDA graph writes its next output into the same memory.
            output = output.clone() if self.graphs else output
            return output[:B].float()

        return evaluate

    def sample_frame(
        self, x0: Tensor, context: Callable[[], tuple[Tensor, Tensor]], noise: torch.Generator
    ) -> Tensor:
        """x_1 given the reference x0, (B, C, h, w), by the config's sampler."""
        sample = self.config.sample
        return integrate(
            self.field(x0, context),
            self.interpolant,
            x0,
            sample.steps,
            sample.solver,
            self.config.diffusion,
            noise,
            grid=sample.grid,
            warm_start=sample.warm_start,
            first=sample.first,
            tolerance=sample.tolerance,
            float_times=True,
        )

    @torch.no_grad()
    def roll_out(self, given: Tensor, frames: int, key: tuple, bar=None) -> Tensor:
        """given: (B, T, C, h, w) normalised latents -> the next `frames`, (B, frames, C, h, w). key seeds the noise."""
        B, T, *shape = given.shape
        sample = self.config.sample
        self.prepare(B)
        if self.config.halves:
            return self.roll_out_halves(given, frames, key, bar)
        history = torch.empty(B, T + frames, *shape, device=self.device)
        history[:, :T] = given
        noise, places = generator(self.device, *key), generator(self.device, *key, "context")
        rows = torch.arange(B, device=self.device)
        for t in range(T, T + frames):

            def draw(t: int = t) -> tuple[Tensor, Tensor]:
                # after a single frame the reference is its own context
                gap = gaps(
                    torch.rand(B, generator=places, device=self.device),
                    max(t - 1, 1),
                    sample.context,
                )
                return history[rows, (t - 1 - gap).clamp(min=0)], gap.float()

            once = draw() if sample.redraw == "frame" else None
            x0 = history[:, t - 1]
            x1 = self.sample_frame(x0, draw if once is None else lambda once=once: once, noise)
            # what follows is forecast from a frame that the autoencoder knows, as in training
            history[:, t] = (
                self.normalize(self.autoencoder.encode(self.to_pixels(x1)))
                if sample.reencode
                else x1
            )
            if bar is not None:
                bar.update(B)
        return history[:, T:]

    def roll_out_halves(self, given: Tensor, frames: int, key: tuple, bar=None) -> Tensor:
        """roll_out of a network that forecasts several frames at once, given several: what is too many at the end is cut."""
        B, T, _, h, _ = given.shape
        sample, (past, future) = self.config.sample, self.config.halves
        noise, gap = generator(self.device, *key), torch.ones(B, device=self.device)
        history = given
        while history.shape[1] < T + frames:
            context, x0 = (
                below(history[:, -past:]),
                below(history[:, -1:].expand(-1, future, -1, -1, -1)),
            )
            x1 = self.sample_frame(x0, lambda context=context: (context, gap), noise)
            x1 = apart(x1, h)[:, : T + frames - history.shape[1]]
            if sample.reencode:
                x1 = self.normalize(
                    self.autoencoder.encode(self.to_pixels(x1.flatten(0, 1)))
                ).unflatten(0, (B, -1))
            history = torch.cat([history, x1], 1)
            if bar is not None:
                bar.update(B * x1.shape[1])
        return history[:, T:]

    @torch.no_grad()
    def shown(self, frames: np.ndarray) -> np.ndarray:
        """What a shard holds, (V, T, H, W, 3) uint8 or latents (V, T, C, h, w), as frames to look at, (V, T, H, W, 3) uint8."""
        if frames.dtype == np.uint8:
            return frames
        parts = [
            to_frames(self.autoencoder.decode(torch.from_numpy(z).to(self.device, torch.float32)))
            for z in frames
        ]
        return np.stack(parts)

    @torch.no_grad()
    def forecast(
        self, frames: np.ndarray, predict: int, futures: int, key: tuple, quiet: bool = False
    ) -> np.ndarray:
        """(V, T, H, W, 3) uint8 given frames, or latents as stored, -> (V, futures, predict, H, W, 3) uint8. Where the data are
        latents, self.latents has the forecast ones after it."""
        V, T = frames.shape[:2]
        z = torch.from_numpy(
            encode_frames(
                self.autoencoder.encode, frames.reshape(-1, *frames.shape[2:]), self.device
            )
        )
        z = (
            self.normalize(z.to(self.device, torch.float32))
            .unflatten(0, (V, T))
            .repeat_interleave(futures, 0)
        )
        out = np.empty((V * futures, predict, *self.shown(frames[:1, :1]).shape[2:]), np.uint8)
        self.latents = []
        size = self.config.sample.batch
        bar = progress(len(z) * predict, "sample", "frame") if not quiet else None
        for start in range(0, len(z), size):
            part = z[start : start + size]
            future = self.roll_out(part, predict, (*key, start), bar)
            for k in range(predict):
                out[start : start + size, k] = to_frames(self.to_pixels(future[:, k]))
            if self.config.vqvae.kind == "latents":
                self.latents.append((future * self.std + self.mean).half().cpu().numpy())
        if bar is not None:
            bar.close()
        return out.reshape(V, futures, *out.shape[1:])


def make_interpolant(config: Config) -> Interpolant:
    """The config's interpolant; its k is measured: the standard deviation of x_1 - x_0, or of x_1."""
    flow = config.flow
    k = (
        config.latent.delta
        if interpolants.TABLE[flow.interpolant].from_reference
        else config.latent.scale
    )
    return interpolants.get(flow.interpolant, flow.c, flow.output, k, flow.weight)


def build_net(config: Config, device: torch.device) -> nn.Module:
    sizes = dataclasses.asdict(config.model)
    del sizes["size"]
    if sizes["name"] != "uvit":
        del sizes["out_norm"]
    if config.halves:
        sizes |= dict(zip(("given", "future"), config.halves))
    net = models.build(sizes.pop("name"), latent_shape=config.latent.shape, **sizes)
    return net.to(device, memory_format=torch.channels_last)


def load(
    path: str | Path,
    device: torch.device,
    overrides: dict | None = None,
    dataset: str = "",
    interpolant: str = "",
) -> tuple[Forecaster, int]:
    """-> the forecaster of a checkpoint, with its averaged weights, and the number of updates behind them. What a file that
    others published does not say of itself, `dataset`, `interpolant` and `overrides` say."""
    state, overrides = checkpoints.load_checkpoint(path), overrides or {}
    free = ("data.", "sample.", "output.", "vqvae.ckpt", "train.precision", "train.seed")
    if published.is_foreign(state):
        state = published.checkpoint(
            state, path, dataset, {"flow.interpolant": interpolant, **overrides}
        )
        free += ("vqvae.", "flow.interpolant", "model.")
    if missing := {"ema", "config", "step"} - state.keys():
        raise UserError(
            f"{path}: not a checkpoint of main.py (it lacks {', '.join(sorted(missing))})"
        )
    if fixed := [name for name in overrides if not name.startswith(free)]:
        raise UserError(
            f"{fixed[0]} belongs to the training of {path} and cannot be changed when sampling from it"
        )
    config = configs.update(configs.from_dict(state["config"]), overrides)
    for flag, asked, own in (
        ("dataset", dataset, config.dataset),
        ("interpolant", interpolant, config.flow.interpolant),
    ):
        if asked and asked != own:
            raise UserError(
                f"{path} was trained with --{flag} {own}, so {asked} does not go with it"
            )
    if not config.latent.shape:
        raise UserError(f"{path}: a VQVAE's checkpoint, not a velocity network's")
    net = build_net(config, device)
    checkpoints.load_weights(net, state["ema"], path)
    if "vqvae" in state:
        autoencoder = vqvae.build(config.vqvae)
        checkpoints.load_weights(autoencoder, state["vqvae"], path)
    elif config.vqvae.ckpt or config.vqvae.kind == "latents":
        autoencoder = vqvae.load(config.vqvae.ckpt, config.vqvae.kind)
    else:
        raise UserError(
            f"{path} does not hold its autoencoder; name it: --set vqvae.kind=KIND vqvae.ckpt=FILE"
        )
    autoencoder = vqvae.freeze(autoencoder, device, config.train.precision)
    return Forecaster(config, net.eval(), autoencoder, device), state["step"]


def about(forecaster: Forecaster, step: int, ckpt: str | Path) -> dict:
    """How a checkpoint is sampled from, for metrics.json."""
    sample = forecaster.config.sample
    return {
        "solver": sample.solver,
        "diffusion": forecaster.config.diffusion,
        "steps": sample.steps,
        "grid": sample.grid,
        "warm_start": sample.warm_start,
        "context": sample.context,
        "redraw": sample.redraw,
        "reencode": sample.reencode,
        "checkpoint": str(ckpt),
        "updates": step,
    }
