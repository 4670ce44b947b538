"""Forecast frames by the autoregressive roll-out of a trained network; load a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import configs
import interpolants
import models
import vqvae
from batches.batch import to_frames, to_pixels
from batches.latents import encode_frames
from batches.windows import draw_gaps
from configs import Config
from interpolants import Interpolant
from models.autoencoders.restore import restore
from models.joint import split_frames, stack_frames
from runtime import checkpoints, parallel, published
from runtime.budget import seconds_per_item
from runtime.console import UserError, progress
from runtime.process import autocast, cast_weights, generator, to_device, uses_bf16
from solvers import Noise, integrate

# A decoder takes at most this many pixels in one call.
DECODE_PIXELS = 1 << 21


class Draws:
    """The random numbers of a roll-out of B videos, by a key."""

    def __init__(self, device: torch.device, *key: int | str):
        self.device = device
        self.noise = generator(device, *key)
        self.places = generator(device, *key, "context")
        self.others = generator(device, *key, "given")

    def normal(self, like: Tensor) -> Tensor:
        """Noise of the solver, of the shape of `like`."""
        return torch.randn(like.shape, generator=self.noise, device=self.device)

    def uniform(self, B: int, K: int) -> Tensor:
        """(B, K) in [0, 1), which draw the contexts."""
        return torch.rand(B, K, generator=self.places, device=self.device)

    def perturb(self, z: Tensor, level: float) -> Tensor:
        """Add noise of deviation `level` to given frames."""
        if not level:
            return z
        return z + level * torch.randn(z.shape, generator=self.others, device=self.device)


# -------------------------------------------------------------------- roll-out
class Forecaster:
    """A trained network and what is needed to forecast pixels with it: config, interpolant,
    autoencoder, normalisation."""

    def __init__(
        self, config: Config, net: nn.Module, autoencoder: nn.Module, device: torch.device
    ):
        self.config, self.net, self.autoencoder, self.device = config, net, autoencoder, device
        self.interpolant = make_interpolant(config)
        # Whether the data are fields, float32, instead of RGB frames.
        self.fields = getattr(autoencoder, "of_fields", False)
        if self.fields and config.sample.restore:
            raise UserError("sample.restore is for RGB frames, and these are fields: set it to 0")
        # The last forecast as latents, if the data are latents.
        self.latents: list[np.ndarray] = []
        # Number of network evaluations in all forecasts so far. A batch of B items counts B times.
        self.evaluations = 0
        # Set by `prepare`. compiled: by torch.compile. graphs: as CUDA graphs.
        self.ready = False
        self.compiled = False
        self.graphs = False
        # Batch size of the compiled network.
        self.rows = 0
        self.mean = torch.tensor(config.latent.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(config.latent.std, device=device).view(-1, 1, 1)

    def prepare(self, rows: int) -> None:
        """Prepare a roll-out of `rows` videos. The first call casts and compiles the network."""
        self.rows = max(self.rows, rows)
        if self.ready:
            return
        if uses_bf16(self.config.train.precision, self.device):
            cast_weights(self.net, torch.bfloat16)
        mode = parallel.compile_modules(
            [self.net], self.config.sample.compile, self.config.model.name, self.device
        )
        self.ready = True
        self.compiled = mode != "off"
        self.graphs = mode in configs.GRAPHS

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.mean) / self.std

    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode frames (n, H, W, 3) uint8, or fields or stored latents, -> normalised latents
        (n, C, h, w) float32 on the device."""
        if self.config.vqvae.kind == "none":
            z = to_device(frames, self.device)
        else:
            z = torch.from_numpy(encode_frames(self.autoencoder.encode, frames, self.device))
        return self.normalize(z.to(self.device, torch.float32))

    def to_pixels(self, z: Tensor) -> Tensor:
        """Decode normalised latents (n, C, h, w), a few at a time to limit the memory."""
        pixels = self.config.data.image_size**2
        if self.fields:
            pixels = z[0, 0].numel() * self.config.vqvae.downsample**2
        frames = max(1, DECODE_PIXELS // pixels)
        parts = (z * self.std + self.mean).split(frames)
        return torch.cat([self.autoencoder.decode(part) for part in parts])

    def to_stored(self, x: Tensor) -> np.ndarray:
        """Convert decoded values (n, C, H, W) to frames (n, H, W, 3) uint8; fields stay (n, C, H,
        W) float32."""
        return x.float().cpu().numpy() if self.fields else to_frames(x)

    def encode_again(self, x: Tensor) -> Tensor:
        """Decode latents (n, C, h, w) to pixels and encode these again.

        The result is the latents of a frame, as the network saw them in training. The network's own
        output need not be. Fields without an autoencoder are returned unchanged.
        """
        if self.config.vqvae.kind == "none":
            return x
        return self.normalize(self.autoencoder.encode(self.to_pixels(x)))

    def field(
        self, x0: Tensor, draw: Callable[[], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor, float], Tensor]:
        """field(x, s) -> output of the network, for one frame after the reference x0.

        draw() -> (contexts, gaps) is called for each evaluation, or once for sample.redraw=frame.
        """
        B = len(x0)
        fixed = draw() if self.config.sample.redraw == "frame" else None
        precision = self.config.train.precision
        level = ()
        if self.config.flow.noise:
            level = (torch.full((B,), self.config.sample.noise, device=self.device),)
        step = ()
        if self.config.flow.objective == "shortcut":
            step = (torch.full((B,), 1 / self.config.sample.steps, device=self.device),)
            # In the order of the network's arguments.
            level = level or (torch.zeros(B, device=self.device),)
        # A network with a trunk reads the given frames once.
        read = None
        if fixed is not None and not self.compiled and hasattr(self.net, "encode"):
            with autocast(precision, self.device):
                read = self.net.encode(x0, *fixed, *level)

        def evaluate(x: Tensor, s: float) -> Tensor:
            self.evaluations += B
            z = self.interpolant.network_input(x, s, x0)
            times = torch.full((B,), s, device=self.device)
            if read is not None:
                with autocast(precision, self.device):
                    return self.net.decode(z, times, *read, *step).float()
            inputs = (z, times, x0, *(fixed or draw()), *level, *step)
            if self.compiled:
                # A graph is compiled for one batch size, for one memory layout, and for inputs that
                # share no memory. So a smaller batch repeats its last row, and each input is a
                # copy.
                rows = torch.arange(self.rows, device=self.device).clamp(max=B - 1)
                inputs = [part[rows] for part in inputs]
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(precision, self.device):
                output = self.net(*inputs)
            # A CUDA graph overwrites its output at the next replay.
            output = output.clone() if self.graphs else output
            return output[:B].float()

        return evaluate

    def sample_frame(
        self, x0: Tensor, draw: Callable[[], tuple[Tensor, Tensor]], noise: Noise
    ) -> Tensor:
        """Sample x_1 given the reference x0, both (B, C, h, w), with the sampler of the config."""
        sample = self.config.sample
        return integrate(
            self.field(x0, draw),
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
    def roll_out(self, given: Tensor, frames: int, key: tuple | Draws, bar=None) -> Tensor:
        """Normalised latents (B, T, C, h, w) -> the next `frames` latents (B, frames, C, h, w).

        key seeds the noise and the contexts, or is their source. bar: progress bar, counted in
        frames.
        """
        B, T, *shape = given.shape
        sample = self.config.sample
        self.prepare(B)
        if self.config.halves:
            return self.roll_out_jointly(given, frames, key, bar)
        K, rule = self.config.data.contexts, self.config.context
        history = torch.empty(B, T + frames, *shape, device=self.device)
        history[:, :T] = given
        draws = key if isinstance(key, Draws) else Draws(self.device, *key)
        rows = torch.arange(B, device=self.device)[:, None]
        for t in range(T, T + frames):

            def draw(t: int = t) -> tuple[Tensor, Tensor]:
                u = draws.uniform(B, K)
                gaps = draw_gaps(u, max(t - 1, 1), rule)
                # After a single given frame, the reference is its own context.
                contexts = history[rows, (t - 1 - gaps).clamp(min=0)]
                return draws.perturb(contexts, sample.noise), gaps.float()

            x0 = draws.perturb(history[:, t - 1], sample.noise)
            x1 = self.sample_frame(x0, draw, draws.normal)
            history[:, t] = self.encode_again(x1) if sample.reencode else x1
            if bar is not None:
                bar.update(B)
        return history[:, T:]

    def roll_out_jointly(self, given: Tensor, frames: int, key: tuple, bar=None) -> Tensor:
        """`roll_out` with the joint network, which forecasts several frames at once. Frames beyond
        the requested number are dropped."""
        B, T, _, h, _ = given.shape
        past, future = self.config.halves
        noise = generator(self.device, *key)
        gaps = torch.ones(B, past, device=self.device)
        history = given
        while history.shape[1] < T + frames:
            # The reference is the last frame, once for each frame of the target.
            x0 = stack_frames(history[:, -1:].expand(-1, future, -1, -1, -1))
            x1 = self.sample_frame(x0, partial(as_drawn, (history[:, -past:], gaps)), noise)
            x1 = split_frames(x1, h)[:, : T + frames - history.shape[1]]
            if self.config.sample.reencode:
                x1 = self.encode_again(x1.flatten(0, 1)).unflatten(0, (B, -1))
            history = torch.cat([history, x1], 1)
            if bar is not None:
                bar.update(B * x1.shape[1])
        return history[:, T:]

    @torch.no_grad()
    def to_display(self, frames: np.ndarray) -> np.ndarray:
        """Convert frames as stored to frames for display, (V, T, H, W, 3) uint8: latents
        (V, T, C, h, w) are decoded, uint8 frames and fields are returned unchanged."""
        if frames.dtype == np.uint8 or self.fields:
            return frames
        videos = []
        for z in frames:
            latents = torch.from_numpy(z).to(self.device, torch.float32)
            videos.append(to_frames(self.autoencoder.decode(latents)))
        return np.stack(videos)

    @torch.no_grad()
    def forecast(
        self, frames: np.ndarray, predict: int, futures: int, key: tuple, quiet: bool = False
    ) -> np.ndarray:
        """Given frames (V, T, H, W, 3) uint8, or latents as stored, -> (V, futures, predict, H, W,
        3) uint8. If the data are latents, self.latents holds the forecast latents afterwards.
        Given fields (V, T, C, H, W) float32 -> (V, futures, predict, C, H, W) float32.

        key seeds the forecasts. quiet: no progress bar.
        """
        V, T = frames.shape[:2]
        flat = frames.reshape(-1, *frames.shape[2:])
        z = self.encode(flat).unflatten(0, (V, T))
        level = self.config.sample.restore
        # The last given frame of each clip, decoded and as given.
        lasts = (self.to_pixels(z[:, -1]), to_pixels(frames[:, -1], self.device)) if level else ()
        z = z.repeat_interleave(futures, 0)
        # Frames for display may be larger than the latents that the shards store.
        shown = self.to_display(frames[:1, :1])
        out = np.empty((V * futures, predict, *shown.shape[2:]), shown.dtype)
        self.latents = []
        size = self.config.sample.batch
        bar = progress(len(z) * predict, "sample", "frame") if not quiet else None
        for start in range(0, len(z), size):
            part = z[start : start + size]
            future = self.roll_out(part, predict, (*key, start), bar)
            clip = torch.arange(start, start + len(part), device=self.device) // futures
            own = [last[clip] for last in lasts]
            # One frame of all futures at a time, because pixels take much more memory than latents.
            for k in range(predict):
                x = self.to_pixels(future[:, k])
                out[start : start + size, k] = self.to_stored(
                    restore(x, *own, level) if level else x
                )
            if self.config.vqvae.kind == "latents":
                self.latents.append((future * self.std + self.mean).half().cpu().numpy())
        if bar is not None:
            bar.close()
        return out.reshape(V, futures, *out.shape[1:])


def measure_frame(config: Config, autoencoder: nn.Module, device: torch.device) -> float:
    """Seconds per forecast frame of one future on this machine, with a new network and without
    torch.compile. config.latent must hold the shape of the latents. Changes no file."""
    sample = dataclasses.replace(config.sample, compile="off")
    config = dataclasses.replace(config, sample=sample)
    forecaster = Forecaster(config, build_net(config, device).eval(), autoencoder, device)
    # At least a context and the reference are given.
    given, frames = config.halves or (2, 1)
    most = min(sample.batch, sample.num_videos * sample.num_samples)
    latents = torch.randn(most, given, *config.latent.shape, device=device)

    def forecast(n: int) -> None:
        future = forecaster.roll_out(latents[:n], frames, (0,))
        with torch.no_grad():
            forecaster.to_stored(forecaster.to_pixels(future.flatten(0, 1)))

    return seconds_per_item(forecast, most, device) / frames


def as_drawn(drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the same (contexts, gaps) at every call, for `Forecaster.field`."""
    return drawn


# -------------------------------------------------------------------- building and loading
def make_interpolant(config: Config) -> Interpolant:
    """The interpolant of the config. Its k is measured on the training data: the standard deviation
    of x_1 - x_0, or of x_1 for interpolants that start at noise."""
    flow = config.flow
    from_reference = interpolants.TABLE[flow.interpolant].from_reference
    k = config.latent.delta if from_reference else config.latent.scale
    return interpolants.get(flow.interpolant, flow.c, flow.output, k, flow.weight)


def build_net(config: Config, device: torch.device) -> nn.Module:
    """The velocity network of the config, with new weights."""
    net = models.build(config.model.name, config.latent.shape, **config.network_sizes)
    return net.to(device, memory_format=torch.channels_last)


def load(
    path: str | Path,
    device: torch.device,
    overrides: dict | None = None,
    dataset: str = "",
    interpolant: str = "",
) -> tuple[Forecaster, int]:
    """Load a checkpoint -> (the forecaster with the averaged weights, number of updates made).

    dataset, interpolant, overrides: settings that a published checkpoint does not store. For
    checkpoints of main.py, dataset and interpolant must be those of the training.
    """
    state, overrides = checkpoints.load_checkpoint(path), overrides or {}
    # Settings that sampling may change.
    free = ("data.", "sample.", "output.", "vqvae.ckpt", "train.precision", "train.seed")
    if published.is_foreign(state):
        settings = {"flow.interpolant": interpolant, **overrides}
        state = published.convert(state, path, dataset, settings)
        # A published file does not hold these settings, so the user may have to give them.
        free += ("vqvae.", "flow.interpolant", "model.")
    if missing := {"ema", "config", "step"} - state.keys():
        raise UserError(
            f"{path}: not a checkpoint of main.py (it lacks {', '.join(sorted(missing))})"
        )
    if fixed := [name for name in overrides if not name.startswith(free)]:
        raise UserError(
            f"{fixed[0]} belongs to the training of {path} and cannot be changed when sampling "
            "from it"
        )
    config = configs.update(configs.from_dict(state["config"]), overrides)
    check_trained_with(path, "dataset", dataset, config.dataset)
    check_trained_with(path, "interpolant", interpolant, config.flow.interpolant)
    if not config.latent.shape:
        raise UserError(f"{path}: a VQVAE's checkpoint, not a velocity network's")
    net = build_net(config, device)
    checkpoints.load_weights(net, state["ema"], path)
    autoencoder = load_autoencoder(state, config, path)
    autoencoder = vqvae.freeze(autoencoder, device, config.train.precision)
    return Forecaster(config, net.eval(), autoencoder, device), state["step"]


def check_trained_with(path: str | Path, flag: str, value: str, trained: str) -> None:
    """Raise UserError if a flag contradicts the training of the checkpoint."""
    if value and value != trained:
        raise UserError(
            f"{path} was trained with --{flag} {trained}, not with {value}; leave out the flag"
        )


def load_autoencoder(state: dict, config: Config, path: str | Path) -> nn.Module:
    """The autoencoder of a checkpoint: stored in the checkpoint, or named by its config."""
    if "vqvae" in state:
        autoencoder = vqvae.build(config.vqvae, vqvae.field_channels(state["vqvae"]))
        checkpoints.load_weights(autoencoder, state["vqvae"], path)
        return autoencoder
    if config.vqvae.ckpt or config.vqvae.stored:
        return vqvae.load(config.vqvae.ckpt, config.vqvae.kind)
    raise UserError(
        f"{path} does not hold its autoencoder; name it: --set vqvae.kind=KIND vqvae.ckpt=FILE"
    )


def describe_sampler(forecaster: Forecaster, step: int, ckpt: str | Path) -> dict:
    """Describe the sampler and the checkpoint for metrics.json."""
    sample = forecaster.config.sample
    # Results of earlier versions lack the entry.
    restored = {"restore": sample.restore} if sample.restore else {}
    return {
        "solver": sample.solver,
        "diffusion": forecaster.config.diffusion,
        "steps": sample.steps,
        "grid": sample.grid,
        "warm_start": sample.warm_start,
        "context": forecaster.config.context,
        "redraw": sample.redraw,
        "reencode": sample.reencode,
        **restored,
        "checkpoint": str(ckpt),
        "updates": step,
    }
