"""The log of a run: JSON lines, wandb, and the scalars of recent updates."""

from __future__ import annotations

import functools
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
from runtime.console import UserError, first_line, has_package, nearest, print_once
from runtime.folders import write_atomically

# Seconds between two drawings of the loss curve.
DRAW_EVERY = 10.0
# Modes of wandb; `run` and `dryrun` are older names of two of them.
MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "shared": "shared",
    "run": "online",
    "dryrun": "offline",
}
# Seconds to wait for wandb's server at the start of a run, and for the last upload at its end.
INIT_TIMEOUT = 15
FINISH_TIMEOUT = 300


# -------------------------------------------------------------------- wandb
def wandb_mode(mode: str) -> str:
    """Resolve wandb.mode to online, shared, offline or disabled.

    `auto` is `disabled` if wandb is not installed (with one printed line), else WANDB_MODE if it is
    set, else `online` if an API key is configured, else `offline`. Raises UserError for an unknown
    WANDB_MODE, for a mode other than `disabled` without wandb, and for `online` without a key.
    """
    if mode == "disabled":
        return mode
    variable = os.environ.get("WANDB_MODE", "")
    if not variable:
        # wandb would take an empty variable for the name of a mode.
        os.environ.pop("WANDB_MODE", None)
    elif variable not in MODES:
        # wandb refuses an unknown value even if wandb.mode is not auto.
        raise UserError(f"WANDB_MODE={variable}: wandb has no such mode{nearest(variable, MODES)}")
    # The environment variable counts for `auto` only. `source` names the setting in errors.
    source, requested = f"wandb.mode={mode}", mode
    if mode == "auto":
        source, requested = f"WANDB_MODE={variable}", variable
    requested = MODES.get(requested, "")

    if requested != "disabled" and not has_package("wandb"):
        if mode != "auto":
            raise UserError(
                f"{source}, but wandb is not installed: pip install wandb, or set "
                "wandb.mode=disabled"
            )
        print_once(
            "wandb is not installed, so nothing is logged there (metrics.jsonl holds all of it): "
            "pip install wandb"
        )
        return "disabled"
    if requested in ("disabled", "offline"):
        return requested
    if has_key():
        return requested or "online"
    if requested:
        raise UserError(
            f"{source}, but wandb has no API key: run `wandb login`, set WANDB_API_KEY, or "
            "--set wandb.mode=offline"
        )
    return "offline"


def has_key() -> bool:
    """Whether wandb's credentials are configured: environment, settings file or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    try:
        settings = wandb.setup().settings
    except ValueError as error:
        # pydantic's ValidationError names the setting in its second line.
        lines = str(error).splitlines()[1:3]
        raise UserError(f"wandb's settings: {': '.join(line.strip() for line in lines)}") from None
    if settings.api_key:
        return True
    url = urlparse(settings.base_url)
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(logins.authenticators(url.netloc) or logins.authenticators(url.hostname))


@functools.cache
def report_no_server(reason: str) -> None:
    """Print once that wandb logs offline. Later runs of this process do not try the server."""
    print(f"wandb: {reason}; logging offline, upload later with `wandb sync`", flush=True)


def start_wandb(dir: Path, config: configs.Config, mode: str):
    """Start the wandb run of a checkpoint folder, or resume it; offline if that fails."""
    import wandb

    # The run gets a random id: wandb does not accept the id of a deleted run again.
    id_file = dir / "wandb_id.txt"
    if not id_file.exists():
        with write_atomically(id_file) as file:
            file.write(f"{dir.name}-{os.urandom(4).hex()}".encode())
    folder = Path(config.output.root)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"silent": True, "console": "off", "init_timeout": INIT_TIMEOUT}
    settings |= {"finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}

    def init(mode: str):
        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity or None,
            id=id_file.read_text(),
            name=dir.name,
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=configs.to_dict(config),
            settings=wandb.Settings(**settings),
        )

    # If report_no_server has been called, an earlier run could not reach the server.
    if mode == "offline" or report_no_server.cache_info().currsize:
        return init("offline")
    try:
        return init(mode)
    except wandb.errors.Error as error:
        report_no_server(first_line(error))
        # wandb's service would refuse the id of the failed run.
        wandb.teardown()
        return init("offline")


# -------------------------------------------------------------------- rows
class Log:
    """Rows of a run, appended to metrics.jsonl and sent to wandb.

    A run that resumes at `step` removes later rows from the file, because their updates run again.
    """

    def __init__(self, dir: Path, config: configs.Config, step: int, enabled: bool = True):
        self.run, self.file, self.dir = None, None, dir
        if not enabled:
            return
        dir.mkdir(parents=True, exist_ok=True)
        path = dir / "metrics.jsonl"
        # Rows after `step`, and an incomplete last row, are removed.
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
            # A full disk has raised its error at the write.
            with suppress(OSError):
                self.file.close()
                preview.draw_curve(self.dir)
        if self.run:
            try:
                self.run.finish(exit_code=code)
            except TimeoutError:
                print(
                    f"wandb: not all rows were uploaded within {FINISH_TIMEOUT} seconds; upload "
                    f"them with `wandb sync {Path(self.run.dir).parent}`"
                )


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
        # The number of updates that `summary` has examined, and that come from a checkpoint.
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
        """Load the state of a checkpoint.

        names: of the values in "pairs", the rows of older checkpoints, which hold no names.
        """
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
        """Average the scalars over the updates that were not skipped. Without any such update, the
        result has neither `loss` nor `grad_norm`.

        Also sets `longest` to (length, age), for the longest run of skipped updates that no earlier
        call examined. age: how many updates ago this run began.
        """
        updates = self.values()
        self.longest = (0, 0)
        # A run of skipped updates may have begun before the last log.
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
