"""What the benchmarks of speed share: median times, matrix rate, peak memory, KTH-like shards."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import models
from configs import Config

CLIP = Path(__file__).parent.parent / "tests/data/walk.mp4"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int, warmup: int = 1, calls: int = 10
) -> float:
    """Seconds per call: the median over `repeats` blocks of `calls` calls, after `warmup` calls.

    The device is synchronised only before and after a block, so that the host launches a call while
    the GPU still computes the previous one, as in training. On a CPU, where a call returns when it
    is done, a block is one call.
    """
    if device.type != "cuda":
        calls = 1
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        taken.append((time.perf_counter() - began) / calls)
    return median(taken)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of large square matrices.

    The size doubles until a product takes a twentieth of a second, because bf16 can be a thousand
    times slower on a CPU without support for it.
    """
    largest = 8192 if device.type == "cuda" else 3072
    n = 512
    while True:
        a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
        taken = median_seconds(lambda a=a, b=b: a @ b, device, 5, 2)
        if taken > 0.05 or 2 * n > largest:
            return 2 * n**3 / taken
        n *= 2


def flops_per_update(config: Config) -> int:
    """Floating-point operations of an update of the velocity network, forward and backward pass,
    as torch.utils.flop_counter counts them: products and sums of convolutions, matrices and
    attention. config.latent must hold the shape of the latents.
    """
    # Imported late, because the GPU benchmarks must run without what the training imports.
    from train import OWN_EVALUATIONS

    C, h, w = config.latent.shape
    flow, train = config.flow, config.train
    rows, frames = flow.draws + (flow.start > 0), 1
    if flow.objective == "energy":
        rows, frames = flow.members * flow.evaluations, flow.unroll
    with torch.device("meta"):
        net = models.build(config.model.name, config.latent.shape, **config.network_sizes)
        z, s = torch.zeros(rows, C, h, w), torch.zeros(rows)
        given = torch.zeros(1, config.data.contexts, C, h, w)
        gaps = torch.ones(1, config.data.contexts)
        with FlopCounterMode(display=False) as counter:
            out = net(z, s, given[:, 0], given, gaps)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
    per_item = frames * (forward + counter.get_total_flops())
    if train.own:
        # Forecasts in place of the given frames, of a row each, without a backward pass.
        per_item += OWN_EVALUATIONS * forward // rows // train.own
    if flow.objective == "shortcut":
        # Of some items three evaluations more, one of them with a backward pass.
        per_item += (per_item + 2 * forward) // rows // flow.consistency
    return per_item * train.batch_size


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: allocated on the GPU, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_walk(size: int) -> np.ndarray:
    """The frames of tests/data/walk.mp4, resized: (T, size, size, 3) uint8."""
    # Imported late, because the GPU benchmarks must run without PyAV.
    import av

    frames = []
    with av.open(str(CLIP), metadata_errors="ignore") as file:
        for frame in file.decode(video=0):
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            frames.append(np.asarray(image.resize((size, size))))
    return np.stack(frames)


def write_river_shards(dir: Path, videos: int, length: int, size: int = 64) -> Path:
    """Write a split in RIVER's layout, unless it exists; return its folder.

    Each frame is a compressed dataset, as in KTH's published shards.
    """
    path = dir / "train" / "shard_0001.hdf5"
    if path.exists():
        return path.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = read_walk(size)
    temporary = path.with_suffix(".tmp")
    with h5py.File(temporary, "w") as file:
        for v in range(videos):
            file[f"len/{v}"] = length
            for t in range(length):
                # Videos differ by their first frame and by a horizontal shift.
                frame = np.roll(frames[(t + 7 * v) % len(frames)], v % size, 1)
                file.create_dataset(f"{v}/{t}", data=frame, compression="lzf")
    temporary.rename(path)
    return path.parent
