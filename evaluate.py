"""Samples and truth -> metrics under a named protocol, and everything there is to look at.

    python evaluate.py --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt --protocol lifelong_ball
    python evaluate.py --results DIR        of samples that sample.py has made

Stopped and run again, it goes on where it was; started several times, or under torchrun, each process takes a share.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import configs
import data
import features
import measures
import metrics
import protocols
import results
import runtime
import sample
from configs import Config
from console import UserError, progress, run_command
from protocols import Protocol

PART = 8  # videos measured at a time, and the grain in which processes share the work: a part of the noise's key
CHANGEABLE = ("videos", "samples", "condition", "predict", "split", "clips", "seed", "rule", "lpips_net", "fvd_chunk",
              "fvd_samples", "reference")


# ------------------------------------------------------------------------------------------------- where forecasts come from
@dataclasses.dataclass
class Source:
    """What is evaluated. part(k) -> (truth, samples, network evaluations) of videos k * PART and after."""
    config: Config
    protocol: Protocol
    part: Callable[[int], tuple[np.ndarray, np.ndarray, int]]
    autoencode: Callable[[np.ndarray], np.ndarray] | None
    about: dict  # of the sampler and the checkpoint, for metrics.json
    key: str  # a name for all that the samples depend on
    fps: float

    @property
    def parts(self) -> int:
        return -(-self.protocol.videos // PART)


def from_checkpoint(args: argparse.Namespace, process: runtime.Process) -> tuple[Source, Path]:
    """Samples made now; -> (source, folder for the results)."""
    forecaster, step = sample.load(args.ckpt, process.device, overrides(args), args.dataset, args.interpolant)
    protocol = protocols.get(args.protocol or "own", forecaster.config, changes(args))
    config = configs.update(forecaster.config, {
        "data.condition": protocol.condition, "data.predict": protocol.predict, "sample.split": protocol.split,
        "sample.num_samples": protocol.samples})
    shards = sample.open_split(config, protocol.split)
    clip, skip = protocol.condition + protocol.predict, config.data.skip
    data.check_long_enough(shards, clip, skip, "the protocol")
    windows = data.draw_windows(shards.lengths, clip, skip, protocol.videos, np.random.default_rng(protocol.seed)) \
        if protocol.clips == "random" else data.spaced_windows(shards.lengths, clip, skip, protocol.videos)
    if len(windows.video) < protocol.videos:
        print(f"{shards.dir} has {len(windows.video)} clips of {clip} frames that do not overlap, not {protocol.videos}")
        protocol = dataclasses.replace(protocol, videos=len(windows.video))
    forecaster.config = config = configs.update(config, {"sample.num_videos": protocol.videos})

    def part(k: int) -> tuple[np.ndarray, np.ndarray, int]:
        rows = slice(k * PART, (k + 1) * PART)
        truth = sample.read_clips(shards, windows._replace(video=windows.video[rows], start=windows.start[rows]))
        forecaster.evaluations = 0
        samples = forecaster.forecast(truth[:, :protocol.condition], protocol.predict, protocol.samples,
                                      (protocol.seed, "evaluate", k), quiet=True)
        return truth, samples, forecaster.evaluations

    key = f"{runtime.digest(forecaster.net)} {shards.fingerprint()}"
    out = sample.results_dir(forecaster, step)
    source = Source(config, protocol, part, autoencoder_of(forecaster), sample.about(forecaster, step, args.ckpt), key,
                    sample.frame_rate(shards, config))
    return source, out.with_name(f"{out.name}-{protocol.name}")


def from_results(args: argparse.Namespace, process: runtime.Process) -> tuple[Source, Path]:
    """Samples made before, in a folder of sample.py's or of this program's; -> (source, that folder)."""
    dir = Path(args.results)
    (truth, samples), made = results.read_arrays(dir), results.read_metrics(dir)
    config, about = configs.from_dict(made["config"]), made["protocol"]
    T = samples.shape[2]
    own = {"videos": len(truth), "samples": samples.shape[1], "condition": truth.shape[1] - T, "predict": T,
           "split": about.get("split", "test")}
    protocol = protocols.get(args.protocol or "own", config, changes(args))
    if (args.protocol or "own") == "own":
        protocol = dataclasses.replace(protocol, **{name: own[name] for name in own if getattr(args, name) is None})
    wanted = {name: getattr(protocol, name) for name in own}
    if wrong := [f"{name} {value}, not {wanted[name]}" for name, value in own.items() if value != wanted[name]]:
        raise UserError(f"{dir} does not go with protocol {protocol.name}: it has {wrong[0]}")
    ckpt = Path(args.ckpt or about.get("checkpoint") or "")
    autoencode = None
    if ckpt.is_file():
        autoencode = autoencoder_of(sample.load(ckpt, process.device, overrides(args), args.dataset, args.interpolant)[0])
    elif set(metrics_of(args, config)) & set(measures.SETS):
        print(f"the FVD of the autoencoder is left out: {ckpt} is not there; name the checkpoint by --ckpt")
    part = lambda k: (truth[k * PART:(k + 1) * PART], samples[k * PART:(k + 1) * PART], 0)  # noqa: E731
    key = " ".join(hashlib.blake2b(array, digest_size=16).hexdigest() for array in (truth, samples))
    args.keep = samples.shape[1]  # nothing of them is thrown away
    return Source(config, protocol, part, autoencode, about, key, results.frame_rate(about)), dir


def autoencoder_of(forecaster: sample.Forecaster) -> Callable[[np.ndarray], np.ndarray]:
    """Frames (n, H, W, 3) uint8 through encoder and decoder."""
    @torch.no_grad()
    def autoencode(frames: np.ndarray) -> np.ndarray:
        size = max(1, (1 << 21) // frames[0].size)
        pixels = (data.to_pixels(frames[k:k + size], forecaster.device) for k in range(0, len(frames), size))
        return np.concatenate([data.to_frames(forecaster.autoencoder.decode(forecaster.autoencoder.encode(x))) for x in pixels])
    return autoencode


# ---------------------------------------------------------------------------------------------------------- sharing the work
@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Is it ours, and not another process's? It is given back also by a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: one process only
        yield True
        return
    try:
        file = open(path, "w")
    except FileNotFoundError:  # another process has summed up and tidied away
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def shared(dir: Path, parts: int, done: Callable[[], bool], first: int) -> Iterator[int | None]:
    """The parts that are this process's to do, from `first` on; None while it waits for other processes. It ends when all are
    there, or when another has summed them up."""
    dir.mkdir(parents=True, exist_ok=True)
    order = [(first + k) % parts for k in range(parts)]
    while todo := [k for k in order if not part_file(dir, k).exists()]:
        if done():
            return
        waiting = True
        for k in todo:
            with lock(dir / f"part_{k:04d}.lock") as ours:
                if ours and not part_file(dir, k).exists() and not done():
                    waiting = False
                    yield k
        if waiting:
            yield None


def part_file(dir: Path, k: int) -> Path:
    return dir / f"part_{k:04d}.npz"


def write_part(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def measured(source: Source, which: list[str], nets: measures.Networks, keep: int, mean: np.ndarray | None, dir: Path,
             done: Callable[[], bool], process: runtime.Process) -> None:
    """Every part in a file of `dir`, by this process and others."""
    V = source.protocol.videos
    with progress(V, "evaluate", "video") as bar:
        for k in shared(dir, source.parts, done, process.rank * source.parts // process.world):
            if k is None:
                time.sleep(0.5)
            else:
                truth, samples, evaluations = source.part(k)
                tables = measures.measure(truth, samples, mean, source.protocol, which, nets, source.autoencode, seed=k)
                write_part(part_file(dir, k), {**tables, "truth": truth, "samples": samples[:, :keep],
                                               "evaluations": np.array([evaluations])})
            there = sum(min(PART, V - k * PART) for k in range(source.parts) if part_file(dir, k).exists())
            bar.update(there - bar.n)


# ----------------------------------------------------------------------------------------------------------------- summing up
def summed_up(source: Source, which: list[str], dir: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """-> (truth, the samples that are kept, metrics.json)"""
    parts = []
    for k in range(source.parts):
        with np.load(part_file(dir, k), allow_pickle=False) as file:
            parts.append(dict(file))
    tables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    truth, samples, evaluations = (tables.pop(name) for name in ("truth", "samples", "evaluations"))
    protocol, about = source.protocol, dict(source.about)
    if evaluations.sum():
        frames = protocol.videos * protocol.samples * protocol.predict
        about["network_evaluations_per_frame"] = float(evaluations.sum() / frames)
    told = {**about, **protocol.told(which), "fps": source.fps, "skip": source.config.data.skip}
    return truth, samples, {"protocol": told, "config": configs.to_dict(source.config), **measures.summarize(tables, protocol)}


def table(result: dict) -> str:
    """What a person reads: each metric beside the baselines, and how it was measured."""
    summary = result["summary"]
    others = {"repeat last": "_repeat_last", "mean frame": "_mean_frame", "autoencoder": "_autoencoder"}
    head = f"{'metric':<26}{'forecast':>20}" + "".join(f"{name:>14}" for name in others)
    lines = [*protocols.in_words(result["protocol"]), "", head, "-" * len(head)]
    for name, value in summary.items():
        if not name.endswith(tuple(others.values())):
            unit = f" ({metrics.ABOUT[name][1]})" if metrics.ABOUT[name][1] else ""
            cells = [number(summary.get(name + suffix, {}).get("mean")) for suffix in others.values()]
            lines.append(f"{name + unit:<26}{number(value['mean']) + ' ± ' + number(value['se']):>20}"
                         + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# -------------------------------------------------------------------------------------------------------------------- command
def metrics_of(args: argparse.Namespace, config: Config) -> list[str]:
    """Those asked for, or all that the dataset has."""
    ball = config.dataset.startswith("ball")
    if not args.metrics:
        return [name for name in measures.ALL if ball or name not in measures.BALL]
    for name in args.metrics:
        if name not in measures.ALL:
            raise UserError(f"no metric `{name}`{configs.nearest(name, measures.ALL)}")
        if name in measures.BALL and not ball:
            raise UserError(f"{name} is for bouncing balls, this is {config.dataset}")
    return [name for name in measures.ALL if name in args.metrics]


def networks(which: list[str], protocol: Protocol, args: argparse.Namespace, device: torch.device) -> measures.Networks:
    i3d = features.load_i3d(args.i3d or args.weights / "i3d.safetensors", device) if set(which) & set(measures.SETS) else None
    lpips = features.load_lpips(args.weights, protocol.lpips_net, device) if "lpips" in which else None
    return measures.Networks(i3d, lpips, device)


def check_frames(protocol: Protocol, which: list[str]) -> None:
    """I3D's least, before hours of work."""
    counted, least = protocol.predict + protocol.condition * protocol.fvd_given, max(features.MIN_FRAMES, protocol.fvd_chunk)
    if set(which) & set(measures.SETS) and counted < least:
        raise UserError(f"fvd and kvd want {least} frames, protocol {protocol.name} counts {counted}; choose others: "
                        "--metrics mse psnr ssim lpips crps energy spread_skill")


