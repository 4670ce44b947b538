"""Runs the steps of a group one after the other and records each as a JSON line.

Nothing here needs torch: the command that starts the groups reads and writes the same file.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ERROR_CHARACTERS = 600


class LeftOut(Exception):
    """Raised by a step that this machine cannot run; the message is the reason."""


class Failed(AssertionError):
    """A step that fails, with the values that were measured before."""

    def __init__(self, message: str, values: dict | None = None):
        super().__init__(message)
        self.values = values


def require(condition: bool, message: str, values: dict | None = None) -> None:
    """Fail the step, with `message`, unless the condition holds; record `values` in either case."""
    if not condition:
        raise Failed(message, values)


class Steps:
    """Runs and records the steps of one group.

    file: JSON lines, appended. deadline: of time.time(), when the group will be stopped.
    A row has `group`, `step`, `state` (began, passed, failed or left out), `seconds`, `reason`
    (of the last two states) and `values` (of steps that passed, and of some that failed).
    """

    def __init__(self, group: str, file: Path, deadline: float = float("inf")):
        self.group = group
        self.file = file
        self.deadline = deadline

    def left(self) -> float:
        """Seconds until the group will be stopped."""
        return self.deadline - time.time()

    def run(self, name: str, function: Callable[..., dict], *args, needs: float = 0) -> dict | None:
        """Run function(*args), record the values that it returns, and return them.

        A failure is recorded and None is returned, so that the next step runs. needs: seconds; with
        less time left the step is left out.
        """
        if self.left() < needs:
            reason = f"{self.left():.0f} s left of the group's time, {needs:.0f} s needed"
            self.record(name, "left out", reason=reason)
            return None
        # This row stays the last one of the step if the process is stopped within it.
        self.record(name, "began")
        began = time.perf_counter()
        try:
            values = function(*args)
        except LeftOut as error:
            self.record(name, "left out", reason=str(error))
            return None
        except Exception as error:
            traceback.print_exc()
            row = {"seconds": time.perf_counter() - began, "reason": describe_error(error)}
            if isinstance(error, Failed) and error.values:
                row["values"] = error.values
            self.record(name, "failed", **row)
            return None
        self.record(name, "passed", seconds=time.perf_counter() - began, values=values)
        return values

    def record(self, name: str, state: str, **more) -> None:
        row = {"group": self.group, "step": name, "state": state, **more}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        if state != "began":
            print(f"[{self.group}] {name}: {state}", describe(row), flush=True)


def describe_error(error: Exception) -> str:
    """The error's message on one line, shortened; with its type unless a step checked for it."""
    message = " ".join(str(error).split())
    if not isinstance(error, Failed):
        message = f"{type(error).__name__}: {message}"
    return message[:ERROR_CHARACTERS]


def describe(row: dict) -> str:
    """The values of a row, or the reason why it has none, on one line."""
    if "reason" in row:
        return row["reason"]
    values = row.get("values", {})
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def show(value) -> str:
    """A value for a person: numbers with four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def read(file: Path) -> list[dict]:
    """The last row of each step, in the order in which the steps began."""
    if not file.exists():
        return []
    rows: dict[tuple[str, str], dict] = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # The process was stopped while it wrote this line.
            continue
        rows[row["group"], row["step"]] = row
    return list(rows.values())
