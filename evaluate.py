"""Measure samples against the truth under a named protocol, and write the results folder.

    python evaluate.py --ckpt CHECKPOINT --protocol lifelong_ball
    python evaluate.py --results FOLDER

The first command samples from a checkpoint; the second measures samples that sample.py has stored.
The same command run again resumes. Several processes, started by hand or by torchrun, share the
work.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import torch

import configs
import data
from configs import Config
from evaluation import measure, networks, oracle, protocols
from evaluation.protocols import Protocol
from evaluation.sources import (
    PART,
    Source,
    clips_of,  # noqa: F401  scripts/forgetting.py calls it here
    digest,
    source_of_arrays,
    source_of_checkpoint,
)
from forecaster import load as load_forecaster
from report import results
from report.terminal import (
    format_number,  # noqa: F401  scripts/forgetting.py and benchmarks/lifelong.py call it here
    summary_table,
)
from runtime.console import UserError, progress, run_command
from runtime.folders import Parts
from runtime.process import Process, start

# Prefix of the tables of an oracle, in the files of the parts.
ORACLE = "oracle_"
# Fields of Protocol that are also flags of this command.
CHANGEABLE = (
    "videos",
    "samples",
    "condition",
    "predict",
    "split",
    "clips",
    "frames",
    "seed",
    "rule",
    "lpips_net",
    "fvd_chunk",
    "fvd_samples",
    "reference",
)


# ----------------------------------------------------------------------------- sources of forecasts
def from_checkpoint(args: argparse.Namespace, process: Process) -> tuple[Source, Path]:
    """Sample from a checkpoint. Returns (source, default folder of the results)."""
    forecaster, step = load_forecaster(
        args.ckpt, process.device, overrides(args), args.dataset, args.interpolant
    )
    if forecaster.config.vqvae.kind == "latents":
        raise UserError(
            f"{args.ckpt} forecasts latents, but evaluate.py measures frames: run sample.py first, "
            "then evaluate its decoded frames with --results DIR"
        )
    protocol = protocols.get(args.protocol or "own", forecaster.config, protocol_changes(args))
    source = source_of_checkpoint(forecaster, step, args.ckpt, protocol)
    out = results.results_dir(forecaster, step)
    return source, out.with_name(f"{out.name}-{source.protocol.name}")


def from_results(args: argparse.Namespace, process: Process) -> tuple[Source, Path]:
    """Read samples that sample.py or evaluate.py stored. Returns (source, their folder)."""
    dir = results.folder(args.results)
    results.check_out(dir)
    truth, samples = results.read_arrays(dir)
    made = results.read_metrics(dir)
    config, about = results.config_of(made, dir), made["protocol"]
    S = samples.shape[1]
    # evaluate.py stores at most --keep samples, but measures all.
    counted = about.get("samples_per_video") or S
    if counted > S:
        raise UserError(
            f"{dir} stores {S} of the {counted} samples per video that its metrics were computed "
            "from; evaluate the checkpoint again"
        )
    protocol = protocol_of_results(args, dir, config, about, truth, samples)

    # The FVD of the autoencoder needs its weights, which the results folder does not hold.
    forecaster = None
    ckpt = args.ckpt or str(about.get("checkpoint") or "")
    fields = truth.dtype != np.uint8
    if set(choose_metrics(args, config, protocol, fields)) & set(measure.SETS):
        if args.ckpt or Path(ckpt).is_file():
            forecaster, _ = load_forecaster(
                ckpt, process.device, overrides(args), args.dataset, args.interpolant
            )
        else:
            print(
                "the FVD of the autoencoder is left out: the checkpoint "
                f"{ckpt or 'of these samples'} does not exist; give one with --ckpt"
            )
    # The new protocol and the new weights of the metric networks replace these entries.
    dropped = (*protocols.FIELDS, "i3d", "lpips")
    fps = results.frame_rate_of(about)
    about = {name: value for name, value in about.items() if name not in dropped}
    return source_of_arrays(config, protocol, (truth, samples), about, fps, forecaster), dir


def protocol_of_results(
    args: argparse.Namespace,
    dir: Path,
    config: Config,
    about: dict,
    truth: np.ndarray,
    samples: np.ndarray,
) -> Protocol:
    """Choose the protocol: that of the stored samples, or that of --protocol.

    Raises UserError if --protocol does not agree with the stored samples.
    """
    T = samples.shape[2]
    own = {
        "videos": len(truth),
        "samples": samples.shape[1],
        "condition": truth.shape[1] - T,
        "predict": T,
        "split": about.get("split", "test"),
        "clips": about.get("clips", "spaced"),
        "stream": about.get("stream", False),
        "frames": about.get("frames", ""),
        "seed": about.get("seed", 0),
    }
    name = args.protocol or "own"
    protocol = protocols.get(name, config, protocol_changes(args))
    if protocol.oracle:
        raise UserError(
            f"protocol {name} forecasts the states of an oracle: give --ckpt FILE in place of "
            "--results DIR"
        )
    # The protocol `own` takes every field that no flag sets from the samples.
    if name == "own":
        unset = {field: own[field] for field in own if getattr(args, field, None) is None}
        protocol = dataclasses.replace(protocol, **unset)
    for field, value in own.items():
        expected = getattr(protocol, field)
        if value != expected:
            raise UserError(
                f"{dir} does not match protocol {protocol.name}: it has {field} {value}, not "
                f"{expected}"
            )
    return protocol


# ------------------------------------------------------------------------- measuring and summing up
def measure_parts(
    source: Source,
    which: list[str],
    nets: measure.Networks,
    keep: int,
    mean: np.ndarray | None,
    parts: Parts,
    process: Process,
) -> None:
    """Measure every part and write each to a file; processes share the parts."""
    V = source.protocol.videos
    # Processes start at different parts, so that they rarely compete for one.
    first = process.rank * parts.count // process.world
    with progress(V, "evaluate", "video") as bar:
        for k in parts.claim(first):
            if k is None:
                # Other processes are measuring the remaining parts.
                time.sleep(0.5)
            else:
                truth, samples, evaluations = source.part(k)
                tables = measure.measure(
                    truth,
                    samples,
                    mean,
                    source.protocol,
                    which,
                    nets,
                    source.autoencode,
                    k,
                    source.scale,
                )
                if source.oracle:
                    scores = oracle.score_states(source.oracle, k * PART, samples)
                    tables |= {ORACLE + name: values for name, values in scores.items()}
                stored = {} if source.arrays else {"truth": truth, "samples": samples[:, :keep]}
                parts.write(k, {**tables, **stored, "evaluations": np.array([evaluations])})
            bar.update(sum(min(PART, V - k * PART) for k in parts.written()) - bar.n)


def summarize_parts(
    source: Source, which: list[str], weights: dict[str, str], parts: Parts
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Merge all parts. -> (truth, the samples to store, metrics.json).

    weights: {network: name of its file}.
    """
    tables, protocol, about = parts.read(), source.protocol, dict(source.about)
    # Samples that were made by this command are in the parts; those of --results are arrays.
    truth, samples = source.arrays or (tables.pop("truth"), tables.pop("samples"))
    evaluations = tables.pop("evaluations").sum()
    of_oracle = {}
    for name in [name for name in tables if name.startswith(ORACLE)]:
        of_oracle[name.removeprefix(ORACLE)] = tables.pop(name)
    if evaluations:
        frames = protocol.videos * protocol.samples * protocol.predict
        about["network_evaluations_per_frame"] = float(evaluations / frames)
    described = {
        **about,
        **protocol.to_metadata(which),
        **weights,
        "fps": source.fps,
        "skip": source.config.data.skip,
    }
    result = {
        "protocol": described,
        "config": configs.to_dict(source.config),
        **measure.summarize(tables, protocol, which),
    }
    if source.oracle:
        times = source.oracle.times(protocol.predict)
        result["oracle"] = oracle.summarize(of_oracle, times)
    return truth, samples, result