def changes(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in CHANGEABLE}


def overrides(args: argparse.Namespace) -> dict:
    given = [f"{name}={getattr(args, flag)}" for flag, name in sample.FLAGS.items() if getattr(args, flag, None) is not None
             and name.startswith("sample.") and flag != "split"]
    return configs.parse_overrides([*given, *args.set])


def mean_of_training(config: Config) -> np.ndarray | None:
    try:
        return sample.mean_frame(sample.open_split(config, "train"))
    except UserError as error:
        print(f"the baseline `mean frame` is left out: {error}")
        return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", help="a checkpoint to sample from; with --results, for its autoencoder")
    add("--results", help="a folder of samples made before; the results go there, too")
    add("--protocol", help=f"{', '.join(protocols.PROTOCOLS)} (default: own). See README and protocols.py")
    add("--metrics", nargs="+", help=f"of {', '.join(measures.ALL)} (default: all that go with the dataset)")
    for field in dataclasses.fields(Protocol):
        if field.name in CHANGEABLE:
            kind = int if isinstance(field.default, int) else str
            add(f"--{field.name}", type=kind, help="changes the protocol, and its name")
    for flag in ("steps", "solver", "diffusion", "grid", "warm_start", "redraw", "format"):
        add(f"--{flag}", help=f"{sample.FLAGS[flag]}; default: the checkpoint's")
    add("--keep", type=int, default=4, help="samples of each video that are stored and shown (default 4)")
    add("--weights", type=Path, default=Path("weights/metrics"), help="folder of the metric networks, which "
        f"`{features.COMMAND}` fetches (default weights/metrics)")
    add("--i3d", type=Path, help="another file of I3D's weights, the usual i3d_torchscript.pt say")
    add("--out", type=Path, help="folder for the results; default: that of sample.py, its name followed by the protocol's")
    add("--dataset", default="", help="of a published checkpoint, which does not say it")
    add("--interpolant", default="", help="likewise")
    add("--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE", help="any other field")
    args = parser.parse_args()
    if not args.ckpt and not args.results:
        raise UserError("nothing to evaluate: give --ckpt FILE or --results DIR")
    if args.keep < 1:
        raise UserError(f"--keep must be >= 1, got {args.keep}")
    return args


