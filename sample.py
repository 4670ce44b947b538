"""The autoregressive roll-out, and the command that turns a checkpoint into forecasts.

    python sample.py --ckpt outputs/checkpoints/ball_stn-follmer-0/latest.pt

writes samples as arrays, a video per forecast with the truth beside it, a contact sheet and metrics.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import configs
import data
from batches.windows import Windows, check_long_enough, spaced_windows
from evaluation import metrics, protocols
from forecaster import Forecaster, about
from forecaster import load as load_forecaster
from report import results
from runtime.console import UserError, run_command
from runtime.process import start
from shards import Shards

SCORES = {
    "mse": lambda x, y: metrics.mse(x, y).mean(1),
    "psnr": lambda x, y: metrics.psnr(x, y).mean(1),
    "crps": metrics.crps,
}


def score(truth: np.ndarray, samples: np.ndarray, mean: np.ndarray | None = None) -> dict:
    """Metrics per horizon of samples (V, S, T, H, W, 3) against the last T frames of truth, and of the baselines: repeat
    the last given frame, and `mean` (H, W, 3) if there is one."""
    T = samples.shape[2]
    rows: dict[str, list] = {}
    for clip, futures in zip(
        truth, samples
    ):  # video by video: float copies of all at once could fill the memory
        y = clip[None, -T:].astype(np.float32) / 255
        forecasts = {"": futures[None], "_repeat_last": clip[-T - 1][None, None, None].repeat(T, 2)}
        if mean is not None:
            forecasts["_mean_frame"] = mean[None, None, None].repeat(T, 2)
        for suffix, frames in forecasts.items():
            x = frames.astype(np.float32) / 255
            for name, metric in SCORES.items():
                rows.setdefault(name + suffix, []).append(metric(x, y)[0])
    table = {name: np.stack(values) for name, values in rows.items()}
    ratio = {
        name: {
            "all": float(table[name].mean() / max(table[f"{name}_repeat_last"].mean(), 1e-12)),
            "horizon": (
                table[name].mean(0) / table[f"{name}_repeat_last"].mean(0).clip(1e-12)
            ).tolist(),
        }
        for name in ("mse", "crps")
    }
    return {
        "summary": {name: metrics.summarize(values) for name, values in table.items()},
        "ratio_to_repeat_last": ratio,
        "horizon": {name: values.mean(0).tolist() for name, values in table.items()},
    }


def forecast_split(
    forecaster: Forecaster, windows: Windows | None = None, quiet: bool = False
) -> tuple[np.ndarray, np.ndarray, Shards]:
    """(truth (V, condition + predict, H, W, 3), samples (V, S, predict, H, W, 3), the shards of sample.split); without
    `windows`, sample.num_videos clips spread evenly over the split. Counts the network's evaluations anew."""
    config, sample = forecaster.config, forecaster.config.sample
    shards, clip = (
        data.open_split(config, sample.split),
        config.data.condition + config.data.predict,
    )
    if windows is None:
        check_long_enough(shards, clip, config.data.skip, "data.condition + data.predict")
        windows = spaced_windows(shards.lengths, clip, config.data.skip, sample.num_videos)
    truth = data.read_clips(shards, windows)
    forecaster.evaluations = 0
    samples = forecaster.forecast(
        truth[:, : config.data.condition],
        config.data.predict,
        sample.num_samples,
        (config.train.seed, "sample"),
        quiet,
    )
    return forecaster.shown(truth), samples, shards