# ------------------------------------------------------------------------------------------ command
def choose_metrics(
    args: argparse.Namespace, config: Config, protocol: Protocol, fields: bool = False
) -> list[str]:
    """The metrics of --metrics; by default all that suit the dataset and the protocol. fields:
    whether fields are measured instead of frames."""
    ball, several = config.dataset.startswith("ball"), protocol.samples > 1
    if not args.metrics:
        unsuitable = set() if ball else set(measure.BALL)
        unsuitable |= set(measure.PICTURES if fields else measure.FIELDS)
        if not several:
            unsuitable.add("spread_skill")
        if protocol.videos < 2 and not fields:
            print("fvd and kvd are left out: they compare sets of at least two videos")
            unsuitable |= set(measure.SETS)
        return [name for name in measure.ALL if name not in unsuitable]
    if "spread_skill" in args.metrics and not several:
        raise UserError("spread_skill needs at least two samples per video, the protocol has one")
    for name in args.metrics:
        if name not in measure.ALL:
            raise UserError(f"no metric `{name}`{configs.nearest(name, measure.ALL)}")
        if name in measure.PICTURES and fields:
            suit = [name for name in measure.ALL if name not in measure.PICTURES]
            raise UserError(
                f"{name} is for RGB frames, and {config.dataset} holds fields; choose of "
                f"{', '.join(suit)}"
            )
        if name in measure.BALL and not ball:
            raise UserError(f"{name} is for bouncing balls, this is {config.dataset}")
    return [name for name in measure.ALL if name in args.metrics]


