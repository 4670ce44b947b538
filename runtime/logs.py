"""The log of a run: JSON lines, wandb, and the scalars of recent updates."""

from __future__ import annotations

import json
import math
import netrc
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import configs
from runtime import preview
from runtime.console import UserError, has_package, print_once
from runtime.folders import write_atomically

# Seconds between two drawings of the loss curve.
DRAW_EVERY = 10.0


def wandb_mode(mode: str) -> str:
    """Resolve wandb.mode.

    `auto` is `disabled` if wandb is not installed (with one printed line), else WANDB_MODE if it is
    set, else `online` if an API key is configured, else `offline`. Any other mode except `disabled`
    raises UserError if wandb is not installed.
    """
    mode_set = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    if mode_set != "disabled" and not has_package("wandb"):
        if mode != "auto":
            raise UserError(
                f"wandb.mode={mode}, but wandb is not installed: pip install wandb, or set "
                "wandb.mode=disabled"
            )
        print_once(
            "wandb is not installed, so nothing is logged there (metrics.jsonl holds all of it): "
            "pip install wandb"
        )
        return "disabled"
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import wandb

    try:
        host = urlparse(wandb.Settings().base_url).hostname
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class Log:
    """Rows of a run, appended to metrics.jsonl and sent to wandb.

    On resuming at `step`, later rows are removed from the file, because their steps run again.
    """

    def __init__(self, dir: Path, config: configs.Config, step: int, enabled: bool = True):
        self.run, self.file, self.dir = None, None, dir
        if not enabled:
            return
        dir.mkdir(parents=True, exist_ok=True)
        path = dir / "metrics.jsonl"
        if path.exists():
            lines = filter(is_row, path.read_text().splitlines())
            rows = [line for line in lines if json.loads(line)["step"] <= step]
            temporary = path.with_name(".metrics.tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)
        self.drawn = -math.inf
        mode = wandb_mode(config.wandb.mode)
        if mode != "disabled":
            self.run = start_wandb(dir, config, mode)

    def row(self, step: int, **values: float) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            if time.monotonic() - self.drawn > DRAW_EVERY:
                preview.draw_curve(self.dir)
                self.drawn = time.monotonic()
        if self.run:
            self.run.log(values, step=step)

    def write_page(self, sample_every: int) -> None:
        """Write the page that shows the loss and the newest forecasts, preview.html."""
        if self.file:
            first = f"{sample_every:,}" if sample_every else "no"
            preview.write_page(self.dir, self.dir.name, first)

    def picture(self, step: int, image: Image.Image) -> None:
        """Save a picture of forecasts, forecasts_STEP.png; preview.png is the newest one."""
        if self.file:
            for name in (f"forecasts_{step:08d}.png", "preview.png"):
                with write_atomically(self.dir / name) as file:
                    image.save(file, format="png")

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """frames: (T, H, W, 3) uint8."""
        if self.run and not has_package("moviepy"):
            print_once("moviepy is not installed, so wandb gets no videos: pip install moviepy")
        elif self.run:
            import wandb

            frames = frames.transpose(0, 3, 1, 2)
            video = wandb.Video(frames, fps=max(1, round(fps)), format="mp4")
            self.run.log({name: video}, step=step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(int(kind is not None))

    def close(self, code: int = 0) -> None:
        if self.file:
            # An error of a full disk has been raised before.
            with suppress(OSError):
                self.file.close()
                preview.draw_curve(self.dir)
        if self.run:
            self.run.finish(exit_code=code)


class Recent:
    """Scalars of the updates since the last log, and the count of skipped updates.

    An update whose gradient norm is not finite is skipped. The scalars stay on the device, so that
    the training loop never waits for them.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.bad = 0
        self.bad_in_a_row = 0
        self.clear()

    def clear(self) -> None:
        # One {name: scalar} per update; `loss` and `grad_norm` are always among the names.
        self.updates: list[dict[str, Tensor]] = []
        # How many of them `summary` has examined, and how many come from a checkpoint.
        self.counted = 0
        self.restored = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start to measure the rate, `samples_per_second`."""
        self.began = time.perf_counter()

    def add(self, scalars: dict[str, Tensor]) -> None:
        self.updates.append(scalars)

    def values(self) -> list[dict[str, float]]:
        """The scalars as floats, copied to the host in one transfer."""
        if not self.updates:
            return []
        scalars = [scalar for update in self.updates for scalar in update.values()]
        floats = iter(torch.stack(scalars).tolist())
        return [{name: next(floats) for name in update} for update in self.updates]

    def state_dict(self) -> dict:
        return {
            "updates": self.values(),
            "counted": self.counted,
            "bad": self.bad,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_state_dict(self, state: dict, device: torch.device, names: Iterable[str]) -> None:
        """names: of the values in the rows ("pairs") of checkpoints that did not store names."""
        updates = state.get("updates")
        if updates is None:
            updates = [dict(zip(names, row.tolist())) for row in state["pairs"]]
        self.updates = []
        for update in updates:
            scalars = torch.tensor(list(update.values()), device=device)
            self.updates.append(dict(zip(update, scalars.unbind())))
        self.restored = len(self.updates)
        self.counted = state["counted"]
        self.bad = state["bad"]
        self.bad_in_a_row = state["bad_in_a_row"]

    def summary(self) -> dict[str, float]:
        """Means over the updates that were made; without `loss` and `grad_norm` if none was made.

        Also sets `longest` to (length of the longest run of skipped updates among those not
        examined before, how many updates ago that run began).
        """
        updates = self.values()
        self.longest = (0, 0)
        for k, update in enumerate(updates[self.counted :], self.counted):
            skipped = not math.isfinite(update["grad_norm"])
            self.bad_in_a_row = self.bad_in_a_row + 1 if skipped else 0
            self.bad += skipped
            began = len(updates) - k - 1 + self.bad_in_a_row
            self.longest = max(self.longest, (self.bad_in_a_row, began))
        self.counted = len(updates)

        made = [update for update in updates if math.isfinite(update["grad_norm"])]
        columns: dict[str, list[float]] = {}
        for update in made:
            for name, value in update.items():
                columns.setdefault(name, []).append(value)
        result = {name: sum(column) / len(column) for name, column in columns.items()}
        seconds = time.perf_counter() - self.began
        result["samples_per_second"] = (len(updates) - self.restored) * self.batch_size / seconds
        if self.bad:
            result["bad_steps"] = self.bad
        return result


def is_row(line: str) -> bool:
    """False for a line that is incomplete because the process was killed."""
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False


def start_wandb(dir: Path, config: configs.Config, mode: str):
    """Start the wandb run of a checkpoint folder, or resume it."""
    import wandb

    # The run gets a random id: wandb does not accept the id of a deleted run again.
    id_file = dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(f"{dir.name}-{os.urandom(4).hex()}")
    folder = Path(config.output.root)
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity or None,
        id=id_file.read_text(),
        name=dir.name,
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        config=configs.to_dict(config),
        settings=wandb.Settings(silent=True, console="off"),
    )
