"""Every setting of a run: typed, commented, checked. DATASETS is at the top.

A run is described by frozen dataclasses, one per group; `--set group.field=value` sets any field.
All paths are relative to the folder that the command is run in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args

from runtime import settings
from runtime.console import UserError, nearest
from runtime.settings import (
    ClosedUnit,
    Group,
    HalfOpenUnit,
    NonNegative,
    OpenUnit,
    Positive,
    Rule,
    at_least,
    check,
    check_choice,
    matches,
    preset,
    update,
)


# ------------------------------------------------------------------------------ presets, datasets
class Dataset:
    """The settings in which a dataset differs from the defaults below, and how to get its files.

    values: {"group.field": value}, merged from `presets` and from the keywords
    group={field: value}.
    clips: further values for data.mode=clips.
    stream: further values for data.mode=stream and offline; None: those of STREAM.
    prepare: the command that makes the shards; empty: main.py generates them.
    fetch: the command that downloads the published VQVAE; empty: there is none.
    """

    def __init__(
        self,
        *presets: dict,
        clips: dict | None = None,
        stream: dict | None = None,
        prepare: str = "",
        fetch: str = "",
        **groups: dict,
    ):
        self.values = preset(*presets, **groups)
        self.clips = clips or {}
        self.stream = stream or STREAM
        self.prepare = prepare
        self.fetch = fetch


# Below, {...} | {...} spreads the fields of one group over two lines.

# The network and the training that benchmarks.quality has chosen on the balls, for two CPU cores,
# see docs/forecasts.md.
FORECASTS = preset(
    data={"contexts": 3, "context": "last"},
    vqvae={"channels": 8, "codes": 0, "noise": 0.5, "sharpness": 1.0},
    model={"name": "trunk", "width": 64, "depth": 4, "mid_depth": 2},
    flow={"draws": 2, "start": 3.0},
    train={"batch_size": 96, "lr": 2e-3, "optimizer": "muon", "own": 4},
    sample={"redraw": "frame", "restore": 0.06},
)
# The same for frames of 64 pixels, as measured on a quarter of the updates of street videos and of
# Moving MNIST.
FORECASTS_64 = preset(FORECASTS, train={"batch_size": 24})
# The world of the balls looks the same in a mirror.
FORECASTS_BALLS = preset(FORECASTS, data={"flips": "h"}, vqvae={"steps": 1_000})
# One pass over a stream, in windows of data.clip frames, the first half given.
ONE_PASS = preset(
    data={"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    replay={"size": "0.05", "n_live": 2},
    train={"steps": 0, "batch_size": 4, "schedule": "constant", "ema": 0.999}
    | {"log_every": 100, "sample_every": 0, "save_every": 1_000},
)
# Windows, batch and replay of the balls and the maze follow arXiv 2406.04814.
STREAM = preset(ONE_PASS, data={"clip": 20, "condition": 10, "predict": 10})
STREAM_BALLS = preset(
    ONE_PASS,
    data={"clip": 10, "condition": 5, "predict": 5},
    replay={"n_live": 1},
    train={"batch_size": 2},
)
# The training settings published with RIVER and its predecessor.
PUBLISHED = preset(
    data={"context": "uniform"},
    model={"name": "uvit", "width": 768, "depth": 4, "mid_depth": 5, "heads": 8, "dropout": 0.05},
    flow={"c": 0.1, "output": "drift", "weight": "published", "normalize": False},
    train={"steps": 400_000, "batch_size": 256, "lr": 2e-4, "warmup": 10_000, "beta2": 0.999}
    | {"schedule": "constant", "ema": 0.9999}
    | {"log_every": 100, "sample_every": 10_000, "save_every": 5_000},
    sample={"steps": 100, "context": "uniform", "reencode": False},
)
# RIVER's changes for BAIR.
PUBLISHED_BAIR = preset(
    PUBLISHED,
    data={"clip": 16, "condition": 1, "predict": 15},
    vqvae={"codes": 16384},
    train={"steps": 300_000, "lr": 1e-4, "warmup": 5_000, "weight_decay": 5e-6},
)
# Clips as published for CLEVRER.
CLEVRER_CLIPS = preset(
    data={"image_size": 128, "clip": 16, "skip": 4, "condition": 2, "predict": 14},
    vqvae={"downsample": 8, "codes": 8192},
)
# Our settings for networks that train on two CPU cores.
SMALL = preset(
    data={"image_size": 64, "clip": 16, "condition": 8, "predict": 16},
    vqvae={"batch_size": 32},
    model={"width": 96},
    train={"steps": 6_000, "batch_size": 16, "ema": 0.998, "sample_every": 2_000},
    sample={"num_videos": 32, "solver": "exact2", "grid": "cosine", "steps": 10}
    | {"redraw": "frame", "reencode": False},
)
# Fields, which the network forecasts as they are.
FIELDS = preset(
    data={"clip": 12, "condition": 4, "predict": 8, "contexts": 1, "context": "last"},
    vqvae={"kind": "none"},
    model={"width": 48, "depth": 2, "mid_depth": 1},
    flow={"output": "v"},
    train={"steps": 3_000, "batch_size": 16, "ema": 0.998, "sample_every": 1_000},
    sample={"num_videos": 16, "solver": "exact2", "diffusion": "0"}
    | {"redraw": "frame", "reencode": False},
)

# model.size: the fields of Model that a size stands for.
SIZES = {
    "S": {"name": "uvit", "width": 384, "depth": 4, "mid_depth": 5, "heads": 6},
    "B": {"name": "uvit", "width": 768, "depth": 4, "mid_depth": 5, "heads": 8},
    "L": {"name": "uvit", "width": 1024, "depth": 8, "mid_depth": 5, "heads": 16},
    "XL": {"name": "uvit", "width": 1280, "depth": 14, "mid_depth": 5, "heads": 16},
    # The U-Net of arXiv 2403.13724 for Navier-Stokes fields.
    "unet": {"name": "unet", "width": 128, "depth": 2, "mid_depth": 2, "heads": 4}
    | {"multipliers": "1,2,2,2"},
    # For two CPU cores.
    "unet_small": {"name": "unet", "width": 64, "depth": 1, "mid_depth": 2, "heads": 4}
    | {"multipliers": "1,2,2", "patch": 2},
}

# To add a dataset, add one entry here and one file in prepare/. Its shards are in data/<name>.
DATASETS = {
    "ball_stn": Dataset(data={"generate": "balls"}, clips=FORECASTS_BALLS, stream=STREAM_BALLS),
    "ball_nstn": Dataset(
        data={"generate": "balls", "color_shift": True}, clips=FORECASTS_BALLS, stream=STREAM_BALLS
    ),
    "wmaze": Dataset(SMALL, data={"generate": "maze", "stream": 20_000, "held_out": 2_000}),
    "moving_mnist": Dataset(
        SMALL,
        data={"condition": 10, "predict": 10},
        clips=FORECASTS_64,
        prepare="python -m prepare.moving_mnist --out {root}",
    ),
    "clevrer_like": Dataset(
        SMALL,
        CLEVRER_CLIPS,
        vqvae={"batch_size": 16, "steps": 2_000},
        train={"steps": 4_000},
        sample={"num_videos": 16, "steps": 5, "reencode": True},
        clips={"sample.restore": 0.06},
        prepare="pip install pybullet && "
        "python -m prepare.clevrer_like --out {root} --image_size {size}",
    ),
    # Latents of frames of 768 x 1280 pixels, 10 frames per second.
    "plaicraft": Dataset(
        SMALL,
        data={"image_size": 768, "clip": 20, "condition": 10, "predict": 10},
        vqvae={"kind": "latents", "downsample": 8},
        train={"batch_size": 8},
        sample={"num_videos": 16, "num_samples": 2, "batch": 8},
        stream=preset(STREAM, replay={"size": "0.2"}, train={"batch_size": 8}),
        prepare="python -m prepare.plaicraft --source FOLDER_OF_PLAICRAFT --out {root}",
    ),
    "videos": Dataset(
        SMALL,
        clips=FORECASTS_64,
        prepare="python -m prepare.videos --source FOLDER_OF_VIDEOS --out {root} "
        "--image_size {size} --clip_length 24",
    ),
    "fields": Dataset(FIELDS, prepare="python -m prepare.fields --source FILES --out {root}"),
    "navier_stokes": Dataset(
        FIELDS,
        data={"generate": "navier_stokes", "image_size": 64, "stream": 10_000, "held_out": 1_000}
        | {"condition": 2, "predict": 10},
        model=SIZES["unet_small"] | {"padding": "circular"},
    ),
    # A linear equation whose conditional law is known in closed form.
    "heat": Dataset(
        FIELDS,
        data={"generate": "heat", "image_size": 32, "stream": 5_000, "held_out": 1_000}
        | {"condition": 2, "predict": 4},
        model=SIZES["unet_small"] | {"padding": "circular"},
        sample={"steps": 20},
    ),
    "kth": Dataset(
        PUBLISHED,
        data={"image_size": 64, "clip": 40, "condition": 10, "predict": 30},
        vqvae={"kind": "taming_f8_small", "downsample": 8, "codes": 16384}
        | {"ckpt": "weights/river_kth_64/vqvae.ckpt"},
        prepare="python -m prepare.kth --source FOLDER_OF_KTH --out {root} --image_size {size}",
        fetch="hf download cvg-unibe/river_kth_64 --local-dir weights/river_kth_64",
    ),
    "clevrer": Dataset(
        PUBLISHED,
        CLEVRER_CLIPS,
        data={"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.25},
        vqvae={"kind": "river", "ckpt": "weights/river_clevrer_128/vqvae.pth"},
        prepare="python -m prepare.clevrer --source FOLDER_OF_CLEVRER --out {root} "
        "--image_size {size}",
        fetch="hf download cvg-unibe/river_clevrer_128 --local-dir weights/river_clevrer_128",
    ),
    "bair_64": Dataset(
        PUBLISHED_BAIR,
        data={"image_size": 64},
        vqvae={"kind": "taming_f8_small", "downsample": 8, "channels": 4}
        | {"ckpt": "weights/river_bair_64/vqvae.ckpt"},
        model={"out_norm": "ln"},
        prepare="python -m prepare.bair --source softmotion30_44k --out {root} --image_size {size}",
        fetch="hf download cvg-unibe/river_bair_64 --local-dir weights/river_bair_64",
    ),
    "bair_256": Dataset(
        PUBLISHED_BAIR,
        data={"image_size": 256},
        vqvae={"kind": "taming_f16", "downsample": 16, "channels": 8}
        | {"ckpt": "weights/river_bair_256/vqvae.ckpt"},
        model={"out_norm": "bn"},
        prepare="python -m prepare.bair --source FOLDER_OF_BAIR_FRAMES --out {root} "
        "--image_size {size}",
        fetch="hf download cvg-unibe/river_bair_256 --local-dir weights/river_bair_256",
    ),
}
# Flags of sample.py and evaluate.py, and the settings that they set.
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

CONTEXT = r"uniform|log|last|recent:[1-9]\d*|at:[1-9]\d*(,[1-9]\d*)*"
CONTEXTS = "uniform, log, last, recent:N or at:N,N,… with N >= 1"
ReplaySize = Annotated[
    str,
    matches(
        r"\d+|0?\.\d*[1-9]\d*|1\.0+|full", "a number of windows, a fraction like 0.05, or full"
    ),
]
Compile = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]
COMPILE = get_args(Compile)
GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay CUDA graphs


# ----------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Data(Group):
    root: str = "data/ball_stn"  # folder that holds train/, val/ and test/ with shards
    # height and width of an RGB frame, in pixels. Fields have the size of their shards, of any
    # height and width
    image_size: Annotated[int, at_least(8)] = 32
    clip: Annotated[int, at_least(3)] = 30  # frames of a training window
    skip: NonNegative = 0  # frames skipped between two frames of a window
    condition: Positive = 10  # given frames of a forecast
    predict: Positive = 20  # frames to forecast
    # how training draws a context frame from the frames before the reference. uniform: all are
    # equally likely. recent:N: one of the last N. log: with a log-uniform gap to the reference.
    # last: the last data.contexts frames. at:N,N,…: the frames N before the reference
    context: Annotated[str, matches(CONTEXT, CONTEXTS)] = "recent:3"
    contexts: Positive = 1  # context frames of each prediction (published: 1)
    # scale brightness by a random factor in [1 - x, 1 + x], the same for all frames of a clip
    brightness: ClosedUnit = 0.0
    contrast: ClosedUnit = 0.0  # as data.brightness
    saturation: ClosedUnit = 0.0  # as data.brightness
    # shift the hue by a random amount in [-x, x], where 1 is a full turn of the colour wheel
    hue: Annotated[float, Rule("in [0, 0.5]", lambda x: 0 <= x <= 0.5)] = 0.0
    # random transforms of albumentations, the same for all frames of a clip, e.g.
    # "HorizontalFlip:p=0.5 RandomResizedCrop:scale=0.8,1"; empty: none
    augment: str = ""
    # mirror images of the training clips as further data. h: left and right exchanged. v: upside
    # down. hv: both, and both at once. Their latents are cached too
    flips: Literal["", "h", "v", "hv"] = ""
    skip_bad: bool = False  # skip shards that cannot be opened, with a warning; else stop
    # loader processes; used only with augmentation, which rules out the latent cache
    workers: NonNegative = 4
    # stream to generate if there are no shards: balls, maze, navier_stokes or heat; empty: none
    generate: Literal["", "balls", "maze", "navier_stokes", "heat"] = ""
    stream: Positive = 100_000  # frames of the generated training stream
    # frames of each generated held-out stream, val and test
    held_out: Positive = 10_000
    color_shift: bool = False  # generated balls turn blue along the stream
    # clips: random clips. stream: all videos concatenated, visited once in order.
    # offline: the same windows in random order
    mode: Literal["clips", "stream", "offline"] = "clips"
    # where windows of data.clip frames start in a stream. continuous: at every frame.
    # chunked: where the previous window ends. spaced: data.num_windows, evenly spaced
    windows: Literal["continuous", "chunked", "spaced"] = "continuous"
    num_windows: NonNegative = 0  # number of windows for data.windows=spaced
    # frames of the stream to train on, a half-open range START:STOP; empty: all
    frames: Annotated[str, matches(r"(\d*:\d*)?", "START:STOP, or empty")] = ""

    def __post_init__(self):
        super().__post_init__()
        if self.windows == "spaced":
            rule = ">= 1 for data.windows=spaced"
            check(self.num_windows >= 1, "data.num_windows", rule, self.num_windows)
        else:
            rule = f"0 for data.windows={self.windows}"
            check(self.num_windows == 0, "data.num_windows", rule, self.num_windows)
        if self.mode != "clips" and self.augmented:
            raise UserError(
                f"data.mode={self.mode} does not augment frames: set data.brightness, "
                "data.contrast, data.saturation and data.hue to 0, and data.augment to nothing"
            )

        if self.flips and self.mode != "clips":
            raise UserError(
                f"data.flips={self.flips} is for random clips: set data.mode=clips, or data.flips "
                "to nothing"
            )

    @property
    def augmented(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.augment))


@dataclass(frozen=True)
class Replay(Group):
    """Replay of past windows, for data.mode=stream."""

    # capacity of the replay reservoir: a number of windows, a fraction of the stream's windows,
    # full (all windows), or 0 for no replay
    size: ReplaySize = "0.05"
    # items of a batch from the newest window, each with its own frames and noise; the other items
    # come from the reservoir
    n_live: Positive = 1


@dataclass(frozen=True)
class Vqvae(Group):
    # architecture. small: our own, trained by main.py. taming_f8_small, taming_f8, taming_f16,
    # river: published. latents: none, the shards hold latents of Stable Diffusion's autoencoder.
    # none: none, the network forecasts fields (prepare.fields) as they are
    kind: str = "small"
    ckpt: str = ""  # file of the weights; empty: train them (small only)
    downsample: Literal[2, 4, 8, 16] = 4  # image size divided by latent size
    channels: Positive = 4  # channels of a latent
    # entries of the codebook; 0: none, latents are decoded as they are
    codes: Annotated[int, Rule("0 or >= 2", lambda n: n == 0 or n >= 2)] = 1024
    # noise on the latents in training, of a level uniform in [0, noise] per frame, in standard
    # deviations of the latents
    noise: HalfOpenUnit = 0.0
    # weight in the loss of the squared error of local contrast, which keeps edges sharp
    sharpness: Annotated[float, Rule(">= 0", lambda x: x >= 0)] = 0.0
    # channels of the blocks
    width: Annotated[int, Rule("a multiple of 8", lambda n: n > 0 and n % 8 == 0)] = 64
    depth: Positive = 2  # blocks in the encoder; the decoder has one more
    steps: Positive = 1_400  # training updates
    batch_size: Positive = 64  # frames per update
    lr: OpenUnit = 3e-3  # learning rate
    # adamw; muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "muon"
    muon_lr: OpenUnit = 0.05  # learning rate of these matrices

    def __post_init__(self):
        from models.autoencoders import KINDS  # imported late: it needs torch

        super().__post_init__()
        check_choice("vqvae.kind", self.kind, KINDS)

    @property
    def stored(self) -> bool:
        """Whether the shards hold what the network forecasts, so that there are no weights."""
        return self.kind in ("latents", "none")


@dataclass(frozen=True)
class Model(Group):
    # velocity network. convnet: small and convolutional. uvit: RIVER's U-ViT. joint: a convnet that
    # predicts the second half of a stream's window at once, given the first half. unet: blocks at
    # several resolutions, for fields
    name: str = "convnet"
    # S, B (as published), L or XL: a uvit of 25, 98, 283 or 698 million parameters. unet: a unet of
    # 128 channels, as published; unet_small: a unet for two CPU cores.
    # sets model.name, width, depth, mid_depth, heads, multipliers and patch.
    # empty: the values below
    size: str = ""
    width: Annotated[int, at_least(8)] = 128  # channels (convnet) or token dimension (uvit)
    depth: Positive = 2  # number of input blocks, and of output blocks
    mid_depth: Positive = 1  # number of middle blocks
    heads: Positive = 4  # attention heads
    dropout: HalfOpenUnit = 0.0  # dropout rate
    # normalisation before the output of uvit: ln, or bn as in RIVER's model for BAIR at 256 pixels
    out_norm: Literal["ln", "bn"] = "ln"
    # channels of the resolutions of unet, from the highest down, in units of model.width
    multipliers: Annotated[
        str, matches(r"[1-9]\d?(,[1-9]\d?)*", "numbers from 1 to 99, like 1,2,2,2")
    ] = "1,2,2,2"
    # how convolutions of unet continue fields beyond their edges: zeros, or circular for periodic
    # fields
    padding: Literal["zeros", "circular"] = "zeros"
    patch: Positive = 1  # pixels per side that unet joins to one before its highest resolution

    def __post_init__(self):
        import models  # imported late: it needs torch

        super().__post_init__()
        check_choice("model.name", self.name, models.TABLE)
        check_choice("model.size", self.size, ("", *SIZES))
        sized = SIZES.get(self.size, {"name": self.name})["name"]
        check(self.name == sized, "model.name", f"{sized} for model.size={self.size}", self.name)
        if self.name != "unet":
            rule = f"zeros for {self.name}"
            check(self.padding == "zeros", "model.padding", rule, self.padding)
        if self.name == "uvit":
            check(self.width % 4 == 0, "model.width", "a multiple of 4 for uvit", self.width)
        else:
            check(self.out_norm == "ln", "model.out_norm", f"ln for {self.name}", self.out_norm)
            check(
                self.width % 8 == 0, "model.width", f"a multiple of 8 for {self.name}", self.width
            )
        rule = f"a multiple of model.heads = {self.heads}"
        check(self.width % self.heads == 0, "model.width", rule, self.width)


@dataclass(frozen=True)
class Flow(Group):
    interpolant: str = "follmer"  # stochastic interpolant, see --interpolant
    # scale of the noise coefficient gamma(s); unused by linear and trig
    c: Annotated[float, Rule("in (0, 1e6)", lambda x: 0 < x < 1e6)] = 1.0
    # what the network predicts. residual: x_1 - x_0, or x_1 if the interpolant starts at noise,
    # scaled to unit variance. v: a rotation of residual and noise (arXiv 2202.00512). drift: the
    # published target
    output: str = "residual"
    # weight w(s) of the squared error: published, velocity or uniform, see interpolants.py
    weight: str = "velocity"
    # density of the flow time in training: uniform, or logit_normal (arXiv 2403.03206)
    times: Literal["uniform", "logit_normal"] = "uniform"
    # flow time in training lies in [s_min, 1 - s_min]
    s_min: Annotated[float, Rule("in [0, 0.5)", lambda x: 0 <= x < 0.5)] = 1e-4
    # noise draws per item of a batch, which share the given frames
    draws: Positive = 1
    # weight of a further draw at s = 0, where the network forecasts the mean of the next frame from
    # the given frames alone; 0: none
    start: Annotated[float, at_least(0)] = 0.0
    # largest deviation of the noise on the given frames in training, start and contexts alike, in
    # units of normalised latents; each item draws its own level, an input of the network; 0: none
    noise: Annotated[float, at_least(0)] = 0.0
    # interpolant: regression of the target. energy: the sampler itself is trained on the energy
    # score. shortcut: regression, and consistency of one solver step with two of half the size,
    # which is an input of the network. See docs/forecasts.md
    objective: Literal["interpolant", "energy", "shortcut"] = "interpolant"
    # energy: evaluations of the network per frame. shortcut: the default of sample.steps
    evaluations: Literal[1, 2] = 1
    # energy: samples per item, each from its own noise
    members: Annotated[int, Rule("in [2, 16]", lambda n: 2 <= n <= 16)] = 2
    # energy: weight of two further scores, the energy score of patches of the latent and the CRPS
    # of its values; 0: none
    local: Annotated[float, at_least(0)] = 0.0
    # energy: frames that are rolled out in training, each scored
    unroll: Literal[1, 2, 3] = 1
    # energy, shortcut: flow time at which sampling starts, for interpolants whose noise is 0 at
    # s = 0
    begin: OpenUnit = 0.05
    # shortcut: every n-th item of a batch also trains the consistency of steps
    consistency: Positive = 4
    normalize: bool = True  # scale latents to zero mean and unit variance per channel

    def __post_init__(self):
        import interpolants  # imported late: it needs torch

        super().__post_init__()
        if self.interpolant not in interpolants.TABLE:
            hint = nearest(self.interpolant, interpolants.TABLE)
            raise UserError(f"no interpolant `{self.interpolant}`{hint}")
        check_choice("flow.output", self.output, interpolants.OUTPUTS)
        check_choice("flow.weight", self.weight, interpolants.WEIGHTINGS)


@dataclass(frozen=True)
class Train(Group):
    steps: NonNegative = 2_400  # updates; 0: one per window of the stream
    batch_size: Positive = 32  # windows per update, over all processes
    lr: OpenUnit = 1e-3  # learning rate
    warmup: NonNegative = 100  # updates of linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up: cosine to 0, or constant
    # adamw; muon: orthogonalised momentum for the matrices of the network's blocks, AdamW for the
    # other weights
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr: OpenUnit = 0.05  # learning rate of these matrices; follows train.schedule
    beta2: HalfOpenUnit = 0.99  # decay of AdamW's second moment
    # maximum norm of the gradient; a larger gradient is scaled down
    clip_norm: Annotated[float, Rule("in (0, 1e9)", lambda x: 0 < x < 1e9)] = 1.0
    weight_decay: Annotated[float, at_least(0)] = 0.0  # weight decay of AdamW
    ema: HalfOpenUnit = 0.995  # decay of the averaged weights; lower in the first updates
    # every n-th item of a batch is given the network's own forecasts in place of the last given
    # frames, so that the network learns to correct its errors; after a quarter of the updates.
    # 0: none. Only for clips without augmentation
    own: NonNegative = 0
    own_steps: Positive = 1  # largest number of frames that are replaced
    # arithmetic of the network and of published autoencoders: bf16 or float32;
    # auto: bf16 if the hardware supports it (GPU, CPU with AMX), else float32
    precision: Literal["auto", "bf16", "float32"] = "auto"
    # mode of torch.compile: off, default, reduce-overhead (CUDA graphs), max-autotune;
    # auto: default for a uvit on a GPU if there is a C compiler, else off
    compile: Compile = "auto"
    # gradient accumulation: parts into which a batch is split to save memory
    accumulate: Positive = 1
    recompute: bool = False  # activation checkpointing of each block: less memory, more computation
    # FSDP2: shard weights, gradients, averages and optimizer state over the processes
    shard: bool = False
    log_every: Positive = 20  # updates between two rows of the log
    # updates between two previews of forecasts; 0: none
    sample_every: NonNegative = 800
    save_every: Positive = 100  # updates between two checkpoints
    keep: Positive = 2  # numbered checkpoints to keep beside latest.pt
    # updates between two checkpoints that are never deleted; 0: none
    keep_every: NonNegative = 0
    # number of consecutive updates without a finite gradient after which the run stops
    max_bad_steps: Positive = 20
    seed: NonNegative = 0  # seed of weights, batches, noise and forecasts
    # train on four clips only and forecast the same clips; --overfit sets it
    overfit: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.shard and self.optimizer == "muon":
            raise UserError(
                "train.optimizer=muon needs whole matrices on each process: set train.shard=false, "
                "or train.optimizer=adamw"
            )
        if self.shard and self.own:
            # The processes would gather the weights unequally often.
            raise UserError("train.own and train.shard cannot be combined: set one of them to 0")
        if self.accumulate > 1 and self.compile in GRAPHS:
            raise UserError(
                f"train.compile={self.compile} records CUDA graphs, which cannot accumulate "
                f"gradients: set train.compile=default, or train.accumulate=1"
            )


@dataclass(frozen=True)
class Sample(Group):
    steps: Positive = 5  # solver steps per forecast frame
    # ODE and SDE: exact, exact2. ODE: euler, heun, rk4, dopri5. SDE: em, stochastic_heun.
    # See docs/sampling.md
    solver: str = "exact"
    # diffusion coefficient g(s). 0: ODE. sigma: SDE as trained. follmer: Föllmer process.
    # A number: sigma times this number. auto: 0 for ODE solvers, sigma for SDE solvers; for exact
    # and exact2 sigma if the interpolant starts at the reference, 0 if it starts at noise
    diffusion: str = "auto"
    grid: str = "uniform"  # flow times of the steps: uniform, cosine or power:P, (k / N)^P
    # flow time to start from, with the last frame in place of the next one (RIVER)
    warm_start: HalfOpenUnit = 0.0
    # flow time at which the network is evaluated in place of s = 0, where its output may not
    # depend on x_1
    first: HalfOpenUnit = 0.0
    tolerance: OpenUnit = 1e-4  # error tolerance of dopri5, which adapts its steps
    # as data.context, from all frames so far; empty: the value of data.context
    context: Annotated[str, matches(rf"({CONTEXT})?", f"{CONTEXTS}, or empty")] = ""
    # deviation of the noise on the given frames, see flow.noise
    noise: Annotated[float, at_least(0)] = 0.0
    # when to draw a new context. step: at every network evaluation. frame: for every frame
    redraw: Literal["step", "frame"] = "step"
    # decode and encode each forecast frame before the next one, against accumulating errors
    reencode: bool = True
    # add to forecasts the detail of the last given frame that the autoencoder loses, where the
    # scene has not changed by more than this share of the range of values; 0: off. For RGB frames
    restore: Annotated[float, Rule("in [0, 1]", lambda x: 0 <= x <= 1)] = 0.0
    num_videos: Positive = 64  # videos to forecast
    num_samples: Positive = 4  # futures per video
    split: Literal["train", "val", "test"] = "test"  # split of the given frames: train, val or test
    format: Literal["mp4", "gif"] = "mp4"  # format of the videos: mp4 or gif
    batch: Positive = 256  # futures to forecast at once; lower it to save memory
    # as train.compile, for forecasts; saves time in long roll-outs on a GPU
    compile: Compile = "off"


@dataclass(frozen=True)
class Output(Group):
    root: str = "outputs"  # folder of checkpoints, latents and results
    # name of the run; empty: <dataset>-<interpolant>-<seed>, then -overfit or -<data.mode>
    run_id: str = ""


@dataclass(frozen=True)
class Wandb(Group):
    # online, offline or disabled; auto: online if an API key is configured, else offline
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    entity: str = ""  # team or user on wandb; empty: your default
    project: str = "driftcast"  # project on wandb


@dataclass(frozen=True)
class Latent:
    """Shape and statistics of the latents. Not a Group: --set cannot set what a run measures."""

    shape: tuple[int, ...] = ()  # (C, h, w)
    mean: tuple[float, ...] = ()  # (C,)
    std: tuple[float, ...] = ()  # (C,)
    delta: float = 1.0  # root mean square of x_1 - x_0, both normalised by mean and std
    scale: float = 1.0  # root mean square of x_1, normalised by mean and std
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
        # Rules that involve several groups. Each group has checked its own fields.
        size, factor = self.data.image_size, self.vqvae.downsample
        rule = f"a multiple of vqvae.downsample = {factor}"
        if self.vqvae.stored and self.data.flips:
            raise UserError(
                f"data.flips={self.data.flips} flips RGB frames before they are encoded, but "
                f"vqvae.kind={self.vqvae.kind} stores no frames; set data.flips to nothing"
            )
        if self.vqvae.stored and self.sample.restore:
            raise UserError(
                f"sample.restore={self.sample.restore:g} restores RGB frames, but vqvae.kind="
                f"{self.vqvae.kind} stores no frames; set it to 0"
            )
        if self.vqvae.kind == "none":
            self.check_fields()
        else:
            check(size % factor == 0, "data.image_size", rule, size)
        if self.model.name == "joint":
            self.check_joint()
        self.check_contexts()
        self.check_given()
        self.check_mode()
        if self.flow.objective != "interpolant":
            self.check_objective()
        self.check_solver()

    def check_joint(self) -> None:
        data = self.data
        modes = "stream or offline for model.name=joint"
        check(data.mode != "clips", "data.mode", modes, data.mode)
        # The number of given frames takes the place of data.contexts.
        check(data.contexts == 1, "data.contexts", "1 for model.name=joint", data.contexts)
        given = self.halves[0]
        rule = f">= {given} for model.name=joint and data.clip = {data.clip}"
        check(data.condition >= given, "data.condition", rule, data.condition)

    def check_contexts(self) -> None:
        for name in ("data.context", "sample.context"):
            group, _, field = name.partition(".")
            kind, _, gaps = getattr(getattr(self, group), field).partition(":")
            if kind == "at":
                rule = f"{self.data.contexts} gaps, as many as data.contexts"
                check(gaps.count(",") + 1 == self.data.contexts, name, rule, f"at:{gaps}")

    def check_fields(self) -> None:
        """Check the settings of fields that are their own latents."""
        if self.data.augmented:
            raise UserError(
                "vqvae.kind=none is for fields, and augmentation for RGB frames: set "
                "data.brightness, data.contrast, data.saturation and data.hue to 0, and "
                "data.augment to nothing"
            )

    def check_given(self) -> None:
        if self.flow.noise:
            check(self.model.name == "trunk", "model.name", "trunk for flow.noise", self.model.name)
        if self.train.own:
            norm = self.model.out_norm
            check(norm == "ln", "model.out_norm", "ln for train.own", norm)
        rule = f"<= flow.noise = {self.flow.noise}"
        check(self.sample.noise <= self.flow.noise, "sample.noise", rule, self.sample.noise)

    def check_mode(self) -> None:
        train, mode, live = self.train, self.data.mode, self.replay.n_live
        if mode == "clips":
            check(train.steps >= 1, "train.steps", ">= 1 for data.mode=clips", train.steps)
            return
        check(not train.overfit, "data.mode", "clips for --overfit 1", mode)
        rule = f"<= train.batch_size = {train.batch_size}"
        check(live <= train.batch_size, "replay.n_live", rule, live)

    def check_solver(self) -> None:
        import solvers  # imported late: it needs torch

        try:
            solvers.check(self.sample.solver, self.diffusion, self.sample.grid)
        except ValueError as error:
            raise UserError(f"sample.{error}") from None
        if self.sample.solver == "dopri5" and self.sample.redraw == "step":
            raise UserError(
                "sample.solver=dopri5 adapts its step size and needs one context per frame: set "
                "sample.redraw=frame"
            )

    def check_objective(self) -> None:
        import models  # imported late: it needs torch

        flow, data, name = self.flow, self.data, self.model.name
        about = f"for flow.objective={flow.objective}"
        for setting, value in trained_sampler(flow).items():
            attribute = setting.partition(".")[2]
            own = getattr(self.sample, attribute)
            if flow.objective == "shortcut" and attribute == "steps":
                check(own in (1, 2, 4, 8), setting, f"1, 2, 4 or 8 {about}", own)
            else:
                check(own == value, setting, f"{value} {about}, as trained", own)
        if flow.objective == "shortcut":
            known = f"{' or '.join(models.STEP_SIZE)} {about}"
            check(name in models.STEP_SIZE, "model.name", known, name)
            check(flow.output != "drift", "flow.output", f"residual or v {about}", flow.output)
            return
        check(name != "joint", "model.name", f"another than joint {about}", name)
        if flow.unroll > 1:
            about = f"for flow.unroll={flow.unroll}"
            check(data.context == "last", "data.context", f"last {about}", data.context)
            check(data.mode == "clips", "data.mode", f"clips {about}", data.mode)
            check(flow.noise == 0, "flow.noise", f"0 {about}", flow.noise)
            cached = not data.augmented or self.train.overfit
            check(cached, "flow.unroll", "1 for frames that are augmented", flow.unroll)

    @property
    def halves(self) -> tuple[int, int] | None:
        """Numbers of (given, future) frames of a window for model.name=joint, else None."""
        given = self.data.clip // 2
        return (given, self.data.clip - given) if self.model.name == "joint" else None

    @property
    def network_sizes(self) -> dict[str, Any]:
        """The keyword arguments that models.build takes for model.name."""
        names = ["width", "depth", "mid_depth", "heads", "dropout"]
        if self.model.name == "uvit":
            names.append("out_norm")
        sizes = {name: getattr(self.model, name) for name in names}
        if self.model.name == "unet":
            multipliers = tuple(map(int, self.model.multipliers.split(",")))
            sizes |= {"multipliers": multipliers, "padding": self.model.padding}
            sizes["patch"] = self.model.patch
        if self.halves:
            sizes["given"], sizes["future"] = self.halves
        else:
            sizes["contexts"] = self.data.contexts
        if self.flow.objective == "shortcut":
            sizes["step_size"] = True
        return sizes

    @property
    def context(self) -> str:
        """sample.context, with an empty value resolved."""
        return self.sample.context or self.data.context

    @property
    def diffusion(self) -> str:
        """sample.diffusion, with `auto` resolved."""
        if self.sample.diffusion != "auto":
            return self.sample.diffusion
        import interpolants
        import solvers

        if self.sample.solver in solvers.ODE:
            return "0"
        if self.sample.solver in solvers.SDE:
            return "sigma"
        return "sigma" if interpolants.TABLE[self.flow.interpolant].from_reference else "0"

    @property
    def run_id(self) -> str:
        """The name of the run's folders."""
        if self.output.run_id:
            return self.output.run_id
        name = f"{self.dataset}-{self.flow.interpolant}-{self.train.seed}"
        if self.train.overfit:
            name += "-overfit"
        if self.data.mode != "clips":
            name += f"-{self.data.mode}"
        return name


