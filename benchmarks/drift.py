"""Drift: roll-outs of 1,000 frames, and how many of their frames are still sound.

    python -m benchmarks.drift --ckpts outputs/board/checkpoints/ball_stn-default-0-1/latest.pt
    python -m benchmarks.drift --ckpts BEFORE.pt AFTER.pt --labels before after --videos 16

A frame is sound if it looks like a frame of the data and if the video still moves:
- balls: two balls of pure colours are found, and a drawing of two balls there differs from the
  frame by no more than it does for true frames that the autoencoder of the first checkpoint has
  reconstructed (99th percentile);
- other data: LPIPS to the nearest of 16 training frames, which are the nearest by downsampled
  pixels, is within the 95th percentile of held-out frames;
- all: the mean squared change from frame to frame, over the last ten frames, is within 0.5 to 2
  times the truth's.

The table of frames 1 to 200 and of the last 100 frames goes to benchmarks/RESULTS.md, the curves to
benchmarks/drift.png, and the last frames of all roll-outs to drift_<label>.png beside the results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import configs
import data
from batches.windows import draw_windows
from benchmarks import results
from configs import Config
from evaluation import balls, metrics
from evaluation.networks import load_lpips, lpips_distance
from evaluation.sources import make_autoencode
from forecaster import Forecaster, load
from prepare.balls import BOX, draw
from runtime.console import UserError, run_command
from runtime.process import numpy_generator, start

# Frames over which the motion is averaged.
MOTION_FRAMES = 10
# Candidates, the nearest by downsampled pixels, among which LPIPS finds the nearest frame.
NEAREST = 16
# Frames of the training data and of the held-out data that frames are compared with.
COMPARED = 2_000
HELD_OUT = 256
# Every EVERY-th frame is compared, since LPIPS is slow.
EVERY = 10
# Frames of a true clip to which the sharpness is compared.
CLIP = 30


class Drift(NamedTuple):
    """Curves against the frame number, each (T,), with NaN where a frame is not measured.

    sound: share of sound frames. sharpness, motion: ratios to the truth's.
    """

    sound: np.ndarray
    sharpness: np.ndarray
    motion: np.ndarray


# -------------------------------------------------------------------- what is sound
def ball_errors(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of frames (n, H, W, 3) uint8 from a drawing of two balls at the
    places and in the colours found, (n,) in [0, 1]; infinite if a ball is not found."""
    places, colors = balls.find(frames)
    lost = (colors == balls.LOST).any(-1)
    size = frames.shape[1]
    drawn = draw(
        places * (BOX / size), np.where(lost[:, None], 0, colors), np.zeros(len(frames)), size
    )
    errors = np.abs(drawn.astype(np.float32) - frames).mean((1, 2, 3)) / 255
    return np.where(lost, np.inf, errors)


class NearestFrames:
    """LPIPS from frames to the nearest training frame."""

    def __init__(self, train: np.ndarray, net: torch.nn.Module, device: torch.device):
        self.train, self.net, self.device = train, net, device
        self.small = self.shrink(train)

    def shrink(self, frames: np.ndarray) -> torch.Tensor:
        """(n, H, W, 3) uint8 -> (n, 3 * 8 * 8), downsampled pixels."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        return F.adaptive_avg_pool2d(pixels, 8).flatten(1)

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8 -> distances (n,)."""
        near = torch.cdist(self.shrink(frames), self.small).topk(NEAREST, largest=False).indices
        candidates = self.train[near.flatten().numpy()]
        repeated = frames.repeat(NEAREST, 0)
        distances = lpips_distance(self.net, repeated, candidates, self.device)
        return distances.reshape(-1, NEAREST).min(1)


