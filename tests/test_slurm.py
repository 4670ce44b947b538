"""scripts/slurm on a real SLURM cluster of one node, which the tests start."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY, copy_of

from runtime import checkpoints

NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")
pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDED)) or os.geteuid() != 0,
        reason="needs root and Debian's slurm-wlm and munge: apt-get install slurm-wlm munge",
    ),
    pytest.mark.cluster,
    pytest.mark.xdist_group("processes"),
]

CONFIG = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
SelectType=select/cons_tres
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def slurm():
    """Environment variables with which sbatch finds a cluster of this test's own daemons."""
    # Not pytest's folder: a socket's path must be short, and its parent folders owned by root.
    dir = Path(tempfile.mkdtemp(prefix="slurm-"))
    dir.chmod(0o755)
    for name in ("state", "spool"):
        (dir / name).mkdir()
    (dir / "munge.key").write_bytes(os.urandom(128))
    (dir / "munge.key").chmod(0o600)
    (dir / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            port=free_port(),
            other=free_port(),
            dir=dir,
            cpus=os.cpu_count(),
        )
    )
    env = {**os.environ, "SLURM_CONF": str(dir / "slurm.conf")}
    files = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munged.seed",
    }
    munged = ["munged", "--force", *(f"--{option}={dir / name}" for option, name in files.items())]
    try:
        for daemon in (munged, ["slurmctld"], ["slurmd"]):
            subprocess.run(daemon, env=env, check=True)

        def is_idle() -> bool:
            command = ["sinfo", "-h"]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            return "idle" in done.stdout

        def logs() -> str:
            names = ("munged", "slurmctld", "slurmd")
            return "".join(text_of(dir / f"{name}.log")[-2000:] for name in names)

        wait_for(is_idle, logs)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, timeout=20)
        for name in ("slurmd", "slurmctld", "munged"):
            if (dir / f"{name}.pid").exists():
                os.kill(int((dir / f"{name}.pid").read_text()), signal.SIGTERM)
        shutil.rmtree(dir, ignore_errors=True)


@pytest.fixture
def folder(tiny_run, tmp_path) -> Path:
    """A folder like a user's clone: main.py, a virtual environment, and prepared data."""
    folder = copy_of(tiny_run[0], tmp_path / "clone")
    for script in ("main.py", "sample.py", "evaluate.py"):
        (folder / script).symlink_to(REPO / script)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(
        f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
    )
    return folder


def submit(folder: Path, slurm: dict, script: str, *flags: str, **settings: str) -> str:
    """Submit a script with sbatch, without its request for GPUs; return the job's number."""
    text = (REPO / "scripts/slurm" / script).read_text().replace("#SBATCH --gpus-per-task=1\n", "")
    (folder / script).write_text(text)
    done = subprocess.run(
        ["sbatch", "--parsable", "--cpus-per-task=1", *flags, script],
        cwd=folder,
        env={**slurm, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(done, what=lambda: "", seconds: float = 150):
    """Wait until done() is true; on a timeout fail with the message what()."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def wait_for_end(slurm: dict, job: str, log: Path) -> None:
    """Wait until all tasks of a job have ended; fail unless all have succeeded."""

    def states() -> list[str]:
        command = ["scontrol", "show", "job", job, "-o"]
        shown = subprocess.run(command, env=slurm, capture_output=True, text=True).stdout
        return [word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")]

    over = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
    wait_for(
        lambda: states() and set(states()) <= over, lambda: f"{states()} {text_of(log)[-1000:]}"
    )
    assert set(states()) == {"COMPLETED"}, text_of(log)[-2000:]


def text_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def test_a_preempted_job_is_requeued_and_finishes(folder, slurm):
    more = "train.schedule=constant train.steps=1300 train.save_every=100 train.keep=1000"
    settings = " ".join([*TINY, more, "output.run_id=run"])
    job = submit(folder, slurm, "train.sbatch", DATASET="ball_stn", SETTINGS=settings)
    dir, log = folder / "outputs/checkpoints/run", folder / f"slurm-driftcast-{job}.out"
    wait_for((dir / "step_00000200.pt").exists, lambda: text_of(log))
    # As SLURM does two minutes before the time limit.
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)
    wait_for(lambda: "stopped by SIGUSR1" in text_of(log), lambda: text_of(log))
    stopped = checkpoints.load_checkpoint(dir / "latest.pt")["step"]
    # The requeued job continues the training.
    wait_for(
        lambda: checkpoints.load_checkpoint(dir / "latest.pt")["step"] > stopped,
        lambda: text_of(log),
    )
    # As a preempting job does.
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    wait_for_end(slurm, job, log)
    assert checkpoints.load_checkpoint(dir / "latest.pt")["step"] == 1300
    assert text_of(log).count("crps / repeat last") == 1


def test_two_tasks_train_together(folder, slurm):
    job = submit(
        folder,
        slurm,
        "train.sbatch",
        "--ntasks-per-node=2",
        DATASET="ball_stn",
        SETTINGS=" ".join([*TINY, "output.run_id=two"]),
    )
    log = folder / f"slurm-driftcast-{job}.out"
    wait_for_end(slurm, job, log)
    assert text_of(log).count("crps / repeat last") == 1
    assert checkpoints.load_checkpoint(folder / "outputs/checkpoints/two/latest.pt")["step"] == 12


def test_an_array_over_interpolants_and_seeds_and_samples_from_it(folder, slurm):
    job = submit(
        folder,
        slurm,
        "array.sbatch",
        "--array=0-3",
        DATASET="ball_stn",
        INTERPOLANTS="linear follmer",
        SEEDS="0 1",
        SETTINGS=" ".join(TINY),
    )
    wait_for_end(slurm, job, folder / f"slurm-driftcast-array-{job}_0.out")
    runs = [
        folder / f"outputs/checkpoints/ball_stn-{name}-{seed}/latest.pt"
        for name in ("linear", "follmer")
        for seed in "01"
    ]
    weights = [checkpoints.load_checkpoint(path)["model"]["conv_in.weight"] for path in runs]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    job = submit(
        folder, slurm, "sample.sbatch", CKPT=str(runs[0]), FLAGS="--num_videos 1 --out mine"
    )
    wait_for_end(slurm, job, folder / f"slurm-driftcast-sample-{job}.out")
    assert (folder / "mine/forecasts.mp4").exists()


def test_several_tasks_evaluate_together(folder, slurm):
    job = submit(
        folder,
        slurm,
        "train.sbatch",
        DATASET="ball_stn",
        SETTINGS=" ".join([*TINY, "output.run_id=run"]),
    )
    wait_for_end(slurm, job, folder / f"slurm-driftcast-{job}.out")
    job = submit(
        folder,
        slurm,
        "evaluate.sbatch",
        "--ntasks=2",
        CKPT="outputs/checkpoints/run/latest.pt",
        FLAGS="--metrics mse crps --videos 20 --out judged",
    )
    log = folder / f"slurm-driftcast-evaluate-{job}.out"
    wait_for_end(slurm, job, log)
    assert text_of(log).count("protocol own-videos_20") == 2
    assert (folder / "judged/index.html").exists()
