"""Training with several processes, on one node and on two: data, gradients, output of rank 0,
killed workers, shared GPUs."""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPO, TINY, copy_of, kill_group, launch, run_group

import configs
import train
from main import Clock, train_network
from runtime import checkpoints, parallel
from runtime.console import UserError
from runtime.process import Process, refuse_shared_gpus, start, use_new_prefix

# Run in sequence: two torchruns that start at the same time may choose the same port.
pytestmark = pytest.mark.xdist_group("processes")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SETTINGS = ["--set", *TINY, "train.schedule=constant", "train.precision=float32"]
# FSDP2 shards AdamW, not Muon, and does not go with own forecasts.
SETTINGS += ["train.optimizer=adamw", "train.lr=1e-3", "train.own=0"]
ENV = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory) -> Path:
    """A folder with data, VQVAE and latents."""
    return copy_of(tiny_run[0], tmp_path_factory.mktemp("several") / "run")


def state(folder: Path, name: str) -> dict:
    return checkpoints.load_checkpoint(folder / "outputs/checkpoints" / name / "latest.pt")


def same(a: dict, b: dict, part: str = "model", atol: float = 0.0) -> bool:
    return all(torch.allclose(a[part][name], b[part][name], rtol=0, atol=atol) for name in b[part])


def torchrun(folder: Path, *command: str, processes: int = 2) -> None:
    done = run_group(
        [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", *command],
        cwd=folder,
        env=ENV,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_compute_the_gradient_of_one_with_the_whole_batch(folder):
    one = [*SETTINGS, "train.steps=1", "sample.num_videos=1"]
    launch(folder, "main.py", *one, "output.run_id=one")
    torchrun(folder, str(REPO / "main.py"), *one, "output.run_id=two")
    moments = {name: first_moments(state(folder, name)) for name in ("one", "two")}
    # A first moment is a tenth of the clipped gradient, and the gradients should agree to 1e-6.
    assert max(moment.abs().max() for moment in moments["one"].values()) > 1e-4
    for k, moment in moments["one"].items():
        assert torch.allclose(moments["two"][k], moment, rtol=0, atol=1e-7)


OBJECTIVES = {
    # Two evaluations in a roll-out of two frames, with the two steps of TINY.
    "energy": ["flow.objective=energy", "flow.evaluations=2", "flow.unroll=2"],
    "shortcut": ["flow.objective=shortcut"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_alike_on_one_process_on_two_and_sharded(folder, name):
    one = [*SETTINGS, *OBJECTIVES[name], "sample.num_videos=1", "train.steps=1"]
    # Two of four items of each process train the consistency of steps.
    one += ["flow.consistency=2"]
    launch(folder, "main.py", *one, f"output.run_id={name}-one")
    for run, more in ((f"{name}-two", []), (f"{name}-sharded", ["train.shard=1"])):
        torchrun(folder, str(REPO / "main.py"), *one, *more, f"output.run_id={run}")
        moments = {key: first_moments(state(folder, key)) for key in (f"{name}-one", run)}
        assert max(moment.abs().max() for moment in moments[run].values()) > 1e-4
        for k, moment in moments[f"{name}-one"].items():
            assert torch.allclose(moments[run][k], moment, rtol=0, atol=1e-6), (run, k)


def first_moments(state: dict) -> dict:
    return {k: slot["exp_avg"] for k, slot in state["opt"]["state"].items()}


def distance(a: dict, b: dict) -> float:
    """The Euclidean distance between the weights of two states."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in b["model"].items():
        total += (a["model"][name].double() - value.double()).square().sum()
    return total.sqrt().item()


def test_sharded_weights_train_as_unsharded_ones_and_resume_without_shards(folder):
    steps = [
        *SETTINGS,
        "model.name=uvit",
        "model.dropout=0",
        "train.log_every=100",
        "sample.num_videos=1",
        "train.ema=0.5",
    ]
    sharded = [*steps, "output.run_id=sharded", "train.sample_every=2"]
    torchrun(folder, str(REPO / "main.py"), *sharded, "train.steps=3", "train.shard=1")
    launch(folder, "main.py", *steps, "train.steps=3", "output.run_id=unsharded")
    third = state(folder, "sharded")
    plain = state(folder, "unsharded")
    # Three updates change a weight by 3e-3 at most.
    assert all(same(third, plain, part, atol=2e-4) for part in ("model", "ema"))
    for a, b in zip(third["opt"]["state"].values(), plain["opt"]["state"].values(), strict=True):
        assert torch.allclose(a["exp_avg"], b["exp_avg"], rtol=0, atol=1e-5)
        assert a.keys() == b.keys()
    assert list((folder / "outputs/checkpoints/sharded").glob("forecasts_*2.png"))
    # One process resumes from the full tensors that two have written.
    launch(folder, "main.py", *sharded, "train.steps=6")
    more = ["train.steps=9", "train.shard=1", "train.accumulate=2"]
    torchrun(folder, str(REPO / "main.py"), *sharded, *more)
    launch(folder, "main.py", *steps, "train.steps=9", "output.run_id=unsharded")
    ninth = state(folder, "sharded")
    plain = state(folder, "unsharded")
    assert ninth["step"] == 9 and distance(ninth, plain) < 0.1 * distance(ninth, third)


POISON = """
import os, sys
sys.path.insert(0, {repo!r})
import main, train
import torch.distributed as dist
loss = train.flow_loss
calls = iter(range(1000))
def poisoned(*arguments):
    bad = next(calls) == 4 and os.environ["RANK"] == "1"
    return loss(*arguments) * (float("nan") if bad else 1.0)
train.flow_loss = poisoned
main.main()
# main.py disconnects at its end.
assert not dist.is_initialized()
"""


def test_all_processes_skip_an_update_that_is_bad_in_one(folder, tmp_path):
    script = tmp_path / "poison.py"
    script.write_text(POISON.format(repo=str(REPO)))
    torchrun(folder, str(script), *SETTINGS, "output.run_id=poisoned", "sample.num_videos=1")
    found = state(folder, "poisoned")
    assert {float(slot["step"]) for slot in found["opt"]["state"].values()} == {11}
    assert all(value.isfinite().all() for value in found["model"].values())


WAITING = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, {repo!r})
import torch, torch.distributed as dist
from runtime import process as processes
processes.STEP_TIMEOUT = timedelta(seconds=4)
process = processes.start()
found = Path({found!r})
for _ in range(2):
    # A stage takes longer than the timeout of a step.
    if process.first:
        time.sleep(6)
    assert process.agree("value of rank 0" if process.first else None) == "value of rank 0"
    process.barrier()
    # The default group still works.
    dist.all_reduce(torch.ones(3))
if process.first:
    # Rank 0 hangs until rank 1 has reported it.
    for _ in range(600):
        if found.exists():
            break
        time.sleep(0.1)
else:
    try:
        dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        found.write_text(str(error))
        # Threads of the operation that timed out can abort a normal exit of the interpreter.
        os._exit(0)
"""


def test_the_timeout_of_a_stage_is_long_and_that_of_a_gradient_short(tmp_path):
    found = tmp_path / "found"
    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(repo=str(REPO), found=str(found)))
    torchrun(tmp_path, str(script))
    assert "Timed out" in found.read_text()


def test_every_save_and_preview_is_followed_by_a_barrier(folder, monkeypatch):
    events = []
    save, score = checkpoints.save_checkpoint, train.score_preview
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Process, "barrier", lambda _: events.append("barrier"))

    def save_checkpoint(dir, *rest):
        save(dir, *rest)
        if "vqvae" not in dir.name:
            events.append("save")

    def score_preview(*frames):
        events.append("preview")
        return score(*frames)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train, "score_preview", score_preview)
    settings = [*TINY, "train.sample_every=4", "output.run_id=barriers"]
    config = configs.build(overrides=configs.parse_overrides(settings))
    train_network(config, start(), None, Clock())
    written = [k for k, event in enumerate(events) if event in ("preview", "save")]
    assert len(written) == 5
    assert all(events[k + 1] == "barrier" for k in written)


@contextmanager
def started(folder: Path, *command: str, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """Start a torchrun of two processes, and kill it when the block ends."""
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=2",
        f"--max-restarts={restarts}",
        str(REPO / "main.py"),
        *SETTINGS,
        "train.keep=1000",
        *command,
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=ENV,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # torchrun starts its workers in sessions of their own.
        for pid in workers(process):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kill_group(process)


def workers(process: subprocess.Popen) -> list[int]:
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def connect_to(agent: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("localhost", agent.port, is_master=False)


def test_restarted_processes_do_not_read_entries_of_dead_ones():
    agent = dist.TCPStore("localhost", 0, is_master=True)
    # Three attempts. In the second, rank 1 may see the `welcome` entry of the first.
    orders = ((0, 1, 2), (2, 1, 0), (1, 0, 2))
    with ThreadPoolExecutor(3) as pool:
        for order in orders:
            parts = []
            for rank in order:
                parts.append(pool.submit(use_new_prefix, connect_to(agent), rank, 3))
                time.sleep(0.1)
            parts = [part.result(timeout=20) for part in parts]
            assert not any(part.check(["address"]) for part in parts)
            parts[order.index(0)].set("address", "here")
            assert all(part.get("address") == b"here" for part in parts)


@pytest.mark.parametrize(
    "gpus, shared",
    [
        (("a, 1", "a, 2", "b, 1"), ""),
        (("a, 1", "b, 1", "a, 1"), "processes 0 and 2 share one GPU .a, 1."),
    ],
)
def test_processes_that_share_a_gpu_are_all_refused(gpus, shared):
    agent = dist.TCPStore("localhost", 0, is_master=True)
    with ThreadPoolExecutor(3) as pool:
        answers = []
        for rank, gpu in enumerate(gpus):
            answers.append(pool.submit(refuse_shared_gpus, connect_to(agent), rank, 3, gpu))
        for answer in answers:
            if shared:
                with pytest.raises(UserError, match=shared):
                    answer.result(timeout=20)
            else:
                answer.result(timeout=20)


@pytest.fixture
def first_of_two():
    """A process that believes to be one of two, in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Process(0, 2, torch.device("cpu"))
    dist.destroy_process_group()


def test_gradients_are_views_of_the_exchanged_buffer_and_equal_those_of_one_process(first_of_two):
    config = configs.build(overrides={"train.compile": "off"})
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    plain = copy.deepcopy(net)
    several = parallel.distribute(net, config, first_of_two)
    for _ in range(3):
        parts = torch.randn(2, 5, 3)
        for k, part in enumerate(parts, 1):
            with parallel.gradient_sync(several, k == len(parts)):
                several(part).square().mean().backward()
            plain(part).square().mean().backward()
        for own, other in zip(net.parameters(), plain.parameters()):
            assert torch.equal(own.grad, other.grad)
        assert len({p.grad.untyped_storage().data_ptr() for p in net.parameters()}) == 1
        for module in (net, plain):
            for weight in module.parameters():
                weight.data.sub_(weight.grad, alpha=0.1)
            module.zero_grad(set_to_none=True)


@needs_proc
def test_a_killed_worker_is_restarted_and_ends_with_the_same_weights(folder):
    more = ["train.steps=150", "train.save_every=20", "sample.num_videos=1"]
    torchrun(folder, str(REPO / "main.py"), *SETTINGS, *more, "output.run_id=whole")
    with started(folder, *more, "output.run_id=killed", restarts=2) as process:
        wait_for(folder / "outputs/checkpoints/killed/step_00000040.pt", process)
        os.kill(next(pid for pid in workers(process) if is_rank_1(pid)), signal.SIGKILL)
        err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err[-3000:]
    killed = state(folder, "killed")
    whole = state(folder, "whole")
    assert killed["step"] == 150
    assert same(killed, whole) and same(killed, whole, "ema")


def is_rank_1(pid: int) -> bool:
    return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_two_nodes_train_as_two_processes_on_one(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    one_node = ["--standalone", "--nproc_per_node=2"]
    node_of_two = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        "--rdzv_id=7",
        "--local-addr=localhost",
    ]
    for name, flags, nodes in (("processes", one_node, 1), ("nodes", node_of_two, 2)):
        settings = [*SETTINGS, f"output.run_id={name}", "sample.num_videos=1"]
        command = [*TORCHRUN, *flags, str(REPO / "main.py"), *settings]
        with ThreadPoolExecutor(nodes) as pool:
            agents = [
                pool.submit(run_group, command, 200, cwd=folder, env=ENV) for _ in range(nodes)
            ]
        done = [agent.result() for agent in agents]
        assert all(agent.returncode == 0 for agent in done), done
        # Rank 0 alone prints the results.
        assert "".join(agent.stdout for agent in done).count("crps / repeat last") == 1
    assert same(state(folder, "nodes"), state(folder, "processes"))
    # One process resumes alone.
    more = ["train.steps=15", "output.run_id=nodes", "sample.num_videos=1"]
    launch(folder, "main.py", *SETTINGS, *more)
    assert state(folder, "nodes")["step"] == 15


@needs_proc
def test_a_signal_to_one_process_stops_both(folder):
    more = ["train.steps=100000", "output.run_id=long", "data.hue=0.1", "data.workers=1"]
    with started(folder, *more) as process:
        wait_for(folder / "outputs/checkpoints/long/step_00000015.pt", process)
        # The signal goes to one of the two processes.
        os.kill(workers(process)[1], signal.SIGUSR1)
        err = process.communicate(timeout=100)[1]
    step = state(folder, "long")["step"]
    assert process.returncode != 0, err[-3000:]
    message = f"stopped by SIGUSR1 after update {step}, which is saved"
    assert err.count(message) >= 2, err[-3000:]
