"""What a command says to the person at the terminal: progress bars, and one clear line for a mistake."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import sys
from typing import Callable

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what to do."""


class Failure(Exception):
    """What went wrong at run time and no other setting would mend, a full disk say; told in one line like a UserError."""


class Stopped(Exception):
    """A run that a signal asked to stop has saved and stops. code: what the command exits with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1, cutoff=0.0)
    return f"; nearest known: {close[0]} (all: {', '.join(known)})" if close else ""


@functools.cache
def print_once(line: str) -> None:
    """Print a line the first time that this process has it to say."""
    print(line)


def progress(total: int, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A bar with rate and ETA on stderr; where that is a log file, a line every ten seconds instead of ten a second."""
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


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main() and leave the process: 2 and one line for a user's mistake, 1 for a failure, 130 for Ctrl-C,
    75 (EX_TEMPFAIL: run it again) for a run that was told to stop by SIGTERM or SIGUSR1."""
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
            print(
                f"error: {error.filename or 'a file'} cannot be written: {error.strerror}",
                file=sys.stderr,
            )
            sys.exit(1)
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        code = 130
    sys.exit(code)
