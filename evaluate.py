"""Samples and truth -> metrics under a named protocol, and everything there is to look at.

    python evaluate.py --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt --protocol lifelong_ball
    python evaluate.py --results DIR        of samples that sample.py has made

Stopped and run again, it goes on where it was; started several times, or under torchrun, each process takes a share.
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
from evaluation import measure, networks, protocols
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
    number,  # noqa: F401  scripts/forgetting.py and benchmarks/lifelong.py call it here
    summary_table,
)
from runtime.console import UserError, progress, run_command
from runtime.folders import Parts
from runtime.process import Process, start

# fields of the protocol that are flags, too
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


# ------------------------------------------------------------------------------------------ sources of forecasts
def from_checkpoint(args: argparse.Namespace, process: Process) -> tuple[Source, Path]:
    """Samples to be made now. Returns (source, default folder of the results)."""
    forecaster, step = load_forecaster(
        args.ckpt, process.device, overrides(args), args.dataset, args.interpolant
    )
    if forecaster.config.vqvae.kind == "latents":
        raise UserError(
            f"{args.ckpt} forecasts latents, but evaluate.py measures frames: run sample.py first, "
            "then evaluate its decoded frames with --results DIR"
        )
    protocol = protocols.get(args.protocol or "own", forecaster.config, changes(args))
    source = source_of_checkpoint(forecaster, step, args.ckpt, protocol)
    out = results.results_dir(forecaster, step)
    return source, out.with_name(f"{out.name}-{source.protocol.name}")


def from_results(args: argparse.Namespace, process: Process) -> tuple[Source, Path]:
    """Samples stored by sample.py or evaluate.py. Returns (source, their folder)."""
    dir = results.folder(args.results)
    results.check_out(dir)
    truth, samples = results.read_arrays(dir)
    made = results.read_metrics(dir)
    config, about = results.config_of(made, dir), made["protocol"]
    S = samples.shape[1]
    counted = about.get("samples_per_video") or S
    if counted > S:
        raise UserError(
            f"{dir} keeps {S} of the {counted} samples that its numbers are of; evaluate the checkpoint again"
        )
    protocol = protocol_of_results(args, dir, config, about, truth, samples)

    # the FVD of the autoencoder needs its weights
    forecaster = None
    ckpt = args.ckpt or str(about.get("checkpoint") or "")
    if set(metrics_of(args, config, protocol)) & set(measure.SETS):
        if args.ckpt or Path(ckpt).is_file():
            forecaster, _ = load_forecaster(
                ckpt, process.device, overrides(args), args.dataset, args.interpolant
            )
        else:
            print(
                "the FVD of the autoencoder is left out: the checkpoint "
                f"{ckpt or 'of these samples'} does not exist; give one with --ckpt"
            )
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
    """The protocol of --protocol, which must agree with the stored samples; by default the protocol of the samples."""
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
    protocol = protocols.get(name, config, changes(args))
    if name == "own":
        unset = {field: own[field] for field in own if getattr(args, field, None) is None}
        protocol = dataclasses.replace(protocol, **unset)
    for field, value in own.items():
        expected = getattr(protocol, field)
        if value != expected:
            raise UserError(
                f"{dir} does not match protocol {protocol.name}: it has {field} {value}, not {expected}"
            )
    return protocol


# ------------------------------------------------------------------------------------------------- measuring and summing up
def measured(
    source: Source,
    which: list[str],
    nets: measure.Networks,
    keep: int,
    mean: np.ndarray | None,
    parts: Parts,
    process: Process,
) -> None:
    """Every part in a file, by this process and others."""
    V = source.protocol.videos
    with progress(V, "evaluate", "video") as bar:
        for k in parts.ours(process.rank * parts.count // process.world):
            if k is None:
                time.sleep(0.5)
            else:
                truth, samples, evaluations = source.part(k)
                tables = measure.measure(
                    truth, samples, mean, source.protocol, which, nets, source.autoencode, seed=k
                )
                stored = {} if source.arrays else {"truth": truth, "samples": samples[:, :keep]}
                parts.write(k, {**tables, **stored, "evaluations": np.array([evaluations])})
            bar.update(sum(min(PART, V - k * PART) for k in parts.there()) - bar.n)


def summed_up(
    source: Source, which: list[str], networks: dict, parts: Parts
) -> tuple[np.ndarray, np.ndarray, dict]:
    """-> (truth, the samples that are kept, metrics.json)"""
    tables, protocol, about = parts.read(), source.protocol, dict(source.about)
    truth, samples = source.arrays or (tables.pop("truth"), tables.pop("samples"))
    if evaluations := tables.pop("evaluations").sum():
        about["network_evaluations_per_frame"] = float(
            evaluations / (protocol.videos * protocol.samples * protocol.predict)
        )
    told = {
        **about,
        **protocol.told(which),
        **networks,
        "fps": source.fps,
        "skip": source.config.data.skip,
    }
    result = {
        "protocol": told,
        "config": configs.to_dict(source.config),
        **measure.summarize(tables, protocol, which),
    }
    return truth, samples, result


# -------------------------------------------------------------------------------------------------------------------- command
def metrics_of(args: argparse.Namespace, config: Config, protocol: Protocol) -> list[str]:
    """Those asked for, or all that the dataset and the protocol have."""
    ball, several = config.dataset.startswith("ball"), protocol.samples > 1
    if not args.metrics:
        return [
            name
            for name in measure.ALL
            if (ball or name not in measure.BALL) and (several or name != "spread_skill")
        ]
    if "spread_skill" in args.metrics and not several:
        raise UserError(
            "spread_skill wants two samples or more of each video, the protocol has one"
        )
    for name in args.metrics:
        if name not in measure.ALL:
            raise UserError(f"no metric `{name}`{configs.nearest(name, measure.ALL)}")
        if name in measure.BALL and not ball:
            raise UserError(f"{name} is for bouncing balls, this is {config.dataset}")
    return [name for name in measure.ALL if name in args.metrics]


def weights_of(which: list[str], protocol: Protocol, args: argparse.Namespace) -> dict[str, Path]:
    """The files of the metric networks that are asked for."""
    found = (
        {"i3d": args.i3d or args.weights / "i3d.safetensors"}
        if set(which) & set(measure.SETS)
        else {}
    )
    if "lpips" in which:
        found["lpips"] = args.weights / f"lpips_{protocol.lpips_net}.safetensors"
    for path in found.values():
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; fetch it by `{networks.COMMAND}`, or choose --metrics without it"
            )
    return found


def load_networks(
    files: dict[str, Path], protocol: Protocol, device: torch.device
) -> measure.Networks:
    i3d = networks.load_i3d(files["i3d"], device) if "i3d" in files else None
    lpips = (
        networks.load_lpips(files["lpips"].parent, protocol.lpips_net, device)
        if "lpips" in files
        else None
    )
    return measure.Networks(i3d, lpips, device)


def check(source: Source, which: list[str]) -> None:
    """What the networks want at the least, before hours of work."""
    protocol, size = source.protocol, source.config.data.image_size
    if (
        set(which) & set(measure.SETS)
        and protocol.reference == "autoencoded"
        and source.autoencode is None
    ):
        raise UserError(
            "--reference autoencoded wants the autoencoder; name the checkpoint by --ckpt"
        )
    if "lpips" in which and size < networks.NETS[protocol.lpips_net]:
        raise UserError(
            f"LPIPS ({protocol.lpips_net}) needs frames of {networks.NETS[protocol.lpips_net]} pixels, these have "
            f"{size}; choose --metrics without lpips"
        )
    counted, least = (
        protocol.predict + protocol.condition * protocol.fvd_given,
        max(networks.MIN_FRAMES, protocol.fvd_chunk),
    )
    if set(which) & set(measure.SETS) and counted < least:
        raise UserError(
            f"fvd and kvd want {least} frames, protocol {protocol.name} counts {counted}; choose others: "
            "--metrics mse psnr ssim lpips crps energy spread_skill"
        )


def changes(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in CHANGEABLE}


def overrides(args: argparse.Namespace) -> dict:
    given = [
        f"{name}={getattr(args, flag)}"
        for flag, name in configs.SAMPLING_FLAGS.items()
        if getattr(args, flag, None) is not None and name.startswith("sample.") and flag != "split"
    ]
    return configs.parse_overrides([*given, *args.set])


def mean_of_training(config: Config) -> np.ndarray | None:
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
    add("--ckpt", help="a checkpoint to sample from; with --results, for its autoencoder")
    add("--results", help="a folder of samples made before; the results go there, too")
    add(
        "--protocol",
        help=f"{', '.join(protocols.PROTOCOLS)} (default: own). See README and evaluation/protocols.py",
    )
    add(
        "--metrics",
        nargs="+",
        help=f"of {', '.join(measure.ALL)} (default: all that go with the dataset)",
    )
    for field in dataclasses.fields(Protocol):
        if field.name in CHANGEABLE:
            kind = int if isinstance(field.default, int) else str
            add(f"--{field.name}", type=kind, help="changes the protocol, and its name")
    for flag in ("steps", "solver", "diffusion", "grid", "warm_start", "redraw", "format"):
        add(f"--{flag}", help=f"{configs.SAMPLING_FLAGS[flag]}; default: the checkpoint's")
    add(
        "--keep",
        type=int,
        default=4,
        help="samples of each video that are stored and shown (default 4)",
    )
    add(
        "--weights",
        type=Path,
        default=Path("weights/metrics"),
        help="folder of the metric networks, which "
        f"`{networks.COMMAND}` fetches (default weights/metrics)",
    )
    add("--i3d", type=Path, help="another file of I3D's weights, the usual i3d_torchscript.pt say")
    add(
        "--out",
        help="folder for the results; default: that of sample.py, its name followed by the protocol's",
    )
    add("--dataset", default="", help="of a published checkpoint, which does not say it")
    add("--interpolant", default="", help="likewise")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field",
    )
    args = parser.parse_args(arguments)
    if not args.ckpt and not args.results:
        raise UserError("nothing to evaluate: give --ckpt FILE or --results DIR")
    if args.keep < 1:
        raise UserError(f"--keep must be >= 1, got {args.keep}")
    return args


def evaluated(
    args: argparse.Namespace, process: Process, known: dict[bytes, np.ndarray] | None = None
) -> Path:
    """-> the folder of the results, made now unless they are there. known: features of videos, for those to come again."""
    source, out = (from_results if args.results else from_checkpoint)(args, process)
    out, which = (
        results.folder(args.out) if args.out else out,
        metrics_of(args, source.config, source.protocol),
    )
    results.check_out(out)
    check(source, which)
    files, mean = weights_of(which, source.protocol, args), mean_of_training(source.config)
    told = {name: f"{path.name} {digest(path.read_bytes())[:8]}" for name, path in files.items()}
    settings = {
        name: group
        for name, group in configs.to_dict(source.config).items()
        if name not in ("output", "wandb")
    }
    plan = (
        source.key,
        source.protocol,
        settings,
        told,
        None if mean is None else digest(mean),
        which,
        args.keep,
        PART,
    )
    plan = digest(repr(plan).encode())[:16]
    done = lambda: (out / "metrics.json").exists() and results.read_metrics(out).get("plan") == plan  # noqa: E731
    parts = Parts(out.with_name(f".{out.name}.{plan}"), -(-source.protocol.videos // PART), done)

    def write() -> None:
        truth, samples, result = summed_up(source, which, told, parts)
        results.write_results(
            out, truth, samples, {"plan": plan, **result}, source.fps, source.config.sample.format
        )
        shutil.rmtree(parts.dir, ignore_errors=True)

    if not done():
        nets = dataclasses.replace(
            load_networks(files, source.protocol, process.device), known=known
        )
        measured(source, which, nets, args.keep, mean, parts, process)
        parts.sum_up(out.parent, write)
    return out


def main() -> None:
    args, process = parse(), start()
    out = evaluated(args, process)
    if process.first:
        result = results.read_metrics(out)
        print(summary_table(result))
        print(
            results.paths(
                out, results.config_of(result, out).sample.format, args.ckpt or args.results
            )
        )
    process.close()


if __name__ == "__main__":
    run_command(main)
