"""Streams: edges of windows, uniformity of the reservoir, batches, resumed runs, joint networks."""

import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, copy_of, launch

import configs
import models
from batches.batch import Batch
from batches.stream import Reservoir, StreamTriples, StreamWindows, capacity, loss_parts
from batches.windows import share
from configs import DATASETS
from forecaster import Forecaster
from forecaster import load as load_forecaster
from main import Clock, train_network
from models.joint import split_frames, stack_frames
from runtime import checkpoints
from runtime.console import Stopped, UserError
from runtime.process import StopSignals, start
from shards import Shards, ShardWriter

CPU = torch.device("cpu")
STREAM = [
    *TINY,
    "data.mode=stream",
    "train.batch_size=4",
    "replay.size=5",
    "train.schedule=constant",
    "train.precision=float32",
]


class Lengths:
    """Replaces shards in tests that read only the lengths of the videos."""

    def __init__(self, *lengths: int):
        self.dir = "train"
        self.lengths = np.array(lengths)


def starts(lengths, clip, *options, **more) -> list[int]:
    windows = StreamWindows(Lengths(*lengths), clip, *options, **more)
    return windows.starts(np.arange(len(windows))).tolist()


# -------------------------------------------------------------------- windows
@pytest.mark.parametrize(
    "lengths, stride, expected",
    [
        ([12], "continuous", [0, 1, 2, 3, 4, 5, 6, 7]),
        ([5], "continuous", [0]),
        ([5, 4, 6], "continuous", [0, 9, 10]),
        ([12], "chunked", [0, 5]),
        ([10], "chunked", [0, 5]),
        ([9], "chunked", [0]),
        ([11, 3, 5], "chunked", [0, 5, 14]),
    ],
)
def test_windows_of_five_frames(lengths, stride, expected):
    assert starts(lengths, 5, stride) == expected


@pytest.mark.parametrize(
    "lengths, count, expected",
    [
        ([10], 2, [0, 5]),
        # Three windows fit exactly; with one frame more; with one frame less they overlap.
        ([15], 3, [0, 5, 10]),
        ([16], 3, [0, 5, 11]),
        ([14], 3, [0, 4, 9]),
        ([9], 1, [0]),
        ([9], 2, [0, 4]),
        ([9], 5, [0, 1, 2, 3, 4]),
        ([5], 1, [0]),
        ([7, 4, 6], 5, [0, 1, 2, 11, 12]),
        ([7, 4, 6], 2, [0, 12]),
    ],
)
def test_spaced_windows_reach_from_the_first_frame_to_the_last(lengths, count, expected):
    assert starts(lengths, 5, "spaced", count) == expected


def test_spaced_windows_are_evenly_spaced():
    found = np.array(starts([1003], 10, "spaced", 97))
    assert found[0] == 0 and found[-1] == 993 and set(np.diff(found)) == {10, 11}


@pytest.mark.parametrize(
    "frames, stride, expected",
    [
        (":", "continuous", list(range(8)) + [12, 13]),
        (":5", "continuous", [0]),
        ("7:12", "continuous", [7]),
        ("3:9", "continuous", [3, 4]),
        ("6:17", "continuous", [6, 7, 12]),
        ("8:", "continuous", [12, 13]),
        ("3:13", "chunked", [3]),
        ("2:", "chunked", [2, 7, 12]),
    ],
)
def test_windows_lie_within_the_range_of_frames(frames, stride, expected):
    assert starts([12, 6], 5, stride, frames=frames) == expected


def test_windows_with_skipped_frames():
    assert starts([8], 3, skip=2) == [0, 1]
    assert starts([14], 3, "chunked", skip=2) == [0, 7]
    windows = StreamWindows(Lengths(14), 3, "chunked", skip=2)
    assert windows.rows(np.array([1])).tolist() == [[7, 10, 13]]


@pytest.mark.parametrize(
    "options, message",
    [
        (("spaced", 6), "6 windows of 5 frames requested, but only 5 "),
        (("continuous", 0, "0:10"), "data.frames=0:10 is not a part"),
        (("continuous", 0, "4:4"), "data.frames=4:4 is not a part"),
        (("chunked", 0, "5:"), "4 frames within data.frames=5:, a window needs 5"),
    ],
)
def test_a_stream_that_is_too_short_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        StreamWindows(Lengths(9), 5, *options)


