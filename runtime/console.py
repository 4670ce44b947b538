"""Terminal output of commands: exceptions that print as one line, exit codes, progress bars."""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import io
import os
import sys
from collections.abc import Callable

from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user. The message is one line: what, where, what to do."""


class Failure(Exception):
    """A run-time error that no setting can fix, such as a full disk. The message is one line."""


class Stopped(Exception):
    """A run was stopped by a signal and has saved its state. code: the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known) -> str:
    """The end of an error message for an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.0)
    return f"; nearest known: {close[0]} (all: {', '.join(known)})" if close else ""


def has_package(name: str) -> bool:
    """Whether a package is installed. A folder of its name in the working directory, such as
    wandb's log, does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


@functools.cache
def print_once(line: str) -> None:
    """Print a line; later calls with the same line print nothing."""
    print(line)


def progress(total: int, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A progress bar with rate and ETA on stderr.

    Updated five times a second on a terminal, every ten seconds in a log file. Disabled for a
    total of 0, and by the environment variable DRIFTCAST_QUIET=1.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=max(10.0, interval),
        smoothing=0.1,
        disable=not total or os.environ.get("DRIFTCAST_QUIET") == "1",
    )


def printable(text: object) -> str:
    """The text with escapes for the bytes of a file name that are not UTF-8."""
    return str(text).encode("utf8", "backslashreplace").decode()


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main() and exit the process. Errors print as one line on stderr.

    Exit codes: 2 for a mistake of the user, 1 for a failure, 130 for Ctrl-C, and 75 (EX_TEMPFAIL:
    run the command again) for a run stopped by SIGTERM or SIGUSR1.
    """
    # Names of files that are not UTF-8 print with escapes, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        code = stop.code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            name = error.filename or "a file"
            print(f"error: {name} cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(1)
        # Without a file name the error is a bug: keep the traceback.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        code = 130
    sys.exit(code)