def find_weights(which: list[str], protocol: Protocol, args: argparse.Namespace) -> dict[str, Path]:
    """Find the weights files of the networks that the metrics use. UserError if one is missing."""
    found = {}
    if set(which) & set(measure.SETS):
        found["i3d"] = args.i3d or args.weights / "i3d.safetensors"
    if "lpips" in which:
        found["lpips"] = args.weights / f"lpips_{protocol.lpips_net}.safetensors"
    for path in found.values():
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; fetch it by `{networks.COMMAND}`, "
                "or choose --metrics without it"
            )
    return found


def load_networks(
    files: dict[str, Path], protocol: Protocol, device: torch.device
) -> measure.Networks:
    i3d = lpips = None
    if "i3d" in files:
        i3d = networks.load_i3d(files["i3d"], device)
    if "lpips" in files:
        lpips = networks.load_lpips(files["lpips"].parent, protocol.lpips_net, device)
    return measure.Networks(i3d, lpips, device)


def check(source: Source, which: list[str]) -> None:
    """Raise UserError, before hours of work, if a metric cannot be computed for these videos."""
    protocol, size = source.protocol, source.config.data.image_size
    sets = set(which) & set(measure.SETS)
    if sets and protocol.reference == "autoencoded" and source.autoencode is None:
        raise UserError(
            "--reference autoencoded needs the autoencoder; name the checkpoint by --ckpt"
        )
    if sets:
        measure.check_set_size(protocol.videos)
    smallest = networks.NETS[protocol.lpips_net]
    if "lpips" in which and size < smallest:
        raise UserError(
            f"LPIPS ({protocol.lpips_net}) needs frames of {smallest} pixels, these have {size}; "
            "choose --metrics without lpips"
        )
    counted = protocol.predict + protocol.condition * protocol.fvd_given
    least = max(networks.MIN_FRAMES, protocol.fvd_chunk)
    if sets and counted < least:
        raise UserError(
            f"fvd and kvd need {least} frames, protocol {protocol.name} counts {counted}; "
            "choose others: --metrics mse psnr ssim lpips crps energy spread_skill"
        )


def protocol_changes(args: argparse.Namespace) -> dict:
    """The fields of the protocol that flags change; None where a flag is absent."""
    return {name: getattr(args, name) for name in CHANGEABLE}


def overrides(args: argparse.Namespace) -> dict:
    """The sampler's flags and --set, as overrides of the config.

    The split is left out, because the protocol sets it.
    """
    given = []
    for flag, name in configs.SAMPLING_FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and name.startswith("sample.") and flag != "split":
            given.append(f"{name}={value}")
    return configs.parse_overrides([*given, *args.set])