# ------------------------------------------------------------------------------------------- builds
def build(dataset: str = "ball_stn", overrides: dict[str, Any] | None = None) -> Config:
    """The defaults, changed by the entry of DATASETS, then by model.size, then by the overrides.

    overrides: {"group.field": value}. data.root is data/<dataset> unless it is overridden.
    """
    if dataset not in DATASETS:
        raise UserError(f"no dataset `{dataset}`{nearest(dataset, DATASETS)}")
    overrides = overrides or {}
    # Later values replace earlier ones.
    entry = DATASETS[dataset]
    values = {"data.root": f"data/{dataset}"} | entry.values
    values |= entry.clips if overrides.get("data.mode", "clips") == "clips" else entry.stream
    values |= preset(model=SIZES.get(overrides.get("model.size", ""), {})) | overrides
    of_flow = {name[5:]: value for name, value in values.items() if name.startswith("flow.")}
    values |= trained_sampler(Flow(**of_flow)) | overrides
    if values.get("train.overfit"):
        values["sample.split"] = "train"
    return update(Config(dataset=dataset), values)


def trained_sampler(flow: Flow) -> dict[str, Any]:
    """The settings of the sampler that the objective trains; {} for flow.objective=interpolant.

    It solves the probability-flow ODE in flow.evaluations steps. For interpolants whose noise is 0
    at s = 0, it starts at flow.begin: see objectives/energy.py.
    """
    import interpolants  # imported late: it needs torch

    if flow.objective == "interpolant":
        return {}
    begin = flow.begin if interpolants.TABLE[flow.interpolant].wiener else 0.0
    return preset(
        sample={"steps": flow.evaluations, "solver": "exact", "diffusion": "0", "grid": "uniform"}
        | {"warm_start": begin, "first": 0.0, "redraw": "frame"}
    )


settable = partial(settings.settable, Config)
parse_overrides = partial(settings.parse_overrides, Config)
describe_settings = partial(settings.describe, Config)
to_dict = dataclasses.asdict


def from_dict(values: dict[str, Any]) -> Config:
    """The config of a checkpoint. A field that the checkpoint lacks has its default; UserError for
    a field that this version lacks."""
    flow = values.get("flow") or {}
    # Checkpoints without flow.weight are older than this field, and used the published weight.
    if flow.get("output") == "drift":
        values = {**values, "flow": {"weight": "published", **flow}}
    return settings.from_dict(Config, values)