@pytest.mark.parametrize("key", ["frames", "latents"])
@pytest.mark.parametrize("stride", ["continuous", "chunked", "spaced"])
def test_items_hold_their_frames_across_shards(tmp_path, key, stride):
    shape = (4, 4, 3) if key == "frames" else (3, 2, 2)
    dtype = "u1" if key == "frames" else "f2"
    rows = (np.arange(60).reshape(-1, 1, 1, 1) * np.ones(shape)).astype(dtype)
    with ShardWriter(tmp_path, key, shard_bytes=400) as writer:
        # A stream over many shards, then a second video.
        for start in range(0, 50, 10):
            write = writer.append if writer.videos else writer.add
            write(rows[start : start + 10])
        writer.add(rows[50:])
    shards = Shards(tmp_path, key)
    assert len(shards.paths) > 2 and shards.lengths.tolist() == [50, 10]
    windows = StreamWindows(shards, 7, stride, 13 if stride == "spaced" else 0)
    for k in range(len(windows)):
        item, places = windows[k]
        assert item.shape == (7, *shape)
        assert places.dtype == np.int64
        assert (item[:, 0, 0, 0] == places).all()
        assert (np.diff(places) == 1).all()
        assert places[-1] < 50 or places[0] >= 50
    with pytest.raises(IndexError):
        windows[len(windows)]


# -------------------------------------------------------------------- reservoir
@pytest.mark.parametrize(
    "size, expected",
    [
        ("0", 0),
        ("7", 7),
        ("5000", 1000),
        ("0.05", 50),
        ("0.0001", 1),
        ("1.0", 1000),
        ("full", 1000),
    ],
)
def test_capacity(size, expected):
    assert capacity(size, 1000) == expected


def filled(capacity: int, seen: int, seed: int = 0) -> Reservoir:
    reservoir = Reservoir(capacity, seed)
    for _ in range(seen):
        reservoir.add()
    return reservoir


@pytest.mark.parametrize("capacity", [1, 8])
def test_the_reservoir_keeps_every_window_of_the_past_with_equal_probability(capacity):
    n, seeds = 40, 2000
    kept = np.stack(
        [np.bincount(filled(capacity, n, seed).slots, minlength=n) for seed in range(seeds)]
    )
    # No window is kept twice.
    assert kept.max() == 1
    assert (kept.sum(1) == capacity).all()
    p = capacity / n
    # Counts of a simple random sample without replacement. Their covariance is that of a
    # multinomial distribution, times (1-p) n/(n-1).
    statistic = ((kept.sum(0) - seeds * p) ** 2).sum() / (seeds * p * (1 - p)) * (n - 1) / n
    # The 0.1 and 99.9 % points of chi-square with 39 degrees of freedom.
    assert 16.3 < statistic < 72.1
    # All pairs are equally likely, with probability p (R-1) / (n-1).
    if capacity > 1:
        together = (kept.T @ kept)[np.triu_indices(n, 1)]
        expected = seeds * p * (capacity - 1) / (n - 1)
        assert abs(together.mean() - expected) < 1e-9 and together.std() < 1.15 * np.sqrt(expected)


def test_replay_draws_every_window_of_the_past_with_equal_probability():
    n, seeds = 20, 6000
    drawn = [filled(5, n, seed).draw(1, np.random.default_rng(seed))[0] for seed in range(seeds)]
    statistic = ((np.bincount(drawn, minlength=n) - seeds / n) ** 2).sum() / (seeds / n)
    # The 0.1 and 99.9 % points of chi-square with 19 degrees of freedom.
    assert 5.4 < statistic < 43.9


def test_reservoirs_of_the_size_of_the_stream_and_of_size_0():
    assert len(filled(30, 12)) == 12
    assert filled(30, 12).slots[:12].tolist() == list(range(12))
    assert sorted(filled(12, 12).slots) == list(range(12))
    assert len(filled(0, 5)) == 0


