"""Checkpoints that survive, seeds, the log, schedules."""

import json
import os
import socket
import subprocess
import threading
import types
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import REPO

import configs
from runtime import checkpoints, logs, process
from runtime.console import Failure, UserError
from runtime.process import autocast, connect, learning_rate, numpy_generator, seed_of, start


def state(step):
    return {"step": step, "model": {"w": torch.full((3,), float(step))}}


def test_checkpoints_are_kept_pruned_and_resumed(tmp_path):
    for step in (5, 10, 15):
        checkpoints.save_checkpoint(tmp_path, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest.pt",
        "step_00000010.pt",
        "step_00000015.pt",
    ]
    assert checkpoints.load_latest(tmp_path)["step"] == 15
    assert checkpoints.load_latest(tmp_path / "new") is None


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    for step in (5, 10):
        checkpoints.save_checkpoint(tmp_path, state(step), keep=2)
    newest = tmp_path / "step_00000010.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])  # latest.pt is the same file
    with pytest.warns(UserWarning, match="latest.pt.*trying the one before"):
        assert checkpoints.load_latest(tmp_path)["step"] == 5


def test_all_checkpoints_damaged_is_an_error_not_a_new_start(tmp_path):
    checkpoints.save_checkpoint(tmp_path, state(5), keep=2)
    (tmp_path / "step_00000005.pt").write_bytes(b"damaged")
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match="none of its 2 checkpoints can be read"),
    ):
        checkpoints.load_latest(tmp_path)


def test_a_save_that_dies_half_way_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoints.save_checkpoint(tmp_path, state(5), keep=2)

    def die(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", die)
    message = (
        r"step_00000010.pt: cannot be written \(no space .* last good checkpoint is .*00005.pt"
    )
    with pytest.raises(Failure, match=message):
        checkpoints.save_checkpoint(tmp_path, state(10), keep=2)
    assert checkpoints.load_latest(tmp_path)["step"] == 5
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["latest.pt", "step_00000005.pt"]


def test_latest_is_a_copy_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (5, 10):
        checkpoints.save_checkpoint(tmp_path, state(step), keep=1)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["latest.pt", "step_00000010.pt"]
    assert checkpoints.load_checkpoint(tmp_path / "latest.pt")["step"] == 10


def test_weights_must_fit_in_full():
    module = torch.nn.Linear(2, 3)
    checkpoints.load_weights(module, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "f.pt")
    assert (module.weight == 1).all()
    for weights, message in (
        ({"weight": torch.ones(3, 2)}, "bias is missing"),
        ({**module.state_dict(), "x": torch.ones(1)}, "x is unknown"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, r"weight is \(2, 2\), not \(3, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.load_weights(module, weights, "f.pt")


def test_seeds_depend_on_every_part_of_the_key():
    keys = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1"), (0, "a", 1, 0)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert numpy_generator(3, "x").integers(1 << 60) == numpy_generator(3, "x").integers(1 << 60)


def test_log_drops_rows_that_will_be_done_again_and_a_line_cut_short(tmp_path):
    config = configs.build(overrides={"wandb.mode": "disabled"})
    log = logs.Log(tmp_path, config, 0)
    for step in (10, 20, 30):
        log.row(step, loss=step / 10)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 35, "lo')
    log = logs.Log(tmp_path, config, 20)
    log.row(30, loss=9.0)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 9.0)]


def test_learning_rate_starts_above_zero_peaks_after_warmup_and_ends_near_zero():
    rate = [learning_rate(k, 2.0, 100, 10) for k in range(100)]
    assert rate[0] == 0.2 and rate[9] == rate[10] == 2.0 and rate[99] < 0.002
    assert learning_rate(99, 2.0, 100, 10, "constant") == 2.0
    assert learning_rate(0, 2.0, 100, 0) == 2.0


# -------------------------------------------------------------------- wandb
@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path):
    """wandb finds no mode, key or server in the environment or the home folder."""
    wandb = pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    logs.report_no_server.cache_clear()
    # wandb reads the environment once in a process.
    wandb.teardown()
    yield tmp_path
    wandb.teardown()
    logs.report_no_server.cache_clear()


def test_wandb_is_online_with_a_key_only(no_wandb_settings, monkeypatch):
    assert logs.wandb_mode("auto") == "offline" and logs.wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert logs.wandb_mode("auto") == logs.wandb_mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert logs.wandb_mode("auto") == "offline" and logs.wandb_mode("online") == "online"


