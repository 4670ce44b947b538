"""Terminal output of commands: exceptions that print as one line, exit codes, progress bars."""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

STANDARD_OUTPUTS = (1, 2)  # file descriptors of stdout and stderr
SIGPIPE = 13  # the signal's number, which Windows does not define


class UserError(Exception):
    """A mistake of the user. The message is one line: what, where, what to do."""


class Failure(Exception):
    """A run-time error that no setting can fix, such as a full disk. The message is one line."""


class Stopped(BaseException):
    """A signal stopped the command, which resumes when it is run again. code: the exit code.

    A BaseException, as KeyboardInterrupt is, so that no `except Exception` swallows it.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known) -> str:
    """The end of an error message for an unknown name: the nearest known name, and all names."""
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
    """Convert to text, with escapes for the bytes of a file name that are not UTF-8."""
    return str(text).encode("utf8", "backslashreplace").decode()


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main() and exit the process. Errors print as one line on stderr.

    Exit codes: 2 for a mistake of the user, 1 for a failure, 130 for Ctrl-C, 75 (EX_TEMPFAIL: run
    the command again) after SIGTERM or SIGUSR1, and 141 if the reader of the output has closed its
    end, as in `command | head`.
    """
    # A file name that is not UTF-8 prints with escapes, as Python prints it on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = exit_code(main)
        finally:
            # At interpreter shutdown, a closed pipe would print a traceback.
            sys.stdout.flush()
    except BrokenPipeError:
        if not output_is_closed():
            # Another pipe, such as that of an encoder process, broke: keep the traceback.
            raise
        discard_output()
        code = 128 + SIGPIPE
    sys.exit(code)


def exit_code(main: Callable[[], int | None]) -> int:
    """Call main(). Print an error as one line on stderr. -> the exit code."""
    try:
        with stop_on_signals():
            return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except OSError as error:
        # The disk: full, over quota, failing or read-only.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            name = error.filename or "a file"
            print(f"error: {name} cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        # Without a file name the error is a bug: keep the traceback.
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------------------ signals
@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise Stopped inside the block, so that temporary files are removed.

    Only in the main thread, and only in the first of several processes: the others wait in
    collectives, which no Python handler interrupts, and must end at once.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if os.environ.get("RANK", "0") != "0" or not in_main_thread:
        yield
        return
    owner = os.getpid()

    def stop(number: int, _frame) -> None:
        # A forked worker inherits the handler, but has no temporary files to remove.
        if os.getpid() != owner:
            os._exit(128 + number)
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name}; run the same command again to resume", 75)

    before = {}
    for name in ("SIGTERM", "SIGUSR1"):
        # Windows has no SIGUSR1. A signal that the parent process ignores stays ignored.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------- closed outputs
def output_is_closed() -> bool:
    """Whether the reader of stdout or of stderr has closed its end of the pipe."""
    if not hasattr(select, "poll"):
        # Windows cannot tell: assume that it has.
        return True
    outputs = select.poll()
    for number in STANDARD_OUTPUTS:
        outputs.register(number, 0)
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def discard_output() -> None:
    """Send stdout and stderr to the null device, so that no later flush fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in STANDARD_OUTPUTS:
        os.dup2(null, number)
    os.close(null)