def mean_training_frame(config: Config) -> np.ndarray | None:
    """Compute the baseline `mean frame`; None if the training frames are not available."""
    if config.vqvae.kind == "latents":
        return None
    try:
        return data.mean_frame(data.open_split(config, "train"))
    except UserError as error:
        print(f"the baseline `mean frame` is left out: {error}")
        return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", help="checkpoint to sample from; with --results, for its autoencoder")
    add("--results", help="results folder with stored samples, which is measured and rewritten")
    known = ", ".join(protocols.PROTOCOLS)
    add("--protocol", help=f"{known} (default: own); see docs/evaluation.md")
    every = ", ".join(measure.ALL)
    add("--metrics", nargs="+", help=f"some of {every} (default: all that suit the dataset)")
    for field in dataclasses.fields(Protocol):
        if field.name in CHANGEABLE:
            kind = int if isinstance(field.default, int) else str
            add(f"--{field.name}", type=kind, help="changes the protocol, and its name")
    for flag in ("steps", "solver", "diffusion", "grid", "warm_start", "redraw", "format"):
        add(f"--{flag}", help=f"{configs.SAMPLING_FLAGS[flag]}; default: the checkpoint's")
    add("--keep", type=int, default=4, help="samples stored and shown per video (default 4)")
    add(
        "--weights",
        type=Path,
        default=Path("weights/metrics"),
        help=f"folder of the metric networks' weights, from `{networks.COMMAND}` "
        "(default weights/metrics)",
    )
    add("--i3d", type=Path, help="another safetensors file of I3D's weights")
    add("--out", help="results folder; default: that of sample.py with the protocol's name added")
    add("--dataset", default="", help="dataset of a published checkpoint, which does not name it")
    add("--interpolant", default="", help="interpolant of a published checkpoint")
    about_set = "any other field"
    add(
        "--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE", help=about_set
    )
    args = parser.parse_args(arguments)
    if not args.ckpt and not args.results:
        raise UserError("nothing to evaluate: give --ckpt FILE or --results DIR")
    if args.keep < 1:
        raise UserError(f"--keep must be >= 1, got {args.keep}")
    return args


def digest_plan(
    source: Source,
    weights: dict[str, str],
    mean: np.ndarray | None,
    which: list[str],
    keep: int,
) -> str:
    """A digest of everything that the results depend on. Equal plans give equal results, which are
    therefore not computed again.
    """
    # The folder of the outputs and wandb do not affect the results.
    settings = {}
    for name, group in configs.to_dict(source.config).items():
        if name not in ("output", "wandb"):
            settings[name] = group
    plan = (
        source.key,
        source.protocol,
        settings,
        weights,
        None if mean is None else digest(mean),
        which,
        keep,
        PART,
    )
    if source.scale is not None:
        plan += (source.scale.tolist(),)
    return digest(repr(plan).encode())[:16]


def ensure_results(
    args: argparse.Namespace, process: Process, known: dict[bytes, np.ndarray] | None = None
) -> Path:
    """Measure and write the results, unless the folder already holds those of the same plan.

    Returns the folder.

    known: cache of I3D features by digest of the video, for callers that measure the same videos
    repeatedly.
    """
    source, out = (from_results if args.results else from_checkpoint)(args, process)
    if args.out:
        out = results.folder(args.out)
    which = choose_metrics(args, source.config, source.protocol, source.scale is not None)
    results.check_out(out)
    check(source, which)
    files, mean = find_weights(which, source.protocol, args), mean_training_frame(source.config)
    weights = {name: f"{path.name} {digest(path.read_bytes())[:8]}" for name, path in files.items()}
    plan = digest_plan(source, weights, mean, which, args.keep)

    def done() -> bool:
        return (out / "metrics.json").exists() and results.read_metrics(out).get("plan") == plan

    # The plan is in the folder's name, so that parts of different plans are never merged.
    parts = Parts(out.with_name(f".{out.name}.{plan}"), -(-source.protocol.videos // PART), done)

    def write() -> None:
        truth, samples, result = summarize_parts(source, which, weights, parts)
        format = source.config.sample.format
        results.write_results(out, truth, samples, {"plan": plan, **result}, source.fps, format)
        shutil.rmtree(parts.dir, ignore_errors=True)

    if not done():
        nets = load_networks(files, source.protocol, process.device)
        nets = dataclasses.replace(nets, known=known)
        measure_parts(source, which, nets, args.keep, mean, parts, process)
        parts.sum_up(out.parent, write)
    return out


def main() -> None:
    args, process = parse(), start()
    out = ensure_results(args, process)
    if process.first:
        result = results.read_metrics(out)
        format = results.config_of(result, out).sample.format
        print(summary_table(result))
        if "oracle" in result:
            print("\n" + oracle.format_table(result["oracle"]))
        print(results.paths(out, format, args.ckpt or args.results))
    process.close()


if __name__ == "__main__":
    run_command(main)
