"""Every setting of a run: typed, commented, checked where it is built. DATASETS is at the top.

A run is described by frozen dataclasses, one per group; `--set group.field=value` sets any field.
No path here is absolute: all are relative to the folder that the command is run in.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from runtime import settings
from runtime.console import UserError, nearest
from runtime.settings import Group, update

MODES = ("clips", "stream", "offline")  # of data.mode
STRIDES = ("continuous", "chunked", "spaced")  # of data.windows


@dataclass(frozen=True)
class Dataset:
    """What one dataset changes in the defaults below, as {"group.field": value}, and how to get its
    files.
    """

    clips: dict[str, Any]  # for data.mode=clips
    stream: dict[str, Any]  # on top of `clips` for data.mode=stream and offline
    prepare: str = ""  # command that makes the shards; empty: main.py generates them
    fetch: str = ""  # command that downloads the published VQVAE; empty: there is none


def stream_of(clip: int, batch: int, live: int, replay: str = "0.05") -> dict[str, Any]:
    """The settings for a split that is one stream: windows of `clip` frames, the first half given.

    Windows, batch and replay of the balls and the maze follow arXiv 2406.04814.
    """
    return {
        "data.clip": clip,
        "data.condition": clip // 2,
        "data.predict": clip // 2,
        "data.brightness": 0.0,
        "data.contrast": 0.0,
        "data.saturation": 0.0,
        "data.hue": 0.0,
        "replay.size": replay,
        "replay.n_live": live,
        "train.batch_size": batch,
        "train.steps": 0,
        "train.schedule": "constant",
        "train.log_every": 100,
        "train.sample_every": 0,
        "train.save_every": 1_000,
        "train.ema": 0.999,
    }


STREAM_BALLS = stream_of(clip=10, batch=2, live=1)
STREAM = stream_of(clip=20, batch=4, live=2)

# The training settings published with RIVER and its predecessor.
PUBLISHED = {
    "model.name": "uvit",
    "model.width": 768,
    "model.depth": 4,
    "model.mid_depth": 5,
    "model.heads": 8,
    "model.dropout": 0.05,
    "flow.c": 0.1,
    "flow.output": "drift",
    "flow.weight": "published",
    "flow.normalize": False,
    "data.context": "uniform",
    "sample.context": "uniform",
    "train.steps": 400_000,
    "train.batch_size": 256,
    "train.lr": 2e-4,
    "train.warmup": 10_000,
    "train.schedule": "constant",
    "train.beta2": 0.999,
    "train.ema": 0.9999,
    "train.log_every": 100,
    "train.sample_every": 10_000,
    "train.save_every": 5_000,
    "sample.steps": 100,
    "sample.reencode": False,
}
# RIVER's changes for BAIR.
PUBLISHED_BAIR = PUBLISHED | {
    "data.clip": 16,
    "data.condition": 1,
    "data.predict": 15,
    "vqvae.codes": 16384,
    "train.steps": 300_000,
    "train.lr": 1e-4,
    "train.warmup": 5_000,
    "train.weight_decay": 5e-6,
}
# Clips as published for CLEVRER.
CLEVRER_CLIPS = {
    "data.image_size": 128,
    "data.clip": 16,
    "data.skip": 4,
    "data.condition": 2,
    "data.predict": 14,
    "vqvae.downsample": 8,
    "vqvae.codes": 8192,
}
# Our settings for networks that train on two CPU cores.
SMALL = {
    "data.image_size": 64,
    "data.clip": 16,
    "data.condition": 8,
    "data.predict": 16,
    "sample.num_videos": 32,
    "sample.solver": "exact2",
    "sample.grid": "cosine",
    "sample.steps": 10,
    "sample.redraw": "frame",
    "sample.reencode": False,
    "vqvae.batch_size": 32,
    "model.width": 96,
    "train.steps": 6_000,
    "train.batch_size": 16,
    "train.ema": 0.998,
    "train.sample_every": 2_000,
}

# To add a dataset, add one entry here and one file in prepare/.
DATASETS = {
    "ball_stn": Dataset(
        clips={"data.root": "data/ball_stn", "data.generate": "balls"},
        stream=STREAM_BALLS,
    ),
    "ball_nstn": Dataset(
        clips={
            "data.root": "data/ball_nstn",
            "data.generate": "balls",
            "data.color_shift": True,
        },
        stream=STREAM_BALLS,
    ),
    "wmaze": Dataset(
        clips=SMALL
        | {
            "data.root": "data/wmaze",
            "data.generate": "maze",
            "data.stream": 20_000,
            "data.held_out": 2_000,
        },
        stream=STREAM,
    ),
    "moving_mnist": Dataset(
        clips=SMALL | {"data.root": "data/moving_mnist", "data.condition": 10, "data.predict": 10},
        stream=STREAM,
        prepare="python -m prepare.moving_mnist --out {root}",
    ),
    "clevrer_like": Dataset(
        clips=SMALL
        | CLEVRER_CLIPS
        | {
            "data.root": "data/clevrer_like",
            "vqvae.batch_size": 16,
            "vqvae.steps": 2_000,
            "train.steps": 4_000,
            "sample.num_videos": 16,
            "sample.steps": 5,
            "sample.reencode": True,
        },
        stream=STREAM,
        prepare="pip install pybullet && "
        "python -m prepare.clevrer_like --out {root} --image_size {size}",
    ),
    # Latents of frames of 768 x 1280 pixels, 10 frames per second.
    "plaicraft": Dataset(
        clips=SMALL
        | {
            "data.root": "data/plaicraft",
            "data.image_size": 768,
            "data.clip": 20,
            "data.condition": 10,
            "data.predict": 10,
            "vqvae.kind": "latents",
            "vqvae.downsample": 8,
            "train.batch_size": 8,
            "sample.num_videos": 16,
            "sample.num_samples": 2,
            "sample.batch": 8,
        },
        stream=stream_of(clip=20, batch=8, live=2, replay="0.2"),
        prepare="python -m prepare.plaicraft --source FOLDER_OF_PLAICRAFT --out {root}",
    ),
    "videos": Dataset(
        clips=SMALL | {"data.root": "data/videos"},
        stream=STREAM,
        prepare="python -m prepare.videos --source FOLDER_OF_VIDEOS --out {root} "
        "--image_size {size} --clip_length 24",
    ),
    "kth": Dataset(
        clips=PUBLISHED
        | {
            "data.root": "data/kth",
            "data.image_size": 64,
            "data.clip": 40,
            "data.condition": 10,
            "data.predict": 30,
            "vqvae.kind": "taming_f8_small",
            "vqvae.downsample": 8,
            "vqvae.codes": 16384,
            "vqvae.ckpt": "weights/river_kth_64/vqvae.ckpt",
        },
        stream=STREAM,
        prepare="python -m prepare.kth --source FOLDER_OF_KTH --out {root} --image_size {size}",
        fetch="hf download cvg-unibe/river_kth_64 --local-dir weights/river_kth_64",
    ),
    "clevrer": Dataset(
        clips=PUBLISHED
        | CLEVRER_CLIPS
        | {
            "data.root": "data/clevrer",
            "data.brightness": 0.1,
            "data.contrast": 0.1,
            "data.saturation": 0.1,
            "data.hue": 0.25,
            "vqvae.kind": "river",
            "vqvae.ckpt": "weights/river_clevrer_128/vqvae.pth",
        },
        stream=STREAM,
        prepare="python -m prepare.clevrer --source FOLDER_OF_CLEVRER --out {root} "
        "--image_size {size}",
        fetch="hf download cvg-unibe/river_clevrer_128 --local-dir weights/river_clevrer_128",
    ),
    "bair_64": Dataset(
        clips=PUBLISHED_BAIR
        | {
            "data.root": "data/bair_64",
            "data.image_size": 64,
            "vqvae.kind": "taming_f8_small",
            "vqvae.downsample": 8,
            "vqvae.channels": 4,
            "vqvae.ckpt": "weights/river_bair_64/vqvae.ckpt",
            "model.out_norm": "ln",
        },
        stream=STREAM,
        prepare="python -m prepare.bair --source softmotion30_44k --out {root} --image_size {size}",
        fetch="hf download cvg-unibe/river_bair_64 --local-dir weights/river_bair_64",
    ),
    "bair_256": Dataset(
        clips=PUBLISHED_BAIR
        | {
            "data.root": "data/bair_256",
            "data.image_size": 256,
            "vqvae.kind": "taming_f16",
            "vqvae.downsample": 16,
            "vqvae.channels": 8,
            "vqvae.ckpt": "weights/river_bair_256/vqvae.ckpt",
            "model.out_norm": "bn",
        },
        stream=STREAM,
        prepare="python -m prepare.bair --source FOLDER_OF_BAIR_FRAMES --out {root} "
        "--image_size {size}",
        fetch="hf download cvg-unibe/river_bair_256 --local-dir weights/river_bair_256",
    ),
}


def settings_of(dataset: str, mode: str = "clips") -> dict[str, Any]:
    """The settings that a dataset changes for data.mode=`mode`: {"group.field": value}."""
    if dataset not in DATASETS:
        raise UserError(f"no dataset `{dataset}`{nearest(dataset, DATASETS)}")
    entry = DATASETS[dataset]
    return entry.clips | entry.stream if mode in ("stream", "offline") else entry.clips


SAMPLING_FLAGS = {
    "num_videos": "sample.num_videos",
    "num_samples": "sample.num_samples",
    "num_frames": "data.predict",
    "steps": "sample.steps",
    "solver": "sample.solver",
    "diffusion": "sample.diffusion",
    "grid": "sample.grid",
    "warm_start": "sample.warm_start",
    "redraw": "sample.redraw",
    "split": "sample.split",
    "format": "sample.format",
}


def check(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise UserError(f"{name} must be {rule}, got {value!r}")


def check_context(name: str, value: str) -> None:
    check(
        value in ("uniform", "log") or re.fullmatch(r"recent:[1-9]\d*", value) is not None,
        name,
        "uniform, log or recent:K with K >= 1",
        value,
    )


def at_least(group: str, low: float, **values: float) -> None:
    for name, value in values.items():
        check(value >= low, f"{group}.{name}", f">= {low}", value)


# ----------------------------------------------------------------------------------- shared section
@dataclass(frozen=True)
class Data(Group):
    root: str = "data/ball_stn"  # folder that holds train/, val/ and test/ with shards
    image_size: int = 32  # pixels, square
    clip: int = 30  # frames of a training window
    skip: int = 0  # frames left out between two frames of a window
    condition: int = 10  # frames given when forecasting
    predict: int = 20  # frames forecast
    # context frame in training: uniform over the past, recent:K, or log (log-uniform gap)
    context: str = "recent:3"
    contexts: int = 1  # context frames K drawn for each forecast; only 1 has been tried
    brightness: float = 0.0  # random factor 1 +- this, the same for all frames of a clip
    contrast: float = 0.0  # as brightness
    saturation: float = 0.0  # as brightness
    hue: float = 0.0  # random shift +- this, in turns of the colour wheel
    # random transforms of albumentations, the same for all frames of a clip, e.g.
    # "HorizontalFlip:p=0.5 RandomResizedCrop:scale=0.8,1"
    augment: str = ""
    skip_bad: bool = False  # warn and skip shards that cannot be opened; otherwise the run stops
    workers: int = 4  # loader processes, used where augmentation rules out the latent cache
    generate: str = ""  # balls or maze: generate the shards where they are absent; empty: do not
    stream: int = 100_000  # frames of the generated training stream
    held_out: int = 10_000  # frames of the generated val stream and of the generated test stream
    color_shift: bool = False  # the balls turn blue along their stream
    # clips: random clips. stream: all videos concatenated, visited once in order.
    # offline: the same windows in random order
    mode: str = "clips"
    # windows of a stream, clip frames each. continuous: one from every frame on.
    # chunked: end to end. spaced: num_windows, evenly spaced
    windows: str = "continuous"
    num_windows: int = 0  # number of windows for windows=spaced
    frames: str = ""  # START:STOP, half-open range of the stream to train on; empty: all

    def __post_init__(self):
        at_least("data", 3, clip=self.clip)
        at_least(
            "data",
            1,
            condition=self.condition,
            predict=self.predict,
            contexts=self.contexts,
            stream=self.stream,
            held_out=self.held_out,
        )
        at_least("data", 0, skip=self.skip, workers=self.workers)
        check(self.image_size >= 8, "data.image_size", ">= 8", self.image_size)
        check_context("data.context", self.context)
        for name in ("brightness", "contrast", "saturation", "hue"):
            top = 0.5 if name == "hue" else 1.0
            check(
                0 <= getattr(self, name) <= top,
                f"data.{name}",
                f"in [0, {top}]",
                getattr(self, name),
            )
        check(
            self.generate in ("", "balls", "maze"),
            "data.generate",
            "empty, balls or maze",
            self.generate,
        )
        check(self.mode in MODES, "data.mode", "clips, stream or offline", self.mode)
        check(
            self.windows in STRIDES, "data.windows", "continuous, chunked or spaced", self.windows
        )
        spaced = self.windows == "spaced"
        check(
            self.num_windows >= 1 if spaced else self.num_windows == 0,
            "data.num_windows",
            ">= 1 with data.windows=spaced, and 0 without",
            self.num_windows,
        )
        check(
            re.fullmatch(r"(\d*:\d*)?", self.frames) is not None,
            "data.frames",
            "START:STOP, or empty",
            self.frames,
        )
        if self.mode != "clips" and self.augmented:
            raise UserError(
                f"data.mode={self.mode} takes each frame as it is; set data.brightness, contrast, "
                "saturation and hue to 0, and data.augment to nothing"
            )

    @property
    def augmented(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.augment))


@dataclass(frozen=True)
class Replay(Group):
    """Replay of past windows, for data.mode=stream."""

    # windows that the reservoir holds: a number, a fraction of the stream's, full, or 0 for no
    # replay
    size: str = "0.05"
    # windows of a batch that are the live window, each with its own triple and noise;
    # the other windows are replayed
    n_live: int = 1

    def __post_init__(self):
        number = re.fullmatch(r"\d+", self.size) or (
            re.fullmatch(r"\d*\.\d+", self.size) and 0 < float(self.size) <= 1
        )
        check(
            self.size == "full" or bool(number),
            "replay.size",
            "a number of windows, a fraction like 0.05, or full",
            self.size,
        )
        at_least("replay", 1, n_live=self.n_live)


@dataclass(frozen=True)
class Vqvae(Group):
    # small: our own, trained where absent. Published: taming_f8_small, taming_f8, taming_f16,
    # river. latents: the shards hold latents of Stable Diffusion's autoencoder
    kind: str = "small"
    ckpt: str = ""  # file with the weights; empty: the weights that this configuration trains
    downsample: int = 4  # pixels per latent, in each direction
    channels: int = 4  # channels of a latent
    codes: int = 1024  # entries of the codebook
    width: int = 64  # channels of its blocks
    depth: int = 2  # blocks in the encoder; the decoder has one more
    steps: int = 1_400  # updates
    batch_size: int = 64  # frames per update
    lr: float = 3e-3  # learning rate

    def __post_init__(self):
        from models.autoencoders import KINDS  # imported late: it needs torch

        check(self.kind in KINDS, "vqvae.kind", " or ".join(KINDS), self.kind)
        at_least(
            "vqvae",
            1,
            channels=self.channels,
            depth=self.depth,
            steps=self.steps,
            batch_size=self.batch_size,
        )
        check(
            self.downsample in (2, 4, 8, 16), "vqvae.downsample", "2, 4, 8 or 16", self.downsample
        )
        check(self.codes >= 2, "vqvae.codes", ">= 2", self.codes)
        check(self.width >= 8 and self.width % 8 == 0, "vqvae.width", "a multiple of 8", self.width)
        check(0 < self.lr < 1, "vqvae.lr", "in (0, 1)", self.lr)


SIZES = {
    size: dict(zip(("name", "width", "depth", "mid_depth", "heads"), ("uvit", *numbers)))
    for size, numbers in (
        ("S", (384, 4, 5, 6)),
        ("B", (768, 4, 5, 8)),
        ("L", (1024, 8, 5, 16)),
        ("XL", (1280, 14, 5, 16)),
    )
}


@dataclass(frozen=True)
class Model(Group):
    # convnet, uvit, or joint: of a stream's windows, the second half at once given the first
    name: str = "convnet"
    # S, B (as published), L or XL: a uvit of 25, 98, 283 or 698 M parameters;
    # sets name, width, depth, mid_depth and heads
    size: str = ""
    width: int = 128  # channels (convnet) or token dimension (uvit)
    depth: int = 2  # blocks on the way in and on the way out
    mid_depth: int = 1  # blocks in between
    heads: int = 4  # attention heads
    dropout: float = 0.0  # dropout rate, in [0, 1)
    # last normalization of uvit: ln, or bn as in RIVER's model for BAIR at 256 pixels
    out_norm: str = "ln"

    def __post_init__(self):
        check(
            self.name in ("convnet", "joint", "uvit"),
            "model.name",
            "convnet, joint or uvit",
            self.name,
        )
        check(self.size in ("", *SIZES), "model.size", f"empty, {', '.join(SIZES)}", self.size)
        check(not self.size or self.name == "uvit", "model.size", "empty but for a uvit", self.size)
        at_least("model", 1, depth=self.depth, mid_depth=self.mid_depth, heads=self.heads)
        check(
            self.width >= 8 and self.width % (4 if self.name == "uvit" else 8) == 0,
            "model.width",
            "a multiple of 8 (uvit: 4)",
            self.width,
        )
        check(
            self.width % self.heads == 0,
            "model.width",
            f"a multiple of model.heads = {self.heads}",
            self.width,
        )
        check(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        check(
            self.out_norm in ("ln", "bn")[: 1 + (self.name == "uvit")],
            "model.out_norm",
            "ln (uvit: or bn)",
            self.out_norm,
        )


@dataclass(frozen=True)
class Flow(Group):
    interpolant: str = "follmer"  # name in interpolants.TABLE
    c: float = 1.0  # size of the noise
    # output of the network: residual (of x_1) or drift (the target as published)
    output: str = "residual"
    # weight of the squared error: published, velocity or uniform; see Interpolant.weight
    weight: str = "velocity"
    # density of the flow time in training: uniform, or logit_normal (arXiv 2403.03206)
    times: str = "uniform"
    s_min: float = 1e-4  # flow time in training lies in [s_min, 1 - s_min]
    normalize: bool = True  # scale latents to zero mean and unit variance per channel

    def __post_init__(self):
        # imported late: it needs torch, and `prepare/` may read configs without
        import interpolants

        if self.interpolant not in interpolants.TABLE:
            raise UserError(
                "no interpolant "
                f"`{self.interpolant}`{nearest(self.interpolant, interpolants.TABLE)}"
            )
        check(0 < self.c < 1e6, "flow.c", "in (0, 1e6)", self.c)
        check(
            self.output in interpolants.OUTPUTS,
            "flow.output",
            " or ".join(interpolants.OUTPUTS),
            self.output,
        )
        check(
            self.weight in interpolants.WEIGHTINGS,
            "flow.weight",
            " or ".join(interpolants.WEIGHTINGS),
            self.weight,
        )
        check(
            self.times in ("uniform", "logit_normal"),
            "flow.times",
            "uniform or logit_normal",
            self.times,
        )
        check(0 <= self.s_min < 0.5, "flow.s_min", "in [0, 0.5)", self.s_min)


GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay CUDA graphs
COMPILE = ("auto", "off", "default", *GRAPHS)


@dataclass(frozen=True)
class Train(Group):
    steps: int = 2_400  # updates; 0, for a stream: as many as the stream has windows
    batch_size: int = 32  # windows per update, over all processes
    lr: float = 1e-3  # learning rate
    warmup: int = 100  # updates of linear warm-up
    schedule: str = "cosine"  # after warm-up: cosine to 0, or constant
    beta2: float = 0.99  # second beta of AdamW
    clip_norm: float = 1.0  # largest norm of the gradient
    weight_decay: float = 0.0  # weight decay of AdamW
    ema: float = 0.995  # decay of the averaged weights, reached step by step
    # of networks and published autoencoders: bf16 or float32;
    # auto: bf16 where the hardware has it (AMX, GPU), else float32
    precision: str = "auto"
    # torch.compile of the network: off, default, reduce-overhead (CUDA graphs), max-autotune;
    # auto: default on GPUs for a uvit where a C compiler is found, else off
    compile: str = "auto"
    # gradient accumulation: parts of a batch, computed one after the other to save memory
    accumulate: int = 1
    recompute: bool = False  # activation checkpointing of each block: less memory, more computation
    # FSDP2: weights, gradients, averages and optimizer sharded over the processes
    shard: bool = False
    log_every: int = 20  # updates between two logged losses
    sample_every: int = 800  # updates between forecasts logged during training; 0: only at the end
    save_every: int = 100  # updates between checkpoints
    keep: int = 2  # numbered checkpoints kept beside latest.pt
    keep_every: int = 0  # updates between checkpoints that are kept for good; 0: none
    # consecutive updates skipped for a gradient that is not finite, before the run stops
    max_bad_steps: int = 20
    seed: int = 0  # seed of all randomness
    # train on one batch of clips, over and over, and sample from the same clips
    overfit: bool = False

    def __post_init__(self):
        at_least(
            "train",
            1,
            batch_size=self.batch_size,
            log_every=self.log_every,
            save_every=self.save_every,
            keep=self.keep,
            max_bad_steps=self.max_bad_steps,
            accumulate=self.accumulate,
        )
        at_least(
            "train",
            0,
            steps=self.steps,
            warmup=self.warmup,
            sample_every=self.sample_every,
            seed=self.seed,
            weight_decay=self.weight_decay,
            keep_every=self.keep_every,
        )
        check(0 < self.lr < 1, "train.lr", "in (0, 1)", self.lr)
        check(self.compile in COMPILE, "train.compile", " or ".join(COMPILE), self.compile)
        if self.accumulate > 1 and self.compile in GRAPHS:
            raise UserError(
                f"train.compile={self.compile} replays CUDA graphs, which write the gradients of "
                f"all parts into "
                "one place; with train.accumulate set train.compile=default"
            )
        check(
            self.schedule in ("cosine", "constant"),
            "train.schedule",
            "cosine or constant",
            self.schedule,
        )
        check(0 <= self.beta2 < 1, "train.beta2", "in [0, 1)", self.beta2)
        check(0 < self.clip_norm < 1e9, "train.clip_norm", "in (0, 1e9)", self.clip_norm)
        check(0 <= self.ema < 1, "train.ema", "in [0, 1)", self.ema)
        check(
            self.precision in ("auto", "bf16", "float32"),
            "train.precision",
            "auto, bf16 or float32",
            self.precision,
        )


@dataclass(frozen=True)
class Sample(Group):
    steps: int = 5  # solver steps per frame
    # exact, exact2; ODE: euler, heun, rk4, dopri5; SDE: em, stochastic_heun. See solvers.py
    solver: str = "exact"
    # 0 (ODE), sigma (as trained), follmer, or a number that scales sigma; auto: 0 for ODE solvers,
    # sigma for SDE solvers; for exact and exact2 sigma from the reference, 0 from noise
    diffusion: str = "auto"
    grid: str = "uniform"  # grid of the solver's steps: uniform, cosine or power:P, (k / N)^P
    # begin at this flow time, from the last frame in place of the next (RIVER)
    warm_start: float = 0.0
    # evaluate the network at this flow time in place of s = 0,
    # where an output may hold nothing of x_1
    first: float = 0.0
    tolerance: float = 1e-4  # error tolerance of dopri5, which chooses its number of steps
    context: str = "recent:3"  # as data.context, over the whole history
    # step: draw the context at every network evaluation. frame: once per frame
    redraw: str = "step"
    # decode and encode each forecast frame before the next, so that errors do not accumulate
    reencode: bool = True
    num_videos: int = 64  # videos to forecast
    num_samples: int = 4  # futures per video
    split: str = "test"  # train, val or test
    format: str = "mp4"  # mp4 or gif
    batch: int = 256  # videos x futures rolled out at once
    compile: str = "off"  # as train.compile, for sampling; pays for long roll-outs on a GPU

    def __post_init__(self):
        at_least(
            "sample",
            1,
            steps=self.steps,
            num_videos=self.num_videos,
            num_samples=self.num_samples,
            batch=self.batch,
        )
        check(0 <= self.warm_start < 1, "sample.warm_start", "in [0, 1)", self.warm_start)
        check(0 <= self.first < 1, "sample.first", "in [0, 1)", self.first)
        check(0 < self.tolerance < 1, "sample.tolerance", "in (0, 1)", self.tolerance)
        check_context("sample.context", self.context)
        check(self.compile in COMPILE, "sample.compile", " or ".join(COMPILE), self.compile)
        check(self.redraw in ("step", "frame"), "sample.redraw", "step or frame", self.redraw)
        check(self.format in ("mp4", "gif"), "sample.format", "mp4 or gif", self.format)
        check(
            self.split in ("train", "val", "test"), "sample.split", "train, val or test", self.split
        )


@dataclass(frozen=True)
class Output(Group):
    root: str = "outputs"  # folder for everything that a run writes
    # name of the run; empty: <dataset>-<interpolant>-<seed>, and -overfit or -<data.mode>
    run_id: str = ""


@dataclass(frozen=True)
class Wandb(Group):
    # online, offline or disabled; auto: online where a key is configured, else offline
    mode: str = "auto"
    entity: str = ""  # team or user on wandb
    project: str = "driftcast"  # project on wandb

    def __post_init__(self):
        check(
            self.mode in ("auto", "online", "offline", "disabled"),
            "wandb.mode",
            "auto, online, offline or disabled",
            self.mode,
        )


@dataclass(frozen=True)
class Latent:
    """Measured by the run, not set: what the flow's latents look like. It travels in the
    checkpoint.
    """

    shape: tuple[int, ...] = ()  # (C, h, w)
    mean: tuple[float, ...] = ()  # per channel
    std: tuple[float, ...] = ()
    delta: float = 1.0  # standard deviation of x_1 - x_0 after normalisation
    scale: float = 1.0  # and of x_1
    vqvae: str = ""  # digest of the autoencoder's weights


@dataclass(frozen=True)
class Config:
    dataset: str = "ball_stn"
    data: Data = field(default_factory=Data)
    replay: Replay = field(default_factory=Replay)
    vqvae: Vqvae = field(default_factory=Vqvae)
    model: Model = field(default_factory=Model)
    flow: Flow = field(default_factory=Flow)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    output: Output = field(default_factory=Output)
    wandb: Wandb = field(default_factory=Wandb)
    latent: Latent = field(default_factory=Latent)

    def __post_init__(self):
        size, f = self.data.image_size, self.vqvae.downsample
        # The K of model.name=joint is its number of given frames.
        if self.model.name == "joint":
            check(
                self.data.contexts == 1,
                "data.contexts",
                "1 for model.name=joint",
                self.data.contexts,
            )
        check(size % f == 0, "data.image_size", f"a multiple of vqvae.downsample = {f}", size)
        self.check_mode()
        import solvers

        try:
            solvers.check(self.sample.solver, self.diffusion, self.sample.grid)
        except ValueError as error:
            raise UserError(f"sample.{error}") from None
        if self.sample.solver == "dopri5" and self.sample.redraw == "step":
            raise UserError(
                "sample.solver=dopri5 chooses its steps by what the network answers, so the "
                "context must stay the "
                "same over a frame; set sample.redraw=frame"
            )

    def check_mode(self) -> None:
        if self.data.mode == "clips":
            at_least("train", 1, steps=self.train.steps)
            if self.halves:
                raise UserError(
                    "model.name=joint forecasts half a window at once; it goes with "
                    "data.mode=stream or offline"
                )
        elif self.train.overfit:
            raise UserError(
                "--overfit 1 learns a few clips by heart; it goes with data.mode=clips only"
            )
        elif self.replay.n_live > self.train.batch_size:
            raise UserError(
                f"replay.n_live = {self.replay.n_live} live windows do not fit in "
                f"train.batch_size = "
                f"{self.train.batch_size}"
            )
        elif self.halves and self.data.condition < self.halves[0]:
            raise UserError(
                f"model.name=joint of data.clip = {self.data.clip} is given {self.halves[0]} "
                f"frames; set "
                f"data.condition to as many at least, not {self.data.condition}"
            )

    @property
    def halves(self) -> tuple[int, int] | None:
        """(given, future) frames of a network that forecasts half a window at once; None of one
        that forecasts the next.
        """
        given = self.data.clip // 2
        return (given, self.data.clip - given) if self.model.name == "joint" else None

    @property
    def network_sizes(self) -> dict[str, Any]:
        """The keyword arguments that models.build takes for model.name."""
        names = ["width", "depth", "mid_depth", "heads", "dropout"]
        if self.model.name == "uvit":
            names.append("out_norm")
        sizes = {name: getattr(self.model, name) for name in names}
        if self.halves:
            sizes["given"], sizes["future"] = self.halves
        else:
            sizes["contexts"] = self.data.contexts
        return sizes

    @property
    def diffusion(self) -> str:
        """sample.diffusion, with `auto` resolved."""
        if self.sample.diffusion != "auto":
            return self.sample.diffusion
        import interpolants
        import solvers

        free = (
            interpolants.TABLE[self.flow.interpolant].from_reference
            and self.sample.solver not in solvers.ODE
        )
        return "sigma" if free or self.sample.solver in solvers.SDE else "0"

    @property
    def run_id(self) -> str:
        default = (
            f"{self.dataset}-{self.flow.interpolant}-{self.train.seed}"
            + "-overfit" * self.train.overfit
        )
        default += f"-{self.data.mode}" * (self.data.mode != "clips")
        return self.output.run_id or default


# ---------------------------------------------------------------------------------- flags to config
def settable() -> dict[str, type]:
    """{"group.field": type} of every field that --set can set."""
    return settings.settable(Config)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """["train.lr=1e-3", …] -> {"train.lr": 0.001, …}; UserError for an unknown field or type."""
    return settings.parse_overrides(Config, items)


def describe_settings() -> str:
    """Every setting with its default and its comment, for --help."""
    title = "settings for --set, with their defaults (a dataset may change them):"
    return f"{title}\n{settings.describe(Config)}"


def build(dataset: str = "ball_stn", overrides: dict[str, Any] | None = None) -> Config:
    """The shared section, the dataset's branch (of streams, where one is asked for), the sizes that
    model.size stands for, then the overrides.
    """
    overrides = overrides or {}
    named = {
        f"model.{name}": value
        for name, value in SIZES.get(overrides.get("model.size", ""), {}).items()
    }
    values = settings_of(dataset, overrides.get("data.mode", "clips")) | named | overrides
    if values.get("train.overfit"):
        values["sample.split"] = "train"  # sampled from the clips that it learns
    return update(Config(dataset=dataset), values)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The config of a checkpoint. A field that the checkpoint lacks has its default; UserError for
    a field that this version lacks."""
    flow = values.get("flow") or {}
    # Checkpoints from before flow.weight existed.
    if flow.get("output") == "drift":
        values = {**values, "flow": {"weight": "published", **flow}}
    return settings.from_dict(Config, values)