def test_a_saved_reservoir_does_not_hold_windows_that_were_read_ahead():
    states = [filled(6, seen).state_dict(seen) for seen in range(100)]
    ahead = filled(6, 99)
    for seen in (99, 80, 40, 7, 3):
        state = ahead.state_dict(seen)
        assert state["seen"] == seen and torch.equal(state["slots"], states[seen]["slots"])
    again = Reservoir(6, 0)
    again.load_state_dict(states[40])
    for _ in range(59):
        again.add()
    assert torch.equal(again.state_dict(99)["slots"], states[99]["slots"])
    with pytest.raises(UserError, match="holds 6 windows, this stream's 7"):
        Reservoir(7, 0).load_state_dict(states[3])


# -------------------------------------------------------------------- batches
@pytest.fixture
def latents(tmp_path):
    """A split of two videos of 50 and 30 frames. Every value of a latent is its place in the
    stream."""
    with ShardWriter(tmp_path / "z", "latents") as writer:
        for first, end in ((0, 50), (50, 80)):
            places = np.arange(first, end, dtype=np.float16).reshape(-1, 1, 1, 1)
            writer.add(places * np.ones((2, 3, 3), np.float16))
    return tmp_path / "z"


def source(dir, *settings, rank=0, world=1, **values) -> StreamTriples:
    settings = configs.parse_overrides(
        ["data.mode=stream", "train.batch_size=4", "replay.size=6", *settings]
    )
    return StreamTriples(configs.build(overrides=settings | values), dir, CPU, rank, world)


def places(part: torch.Tensor) -> np.ndarray:
    return part[:, 0, 0, 0].numpy().astype(int)