def main() -> None:
    args, process = parse(), runtime.start()
    source, out = (from_results if args.results else from_checkpoint)(args, process)
    out, which = args.out or out, metrics_of(args, source.config)
    sample.check_out(out)
    check_frames(source.protocol, which)
    plan = repr((source.key, source.protocol, source.config.sample, PART, which, args.keep))
    plan = hashlib.blake2b(plan.encode(), digest_size=8).hexdigest()
    done = lambda: (out / "metrics.json").exists() and results.read_metrics(out).get("plan") == plan  # noqa: E731
    if not done():
        nets, parts = networks(which, source.protocol, args, process.device), out.with_name(f".{out.name}.{plan}")
        measured(source, which, nets, args.keep, mean_of_training(source.config), parts, done, process)
        while not done():
            with lock(parts / "sum.lock") as ours:
                if ours and not done():
                    truth, samples, result = summed_up(source, which, parts)
                    sample.write_results(out, truth, samples, {"plan": plan, **result}, source.fps, source.config.sample.format)
                    shutil.rmtree(parts, ignore_errors=True)
            time.sleep(0.2)
    if process.first:
        print(table(results.read_metrics(out)))
        print(sample.paths(out, source.config.sample.format, args.ckpt or args.results))


if __name__ == "__main__":
    run_command(main)