def evaluate(
    forecaster: Forecaster,
    step: int,
    out: Path | None = None,
    windows: Windows | None = None,
    ckpt: str | Path = "",
) -> tuple[dict, Path]:
    """Forecast held-out clips and write everything there is to look at; -> (metrics, folder). The folder appears when
    it is complete, in place of an earlier one of the same name."""
    config, sample = forecaster.config, forecaster.config.sample
    train = data.open_split(config, "train")
    truth, samples, shards = forecast_split(forecaster, windows)
    asked = protocols.Protocol(
        "own",
        "the clips that sample.py takes",
        (),
        config.data.condition,
        config.data.predict,
        sample.split,
        len(truth),
        sample.num_samples,
    )
    protocol = {
        **about(forecaster, step, ckpt),
        **asked.told(list(SCORES)),
        "skip": config.data.skip,
        "fps": data.frame_rate(shards, config),
        "network_evaluations_per_frame": forecaster.evaluations / samples[..., 0, 0, 0].size,
    }
    scores = score(truth, samples, data.mean_frame(train, forecaster.shown))
    result = {"protocol": protocol, "config": configs.to_dict(config), **scores}
    out = out or results.results_dir(forecaster, step)
    results.write_results(
        out, truth, samples, result, protocol["fps"], sample.format, forecaster.latents
    )
    return result, out


def table(result: dict) -> str:
    """What a person reads at the end of a run."""
    horizon, protocol = result["horizon"], result["protocol"]
    T = protocol["predict"]
    shown = sorted({t for t in (1, 2, 5, 10, 20, 30, T) if t <= T})
    head = f"{'frame':<24}" + "".join(f"{t:>9}" for t in shown) + f"{'all':>9}"
    lines = [
        f"{protocol['videos']} {protocol['split']} videos, {protocol['samples_per_video']} futures each, "
        f"{protocol['condition']} -> {T} frames, {protocol['solver']} solver, diffusion {protocol['diffusion']}, "
        f"{protocol['network_evaluations_per_frame']:.4g} network evaluations a frame",
        head,
        "-" * len(head),
    ]
    for name, digits in (("crps", 4), ("mse", 4), ("psnr", 2)):
        for suffix, label in (
            ("", ""),
            ("_repeat_last", " repeat last frame"),
            ("_mean_frame", " mean frame"),
        ):
            values = horizon[name + suffix]
            cells = [values[t - 1] for t in shown] + [float(np.mean(values))]
            lines.append(f"{name + label:<24}" + "".join(f"{v:>9.{digits}f}" for v in cells))
        if name in result["ratio_to_repeat_last"]:
            ratio = result["ratio_to_repeat_last"][name]
            cells = [ratio["horizon"][t - 1] for t in shown] + [ratio["all"]]
            lines.append(f"{name + ' / repeat last':<24}" + "".join(f"{v:>9.2f}" for v in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python sample.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt",
        required=True,
        help="a checkpoint of main.py, or one that others published (see README)",
    )
    parser.add_argument(
        "--dataset", default="", help="of a published checkpoint, which does not say it"
    )
    parser.add_argument("--interpolant", default="", help="likewise")
    for flag, name in configs.SAMPLING_FLAGS.items():
        parser.add_argument(f"--{flag}", help=f"{name}; default: the checkpoint's")
    parser.add_argument(
        "--out", help="folder to write; default: outputs/results/<run id>/<model>_<sampler>/<data>"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field, e.g. data.root=DIR where the data has moved",
    )
    args = parser.parse_args()
    given = [
        f"{name}={getattr(args, flag)}"
        for flag, name in configs.SAMPLING_FLAGS.items()
        if getattr(args, flag) is not None
    ]
    process = start()
    forecaster, step = load_forecaster(
        args.ckpt,
        process.device,
        configs.parse_overrides([*given, *args.set]),
        args.dataset,
        args.interpolant,
    )
    out = results.folder(args.out) if args.out else None
    if out is not None:
        results.check_out(out)
    if process.world > 1:
        raise UserError("sample.py runs as one process; start it without torchrun")
    result, out = evaluate(forecaster, step, out, ckpt=args.ckpt)
    print(table(result))
    print(results.paths(out, forecaster.config.sample.format, args.ckpt))


if __name__ == "__main__":
    run_command(main)