def all_places(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in the stream of the targets, references and first contexts."""
    return places(batch.target), places(batch.reference), places(batch.contexts[:, 0])


def test_a_batch_holds_the_newest_window_and_windows_of_the_past(latents):
    for k, batch in enumerate(source(latents, "replay.n_live=2").batches(0, 60)):
        target, reference, context = all_places(batch)
        gap = batch.gaps[:, 0].numpy()
        assert (target - reference == 1).all()
        assert (reference - context == gap).all() and (gap >= 1).all()
        # No window crosses from one video to the next.
        first = k if k < 41 else k + 9
        assert (context[:2] >= first).all() and (target[:2] < first + 10).all()
        assert (target[2:] < first + 10 - (k > 0)).all()
        assert (context < 50).all() == (target < 50).all() or (context // 50 == target // 50).all()


def test_replay_covers_the_past(latents):
    batches = source(latents, "replay.size=full").batches(0, 41)
    drawn = np.concatenate([all_places(batch)[2][1:] for batch in batches])
    assert len(set(drawn)) > 20 and len(set(drawn[60:])) > 15


def test_every_item_of_the_newest_window_has_its_own_triple(latents):
    batches = [all_places(batch) for batch in source(latents, "replay.size=0").batches(0, 40)]
    assert np.mean([len(set(target)) for target, _, _ in batches]) > 2
    for k, (target, _, context) in enumerate(batches):
        assert (context >= k).all() and (target < k + 10).all()


def test_offline_batches_cover_the_stream_in_random_order(latents):
    offline = source(latents, "data.mode=offline")
    first = np.concatenate([all_places(batch)[2] for batch in offline.batches(0, 200)])
    assert first.min() < 3 and first.max() > 75 and offline.state_dict(200) is None
    again = offline.batches(7, 9)
    for batch, other in zip(again, list(offline.batches(0, 9))[7:], strict=True):
        assert (places(batch.target) == places(other.target)).all()

    # `random_batches`, for the statistics of the latents, draws the same batches from a stream.
    live = source(latents)
    for batch, other in zip(live.random_batches(0, 5), offline.batches(0, 5), strict=True):
        assert (places(batch.target) == places(other.target)).all()
    assert live.reservoir.seen == 0


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("mode", ["stream", "offline"])
def test_the_shares_of_all_processes_make_the_batch_of_one(latents, mode, world):
    whole = list(source(latents, f"data.mode={mode}").batches(0, 30))
    parts = [source(latents, f"data.mode={mode}", rank=rank, world=world) for rank in range(world)]
    for batch, *shares in zip(whole, *(part.batches(0, 30) for part in parts)):
        assert_joined(shares, batch)
    if mode == "stream":
        assert all(np.array_equal(part.reservoir.slots, parts[0].reservoir.slots) for part in parts)


def assert_joined(shares: list[Batch], whole: Batch) -> None:
    """The shares of the processes, concatenated, are the whole batch."""
    for expected, *pieces in zip(whole, *shares):
        assert torch.equal(torch.cat(pieces), expected)


def test_a_joint_batch_stacks_the_second_half_of_the_window(latents):
    joint = source(latents, "model.name=joint", "data.clip=5", "replay.size=0")
    (batch,) = joint.batches(0, 1)
    columns = [part[0, 1, :, 0].tolist() for part in (batch.target, batch.reference)]
    assert columns == [[2] * 3 + [3] * 3 + [4] * 3, [1] * 9]
    assert batch.contexts[0, :, 1, 0, 0].tolist() == [0, 1]
    assert batch.gaps.shape == (4, 2) and (batch.gaps == 1).all()
    parts = [
        source(latents, "model.name=joint", rank=rank, world=2).batches(0, 9) for rank in range(2)
    ]
    for whole, *shares in zip(source(latents, "model.name=joint").batches(0, 9), *parts):
        assert_joined(shares, whole)


def test_a_stream_resumes_after_the_last_consumed_batch(latents):
    whole = list(source(latents).batches(0, 60))
    ahead = source(latents)
    reader = ahead.batches(0, 60)
    for _ in range(45):
        next(reader)
    resumed = source(latents)
    resumed.load_state_dict(ahead.state_dict(25))
    for batch, expected in zip(resumed.batches(25, 60), whole[25:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected))
    with pytest.raises(ValueError, match="at window 60, not at 25"):
        next(resumed.batches(25, 60))


@pytest.mark.parametrize(
    "size, rank, world, expected",
    [
        ("5", 0, 1, {"loss_live": (0, 1), "loss_replay": (1, 4)}),
        ("0", 0, 1, {"loss_live": (0, 4)}),
        ("5", 0, 2, {"loss_live": (0, 1), "loss_replay": (1, 2)}),
        ("5", 1, 2, {"loss_replay": (0, 2)}),
        ("0", 1, 2, {"loss_live": (0, 2)}),
    ],
)
def test_parts_of_the_loss(size, rank, world, expected):
    config = configs.build(
        overrides={"data.mode": "stream", "train.batch_size": 4, "replay.size": size}
    )
    parts = loss_parts(config, share(4, rank, world))
    assert {name: (part.start, part.stop) for name, part in parts.items()} == expected


# -------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "dataset, clip, batch, live, size",
    [("ball_stn", 10, 2, 1, 32), ("ball_nstn", 10, 2, 1, 32), ("wmaze", 20, 4, 2, 64)],
)
@pytest.mark.parametrize("mode", ["stream", "offline"])
def test_published_settings_of_streams(dataset, clip, batch, live, size, mode):
    config = configs.build(dataset, {"data.mode": mode})
    assert (config.data.clip, config.data.image_size) == (clip, size)
    assert (config.train.batch_size, config.replay.n_live) == (batch, live)
    assert (config.data.condition, config.data.predict) == (clip // 2, clip // 2)
    assert config.replay.size == "0.05"
    assert configs.from_dict(configs.to_dict(config)) == config
    assert configs.build(dataset, {"data.mode": mode, "data.clip": 8}).data.clip == 8


def test_every_dataset_can_be_a_stream_and_none_is_by_default():
    for dataset in DATASETS:
        assert configs.build(dataset, {"data.mode": "stream"}).train.steps == 0
        assert configs.build(dataset).data.mode == "clips"


@pytest.mark.parametrize(
    "items, message",
    [
        (["data.mode=live"], "data.mode must be clips, stream or offline"),
        (["train.steps=0"], "train.steps must be >= 1 for data.mode=clips, got 0"),
        (["data.mode=stream", "replay.size=5%"], "replay.size must be"),
        (["replay.size=1.5"], "replay.size must be"),
        (
            ["data.mode=stream", "replay.n_live=3"],
            "replay.n_live must be <= train.batch_size = 2, got 3",
        ),
        (["data.mode=stream", "data.hue=0.1"], "data.mode=stream does not augment frames"),
        (
            ["data.mode=stream", "train.overfit=1"],
            "data.mode must be clips for --overfit 1, got 'stream'",
        ),
        (["data.windows=spaced"], "data.num_windows must be >= 1"),
        (["data.num_windows=4"], "data.num_windows must be 0 for data.windows=continuous"),
        (
            ["model.name=joint"],
            "data.mode must be stream or offline for model.name=joint, got 'clips'",
        ),
        (
            ["data.mode=stream", "model.name=joint", "data.condition=4"],
            "data.condition must be >= 5 for model.name=joint and data.clip = 10, got 4",
        ),
        (["data.frames=0-5"], "data.frames must be START:STOP"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(items, message):
    with pytest.raises(UserError) as caught:
        configs.build(overrides=configs.parse_overrides(items))
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A folder with data, VQVAE and latents."""
    return copy_of(tiny_run[0], tmp_path_factory.mktemp("streams") / "run")


def trained(folder, name, monkeypatch, *settings) -> dict:
    monkeypatch.chdir(folder)
    config = configs.build(
        overrides=configs.parse_overrides([*STREAM, f"output.run_id={name}", *settings])
    )
    return checkpoints.load_checkpoint(train_network(config, start(), None, Clock())[1])


def rows(folder, name) -> list[dict]:
    """The rows of a run's log, without the rate."""
    lines = (folder / "outputs/checkpoints" / name / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in found:
        row.pop("samples_per_second", None)
    return found


def same(a: dict, b: dict, *parts: str) -> bool:
    return all(torch.equal(a[part][name], b[part][name]) for part in parts for name in b[part])


@pytest.mark.parametrize(
    "settings",
    [
        ["data.mode=stream"],
        ["replay.size=0"],
        ["replay.size=full", "data.windows=chunked"],
        ["data.mode=offline"],
        ["model.name=joint"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_resumed_stream_equals_an_uninterrupted_one(folder, monkeypatch, settings):
    name = settings[0].replace("=", "-")

    def stop_at_6(self, step: int, last: bool) -> int:
        return signal.SIGTERM if step == 6 else 0

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after update 6"):
        patch.setattr(StopSignals, "agreed", stop_at_6)
        trained(folder, f"{name}-parts", monkeypatch, *settings)
    parts = trained(folder, f"{name}-parts", monkeypatch, *settings)
    whole = trained(folder, f"{name}-whole", monkeypatch, *settings)
    assert parts["step"] == 12 and same(parts, whole, "model", "ema")
    if settings == ["data.mode=stream"]:
        assert whole["replay"]["seen"] == 12 and sorted(whole["replay"]["slots"]) != list(range(5))
        assert torch.equal(parts["replay"]["slots"], whole["replay"]["slots"])
    logged = rows(folder, f"{name}-whole")
    assert len(logged) == 3
    assert rows(folder, f"{name}-parts") == logged
    assert ("loss_live" in logged[0]) == (settings[0] != "data.mode=offline")
    has_replay = settings[0] not in ("data.mode=offline", "replay.size=0")
    assert ("loss_replay" in logged[0]) == has_replay


def test_a_run_ends_with_its_stream(folder, monkeypatch):
    short = ["data.frames=100:120", "train.steps=0"]

    def steps(name: str, *settings: str) -> int:
        return trained(folder, name, monkeypatch, *short, *settings)["step"]

    # Windows of 8 frames in a stream of 20.
    assert steps("short") == 13
    assert steps("chunks", "data.windows=chunked") == 2
    assert steps("spaced", "data.windows=spaced", "data.num_windows=4") == 4
    message = "train.steps = 14, but the stream of .* has 13 windows, each seen once"
    with pytest.raises(UserError, match=message):
        steps("long", "train.steps=14")
    assert steps("offline", "data.mode=offline", "train.steps=14") == 14
    with pytest.raises(UserError, match="holds a run of other settings .*replay.size: '5' -> '4'"):
        steps("short", "replay.size=4")


@pytest.mark.xdist_group("processes")
def test_two_processes_train_on_a_stream_as_one_does(folder, monkeypatch):
    settings = ["--set", *STREAM, "train.steps=8", "replay.size=3", "sample.num_videos=1"]
    trained(folder, "one", monkeypatch, "train.steps=8", "replay.size=3")
    launch(
        folder,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(REPO / "main.py"),
        *settings,
        "output.run_id=two",
        CUDA_VISIBLE_DEVICES="",
    )
    one, two = (
        checkpoints.load_checkpoint(folder / "outputs/checkpoints" / name / "latest.pt")
        for name in ("one", "two")
    )
    assert two["replay"]["seen"] == 8
    assert torch.equal(one["replay"]["slots"], two["replay"]["slots"])
    # The first process, which writes the log, has the item of the newest window.
    losses = [[row["loss_live"] for row in rows(folder, name)] for name in ("one", "two")]
    assert len(losses[0]) == 2
    assert np.allclose(*losses, rtol=1e-3)


# -------------------------------------------------------------------- joint networks
class AddOne(torch.nn.Module):
    """A network whose frames are each one more than the frame before. It records the contexts."""

    def __init__(self, k: float, seen: list):
        super().__init__()
        self.k = k
        self.seen = seen

    def forward(self, z, s, reference, contexts, gaps):
        self.seen.append(contexts[:, :, 0, 0, 0].tolist())
        steps = torch.arange(1.0, z.shape[2] // 2 + 1).repeat_interleave(2)[:, None]
        return (steps / self.k).expand_as(z)


def test_a_joint_network_continues_from_its_own_frames():
    config = configs.build(
        overrides={
            "data.mode": "stream",
            "model.name": "joint",
            "data.clip": 7,
            "sample.reencode": False,
            "sample.diffusion": "0",
            "sample.steps": 2,
        }
    )
    latent = configs.Latent((3, 2, 2), (0.0,) * 3, (1.0,) * 3, delta=2.0)
    seen = []
    forecaster = Forecaster(
        dataclasses.replace(config, latent=latent), AddOne(2.0, seen), None, CPU
    )
    given = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(2, 5, 3, 2, 2)
    future = forecaster.roll_out(given, 6, (0,))
    assert future.shape == (2, 6, 3, 2, 2)
    assert torch.allclose(
        future, torch.arange(5.0, 11).view(6, 1, 1, 1).expand_as(future), atol=1e-5
    )
    # Three of seven frames are given, four are forecast.
    assert seen[0][0] == [2, 3, 4] and np.allclose(seen[-1][0], [6, 7, 8])


def test_the_joint_network_depends_on_its_given_frames_only():
    torch.manual_seed(0)
    net = models.build(
        "joint", (3, 4, 4), given=2, future=3, width=16, depth=1, mid_depth=1, heads=2
    )
    torch.nn.init.normal_(net.conv_out.weight)
    frames = torch.randn(2, 5, 3, 4, 4)
    assert torch.equal(split_frames(stack_frames(frames), 4), frames)
    z, s = stack_frames(torch.randn(2, 3, 3, 4, 4)), torch.rand(2)
    contexts, gaps = frames[:, :2], torch.ones(2, 2)
    out = net(z, s, z, contexts, gaps)
    assert out.shape == (2, 3, 12, 4) and torch.equal(net(z, s, 0 * z, contexts, gaps + 1), out)
    assert not torch.allclose(net(z, s, z, contexts.flip(1), gaps), out)
    assert [p.shape for p in net.parameters() if p.dim() == 4][0] == (16, 15, 3, 3)


def test_a_joint_run_forecasts(folder, monkeypatch):
    trained(folder, "joint", monkeypatch, "model.name=joint")
    forecaster, _ = load_forecaster(folder / "outputs/checkpoints/joint/latest.pt", CPU)
    assert forecaster.config.latent.shape == (4, 8, 8)
    given = np.random.default_rng(0).integers(0, 255, (2, 4, 32, 32, 3), np.uint8)
    assert forecaster.forecast(given, 6, 2, (0,), quiet=True).shape == (2, 2, 6, 32, 32, 3)
