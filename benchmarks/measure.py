"""What the benchmarks of speed share: medians, the machine's matrix rate, peak memory, and KTH-like shards of real video."""

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

CLIP = Path(__file__).parent.parent / "tests/data/walk.mp4"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    work: Callable[[], object], device: torch.device, repeats: int, warmup: int = 1, calls: int = 10
) -> float:
    """Seconds per call: the median over `repeats` blocks of `calls`, after `warmup` calls. The
    device is synchronised around a block only, so that a call is launched while the GPU still
    computes the one before, as in training. On a CPU, where a call returns when it is done, a
    block is one call."""
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
    """FLOP/s of a large product of square matrices: the largest that takes a twentieth of a second,
    since bf16 on a CPU without support for it can be a thousand times slower than with it."""
    largest = 8192 if device.type == "cuda" else 3072
    n = 512
    while True:
        a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
        taken = seconds(lambda a=a, b=b: a @ b, device, 5, 2)
        if taken > 0.05 or 2 * n > largest:
            return 2 * n**3 / taken
        n *= 2


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def frames_of_a_walk(size: int) -> np.ndarray:
    """(n, size, size, 3) uint8"""
    import av  # late: the benchmarks of GPUs run without it

    with av.open(str(CLIP), metadata_errors="ignore") as file:
        return np.stack(
            [
                np.asarray(Image.fromarray(frame.to_ndarray(format="rgb24")).resize((size, size)))
                for frame in file.decode(video=0)
            ]
        )


def river_shards(dir: Path, videos: int, length: int, size: int = 64) -> Path:
    """A split in RIVER's layout, a compressed dataset per frame, as KTH's published shards have it; kept if it is there."""
    path = dir / "train" / "shard_0001.hdf5"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        frames, temporary = frames_of_a_walk(size), path.with_suffix(".tmp")
        with h5py.File(temporary, "w") as file:
            for v in range(videos):
                file[f"len/{v}"] = length
                for t in range(length):
                    frame = np.roll(frames[(t + 7 * v) % len(frames)], v % size, 1)
                    file.create_dataset(f"{v}/{t}", data=frame, compression="lzf")
        temporary.rename(path)
    return path.parent
