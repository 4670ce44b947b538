"""The functions of conftest.py that run commands."""

import subprocess
import sys
import time

import pytest
from conftest import run_group

# A command that waits for its child. The child ignores SIGTERM and writes every 20 ms.
BEATING = """
import subprocess, sys
beat = "import signal, time\\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
beat += "while True:\\n    open('beats', 'a').write('.'); time.sleep(0.02)"
subprocess.run([sys.executable, "-c", beat])
"""


def test_a_command_that_takes_too_long_is_killed_with_its_descendants(tmp_path):
    beats = tmp_path / "beats"
    # On a slow machine the child may not have started after 2 seconds.
    for timeout in (2, 10, 50):
        with pytest.raises(subprocess.TimeoutExpired):
            run_group([sys.executable, "-c", BEATING], timeout=timeout, cwd=tmp_path)
        if beats.exists():
            break
    count = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == count


def test_output_and_exit_code_of_a_command_are_returned(tmp_path):
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = run_group([sys.executable, "-c", script], timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
