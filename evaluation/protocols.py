"""How forecasts are evaluated, by name: two numbers can be compared where their protocols are the
same, and only there.

A protocol goes into metrics.json whole. Where a paper leaves something open, `source` says what was
chosen.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import configs
from configs import nearest
from runtime.console import UserError


@dataclass(frozen=True)
class Protocol:
    name: str
    source: str  # where it comes from, and what that leaves open
    datasets: tuple[str, ...]  # those it is made for; empty: any
    condition: int = 0  # frames given; 0: as many as the checkpoint's config has
    predict: int = 0  # frames forecast; likewise
    split: str = "test"
    videos: int = 256  # clips, or as many as there are
    samples: int = 4  # futures of each
    clips: str = "spaced"  # `spaced` evenly over the split without overlap, or `random` ones
    # clips of all videos laid end to end, where those `spaced` overlap if they must; or the first
    stream: bool = False
    # that there are: `continuous`, one from every frame on, or `chunked`, end to end
    frames: str = ""  # of a stream: START:STOP, the part that clips are taken from; empty: all
    seed: int = 0  # of the clips, if random, and of the noise
    # of mse, psnr, ssim, lpips: `mean` over samples, `first`, or the `best` of each video and
    # metric
    rule: str = "mean"
    lpips_net: str = "alex"  # its backbone: `alex` or `vgg`
    fvd_given: bool = False  # do the given frames count in FVD and KVD, too
    fvd_chunk: int = 0  # frames of a clip that I3D looks at; 0: all at once
    fvd_samples: int = 1  # futures of each video that are compared; 0: all
    reference: str = "real"  # FVD against `real` videos, or against `autoencoded` ones

    def __post_init__(self):
        positive = ("videos", "samples")
        for name in ("condition", "predict", "fvd_samples", *positive):
            if getattr(self, name) < (name in positive):
                raise UserError(
                    f"protocol {self.name}: {name} must be >= {int(name in positive)}, got "
                    f"{getattr(self, name)}"
                )
        if 0 < self.fvd_chunk < 10:
            raise UserError(
                f"protocol {self.name}: fvd_chunk must be 0 or >= 10, got {self.fvd_chunk}: I3D "
                f"needs 10 frames"
            )
        if self.frames and not self.stream:
            raise UserError(
                f"protocol {self.name} is not of a stream, so --frames does not go with it; see "
                f"lifelong_stream"
            )
        if re.fullmatch(r"(\d*:\d*)?", self.frames) is None:
            raise UserError(f"protocol {self.name}: frames must be START:STOP, got {self.frames}")
        clips = ("spaced", "random", *(("continuous", "chunked") if self.stream else ()))
        for name, values in (
            ("clips", clips),
            ("rule", ("mean", "first", "best")),
            ("lpips_net", ("alex", "vgg")),
            ("reference", ("real", "autoencoded")),
        ):
            if getattr(self, name) not in values:
                raise UserError(
                    f"protocol {self.name}: {name} must be one of {', '.join(values)}, got "
                    f"{getattr(self, name)}"
                )

    @property
    def compared(self) -> int:
        """Futures of each video that FVD looks at."""
        return min(self.fvd_samples or self.samples, self.samples)

    def told(self, which: list[str]) -> dict:
        """For metrics.json, with the names of the metrics that were measured; of a stream only
        where there is one, as in older results, which stay comparable.
        """
        left_out = ("datasets",) if self.stream else ("datasets", "stream", "frames")
        fields = {
            TOLD.get(name, name): value
            for name, value in dataclasses.asdict(self).items()
            if name not in left_out
        }
        return {**fields, "metrics": which}


TOLD = {"samples": "samples_per_video"}  # fields that metrics.json names otherwise
FIELDS = {TOLD.get(field.name, field.name) for field in dataclasses.fields(Protocol)} | {"metrics"}


def in_words(told: dict) -> list[str]:
    """What `told` gave, as lines for a person."""
    S = told["samples_per_video"]
    lpips = f" and lpips ({told['lpips_net']})" if "lpips" in told["metrics"] else ""
    where = f" of the stream's frames {told['frames'] or ':'}" if told.get("stream") else ""
    lines = [
        f"protocol {told['name']}: {told['videos']} {told['split']} clips{where} "
        f"({told['clips']}, seed {told['seed']}), "
        f"{S} samples each, {told['condition']} -> {told['predict']} frames",
        f"of mse, psnr, ssim{lpips} the {told['rule']} of the samples counts; crps and energy are "
        f"unbiased",
    ]
    if {"fvd", "kvd"} & set(told["metrics"]):
        frames = f"{told['fvd_chunk']}-frame pieces of the" if told["fvd_chunk"] else "the"
        counted = (
            f"{frames} given and forecast frames"
            if told["fvd_given"]
            else f"{frames} forecast frames"
        )
        lines.append(
            f"fvd and kvd look at {counted}, {min(told['fvd_samples'] or S, S)} of {S} samples a "
            f"clip, against "
            f"{told['reference']} videos"
        )
    return lines


BALLS, KTH, BAIR = ("ball_stn", "ball_nstn"), ("kth",), ("bair_64", "bair_256")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("own", "the checkpoint's own task, whatever it was trained on", ()),
        Protocol(
            "lifelong_ball", "ours, for the balls of lifelong learning", BALLS, 10, 20, videos=64
        ),
        Protocol(
            "lifelong_stream",
            "after Yoo et al. 2024 (arXiv 2406.04814): windows as long as those of the training, "
            "the first "
            "half given, minADE of the best of 3 samples. Ours: 100 windows from the stream's "
            "first frame to its last, and "
            "FVD and KVD of the first sample with the given frames, without which I3D would have "
            "too few",
            (),
            videos=100,
            samples=3,
            stream=True,
            fvd_given=True,
        ),
        Protocol(
            "srvp_kth",
            "Franceschi et al. 2020 and their test.py: 1,000 random clips, the best of 100 "
            "samples by each "
            "metric, FVD of the first sample with the given frames. Their clips are drawn by "
            "file, ours over all shards",
            KTH,
            10,
            30,
            videos=1000,
            samples=100,
            clips="random",
            seed=42,
            rule="best",
            fvd_given=True,
        ),
        Protocol(
            "river_kth",
            "Davtyan et al. 2023: as others do, but only forecast frames count in FVD. Left open "
            "there and "
            "chosen here: 256 clips, the best of 100 samples as in srvp_kth, FVD of the first",
            KTH,
            10,
            30,
            samples=100,
            rule="best",
        ),
        Protocol(
            "pfi_kth",
            "Chen et al. 2024 (arXiv 2403.13724): FVD over 256 test videos. Left open there and "
            "chosen here: one "
            "sample each, only forecast frames",
            KTH,
            10,
            30,
            samples=1,
        ),
        Protocol("pfi_clevrer", "as pfi_kth", ("clevrer",), 2, 14, samples=1),
        Protocol(
            "bair",
            "the usual one, of Denton and Fergus 2018 and Rakhimov et al. 2020: 256 test videos, "
            "100 samples of each, "
            "all of them in FVD with the given frame (16 frames)",
            BAIR,
            1,
            15,
            samples=100,
            rule="best",
            fvd_given=True,
            fvd_samples=0,
        ),
    )
}


def get(name: str, config: configs.Config, changes: dict) -> Protocol:
    """The protocol of that name for a checkpoint's config. What `changes` differs in goes into its
    name: it is another.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no protocol `{name}`{nearest(name, PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if protocol.datasets and config.dataset not in protocol.datasets:
        raise UserError(
            f"protocol {name} is for {' and '.join(protocol.datasets)}, the checkpoint is of "
            f"{config.dataset}; "
            "--protocol own is for any"
        )
    changes = {
        key: value
        for key, value in changes.items()
        if value is not None and value != getattr(protocol, key)
    }
    full_name = "-".join(
        [name, *(f"{field}_{value}".replace(":", "-") for field, value in sorted(changes.items()))]
    )
    protocol = dataclasses.replace(protocol, **changes, name=full_name)
    half, own = config.data.clip // 2, config.data
    condition, predict = (
        (half, own.clip - half) if protocol.stream else (own.condition, own.predict)
    )
    return dataclasses.replace(
        protocol, condition=protocol.condition or condition, predict=protocol.predict or predict
    )
