"""Results folders: paths, atomic writes, checked reads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import configs
from evaluation.metrics import own_metrics
from forecaster import Forecaster
from report import page, plots, videos
from report.colours import Colours
from runtime.console import UserError, first_line, progress
from runtime.folders import replace_folder, restore_folder


def require(file: Path) -> Path:
    """Return the path if the file exists; else raise UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a results folder that sample.py wrote")
    return file


def read_array(file: Path, axes: int) -> np.ndarray:
    """Memory-map an array with `axes` axes, of frames (uint8) or of fields (float32). UserError if
    the file holds anything else."""
    try:
        array = np.load(require(file), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{file}: not an array that sample.py wrote ({first_line(error)}); sample again"
        ) from None
    # np.load returns an archive, which is no array, for a file of several arrays.
    if (
        not isinstance(array, np.ndarray)
        or array.dtype not in (np.uint8, np.float32)
        or array.ndim != axes
        or 0 in array.shape
    ):
        found = (
            f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        )
        raise UserError(f"{file}: {found}, not uint8 or float32 with {axes} axes; sample again")
    return array


def read_arrays(dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read truth (V, T, H, W, 3) and samples (V, S, T - condition, H, W, 3), uint8; of fields truth
    (V, T, C, H, W) and samples (V, S, T - condition, C, H, W), float32."""
    samples, truth = read_array(dir / "samples.npy", 6), read_array(dir / "truth.npy", 5)
    V, T, *frame = truth.shape
    if (
        samples.shape[0] != V
        or samples.shape[2] >= T
        or list(samples.shape[3:]) != frame
        or samples.dtype != truth.dtype
        or (truth.dtype == np.uint8 and frame[-1] != 3)
    ):
        raise UserError(
            f"{dir}: samples {samples.shape} {samples.dtype} and truth {truth.shape} {truth.dtype} "
            "do not match; sample again"
        )
    return truth, samples


def read_pictures(dir: Path) -> tuple[np.ndarray, np.ndarray, list[Colours]]:
    """`read_arrays` for drawing, uint8, and the colours by which fields were drawn."""
    truth, samples = read_arrays(dir)
    channels = ()
    if truth.dtype != np.uint8 and (dir / "metrics.json").is_file():
        channels = tuple(map(str, read_metrics(dir)["protocol"].get("channels") or ()))
    return videos.as_pictures(truth, samples, channels)


def missing_part(result: object, parts: tuple[str, ...]) -> str | None:
    """The first of `parts` that is missing from metrics.json or no JSON object; None if none is."""
    for part in parts:
        if not isinstance(result, dict) or not isinstance(result.get(part), dict):
            return part
    return None


def read_metrics(dir: Path) -> dict:
    """Read metrics.json. UserError if it is damaged or incomplete."""
    file = require(dir / "metrics.json")
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({first_line(error)}); sample again") from None
    parts = ("protocol", "config", "summary", "horizon")
    if missing_part(result, parts):
        raise UserError(f"{file}: lacks one of {', '.join(parts)}; sample again")
    return result


def config_of(result: dict, dir: Path) -> configs.Config:
    """The config in metrics.json. UserError if it is not a config of this program."""
    try:
        return configs.from_dict(result["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{dir / 'metrics.json'}: its config cannot be read ({first_line(error)})"
        ) from None


def frame_rate_of(protocol: dict, clip: int | None = None) -> float:
    """Frames per second of the clips, or of clip number `clip` if rates differ; 10 if unknown."""
    rates = protocol.get("rates")
    fps = protocol.get("fps")
    if clip is not None and isinstance(rates, list) and clip < len(rates):
        fps = rates[clip]
    return fps if isinstance(fps, (int, float)) and 0 < fps < math.inf else 10


def run_id(config: dict) -> str:
    """The run id of a config as in metrics.json, which may be of an earlier version."""
    flow, train, output = (config.get(group, {}) for group in ("flow", "train", "output"))
    default = (
        f"{config.get('dataset', '?')}-{flow.get('interpolant', '?')}-{train.get('seed', '?')}"
    )
    return output.get("run_id") or default + "-overfit" * bool(train.get("overfit"))


def results_dir(forecaster: Forecaster, step: int) -> Path:
    """The default results folder of a sampler. Its name contains the sampler's settings that differ
    from the defaults.
    """
    config, sample = forecaster.config, forecaster.config.sample
    sampler = f"{config.model.name}-{step}_{sample.solver}-{config.diffusion}-{sample.steps}"
    # Only settings that differ from the defaults are in the name, which would be too long
    # otherwise.
    usual = configs.Sample()
    sampler += "".join(
        f"_{name}-{getattr(sample, name)}"
        for name in ("grid", "warm_start", "redraw", "reencode", "first", "noise", "restore")
        if getattr(sample, name) != getattr(usual, name)
    )
    return (
        Path(config.output.root)
        / "results"
        / config.run_id
        / sampler
        / f"{config.dataset}-{sample.split}"
    )


# All names that a results folder may contain.
RESULTS = {
    "videos",
    "samples.npy",
    "latents.npy",
    "truth.npy",
    "contact_sheet.png",
    "forecasts.mp4",
    "forecasts.gif",
    "metrics.json",
    "curves.png",
    "rank_histogram.png",
    "index.html",
}


def folder(name: str) -> Path:
    """The path of a results folder given by a flag.

    A link, `.` or `..` is resolved, because the folder will be replaced by renaming.
    """
    path = Path(name)
    return path.resolve() if path.is_symlink() or not path.name or path.name == ".." else path


def check_out(out: Path) -> None:
    """Restore a folder whose replacement was interrupted.

    UserError if the folder contains anything but results: the replacement would delete it.
    """
    restore_folder(out)
    if out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= RESULTS):
        raise UserError(
            f"{out} exists and holds files that are not results; choose another folder with --out"
        )


def write_results(
    out: Path,
    truth: np.ndarray,
    samples: np.ndarray,
    result: dict,
    fps: float,
    format: str,
    latents: Sequence[np.ndarray] = (),
) -> None:
    """Write a results folder, which replaces an earlier one when it is complete.

    truth (V, T, H, W, 3) and samples (V, S, T - condition, H, W, 3), uint8, or fields as in
    read_arrays, float32. result: the content of metrics.json. fps: frame rate of the videos.
    format: mp4, avi or gif. latents: batches of the samples' latents, if the data are latents.
    """
    with replace_folder(out) as partial:
        np.save(partial / "samples.npy", samples)
        np.save(partial / "truth.npy", truth)
        if latents:
            shape = (*samples.shape[:3], *latents[0].shape[2:])
            np.save(partial / "latents.npy", np.concatenate(latents).reshape(shape))
        elif (out / "latents.npy").exists():
            # The same samples were measured again, so their latents stay valid.
            shutil.copyfile(out / "latents.npy", partial / "latents.npy")
        rates = [fps] * len(truth)
        if "rates" in result["protocol"]:
            rates = [frame_rate_of(result["protocol"], k) for k in range(len(truth))]
        channels = tuple(result["protocol"].get("channels", ()))
        *drawn, colours = videos.as_pictures(truth, samples, channels)
        write_videos(partial, *drawn, rates, videos.usable_format(format), colours)
        (partial / "metrics.json").write_text(json.dumps(result, indent=1, allow_nan=False))
        if own_metrics(result["horizon"]):
            plots.curves(result["horizon"], partial / "curves.png", result.get("horizon_se"))
        if "rank_histogram" in result:
            plots.rank_histogram(np.array(result["rank_histogram"]), partial / "rank_histogram.png")
        page.result_page(partial)


def write_videos(
    dir: Path,
    truth: np.ndarray,
    samples: np.ndarray,
    rates: list[float],
    format: str,
    colours: Sequence[Colours] = (),
) -> None:
    """Write a video per clip, and a contact sheet and a mosaic of the six clips with most motion.

    rates: frames per second of each clip; the mosaic has the rate of the first clip. colours: of
    the channels of fields, whose bars are drawn below each picture.
    """
    shown = videos.rank_by_motion(truth, truth.shape[1] - samples.shape[2])[:6]
    sheet = videos.contact_sheet(truth[shown], samples[shown])
    videos.add_bars_to_sheet(sheet, colours).save(dir / "contact_sheet.png")
    mosaic = videos.add_bars(videos.draw_mosaic(truth[shown], samples[shown]), colours)
    videos.write_video(dir / f"forecasts.{format}", mosaic, rates[0])
    (dir / "videos").mkdir()
    with progress(len(truth), "write videos", "video") as bar:
        for k, (t, s) in enumerate(zip(truth, samples)):
            path = dir / "videos" / f"{k:03d}.{format}"
            video = videos.add_bars(videos.side_by_side(t, s), colours)
            videos.write_video(path, video, rates[k])
            bar.update()


def paths(out: Path, format: str, ckpt: str | Path) -> str:
    """The lines that a command prints at its end: the files that it wrote."""
    lines = [
        f"page           {out / 'index.html'}",
        f"video          {out / f'forecasts.{videos.usable_format(format)}'}",
        f"contact sheet  {out / 'contact_sheet.png'}",
        f"metrics        {out / 'metrics.json'}",
        f"checkpoint     {ckpt}",
    ]
    if (out / "latents.npy").exists():
        latents = (
            f"latents        {out / 'latents.npy'} (the samples; pictures and metrics are of "
            "decoded frames: by the AutoencoderKL in vqvae.ckpt, else by a linear preview)"
        )
        lines.insert(0, latents)
    return "\n".join(lines)
