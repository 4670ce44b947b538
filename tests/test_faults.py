"""Bad input: one line, and nothing is written. Faults of a run: signals, a full disk, gradients
that are not finite."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import REPO, TINY, copy_of, launch

import configs
import main
import train
from batches.frames import FrameTriples
from main import Clock, check_before_work, train_network
from runtime import checkpoints, logs
from runtime.console import Failure, UserError
from runtime.process import Process, StopSignals, start
from shards import Shards, ShardWriter, write_packed

RUN = "outputs/checkpoints/ball_stn-follmer-0"
CKPT = ["--ckpt", f"{RUN}/latest.pt"]


def frames(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, size, size, 3), dtype=np.uint8)


# -------------------------------------------------------------------- settings and files
@pytest.mark.parametrize(
    "arguments, messages",
    [
        (
            ["--dataset", "kth"],
            [
                "data/kth/train/shard_*.hdf5",
                "prepare.kth",
                "weights/river_kth_64/vqvae.ckpt",
                "hf download",
            ],
        ),
        (
            ["--dataset", "clevrer"],
            [
                "data/clevrer/train/shard_*.hdf5",
                "prepare.clevrer",
                "weights/river_clevrer_128/vqvae.pth",
            ],
        ),
        (
            ["--dataset", "videos", "--set", "data.root=nowhere"],
            ["nowhere/train/shard_*.hdf5", "--out nowhere"],
        ),
        (["--dataset", "mnist"], ["no dataset `mnist`"]),
        (["--interpolant", "follner"], ["no interpolant `follner`; nearest known: follmer"]),
        (["--ckpt", "nowhere.pt"], ["nowhere.pt: no such checkpoint"]),
        (
            ["--set", "sample.solver=em", "sample.diffusion=0"],
            ["sample.solver em solves an SDE", "euler"],
        ),
        (["--set", "sample.solver=dopri5", "sample.redraw=step"], ["sample.redraw=frame"]),
        (["--set", "train.step=5"], ["no field `train.step`; nearest known: train.steps"]),
        (["--set", "train.steps=ten"], ["train.steps takes int, got 'ten'"]),
        (["--set", "train.steps=0"], ["train.steps must be >= 1 for data.mode=clips, got 0"]),
        (["--set", "train.lr=nan"], ["train.lr must be in (0, 1), got nan"]),
        (["--set", "train.steps"], ["--set takes group.field=value"]),
        (["--set", "flow.s_min=0.5"], ["flow.s_min must be in [0, 0.5)"]),
        (["--set", "data.context=recent:0"], ["data.context must be uniform, log, last, recent:N"]),
        (["--set", "sample.grid=power:-1"], ["grid must be uniform, cosine or power:P"]),
        (["--set", "model.name=vit"], ["model.name must be convnet, joint, trunk, unet or uvit"]),
        (["--set", "model.width=20"], ["model.width must be a multiple of 8"]),
        (["--set", "vqvae.kind=vqgan"], ["vqvae.kind must be small, taming_f8_small"]),
        (["--set", "vqvae.ckpt=mine.pt"], ["no VQVAE weights mine.pt"]),
        (["--set", "output.root=/dev/null/x"], ["/dev/null"]),
    ],
)
def test_mistakes_with_main_are_one_line_and_code_2_and_nothing_is_written(
    tmp_path, command, arguments, messages
):
    code, err = command(tmp_path, "main.py", *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    for message in messages:
        assert message in err
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_a_launched_command(tmp_path):
    done = launch(tmp_path, "main.py", "--dataset", "kth", check=False)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "no shards data/kth" in done.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ckpt", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
        ([*CKPT, "--split", "dev"], "sample.split must be train, val or test"),
        ([*CKPT, "--solver", "euler", "--diffusion", "sigma"], "euler"),
        ([*CKPT, "--num_frames", "5000"], "the longest video has 200 frames"),
        ([*CKPT, "--set", "data.root=elsewhere"], "no shards in elsewhere"),
        ([*CKPT, "--set", "flow.interpolant=linear"], "cannot be changed when sampling"),
        ([*CKPT, "--out", "data"], "exists and holds files that are not results"),
        ([*CKPT, "--dataset", "kth"], "was trained with --dataset ball_stn, not with kth"),
        (
            [*CKPT, "--interpolant", "linear"],
            "was trained with --interpolant follmer, not with linear",
        ),
        ([*CKPT, "--steps", "0"], "sample.steps must be >= 1"),
        ([*CKPT, "--num_videos", "-1"], "sample.num_videos must be >= 1"),
        ([*CKPT, "--format", "avi"], "sample.format must be mp4 or gif"),
        (
            [*CKPT, "--set", "data.image_size=64"],
            "frames of 32x32 pixels, but data.image_size is 64",
        ),
        (
            ["--ckpt", "data/ball_stn/test/shard_0001.hdf5"],
            "not a checkpoint that can be loaded safely",
        ),
        (["--ckpt", "VQVAE"], "not a checkpoint of main.py (it lacks ema)"),
    ],
)
def test_mistakes_with_sample_are_one_line_and_code_2(tiny_run, command, arguments, message):
    folder, _ = tiny_run
    vqvae = str(next((folder / "outputs/checkpoints").glob("vqvae-*/latest.pt")))
    before = sorted(folder.rglob("*"))
    code, err = command(
        folder, "sample.py", *(vqvae if word == "VQVAE" else word for word in arguments)
    )
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: "), err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "changed, message",
    [
        ("data.stream=700", "holds 600 frames (bouncing balls), but"),
        ("data.color_shift=1", "turning blue); change these settings"),
        ("data.clip=700", "the longest video has 600 frames, data.clip needs 700"),
        (
            "data.predict=300",
            "the longest video has 200 frames, data.condition + data.predict needs 304",
        ),
        ("data.image_size=64", "frames of 32x32 pixels, but data.image_size is 64"),
    ],
)
def test_data_that_does_not_fit_is_reported_before_any_training(
    tiny_run, command, changed, message
):
    folder, _ = tiny_run
    before = sorted((folder / "outputs/checkpoints").iterdir())
    code, err = command(folder, "main.py", "--set", *TINY, changed, "output.run_id=new")
    assert code == 2 and message in err and err.count("\n") == 1
    assert sorted((folder / "outputs/checkpoints").iterdir()) == before


def external(path):
    with h5py.File(path.with_name("secret.h5"), "w") as file:
        file["frames"] = frames(40)
    with h5py.File(path, "w") as file:
        file["frames"], file["lengths"] = (
            h5py.ExternalLink(str(path.with_name("secret.h5")), "frames"),
            [40],
        )


def external_river(path):
    external(path)
    with h5py.File(path, "w") as file:
        file["len/0"] = 40
        for t in range(40):
            file[f"0/{t}"] = (
                h5py.ExternalLink(str(path.with_name("secret.h5")), "frames")
                if t == 7
                else frames(1)[0]
            )


def raw_storage(path):
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "frames", (40, 32, 32, 3), "u1", external=[("/etc/passwd", 0, 40 * 3072)]
        )
        file["lengths"] = [40]


def absurd(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", (10**12, 32, 32, 3), "u1", chunks=(1, 32, 32, 3))
        file["lengths"] = [10**12]


def absurd_river(path):
    with h5py.File(path, "w") as file:
        file["len/0"] = 10**12
        file["0/0"] = frames(1)[0]


def absurd_lengths(path):
    with h5py.File(path, "w") as file:
        file["frames"] = frames(2)
        file.create_dataset("lengths", (10**13,), "i8", chunks=(1,))


def absurd_number(path):
    with h5py.File(path, "w") as file:
        file["len/0"] = np.uint64(2**63)
        file["0/0"] = frames(1)[0]


def truncated(path):
    write_packed(path, "frames", frames(40), [40], {})
    path.write_bytes(path.read_bytes()[:5000])


def no_length(path):
    with h5py.File(path, "w") as file:
        file["frames"] = frames(40)


@pytest.mark.parametrize(
    "make, message",
    [
        (external, "links to another file"),
        (external_river, "links to another file"),
        (raw_storage, "links to another file"),
        (absurd_lengths, "declares"),
        (absurd_number, "not a whole shard"),
        (absurd, "declares 3,072,000,000,000,000 bytes"),
        (absurd_river, "not a whole shard"),
        (truncated, "not a readable HDF5 file"),
        (no_length, "holds neither `frames` with `lengths`"),
        (lambda path: path.write_text("frames"), "not a readable HDF5 file"),
        (lambda path: path.touch(), "not a readable HDF5 file"),
        (
            lambda path: write_packed(path, "frames", frames(40), [20, 21], {}),
            "`lengths` add up to 41 frames but",
        ),
        (lambda path: write_packed(path, "frames", frames(40), [45, -5], {}), "an empty video"),
        (
            lambda path: write_packed(path, "frames", frames(40)[..., 0], [40], {}),
            "frames of (32, 32) uint8, not",
        ),
        (
            lambda path: write_packed(path, "frames", frames(40) / 255, [40], {}),
            "float64, not (height, width, 3) uint8",
        ),
        (
            lambda path: write_packed(path, "frames", frames(40, 16), [40], {}),
            "frames of 16x16 pixels, but data.image_size is 32",
        ),
        (lambda path: write_packed(path, "frames", frames(40) * 0, [40], {}), "stand still"),
    ],
)
def test_bad_shards_are_one_line_and_code_2(tmp_path, command, make, message):
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
    write_packed(tmp_path / "d/test/shard_0001.hdf5", "frames", frames(40), [40], {})
    make(tmp_path / "d/train/shard_0001.hdf5")
    code, err = command(
        tmp_path,
        "main.py",
        "--dataset",
        "videos",
        "--set",
        *TINY,
        "data.root=d",
        "data.image_size=32",
        "vqvae.steps=1",
    )
    assert code == 2 and message in err and err.splitlines()[-1].startswith("error: "), err
    # Videos that stand still are detected in the latents only.
    if message != "stand still":
        lines = [line for line in err.splitlines() if not line.startswith("expected time")]
        assert len(lines) == 1
        assert sorted(p.name for p in (tmp_path / "outputs").rglob("*")) == [".lock"]


def test_a_damaged_frame_read_by_a_worker_is_one_line_too(tmp_path, command):
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        with h5py.File(tmp_path / "d" / split / "shard_0001.hdf5", "w") as file:
            file["len/0"] = 40
            for t, frame in enumerate(frames(40)):
                file.create_dataset(f"0/{t}", data=frame // 64, compression="gzip")
    with h5py.File(tmp_path / "d/train/shard_0001.hdf5") as file:
        places = [file[f"0/{t}"].id.get_chunk_info(0) for t in range(1, 40)]
    with open(tmp_path / "d/train/shard_0001.hdf5", "r+b") as raw:
        for place in places:
            raw.seek(place.byte_offset)
            raw.write(bytes(place.size))
    config = configs.build(
        "videos",
        configs.parse_overrides(
            [
                *TINY,
                "data.image_size=32",
                f"data.root={tmp_path / 'd'}",
                "data.hue=0.1",
                "data.workers=1",
            ]
        ),
    )
    source = FrameTriples(config, Shards(tmp_path / "d/train")).batches(
        0, 2, lambda x: x, torch.device("cpu")
    )
    with pytest.raises(
        UserError, match="shard_0001.hdf5: damaged, frames cannot be read"
    ) as caught:
        next(source)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- what a run finds on resuming
@pytest.fixture
def copy(tiny_run, tmp_path):
    """A copy of a finished tiny run, which a test may damage."""
    return copy_of(tiny_run[0], tmp_path / "copy", "ball_stn-follmer-0")


def change(path, **values):
    torch.save({**checkpoints.load_checkpoint(path), **values}, path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda run: [p.write_text("not a checkpoint") for p in run.glob("*.pt")],
            "none of its 3 checkpoints can be read",
        ),
        (
            lambda run: [
                change(
                    p,
                    config={
                        **checkpoints.load_checkpoint(p)["config"],
                        "extra": 1,
                        "train": {"momentum": 1},
                    },
                )
                for p in run.glob("*.pt")
            ],
            "train.momentum, which this version does not know",
        ),
        (lambda run: change(run / "latest.pt", model={}), "not weights of this architecture"),
    ],
)
def test_damaged_checkpoints_are_reported(copy, command, spoil, message):
    spoil(copy / RUN)
    before = {path: path.read_bytes() for path in (copy / RUN).glob("*.pt")}
    code, err = command(copy, "main.py", "--set", *TINY, "train.steps=15")
    assert (
        code == 2 and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    ), err
    assert {path: path.read_bytes() for path in (copy / RUN).glob("*.pt")} == before


def test_latents_that_are_not_finite_are_reported(copy, command):
    path = next((copy / "outputs/latents").rglob("train/shard_0001.hdf5"))
    with h5py.File(path, "r+") as file:
        file["latents"][30] = np.nan
    code, err = command(copy, "main.py", "--set", *TINY, "output.run_id=new")
    assert (
        code == 2
        and "shard_0001.hdf5: latents that are not finite, from frame 0 on" in err.splitlines()[-1]
    )


def test_latents_of_another_autoencoder_are_not_reused(copy, command):
    for path in (copy / RUN).glob("*.pt"):
        state = checkpoints.load_checkpoint(path)
        state["config"]["latent"]["vqvae"] = "another"
        torch.save(state, path)
    code, err = command(copy, "main.py", "--set", *TINY, "train.steps=15")
    assert code == 2 and "was trained on the latents of another VQVAE" in err.splitlines()[-1]


def test_a_batch_that_processes_cannot_share_is_reported(tmp_path):
    config = configs.build(overrides={"train.batch_size": 8})
    with pytest.raises(
        UserError, match="train.batch_size = 8 cannot be divided evenly among 3 processes"
    ):
        check_before_work(config, tmp_path, Process(0, 3, torch.device("cpu")), None)


# -------------------------------------------------------------------- a full disk
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(copy):
    more = ["--set", *TINY, "train.steps=25", "train.schedule=constant", "output.run_id=full"]
    dir = copy / "outputs/checkpoints/full"
    dir.mkdir()
    (dir / ".step_00000015.pt.tmp").symlink_to("/dev/full")
    done = launch(copy, "main.py", *more, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: outputs/checkpoints/full/step_00000015.pt"
    )
    assert "the last good checkpoint is outputs/checkpoints/full/step_00000010.pt" in done.stderr
    assert checkpoints.load_checkpoint(dir / "latest.pt")["step"] == 10 and not list(dir.glob(".*"))
    launch(copy, "main.py", *more)
    assert checkpoints.load_checkpoint(dir / "latest.pt")["step"] == 25


# -------------------------------------------------------------------- signals
@pytest.mark.parametrize(
    "name, code, more",
    [
        ("SIGTERM", 75, []),
        ("SIGUSR1", 75, []),
        ("SIGINT", 130, []),
        ("SIGTERM", 75, ["data.hue=0.1", "data.workers=2"]),
    ],
)
def test_a_signal_ends_the_run_after_its_step(copy, name, code, more):
    """Send a signal to the process group, as torchrun, timeout and terminals do."""
    long = [
        "--set",
        *TINY,
        "train.steps=100000",
        "train.schedule=constant",
        "output.run_id=long",
        "train.save_every=7",
        "train.keep=1000",
        *more,
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, str(REPO / "main.py"), *long],
        cwd=copy,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    dir, deadline = copy / "outputs/checkpoints/long", time.monotonic() + 60
    try:
        while not (dir / "step_00000007.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, getattr(signal, name))
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    step = checkpoints.load_checkpoint(dir / "latest.pt")["step"]
    assert process.returncode == code, err
    assert f"stopped by {name} after update {step}, which is saved in" in err.splitlines()[-1]


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(Process(0, 1, torch.device("cpu"))) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(1) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_the_last_update_is_not_lost():
    with (
        pytest.raises(KeyboardInterrupt),
        StopSignals(Process(0, 1, torch.device("cpu"))) as signals,
    ):
        assert signals.agreed(12, last=True) == 0
        os.kill(os.getpid(), signal.SIGINT)
    # A signal that the loop has read is not sent again.
    with StopSignals(Process(0, 1, torch.device("cpu"))) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed(12, last=True) == signal.SIGINT


# Points of the stages of main.py, in order: what is called there, the call at which the signal
# comes, the signal, and the exit code.
POINTS = [
    ("shards.ShardWriter.add", 2, "SIGINT", 130),
    ("vqvae.update", 3, "SIGTERM", 75),
    # Between the numbered checkpoint of update 10 and latest.pt.
    ("runtime.checkpoints.point_latest", 2, "SIGINT", 130),
    ("vqvae.validate", 1, "SIGUSR1", 75),
    ("batches.latents.encode_on_device", 1, "SIGINT", 130),
    ("batches.latents.write_packed", 1, "SIGTERM", 75),
    ("data.measure_latents", 1, "SIGINT", 130),
    ("train.update", 3, "SIGINT", 130),
    ("train.preview", 1, "SIGTERM", 75),
    ("forecaster.Forecaster.forecast", 1, "SIGTERM", 75),
    ("report.results.write_videos", 1, "SIGINT", 130),
    ("report.page.result_page", 1, "SIGTERM", 75),
]


def test_after_a_signal_in_any_stage_the_same_command_resumes(
    tiny_run, tmp_path, command, monkeypatch
):
    """One run is stopped at all points, one after another, and equals an undisturbed run."""
    arguments = ["main.py", "--set", *TINY, "train.sample_every=6", "train.steps=12"]
    for place, call, name, code in POINTS:
        with monkeypatch.context() as patch:
            sent = send_at(patch, place, call, getattr(signal, name))
            found, err = command(tmp_path, *arguments)
        assert sent == [name], f"{place} was not reached: {err}"
        assert found == code, f"{place}: {err}"
        assert name in err or "stopped; run the same command again" in err
        # An incomplete folder of results is replaced by the next run.
        left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".partial")]
        assert set(left) <= {"ball_stn-test.partial"}, place
    assert command(tmp_path, *arguments)[0] == 0
    assert not list(tmp_path.rglob("*.partial"))

    undisturbed = tiny_run[0]
    own = checkpoints.load_checkpoint(tmp_path / RUN / "latest.pt")
    other = checkpoints.load_checkpoint(undisturbed / RUN / "latest.pt")
    for part in ("model", "ema", "vqvae"):
        for tensor, value in other[part].items():
            assert torch.equal(own[part][tensor], value), (part, tensor)
    # Other tests sample in the folder of the undisturbed run, so it is sampled anew in a copy.
    again = copy_of(undisturbed, tmp_path / "again", Path(RUN).name)
    assert command(again, "main.py", "--set", *TINY)[0] == 0
    samples = [next((dir / "outputs").rglob("samples.npy")) for dir in (tmp_path, again)]
    assert (np.load(samples[0]) == np.load(samples[1])).all()
    steps = [
        [json.loads(row)["step"] for row in (dir / RUN / "metrics.jsonl").read_text().splitlines()]
        for dir in (tmp_path, undisturbed)
    ]
    assert set(steps[0]) >= set(steps[1]) and steps[0] == sorted(steps[0])


def send_at(patch, place: str, call: int, number: int) -> list[str]:
    """Send a signal to this process when the function `place` is called for the `call`-th time.

    -> a list that holds the name of the signal after it was sent.
    """
    sent = []
    owner, _, name = place.rpartition(".")
    try:
        owner = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, kind = owner.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def send_and_call(*arguments, **named):
        if next(calls) == call:
            sent.append(signal.Signals(number).name)
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    patch.setattr(owner, name, send_and_call)
    return sent


# -------------------------------------------------------------------- gradients not finite
def trained(folder, monkeypatch, poisoned=(), **values):
    """Train a tiny run whose updates `poisoned` (from 1) have NaN gradients -> (last checkpoint,
    rows of the log)."""
    monkeypatch.chdir(folder)
    # The estimate of the time also makes updates.
    monkeypatch.setattr(main, "remaining_stages", lambda *_: [])
    loss, count = train.flow_loss, iter(range(1, 1000))
    monkeypatch.setattr(
        train, "flow_loss", lambda *a: loss(*a) * (float("nan") if next(count) in poisoned else 1.0)
    )
    overrides = configs.parse_overrides(
        [*TINY, "train.schedule=constant", "output.run_id=poisoned"]
    )
    config = configs.build(overrides={**overrides, **values})
    path = train_network(config, start(), None, Clock())[1]
    monkeypatch.setattr(train, "flow_loss", loss)
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    return checkpoints.load_checkpoint(path), rows


def test_an_update_without_a_finite_gradient_is_left_out_and_counted(copy, monkeypatch):
    state, rows = trained(copy, monkeypatch, poisoned=(3, 6, 7))
    assert all(
        value.isfinite().all() for part in ("model", "ema") for value in state[part].values()
    )
    assert {float(slot["step"]) for slot in state["opt"]["state"].values()} == {9}  # of 12
    assert [row.get("bad_steps") for row in rows] == [1, 3, 3] and all(
        np.isfinite(row["loss"]) for row in rows
    )
    shutil.rmtree(copy / "outputs/checkpoints/poisoned")
    clean = trained(copy, monkeypatch, poisoned=(12,))[0]
    shutil.rmtree(copy / "outputs/checkpoints/poisoned")
    short = trained(copy, monkeypatch, **{"train.steps": 11})[0]
    assert all(torch.equal(clean["model"][name], short["model"][name]) for name in short["model"])


def test_a_forward_pass_of_nan_leaves_batch_normalisation_alone(copy, monkeypatch):
    import interpolants

    real, count = interpolants.Interpolant.network_input, iter(range(1, 1000))
    monkeypatch.setattr(
        interpolants.Interpolant,
        "network_input",
        lambda self, x, s, x0: real(self, x, s, x0) * (float("nan") if next(count) == 6 else 1.0),
    )
    state, rows = trained(
        copy, monkeypatch, **{"model.name": "uvit", "model.out_norm": "bn", "train.own": 0}
    )
    assert rows[-1]["bad_steps"] == 1
    assert all(
        value.isfinite().all() for part in ("model", "ema") for value in state[part].values()
    )


def test_too_many_bad_updates_in_a_row_are_detected_after_a_good_one():
    recent = logs.Recent(batch_size=4)
    for norm in (1.0, float("nan"), float("inf"), float("nan"), 1.0):
        recent.add({"loss": torch.tensor(2.0), "grad_norm": torch.tensor(norm)})
    values = recent.summary()
    assert (values["loss"], values["grad_norm"], values["bad_steps"]) == (2.0, 1.0, 3)
    # Three skipped updates in a row, the first of them four updates ago.
    assert recent.longest == (3, 4) and recent.bad_in_a_row == 0


def test_too_many_bad_updates_in_a_row_end_the_run_and_name_their_batch(copy, monkeypatch):
    with pytest.raises(
        Failure,
        match=r"no finite gradient in 4 updates in a row, from update 7 on, whose batch holds "
        r"data/ball_stn/train: shard_0001.hdf5, video 0, frames (\d+, ){4}\d+; .*and 4 more; "
        r"last good checkpoint: outputs/checkpoints/poisoned/step_00000005.pt",
    ):
        trained(copy, monkeypatch, poisoned=range(7, 100), **{"train.max_bad_steps": 3})
    state = checkpoints.load_checkpoint("outputs/checkpoints/poisoned/latest.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


def test_the_place_of_a_frame(tmp_path):
    with ShardWriter(tmp_path / "s", shard_bytes=1) as writer:
        writer.add(frames(3))
        writer.append(frames(2))
        writer.add(frames(4))
    shards = Shards(tmp_path / "s")
    assert [
        shards.path_of(v, t).stem[-1] for v, t in ((0, 2), (0, 3), (0, 4), (1, 0), (1, 3))
    ] == list("12233")
