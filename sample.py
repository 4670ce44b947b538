"""The command that turns a checkpoint into forecasts.

    python sample.py
    python sample.py --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt

It writes samples as arrays, a video per clip, a contact sheet, a page and metrics.json. Without
--ckpt it samples from a small checkpoint of the bouncing balls and generates the clips.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import configs
import data
from batches.fields import channel_scale
from batches.windows import Windows
from evaluation import measure
from evaluation.protocols import Protocol
from evaluation.sources import describe_fields, forecast_split, sample_windows
from forecaster import Forecaster, describe_sampler
from forecaster import load as load_forecaster
from report import results
from report.terminal import horizon_table as table
from runtime.console import UserError, run_command
from runtime.process import start

# The checkpoint of `python sample.py` without --ckpt; scripts/export_demo.py makes it.
DEMO = Path(__file__).parent / "pretrained" / "ball_stn.pt"
DEMO_SETTINGS = {
    "data.root": "data/demo",
    "data.stream": 2_000,
    "data.held_out": 2_000,
    "sample.num_videos": 8,
    "sample.num_samples": 2,
}


def evaluate(
    forecaster: Forecaster,
    step: int,
    out: Path | None = None,
    windows: Windows | None = None,
    ckpt: str | Path = "",
) -> tuple[dict, Path]:
    """Forecast held-out clips, score them, write the results. -> (metrics.json, its folder)."""
    config, sample = forecaster.config, forecaster.config.sample
    train = data.open_split(config, "train")
    truth, samples, shards = forecast_split(forecaster, windows)
    scale = channel_scale(shards)
    given, predict = config.data.condition, config.data.predict
    source = "the clips that sample.py takes"
    clips = (given, predict, sample.split, len(truth), sample.num_samples)
    protocol = Protocol("own", source, (), *clips)
    fps = data.frame_rate(shards, config)
    described = {
        **describe_sampler(forecaster, step, ckpt),
        **protocol.to_metadata(measure.SCORES if scale is None else measure.FIELD_SCORES),
        "skip": config.data.skip,
        "fps": fps,
        **data.clip_rates(shards, windows or sample_windows(config, shards), config),
        # samples[..., 0, 0, 0] has one element for each forecast frame.
        "network_evaluations_per_frame": forecaster.evaluations / samples[..., 0, 0, 0].size,
        **describe_fields(shards, scale),
    }
    mean = data.mean_frame(train, forecaster.to_display)
    scores = measure.score(truth, samples, mean, scale)
    result = {"protocol": described, "config": configs.to_dict(config), **scores}
    out = out or results.results_dir(forecaster, step)
    results.write_results(out, truth, samples, result, fps, sample.format, forecaster.latents)
    return result, out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python sample.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    about_ckpt = "checkpoint of main.py, or a published one (docs/published.md); default: a small "
    add("--ckpt", default=DEMO, help=about_ckpt + "one of the bouncing balls, with generated clips")
    add("--dataset", default="", help="dataset of a published checkpoint, which does not name it")
    add("--interpolant", default="", help="interpolant of a published checkpoint")
    for flag, name in configs.SAMPLING_FLAGS.items():
        add(f"--{flag}", help=f"{name}; default: the checkpoint's")
    default = "outputs/results/<run id>/<model>_<sampler>/<data>"
    add("--out", help=f"results folder; default: {default}")
    about_set = "any other field, e.g. data.root=DIR if the data has moved"
    add(
        "--set", nargs="+", action="extend", default=[], metavar="GROUP.FIELD=VALUE", help=about_set
    )
    return parser.parse_args()


def main() -> None:
    args, process = parse(), start()
    if process.world > 1:
        raise UserError("sample.py runs as one process; start it without torchrun")
    given = vars(args)
    flags = [f"{n}={given[f]}" for f, n in configs.SAMPLING_FLAGS.items() if given[f] is not None]
    overrides = configs.parse_overrides([*flags, *args.set])
    demo = args.ckpt == DEMO
    if demo:
        print(f"no --ckpt: sampling from {DEMO.name}, a small network of the bouncing balls")
        overrides = DEMO_SETTINGS | overrides
    forecaster, step = load_forecaster(
        args.ckpt, process.device, overrides, args.dataset, args.interpolant
    )
    if demo:
        data.ensure_data(forecaster.config, process)
    # Before the sampling, which may take hours: can the results be written there?
    out = results.folder(args.out) if args.out else None
    if out is not None:
        results.check_out(out)
    result, out = evaluate(forecaster, step, out, ckpt=args.ckpt)
    print(table(result))
    print(results.paths(out, forecaster.config.sample.format, args.ckpt))


if __name__ == "__main__":
    run_command(main)