def make_judge(forecaster: Forecaster, weights: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function frames (n, H, W, 3) uint8 -> whether each frame looks like the data, (n,) bool."""
    config = forecaster.config
    held_out = data.open_split(config, config.sample.split)
    rng = np.random.default_rng(0)
    true = data.random_frames(held_out, HELD_OUT, rng)
    if config.dataset.startswith("ball"):
        limit = np.quantile(ball_errors(make_autoencode(forecaster)(true)), 0.99)
        return lambda frames: ball_errors(frames) <= limit
    train = data.random_frames(data.open_split(config, "train"), COMPARED, rng)
    distance = NearestFrames(
        train, load_lpips(weights, device=forecaster.device), forecaster.device
    )
    limit = np.quantile(distance(true), 0.95)
    return lambda frames: distance(frames) <= limit


# -------------------------------------------------------------------- roll-out
def follow(forecaster: Forecaster, frames: int, videos: int, judge: Callable) -> tuple:
    """Forecast `frames` frames after the given frames of `videos` clips -> (Drift, the forecasts
    (V, T, H, W, 3) uint8). judge: see make_judge."""
    config = forecaster.config
    shards = data.open_split(config, config.sample.split)
    clip = config.data.condition + config.data.predict
    rng = numpy_generator(config.train.seed, "drift")
    windows = draw_windows(shards.lengths, clip, config.data.skip, videos, rng)
    truth = data.read_clips(shards, windows)
    given = truth[:, : config.data.condition]
    futures = forecaster.forecast(given, frames, 1, (config.train.seed, "drift"))[:, 0]
    video = np.concatenate([given[:, -1:], futures], 1)
    return measure_drift(video, truth, judge, interval(config)), futures


def follow_truth(config: Config, frames: int, videos: int, judge: Callable) -> Drift | None:
    """The same of true videos, as the most that forecasts can reach; None if they are shorter."""
    shards = data.open_split(config, config.sample.split)
    if shards.lengths.max() <= frames * (config.data.skip + 1):
        return None
    rng = numpy_generator(config.train.seed, "drift")
    windows = draw_windows(shards.lengths, frames + 1, config.data.skip, videos, rng)
    truth = data.read_clips(shards, windows)
    return measure_drift(truth, truth, judge, interval(config))


def interval(config: Config) -> int:
    """Every how many frames the drift is measured."""
    return 1 if config.dataset.startswith("ball") else EVERY


def measure_drift(video: np.ndarray, truth: np.ndarray, judge: Callable, every: int) -> Drift:
    """Judge the frames 1, 2, … of videos (V, 1 + T, H, W, 3) uint8 beside true clips."""
    frames = video.shape[1] - 1
    change = np.square(np.diff(truth.astype(np.float32), axis=1)).mean()
    true_pixels = truth[:, :CLIP].astype(np.float32) / 255
    sound = np.full(frames, np.nan)
    sharpness = np.full(frames, np.nan)
    motion = np.full(frames, np.nan)
    for t in range(every - 1, frames, every):
        first = max(0, t + 1 - MOTION_FRAMES)
        recent = video[:, first : t + 2].astype(np.float32)
        moved = np.square(np.diff(recent, axis=1)).mean((1, 2, 3, 4)) / change
        alive = (moved > 0.5) & (moved < 2)
        sound[t] = (judge(video[:, t + 1]) & alive).mean()
        motion[t] = moved.mean()
        frame = video[:, None, t + 1 : t + 2].astype(np.float32) / 255
        sharpness[t] = metrics.sharpness(frame, true_pixels)
    return Drift(sound, sharpness, motion)


def part(values: np.ndarray, first: int, last: int) -> float:
    """Mean over the frames first..last, counted from 1, that are measured."""
    return float(np.nanmean(values[first - 1 : last]))


# -------------------------------------------------------------------- report
def draw_curves(found: dict[str, Drift], path: Path) -> None:
    from report.style import add_legend, add_panels, figure_of, save

    titles = ("share of sound frames", "sharpness / truth", "motion energy / truth")
    with figure_of(12, 3.4) as figure:
        panels = add_panels(figure, 3, 3)
        for panel, name, title in zip(panels, Drift._fields, titles):
            for label, drift in found.items():
                values = getattr(drift, name)
                measured = np.flatnonzero(~np.isnan(values))
                panel.plot(measured + 1, values[measured], label=label, linewidth=1)
            panel.set_title(title)
            panel.set_xlabel("forecast frame")
        add_legend(figure, panels, "outside upper center", len(found))
        save(figure, path)


def table(found: dict[str, Drift], frames: int) -> str:
    """Markdown: a row per checkpoint, and one of true videos."""
    parts = [(1, min(200, frames)), (max(1, frames - 99), frames)]
    head = ["checkpoint"]
    for name in ("sound", "sharpness", "motion"):
        head += [f"{name}, frames {first} to {last}" for first, last in parts]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for label, drift in found.items():
        cells = [label]
        for values in drift:
            cells += [f"{part(values, *ends):.2f}" for ends in parts]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contact_sheet(futures: np.ndarray, path: Path) -> None:
    """The frames 1, 10, 50, 200 and the last one of each roll-out: a row per roll-out."""
    T = futures.shape[1]
    chosen = [t - 1 for t in (1, 10, 50, 200) if t < T] + [T - 1]
    rows = [np.concatenate(list(video[chosen]), 1) for video in futures]
    Image.fromarray(np.concatenate(rows)).save(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--ckpts", nargs="+", required=True, metavar="FILE")
    add("--labels", nargs="+", default=[], metavar="LABEL", help="default: the names of the runs")
    add("--frames", type=int, default=1_000)
    add("--videos", type=int, default=16)
    add("--weights", type=Path, default=Path("weights/metrics"), help="networks of LPIPS")
    add("--out", type=Path, default=results.HERE, help="folder of RESULTS.md and of the pictures")
    add("--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE")
    args = parser.parse_args()
    if args.frames < MOTION_FRAMES or args.videos < 1:
        raise UserError(f"--frames must be >= {MOTION_FRAMES} and --videos >= 1")
    if args.labels and len(args.labels) != len(args.ckpts):
        raise UserError(f"{len(args.labels)} labels for {len(args.ckpts)} checkpoints")
    return args


def main() -> None:
    args = parse()
    device = start().device
    found = {}
    overrides = configs.parse_overrides(args.set)
    labels = args.labels or [Path(ckpt).parent.name for ckpt in args.ckpts]
    judge = None
    for label, ckpt in zip(labels, args.ckpts):
        forecaster, _ = load(ckpt, device, overrides)
        if judge is None:
            judge = make_judge(forecaster, args.weights)
            truth = follow_truth(forecaster.config, args.frames, args.videos, judge)
            if truth is not None:
                found["truth"] = truth
        found[label], futures = follow(forecaster, args.frames, args.videos, judge)
        contact_sheet(futures, args.out / f"drift_{label}.png")
    text = table(found, args.frames)
    print(text)
    draw_curves(found, args.out / "drift.png")
    text = (
        f"Roll-outs of {args.frames} frames after {args.videos} held-out clips. Sound: see "
        f"`python -m benchmarks.drift --help`. {results.describe_machine()}.\n\n{text}\n\n"
        "![Curves of drift](drift.png)"
    )
    print(f"table          {results.write('Drift', text, args.out)}")
    print(json.dumps({label: part(drift.sound, 1, args.frames) for label, drift in found.items()}))


if __name__ == "__main__":
    run_command(main)
