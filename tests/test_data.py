"""Index arithmetic at its edges, batches as a function of (seed, step), contents of the caches."""

import gc
import multiprocessing
import os
import re
import signal
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import configs
import data
from batches.batch import to_frames, to_pixels
from batches.frames import (
    FrameTriples,
)
from batches.latents import (
    LatentStore,
    LatentTriples,
    block_rows,
    cache_latents,
    encode_batch_size,
    encode_on_device,
    latent_dir,
    start_copy,
)
from batches.windows import (
    check_long_enough,
    draw_batch,
    draw_frames,
    draw_gaps,
    draw_windows,
    spaced_windows,
    span,
)
from batches.workers import check_shared_memory, shared_memory_bytes
from runtime.console import Failure, UserError
from shards import Shards, ShardWriter, write_packed

TINY = {
    "data.clip": 6,
    "data.contexts": 1,
    "data.context": "recent:3",
    "train.batch_size": 8,
}


def config(**values):
    return configs.build(
        overrides=TINY | {name.replace("__", "."): value for name, value in values.items()}
    )


@pytest.mark.parametrize("clip, skip, wanted", [(5, 0, 5), (16, 4, 76), (3, 1, 5)])
def test_span(clip, skip, wanted):
    assert span(clip, skip) == wanted


def test_windows_reach_the_first_and_the_last_start_and_no_further():
    windows = draw_windows(np.array([3, 9, 5]), 5, 0, 4000, np.random.default_rng(0))
    assert set(windows.video) == {1, 2}  # the first video is too short
    assert set(windows.start[windows.video == 1]) == {0, 1, 2, 3, 4}
    assert set(windows.start[windows.video == 2]) == {0}  # exact fit
    assert 0.45 < (windows.video == 1).mean() < 0.55  # videos alike, whatever their length


def test_spaced_windows_never_overlap_and_cover_all():
    lengths = np.array([10, 4, 23])
    every = spaced_windows(lengths, 5, 0, 99)
    assert list(zip(every.video, every.start)) == [(0, 0), (0, 5), (2, 0), (2, 5), (2, 10), (2, 15)]
    some = spaced_windows(lengths, 5, 0, 3)
    assert list(zip(some.video, some.start)) == [(0, 0), (2, 0), (2, 10)]
    skipping = spaced_windows(lengths, 5, 1, 99)
    assert list(zip(skipping.video, skipping.start)) == [(0, 0), (2, 0), (2, 9)]
    assert (skipping.start + 8 < lengths[skipping.video]).all()


