"""Evaluation protocols by name. Only numbers of equal protocols can be compared.

metrics.json contains the whole protocol. Where a paper leaves a choice open, `source` states ours.
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
    source: str  # publication, and our choices where it leaves them open
    datasets: tuple[str, ...]  # datasets that the protocol is for; empty: any
    condition: int = 0  # given frames; 0: data.condition of the checkpoint
    predict: int = 0  # frames to forecast; 0: data.predict of the checkpoint
    split: str = "test"
    videos: int = 256  # number of clips, or all clips if there are fewer
    samples: int = 4  # futures per clip
    # where clips start. spaced: evenly over the split, without overlap. random: anywhere. Streams
    # only: continuous: a window at each of the first `videos` frames; chunked: the first `videos`
    # windows end to end. Spaced windows of a stream may overlap.
    clips: str = "spaced"
    stream: bool = False  # treat all videos of the split as one stream
    frames: str = ""  # part of the stream to take clips from, START:STOP; empty: all
    seed: int = 0  # seed of random clips and of the noise
    # how mse, psnr, ssim and lpips reduce the samples of a clip: mean over samples, first sample,
    # or best sample (chosen for each metric)
    rule: str = "mean"
    lpips_net: str = "alex"  # backbone of LPIPS: alex or vgg
    fvd_given: bool = False  # whether FVD and KVD include the given frames
    fvd_chunk: int = 0  # length in frames of the pieces that I3D sees; 0: the whole clip
    fvd_samples: int = 1  # futures per clip that FVD and KVD compare; 0: all
    reference: str = "real"  # videos that FVD and KVD compare with: real or autoencoded
    # forecast the states of the oracle, and score against all of its draws, see evaluation.oracle.
    # Not in the repr, from which the plan of an evaluation is computed: the name says it.
    oracle: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self):
        least = {"condition": 0, "predict": 0, "fvd_samples": 0, "videos": 1, "samples": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(
                    f"protocol {self.name}: {name} must be >= {low}, got {getattr(self, name)}"
                )
        if 0 < self.fvd_chunk < 10:
            raise UserError(
                f"protocol {self.name}: fvd_chunk must be 0 or >= 10 (I3D needs 10 frames), got "
                f"{self.fvd_chunk}"
            )
        if self.frames and not self.stream:
            raise UserError(
                f"protocol {self.name} does not evaluate a stream and takes no --frames; use "
                "--protocol lifelong_stream"
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
        """Number of futures per clip that FVD and KVD compare."""
        return min(self.fvd_samples or self.samples, self.samples)

    def to_metadata(self, which: list[str]) -> dict:
        """The fields for metrics.json, with the names of the measured metrics in `which`.

        The fields of streams are left out for other protocols, as in results of earlier versions.
        """
        left_out = ("datasets",) if self.stream else ("datasets", "stream", "frames")
        if not self.oracle:
            left_out += ("oracle",)
        fields = {
            METADATA_NAMES.get(name, name): value
            for name, value in dataclasses.asdict(self).items()
            if name not in left_out
        }
        return {**fields, "metrics": which}


METADATA_NAMES = {"samples": "samples_per_video"}  # field -> its name in metrics.json
FIELDS = {METADATA_NAMES.get(field.name, field.name) for field in dataclasses.fields(Protocol)} | {
    "metrics"
}


def describe(metadata: dict) -> list[str]:
    """Describe the protocol of a metrics.json in a few lines of text."""
    S = metadata["samples_per_video"]
    lpips = f" and lpips ({metadata['lpips_net']})" if "lpips" in metadata["metrics"] else ""
    where = f" of the stream's frames {metadata['frames'] or ':'}" if metadata.get("stream") else ""
    scores = f"mse, psnr, ssim{lpips}: the {metadata['rule']} of the samples; "
    scores += "crps and energy: unbiased"
    if "scale" in metadata:
        units = ", ".join(f"{unit:.4g}" for unit in metadata["scale"])
        scores = (
            f"mse: the {metadata['rule']} of the samples; crps and energy: unbiased; rmse: of the "
            f"ensemble mean; fields divided by the standard deviation of each channel ({units})"
        )
    lines = [
        f"protocol {metadata['name']}: {metadata['videos']} {metadata['split']} clips{where} "
        f"({metadata['clips']}, seed {metadata['seed']}), "
        f"{S} samples each, {metadata['condition']} -> {metadata['predict']} frames",
        scores,
    ]
    # The settings of FVD and KVD matter only if one of them was measured.
    if {"fvd", "kvd"} & set(metadata["metrics"]):
        frames = f"{metadata['fvd_chunk']}-frame pieces of the" if metadata["fvd_chunk"] else "the"
        counted = (
            f"{frames} given and forecast frames"
            if metadata["fvd_given"]
            else f"{frames} forecast frames"
        )
        compared = min(metadata["fvd_samples"] or S, S)
        lines.append(
            f"fvd and kvd: {counted}, {compared} of {S} samples per clip, against "
            f"{metadata['reference']} videos"
        )
    return lines


BALLS, KTH, BAIR = ("ball_stn", "ball_nstn"), ("kth",), ("bair_64", "bair_256")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("own", "the task that the checkpoint was trained on", ()),
        Protocol(
            "lifelong_ball", "ours, for the balls of lifelong learning", BALLS, 10, 20, videos=64
        ),
        Protocol(
            "lifelong_stream",
            "Yoo et al. 2024 (arXiv 2406.04814): windows of the length used in training, the first "
            "half given, minADE of the best of 3 samples. Our choices: 100 windows, evenly spaced "
            "over the stream; FVD and KVD of the first sample, including the given frames, because "
            "I3D needs 10 frames",
            (),
            videos=100,
            samples=3,
            stream=True,
            fvd_given=True,
        ),
        Protocol(
            "srvp_kth",
            "Franceschi et al. 2020 and their test.py: 1,000 random clips, the best of 100 samples "
            "for each metric, FVD of the first sample including the given frames. They draw clips "
            "per file, we draw them over all shards",
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
            "Davtyan et al. 2023: the usual metrics, FVD of the forecast frames only. Our choices: "
            "256 clips, the best of 100 samples as in srvp_kth, FVD of the first sample",
            KTH,
            10,
            30,
            samples=100,
            rule="best",
        ),
        Protocol(
            "pfi_kth",
            "Chen et al. 2024 (arXiv 2403.13724): FVD over 256 test videos. Our choices: one "
            "sample per video, forecast frames only",
            KTH,
            10,
            30,
            samples=1,
        ),
        Protocol("pfi_clevrer", "as pfi_kth", ("clevrer",), 2, 14, samples=1),
        Protocol(
            "bair",
            "Denton and Fergus 2018, Rakhimov et al. 2020: 256 test videos, 100 samples each; FVD "
            "of all samples, including the given frame (16 frames)",
            BAIR,
            1,
            15,
            samples=100,
            rule="best",
            fvd_given=True,
            fvd_samples=0,
        ),
        Protocol(
            "navier_stokes",
            "Chen et al. 2024 (arXiv 2403.13724): forecasts against simulated ensembles. Our "
            "choices: the states and the draws of the oracle beside the shards, over all of its "
            "lead times; every draw is the truth in turn",
            ("navier_stokes", "heat", "fields"),
            videos=64,
            samples=16,
            oracle=True,
        ),
    )
}


def get(name: str, config: configs.Config, changes: dict) -> Protocol:
    """The protocol `name` for a checkpoint's config.

    changes: {field: value, or None for no change}. Changed fields become part of the protocol's
    name, so that its numbers are not mistaken for those of the protocol itself.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no protocol `{name}`{nearest(name, PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if protocol.datasets and config.dataset not in protocol.datasets:
        raise UserError(
            f"protocol {name} is for {' and '.join(protocol.datasets)}, the checkpoint is of "
            f"{config.dataset}; use --protocol own"
        )
    # A flag that repeats the protocol's own value does not change its name.
    changed, full_name = {}, name
    for field, value in sorted(changes.items()):
        if value is not None and value != getattr(protocol, field):
            changed[field] = value
            full_name += f"-{field}_{value}".replace(":", "-")
    protocol = dataclasses.replace(protocol, **changed, name=full_name)
    # What the protocol leaves open is the checkpoint's task; along a stream, a window split in
    # half.
    condition, predict = config.data.condition, config.data.predict
    if protocol.stream:
        condition = config.data.clip // 2
        predict = config.data.clip - condition
    # The oracle's file knows how far its draws reach.
    if protocol.oracle:
        predict = 0
    return dataclasses.replace(
        protocol, condition=protocol.condition or condition, predict=protocol.predict or predict
    )
