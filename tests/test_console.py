"""What a command prints for an error, and its exit code."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO

from runtime.console import UserError, has_package, run_command
from runtime.folders import complete


def exit_code(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code


def test_a_user_error_prints_one_line_and_exits_with_2(capsys):
    def main():
        raise UserError("data/x: no such folder; choose another")

    assert exit_code(main) == 2
    assert capsys.readouterr().err == "error: data/x: no such folder; choose another\n"


def test_an_unusable_path_prints_one_line_and_exits_with_2(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert exit_code(lambda: (tmp_path / "file" / "below").mkdir()) == 2
    assert "file/below: Not a directory" in capsys.readouterr().err


def test_exit_codes_are_returned_and_bugs_keep_their_traceback():
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_folder_in_the_working_directory_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_log").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_package("json")
    assert not has_package("wandb_log")
    assert not has_package("no_such_package")


# ----------------------------------------------------------------------------------- closed outputs
def run_into_closed_pipe(*command: str, errors: bool = False) -> tuple[int, str]:
    """Run a command whose output nobody reads, as after the end of `| head`.

    errors: its error output goes into the same pipe. -> (exit code, error output)
    """
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPO,
            stdout=writing,
            stderr=writing if errors else subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        os.close(writing)
    try:
        err = process.communicate(timeout=120)[1] or ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, err


MAIN = """
import argparse, sys
from runtime.console import Failure, UserError, progress, run_command

def main():
    {body}

run_command(main)
"""


@pytest.mark.parametrize(
    "body",
    [
        "print('x' * 100_000)",
        # Written when the command ends, where Python's own message would be a traceback.
        "print('x')",
        "print('x'); return 1",
        "print('x'); raise UserError('wrong')",
    ],
)
def test_a_closed_output_ends_a_command_without_a_traceback(body):
    code, err = run_into_closed_pipe("-c", MAIN.format(body=body))
    assert code == 141 and "Traceback" not in err and "Exception ignored" not in err
    assert err in ("", "error: wrong\n")


@pytest.mark.parametrize(
    "body",
    [
        "raise UserError('wrong')",
        "raise Failure('full')",
        "raise KeyboardInterrupt",
        "[bar.update() for bar in [progress(9, 'encode', 'frame')] for _ in range(9)]",
        "argparse.ArgumentParser().parse_args(['--unknown'])",
    ],
)
def test_errors_that_nobody_reads(body):
    assert run_into_closed_pipe("-c", MAIN.format(body=body), errors=True)[0] in (2, 141)


@pytest.mark.parametrize(
    "command, code",
    [
        (("main.py", "--dry_run", "1"), 141),
        # argparse itself ignores the broken pipe.
        (("-m", "prepare.videos", "--help"), 0),
    ],
)
def test_real_commands_with_output_that_nobody_reads(command, code):
    assert run_into_closed_pipe(*command) == (code, "")


def test_another_broken_pipe_is_not_hidden(capsys):
    def main():
        reading, writing = os.pipe()
        os.close(reading)
        os.write(writing, b"x")

    with pytest.raises(BrokenPipeError):
        run_command(main)


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_outside_training_removes_temporary_files_and_requests_a_restart(
    tmp_path, capsys, number
):
    before = signal.getsignal(number)

    def main():
        with complete(tmp_path / "out") as partial:
            (partial / "file").touch()
            os.kill(os.getpid(), number)
            time.sleep(5)

    assert exit_code(main) == 75
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}; run the same command again to resume\n"
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) is before


def test_only_the_first_of_several_processes_handles_signals(monkeypatch):
    """The others may wait in a collective, which only the default action of a signal ends."""
    handlers = []

    def main():
        handlers.append(signal.getsignal(signal.SIGTERM))

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        exit_code(main)
    assert handlers[0] == signal.SIG_DFL and callable(handlers[1])