@pytest.mark.parametrize(
    "rule, wanted",
    [
        ("uniform", {1, 2, 3, 4, 5, 6, 7}),
        ("recent:3", {1, 2, 3}),
        ("recent:1", {1}),
        ("recent:20", {1, 2, 3, 4, 5, 6, 7}),
        ("log", {1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_gaps(rule, wanted):
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    found = draw_gaps(u[:, None], 7, rule).numpy()[:, 0]
    assert set(found) == wanted
    several = torch.stack([u[-3:], u[:3]], 1)
    assert draw_gaps(several, torch.ones(3, dtype=torch.int64), rule).tolist() == [[1, 1]] * 3
    # 1 - 2^-24 times 7 is 7 in float32.
    almost = torch.tensor([[1 - 2**-24]])
    assert draw_gaps(almost, 7, rule).item() == max(wanted)
    if rule == "log":  # P(gap >= g) = 1 - log g / log 8
        assert abs((found >= 4).mean() - (1 - np.log(4) / np.log(8))) < 1e-3
    if rule == "uniform":
        assert np.allclose(np.bincount(found)[1:] / 10_000, 1 / 7, atol=1e-3)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rule", ["uniform", "recent:3", "log"])
def test_triples_lie_in_their_windows_in_order(rule, K):
    windows = draw_windows(np.array([40, 60]), 6, 2, 5000, np.random.default_rng(1))
    at = draw_frames(windows, rule, K, np.random.default_rng(2))
    assert at.contexts.shape == at.gaps.shape == (5000, K)
    assert (at.target - at.reference == 3).all()
    assert (at.reference[:, None] - at.contexts == 3 * at.gaps).all() and (at.gaps >= 1).all()
    assert (at.contexts >= windows.start[:, None]).all()
    assert (at.target <= windows.start + 15).all()
    assert ((at.target - windows.start) // 3).min() == 2 and (
        (at.target - windows.start) // 3
    ).max() == 5
    assert (at.contexts == windows.start[:, None]).any()


def test_batches_depend_on_seed_and_step_alone_and_processes_share_them():
    lengths, cfg = np.array([50, 70]), config()
    same, other, seed = (
        draw_batch(c, lengths, k, 0, 1, None)
        for c, k in ((cfg, 3), (cfg, 4), (config(train__seed=1), 3))
    )
    again = draw_batch(cfg, lengths, 3, 0, 1, None)
    assert all((a == b).all() for a, b in zip(same, again))
    assert (same.target != other.target).any() and (same.target != seed.target).any()
    halves = [draw_batch(cfg, lengths, 3, rank, 2, None) for rank in range(2)]
    assert all((np.concatenate(parts) == whole).all() for *parts, whole in zip(*halves, same))


def encode(x: torch.Tensor) -> torch.Tensor:
    """A stand-in autoencoder that keeps the grey level: (B, 3, H, W) -> (B, 2, H/4, W/4)."""
    return torch.nn.functional.avg_pool2d(x[:, :2], 4)


def test_latent_cache_holds_each_frame_once_and_resumes(make_shards, tmp_path):
    shards = Shards(make_shards([30, 20], shard_bytes=3000))
    assert len(shards.paths) == 2
    out = cache_latents(shards, encode, "weights", tmp_path, torch.device("cpu"))
    latents = Shards(out, "latents")
    assert latents.lengths.tolist() == [30, 20] and latents.shape == (2, 2, 2)
    levels = latents.read(1, slice(None))[:, 0, 0, 0]
    assert np.allclose((levels.astype(float) + 1) * 127.5, np.arange(30, 50), atol=0.1)
    first, second = sorted(out.glob("*.hdf5"))
    kept = os.stat(first).st_mtime_ns
    second.unlink()
    assert cache_latents(shards, encode, "weights", tmp_path, torch.device("cpu")) == out
    assert second.exists() and os.stat(first).st_mtime_ns == kept
    assert latent_dir(shards, "other weights", tmp_path) != out


def log_calls(monkeypatch, shards) -> list[tuple[str, int]]:
    """The events of the blocks of frames in order: ("read" | "encode" | "fetch", block)."""
    calls = []
    done = {"read": 0, "encode": 0, "copy": 0}
    read_file, copy_block, encode_block = shards.read_file, start_copy, encode_on_device

    def log(what: str) -> None:
        calls.append((what, done[what]))
        done[what] += 1

    def read(*place):
        log("read")
        return read_file(*place)

    def encode_logged(*arguments):
        log("encode")
        return encode_block(*arguments)

    def copy_logged(z):
        block = done["copy"]
        done["copy"] += 1
        wait = copy_block(z)

        def wait_logged():
            calls.append(("fetch", block))
            return wait()

        return wait_logged

    monkeypatch.setattr(shards, "read_file", read)
    monkeypatch.setattr("batches.latents.encode_on_device", encode_logged)
    monkeypatch.setattr("batches.latents.start_copy", copy_logged)
    return calls


def test_a_block_is_read_and_encoded_before_the_latents_of_the_one_before_are_fetched(
    make_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("batches.latents.BLOCK_FRAMES", 10)
    shards = Shards(make_shards([25, 20]))
    calls = log_calls(monkeypatch, shards)
    out = cache_latents(shards, encode, "w", tmp_path, torch.device("cpu"))
    latents = Shards(out, "latents").read_rows(np.arange(45))
    plain = encode(to_pixels(shards.read_rows(np.arange(45)))).half().numpy()
    assert np.array_equal(latents, plain)
    assert {call for call in calls if call[0] == "fetch"} == {("fetch", k) for k in range(5)}
    for k in range(4):
        assert calls.index(("read", k + 1)) < calls.index(("fetch", k))
        assert calls.index(("encode", k + 1)) < calls.index(("fetch", k))


def test_the_next_block_is_read_while_one_is_encoded_and_no_other(
    make_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("batches.latents.BLOCK_FRAMES", 10)
    shards = Shards(make_shards([50]))
    read_file, read = shards.read_file, []
    arrived = threading.Condition()

    def read_and_tell(k, rows):
        frames = read_file(k, rows)
        with arrived:
            read.append(rows[0] // 10)
            arrived.notify_all()
        return frames

    def encode_when_read(x):
        block = int((x[0, 0, 0, 0] + 1) * 127.5 + 0.5) // 10
        with arrived:
            assert arrived.wait_for(lambda: len(read) > min(block + 1, 4), timeout=10)
            assert len(read) <= block + 2
        return encode(x)

    monkeypatch.setattr(shards, "read_file", read_and_tell)
    cache_latents(shards, encode_when_read, "w", tmp_path, torch.device("cpu"))
    assert read == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("error", [UserError("shard_0001.hdf5: damaged"), KeyboardInterrupt()])
def test_an_error_ends_the_thread_and_keeps_finished_shards(
    error, make_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("batches.latents.BLOCK_FRAMES", 10)
    shards = Shards(make_shards([20, 20], shard_bytes=3000))
    read_file = shards.read_file
    readers = []

    def read(k, rows):
        readers.append(threading.current_thread())
        if isinstance(error, UserError) and (k, rows[0]) == (1, 10):
            raise error
        return read_file(k, rows)

    def interrupted(x):
        if isinstance(error, KeyboardInterrupt) and x.max() > 30 / 127.5 - 1:
            raise error
        return encode(x)

    monkeypatch.setattr(shards, "read_file", read)
    with pytest.raises(type(error)) as caught:
        cache_latents(shards, interrupted, "w", tmp_path, torch.device("cpu"))
    assert caught.value is error
    assert threading.main_thread() not in readers
    assert not any(reader.is_alive() for reader in readers)
    written = [path.name for path in latent_dir(shards, "w", tmp_path).iterdir()]
    assert written == ["shard_0001.hdf5"]


def test_blocks_are_whole_batches_of_bounded_size():
    small = block_rows(5000, (64, 64, 3), np.dtype(np.uint8))
    assert [len(rows) for rows in small] == [2048, 2048, 904]
    large = block_rows(5000, (256, 256, 3), np.dtype(np.uint8))
    assert max(len(rows) for rows in large) * 256 * 256 * 3 <= 64 << 20
    assert np.array_equal(np.concatenate(large), np.arange(5000))
    batch = encode_batch_size(256 * 256 * 3)
    assert all(rows[0] % 2048 % batch == 0 for rows in large)
    huge = block_rows(3, (8192, 8192, 3), np.dtype(np.uint8))
    assert [len(rows) for rows in huge] == [1, 1, 1]


def test_frames_are_copied_to_the_device_without_a_wait(monkeypatch):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    devices = []

    def to_device(values, device):
        devices.append(device)
        return torch.as_tensor(values)

    monkeypatch.setattr("batches.batch.to_device", to_device)
    to_pixels(frames, "cuda")
    assert devices == [torch.device("cuda")]


def test_encoded_batches_stay_on_the_device_until_the_last(monkeypatch):
    with FakeTensorMode():
        frames = np.zeros((3000, 16, 16, 3), np.uint8)
        monkeypatch.setattr(
            "batches.batch.to_device",
            lambda values, device: torch.empty(values.shape, dtype=torch.uint8, device=device),
        )
        z = encode_on_device(encode, frames, torch.device("cuda"))
    assert (z.shape, z.dtype, z.device.type) == ((3000, 2, 4, 4), torch.float16, "cuda")


def test_latent_batches_hold_the_frames_they_name(make_shards, tmp_path):
    shards, cfg = Shards(make_shards([30, 20])), config()
    out = cache_latents(shards, encode, "w", tmp_path, torch.device("cpu"))
    source = LatentTriples(cfg, out, torch.device("cpu"))
    at = source.frames(5)
    batch = source.batch(5)
    assert batch.contexts.shape[1] == at.contexts.shape[1] == batch.gaps.shape[1]
    for latents, frames in (
        (batch.target, at.target),
        (batch.reference, at.reference),
        (batch.contexts[:, 0], at.contexts[:, 0]),
    ):
        level = (latents[:, 0, 0, 0].numpy() + 1) * 127.5
        assert np.allclose(level, np.array([0, 30])[at.video] + frames, atol=0.1)
    assert torch.equal(batch.gaps, torch.from_numpy(at.gaps).float())


@pytest.mark.parametrize("K", [1, 3])
def test_augmented_batches_do_not_depend_on_workers_and_jitter_frames_alike(make_shards, K):
    dir = make_shards([30, 20], size=8)
    batches = {}
    for workers in (0, 2):
        cfg = config(data__brightness=0.3, data__hue=0.1, data__workers=workers, train__steps=5)
        object.__setattr__(cfg.data, "contexts", K)
        source = FrameTriples(cfg, Shards(dir))
        batches[workers] = list(source.batches(2, 4, lambda x: x, torch.device("cpu")))
    assert len(batches[0]) == 2
    assert batches[0][0].contexts.shape[1] == batches[0][0].gaps.shape[1] == K
    for a, b in zip(batches[0], batches[2]):
        assert all(torch.equal(p, q) for p, q in zip(a, b))
    cfg = config(data__brightness=0.3)
    object.__setattr__(cfg.data, "contexts", K)
    plain = FrameTriples(cfg, Shards(dir))
    pixels = plain.jitter_batch(torch.from_numpy(plain[2][0]), 2)
    clips = (pixels.movedim(2, -1).numpy() + 1) * 127.5
    at = draw_batch(plain.config, plain.shards.lengths, 2, 0, 1, None)
    frames = np.column_stack([at.target, at.reference, at.contexts])
    truth = np.array([0, 30])[at.video][:, None] + frames
    factor = clips[:, :, 0, 0, 0].astype(float) / np.maximum(truth, 1)
    bright = truth.min(1) > 10
    assert np.ptp(factor[bright], axis=1).max() < 0.1  # the same within a clip
    assert np.ptp(factor[bright][:, 0]) > 0.05  # another from clip to clip
    assert 0.65 < factor[bright].min() and factor[bright].max() < 1.35


def test_too_short_videos_are_named_with_what_to_do(make_shards, tmp_path):
    with pytest.raises(
        UserError, match=r"the longest video has 5 frames, data.clip needs 6; lower data.clip"
    ):
        check_long_enough(Shards(make_shards([5, 4])), 6, 0, "data.clip")


def test_pixels_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert (to_frames(to_pixels(frames)) == frames).all()
    assert to_pixels(frames).min() == -1 and to_pixels(frames).max() == 1


def test_latents_are_gathered_from_their_files_across_shards(tmp_path):
    latents = np.random.default_rng(0).standard_normal((70, 2, 3, 3)).astype(np.float16)
    for k, (start, stop) in enumerate(((0, 30), (30, 31), (31, 70)), 1):
        write_packed(
            tmp_path / f"shard_{k:04d}.hdf5",
            "latents",
            latents[start:stop],
            np.array([stop - start]),
            {"continues": k > 1, "fps": 1.0},
        )
    shards = Shards(tmp_path, "latents")
    assert isinstance(shards.map_file(0), np.memmap)
    rows = np.array([69, 0, 29, 30, 31, 31, 5])
    found = LatentStore(shards, torch.device("cpu")).gather(rows)
    assert found.dtype == torch.float16 and np.array_equal(found.numpy(), latents[rows])


def test_chunked_shards_cannot_be_mapped_and_are_read(make_shards):
    shards = Shards(make_shards([30]))
    assert np.array_equal(shards.map_file(0), shards.read(0, slice(None))) and not isinstance(
        shards.map_file(0), np.memmap
    )


def test_clips_have_the_rate_of_their_video(tmp_path):
    with ShardWriter(tmp_path, fps=20.0) as writer:
        for rate in (20.0, 5.0, 0.0):
            writer.add(np.zeros((9, 8, 8, 3), np.uint8), rate=rate)
    shards = Shards(tmp_path)
    windows = spaced_windows(shards.lengths, 4, 1, 3)
    rates = data.clip_rates(shards, windows, config(**{"data.skip": 1}))
    # A video of unknown rate is shown at the first's.
    assert rates == {"rates": [10, 2.5, 10]}
    only_first = windows._replace(video=windows.video[:1], start=windows.start[:1])
    assert data.clip_rates(shards, only_first, config()) == {}


# -------------------------------------------------------------------- loader workers
@pytest.fixture(autouse=True)
def no_old_loaders():
    """A loader that waits for the garbage collector would be collected in forked workers too."""
    gc.collect()


def source_with(make_shards, getitem, monkeypatch, **values):
    """Batches of two loader workers, which run `getitem` in place of reading batch k."""
    monkeypatch.setattr(FrameTriples, "__getitem__", lambda self, k: getitem(k))
    cfg = config(data__workers=2, data__hue=0.1, data__image_size=8, **values)
    source = FrameTriples(cfg, Shards(make_shards([20])))
    return source.batches(0, 100, lambda x: x[:, :, :2, :2], torch.device("cpu"))


def frames_and_gaps():
    return np.zeros((8, 3, 8, 8, 3), np.uint8), np.ones((8, 1), np.float32)


@pytest.mark.parametrize(
    "end, message",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"killed by SIGKILL, usually for lack of m"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), r"killed by SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"by SIGBUS, usually because /dev/shm is f"),
        (lambda: os._exit(3), r"loader worker \(pid \d+\) ended with exit code 3"),
        (lambda: os._exit(0), r"loader worker \(pid \d+\) ended with exit code 0"),
        (lambda: time.sleep(60), r"no loader worker gave a batch in 2 seconds"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_a_failure_that_names_the_checkpoint(
    make_shards, tmp_path, monkeypatch, end, message
):
    def getitem(k):
        if k == 4:
            end()
        return frames_and_gaps()

    monkeypatch.setattr("batches.workers.TIMEOUT", 2)
    dir = tmp_path / "checkpoints/mine"
    dir.mkdir(parents=True)
    (dir / "step_00000200.pt").touch()
    output = {"output__root": str(tmp_path), "output__run_id": "mine"}
    text = failure_of(source_with(make_shards, getitem, monkeypatch, **output))
    assert re.search(message, text) and "\n" not in text
    assert f"last good checkpoint is {dir}/step_00000200.pt" in text
    assert "set data.workers lower" in text


def failure_of(source) -> str:
    """The error of a training on batches of a source. The training never sees it elsewhere."""
    with pytest.raises(Failure) as caught:
        while True:
            batch = next(source)
            time.sleep(0.02)
            del batch
    return str(caught.value)


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (ValueError("two\nlines"), Failure, "a loader worker failed: .*lines; data.workers=0"),
        (KeyError("name"), Failure, "a loader worker failed: KeyError: 'name'"),
        (MemoryError(), Failure, "a loader worker failed: MemoryError"),
        (OSError(5, "Input/output error"), Failure, "worker failed: OSError: .*Input/output error"),
        (UserError("shard_0001.hdf5: damaged"), UserError, "^shard_0001.hdf5: damaged$"),
    ],
)
def test_an_exception_in_a_worker_is_one_line(make_shards, monkeypatch, error, kind, message):
    def getitem(k):
        raise error

    with pytest.raises(kind, match=message) as caught:
        list(source_with(make_shards, getitem, monkeypatch))
    assert "\n" not in str(caught.value)


def test_a_dead_worker_is_not_reported_inside_an_update(make_shards, monkeypatch):
    """torch would raise at whatever line of the training the signal arrives."""
    before = set(multiprocessing.active_children())
    source = source_with(make_shards, lambda k: frames_and_gaps(), monkeypatch)
    next(source)
    # The training kills a worker and sees that it has ended, without an exception.
    worker = (set(multiprocessing.active_children()) - before).pop()
    worker.kill()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    with pytest.raises(Failure, match="was killed by SIGKILL"):
        next(source)


def test_shared_memory_that_is_too_small_is_found_before_any_work(monkeypatch):
    """Docker's 64 MB, and the published settings of CLEVRER: 256 items of 3 frames of 128 px."""
    size = {"data__image_size": 128, "train__batch_size": 256}
    cfg = config(data__workers=4, data__hue=0.1, **size)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    batch = 256 * 3 * 128 * 128 * 3
    assert 10 * batch < shared_memory_bytes(cfg) < 10.1 * batch

    def room(free):
        return lambda _: types.SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", room(64 << 20))
    message = r"/dev/shm has 67.1 MB of free space.*data.workers=4.* need 377.*--shm-size=1g"
    with pytest.raises(UserError, match=message):
        check_shared_memory(cfg)
    check_shared_memory(config(data__workers=0, **size))
    monkeypatch.setattr(os, "statvfs", room(400 << 20))
    check_shared_memory(cfg)
    # Two processes of torchrun share the room.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="need 755"):
        check_shared_memory(cfg)
