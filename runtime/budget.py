"""Time budget: predict how long a run takes, and how many updates fit into given minutes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.console import UserError
from runtime.folders import write_atomically

# A call that takes more seconds than this is long enough to measure a rate.
ENOUGH = 0.5
# If even a full batch takes less, the rate is an average over about this many seconds.
AVERAGED = 0.1
# A plan fills this share of the given minutes. The rest allows for the error of the estimate.
PLANNED = 0.9
# The shortest training that is accepted, as a share of the updates of the full run.
LEAST_SHARE = 0.02


class Stage(NamedTuple):
    """A stage of a run: `count` items (frames, updates or videos) that take `seconds` each."""

    name: str
    count: int
    seconds: float
    # True for the trainings, the only stages that --minutes shortens.
    updates: bool = False

    @property
    def total(self) -> float:
        return self.count * self.seconds


def seconds_per_item(work: Callable[[int], object], most: int, device: torch.device) -> float:
    """Seconds per item of work(n), which processes n items on the device.

    n grows from 1 by factors of 4 until a call takes ENOUGH seconds or n = `most`. A slow machine
    therefore measures only a part of a batch.
    """

    def seconds(n: int, calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            work(n)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    n = 1
    while True:
        # The first call with a new size also allocates buffers and selects kernels.
        seconds(n, calls=1)
        taken = seconds(n, calls=1)
        if taken > ENOUGH or n == most:
            break
        n = min(4 * n, most)
    if taken > ENOUGH:
        return taken / n
    # A full batch is fast: average over several calls.
    calls = 1 + int(AVERAGED / max(taken, AVERAGED / 100))
    return seconds(n, calls) / (n * calls)


def share_that_fits(stages: list[Stage], minutes: float) -> float:
    """Find the share of the updates, in [LEAST_SHARE, 1], with which the run takes `minutes`.

    Raises UserError if even LEAST_SHARE takes longer.
    """
    fixed = sum(stage.total for stage in stages if not stage.updates)
    updates = sum(stage.total for stage in stages if stage.updates)
    share = min(1.0, (PLANNED * 60 * minutes - fixed) / max(updates, 1e-9))
    if share < LEAST_SHARE:
        least = math.ceil((fixed + LEAST_SHARE * updates) / (60 * PLANNED))
        raise UserError(
            f"--minutes {minutes:g} is too short for this machine; the full run would take "
            f"{describe_seconds(fixed + updates)} ({describe_stages(stages)}), and only the "
            f"trainings can be shortened: use --minutes {least} or more"
        )
    return share


def shorten(stages: list[Stage], share: float) -> list[Stage]:
    """Reduce the trainings to `share` of their updates."""
    return [
        stage._replace(count=math.ceil(share * stage.count)) if stage.updates else stage
        for stage in stages
    ]


def describe_stages(stages: list[Stage]) -> str:
    """List the stages that are not finished, each with the time that it takes."""
    return ", ".join(
        f"{stage.name} {describe_seconds(stage.total)}" for stage in stages if stage.total > 0
    )


def describe_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def describe_run(stages: list[Stage], now: float) -> str:
    """One line: the expected time of the stages and the time of the day at their end.

    now: seconds since the epoch, as time.time().
    """
    seconds = sum(stage.total for stage in stages)
    format = "%H:%M" if seconds < 20 * 3600 else "%a %d %b, %H:%M"
    end = time.strftime(format, time.localtime(now + seconds))
    return f"expected time  {describe_seconds(seconds)}, until {end} ({describe_stages(stages)})"


# ------------------------------------------------------------------------------------------- plans
def read_plan(path: Path) -> dict | None:
    """Read plan.json, {"minutes": float, "settings": {name: int}}; None if there is no file."""
    try:
        plan = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        plan = None
    # The file may be damaged, or edited by hand: check all that a run reads from it.
    plan = plan if isinstance(plan, dict) else {}
    settings, minutes = plan.get("settings"), plan.get("minutes")
    numbers = [*settings.values(), minutes] if isinstance(settings, dict) else [None]
    if not all(type(number) in (int, float) for number in numbers):
        raise UserError(
            f"{path}: not the plan of a run; move {path.parent} away to start a new run"
        )
    return plan


def write_plan(path: Path, plan: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write((json.dumps(plan, indent=1) + "\n").encode())


def describe_plan(plan: dict, path: Path) -> str:
    """One line: the numbers of updates of a shortened run. path: the file of the plan."""
    settings = " ".join(f"{name}={value}" for name, value in plan["settings"].items())
    return f"shortened to   {plan['minutes']:g} min: {settings} ({path})"
