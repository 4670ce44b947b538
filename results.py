"""A results folder, as sample.py leaves it: its arrays and metrics, read and checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

import configs
from console import UserError, first_line


def require(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a results folder that sample.py wrote")
    return file


def read_array(file: Path, axes: int) -> np.ndarray:
    """uint8, left on the disk."""
    try:
        array = np.load(require(file), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: not an array that sample.py wrote ({first_line(error)}); sample again") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != axes or 0 in array.shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"{file}: {found}, not uint8 with {axes} axes; sample again")
    return array


def read_arrays(dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> truth (V, T, H, W, 3) and samples (V, S, T - condition, H, W, 3), uint8."""
    samples, truth = read_array(dir / "samples.npy", 6), read_array(dir / "truth.npy", 5)
    V, T, *frame = truth.shape
    if samples.shape[0] != V or samples.shape[2] >= T or list(samples.shape[3:]) != frame or frame[-1] != 3:
        raise UserError(f"{dir}: samples {samples.shape} and truth {truth.shape} do not go together; sample again")
    return truth, samples


def read_metrics(dir: Path) -> dict:
    file = require(dir / "metrics.json")
    try:
        result = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({first_line(error)}); sample again") from None
    parts = ("protocol", "config", "summary", "horizon")
    if not isinstance(result, dict) or not all(isinstance(result.get(part), dict) for part in parts):
        raise UserError(f"{file}: lacks one of {', '.join(parts)}; sample again")
    return result


def config_of(result: dict, dir: Path) -> configs.Config:
    try:
        return configs.from_dict(result["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{dir / 'metrics.json'}: its config is none of this program's ({first_line(error)})") from None


def frame_rate(protocol: dict) -> float:
    """Frames a second of the clips, 10 where it is not said."""
    fps = protocol.get("fps")
    return fps if isinstance(fps, (int, float)) and 0 < fps < math.inf else 10


def run_id(config: dict) -> str:
    """As configs.Config.run_id has it, of a config that may be older than this program."""
    flow, train, output = (config.get(group, {}) for group in ("flow", "train", "output"))
    default = f"{config.get('dataset', '?')}-{flow.get('interpolant', '?')}-{train.get('seed', '?')}"
    return output.get("run_id") or default + "-overfit" * bool(train.get("overfit"))