def test_wandb_finds_the_key_of_its_server_in_netrc(no_wandb_settings, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    netrc = no_wandb_settings / "netrc"
    netrc.write_text("machine elsewhere login user password key")
    netrc.chmod(0o600)
    assert logs.wandb_mode("auto") == "offline"
    netrc.write_text("machine 127.0.0.1:9 login user password key")
    assert logs.wandb_mode("auto") == "online"


@pytest.mark.parametrize(
    "mode, variable, message",
    [
        ("auto", "online_typo", "WANDB_MODE=online_typo: .* nearest known: online"),
        ("offline", "of", "WANDB_MODE=of: wandb has no such mode"),
        ("auto", "Offline", "WANDB_MODE=Offline: .* nearest known: offline"),
        ("online", "", "wandb.mode=online, but wandb has no API key: .*wandb.mode=offline"),
        ("auto", "online", "WANDB_MODE=online, but wandb has no API key"),
        ("auto", "run", "WANDB_MODE=run, but wandb has no API key"),
        ("auto", "shared", "WANDB_MODE=shared, but wandb has no API key"),
    ],
)
def test_a_wandb_mode_that_cannot_work_is_one_line(
    no_wandb_settings, monkeypatch, mode, variable, message
):
    monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.raises(UserError, match=message) as caught:
        logs.wandb_mode(mode)
    assert "\n" not in str(caught.value)


def test_older_names_of_wandb_modes(no_wandb_settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert logs.wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "run")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert logs.wandb_mode("auto") == "online"


def test_a_bad_wandb_address_is_one_line(no_wandb_settings, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "not an address")
    with pytest.raises(UserError, match="wandb's settings: base_url") as caught:
        logs.wandb_mode("auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("server", ["closed", "silent", "refuses", "garbage"])
def test_wandb_without_a_way_out_logs_offline_with_one_line(
    no_wandb_settings, monkeypatch, capfd, server
):
    """closed: nothing listens. silent: nothing answers. Otherwise: HTTP 401, or no JSON."""
    monkeypatch.setattr(logs, "INIT_TIMEOUT", 3)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    root = no_wandb_settings
    config = configs.build(overrides={"output.root": str(root), "wandb.mode": "online"})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        answer = {"refuses": b"401 Unauthorized", "garbage": b"200 OK"}.get(server)
        if server == "closed":
            listening.close()
        if answer:
            arguments = (listening, answer)
            threading.Thread(target=answer_requests, args=arguments, daemon=True).start()
        for name in ("a", "b"):
            # The second run of this process does not try the server again.
            log = logs.Log(root / name, config, 0)
            assert log.run.settings.mode == "offline"
            log.row(1, loss=1.0)
            log.close()
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("wandb: ") and "logging offline" in printed
    assert len(list((root / "wandb").glob("offline-run-*"))) == 2


def answer_requests(listening: socket.socket, status: bytes) -> None:
    """Answer every HTTP request with a page that is no JSON, until the socket is closed."""
    page = b"<html></html>"
    length = str(len(page)).encode()
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: " + length + b"\r\n\r\n"
    while True:
        try:
            connection = listening.accept()[0]
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(head + page)


def test_bf16_only_where_chosen_or_fast():
    cpu = torch.device("cpu")
    with autocast("bf16", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("float32", cpu):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


class Gpus:
    """A stand-in for torch.cuda on a machine where this process sees `visible` GPUs."""

    def __init__(self, visible):
        self.visible = visible
        self.used = None

    def is_available(self):
        return True

    def device_count(self):
        return self.visible

    def set_device(self, device):
        self.used = device

    def get_device_properties(self, device):
        return types.SimpleNamespace(uuid=f"uuid-{device.index}")


@pytest.fixture
def several_gpus(monkeypatch):
    """several_gpus(local, visible) -> (the Process of start() as one of four, what it called)"""
    connect.cache_clear()
    calls = {}

    class Store(dist.HashStore):
        def set_timeout(self, timeout):
            calls["store"] = timeout
            super().set_timeout(timeout)

    def begin(local, visible):
        gpus = Gpus(visible)
        store = Store()
        for name, value in (("LOCAL_RANK", local), ("RANK", local), ("WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch, "cuda", gpus)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, local, 4)]))
        monkeypatch.setattr(process, "use_new_prefix", lambda store, *_: store)
        monkeypatch.setattr(
            process, "refuse_shared_gpus", lambda *asked: calls.update(gpu=asked[-1])
        )
        monkeypatch.setattr(
            dist, "init_process_group", lambda *a, **named: calls.update(default=(*a, named))
        )
        monkeypatch.setattr(dist, "new_group", lambda **named: calls.update(stages=named))
        own = start()
        assert gpus.used == own.device
        return own, calls

    yield begin
    connect.cache_clear()


def test_nccl_connects_at_once_and_stages_have_a_longer_timeout(several_gpus):
    process, calls = several_gpus(3, 4)
    backend, named = calls["default"]
    assert (backend, named["device_id"]) == ("nccl", torch.device("cuda", 3))
    assert process.device == torch.device("cuda", 3)
    assert named["timeout"] == calls["store"] == timedelta(minutes=30)
    assert calls["stages"] == {"backend": "gloo", "timeout": timedelta(days=1)}
    assert calls["gpu"].endswith("uuid-3")


def test_a_process_that_sees_one_gpu_uses_that_one(several_gpus):
    process, calls = several_gpus(3, 1)
    assert process.device == calls["default"][1]["device_id"] == torch.device("cuda", 0)


def test_more_processes_than_gpus_are_refused(several_gpus):
    with pytest.raises(UserError, match="process 2 .* has no GPU of its own, there are 2"):
        several_gpus(2, 2)


@pytest.mark.parametrize("script", ["array", "evaluate", "sample", "train"])
def test_slurm_jobs_keep_what_was_compiled_among_the_outputs(tmp_path, script):
    stubs = {
        ".venv/bin/activate": "",
        "bin/scontrol": "echo host",
        "bin/srun": 'echo "$TORCHINDUCTOR_CACHE_DIR"',
    }
    for name, text in stubs.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "CKPT": "latest.pt",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "host",
        "SLURM_ARRAY_TASK_ID": "0",
    }
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = ["bash", str(REPO / f"scripts/slurm/{script}.sbatch")]
    options = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run(command, cwd=tmp_path, env=env, **options)
    user = subprocess.run(["id", "-un"], **options).stdout.strip()
    assert done.stdout.strip() == str(tmp_path / "outputs/inductor" / user)
