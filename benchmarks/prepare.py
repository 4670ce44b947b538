"""Frames per second from raw video to shards: the plain loop, and prepare.frames and prepare.kth.

    python -m benchmarks.prepare

The plain loop opens, resizes and stores one frame after another, each as an HDF5 dataset of its own, packed by lzf, as RIVER's
shards are. Both read the same made-up data: PNGs and AVIs of 160x120 (KTH's size) cut from tests/data/walk.mp4; what they store
is compared. Times are those of the calls: ours with the start of its processes, both without Python's own start and imports. A
JSON line comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import h5py
import numpy as np
from PIL import Image

from prepare import frames, kth
from runtime.console import UserError, progress, run_command
from shards import Shards

HERE = Path(__file__).parent
WALK = HERE.parent / "tests/data/walk.mp4"
WIDTH, HEIGHT, SIZE = 160, 120, 64
FILES_PER_SHARD = 100  # of the plain loop


# --------------------------------------------------------------------------------------------------------------- data
def walk() -> np.ndarray:
    """(60, HEIGHT, WIDTH, 3) uint8."""
    with av.open(str(WALK)) as container:
        return np.stack(
            [
                np.asarray(frame.to_image().resize((WIDTH, HEIGHT)))
                for frame in container.decode(video=0)
            ]
        )


def clip(source: np.ndarray, k: int, length: int) -> np.ndarray:
    """`length` frames, to and fro from another frame in each clip, every second one mirrored."""
    there_and_back = np.concatenate([source, source[-2:0:-1]])[:, :, :: -1 if k % 2 else 1]
    return there_and_back[(7 * k + np.arange(length)) % len(there_and_back)]


def write_tree(folder: Path, videos: int, length: int) -> None:
    source = walk()
    for k in range(videos):
        video = folder / ("test" if k % 10 == 9 else "train") / f"{k:04d}"
        video.mkdir(parents=True)
        for t, frame in enumerate(clip(source, k, length)):
            Image.fromarray(frame).save(video / f"{t:05d}.png")


def write_avis(folder: Path, videos: int, length: int) -> None:
    """person01_walking_d1_uncomp.avi and so on, in MPEG-4 as KTH's are."""
    source = walk()
    folder.mkdir(parents=True)
    names = [
        f"person{p:02d}_{action}_d{d}_uncomp.avi"
        for p in range(1, 26)
        for action in kth.ACTIONS
        for d in range(1, 5)
    ]
    for k, name in enumerate(names[:videos]):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
                WIDTH,
                HEIGHT,
                "yuv420p",
                1_000_000,
            )
            for frame in clip(source, k, length):
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    )
                )
            container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------- plain loop
def images_in(video: Path) -> Iterator[Image.Image]:
    for path in sorted(video.iterdir()):
        yield Image.open(path).convert("RGB")


def frames_in(video: Path) -> Iterator[Image.Image]:
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def plain(videos: list[Path], out: Path, pictures: Callable[[Path], Iterator[Image.Image]]) -> None:
    out.mkdir(parents=True)
    for start in range(0, len(videos), FILES_PER_SHARD):
        with h5py.File(out / f"shard_{start // FILES_PER_SHARD + 1:04d}.hdf5", "w") as file:
            for k, video in enumerate(videos[start : start + FILES_PER_SHARD]):
                count = 0
                for image in pictures(video):
                    frame = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                    file.create_dataset(f"{k}/{count}", data=frame, compression="lzf")
                    count += 1
                file[f"len/{k}"] = count


def plain_tree(source: Path, out: Path) -> None:
    for split in ("train", "test"):
        if (source / split).is_dir():
            plain(sorted((source / split).iterdir()), out / split, images_in)


def plain_avis(source: Path, out: Path) -> None:
    groups: dict[str, list[Path]] = {}
    for path in sorted(source.iterdir()):
        groups.setdefault(kth.split_of("subjects", int(path.name[6:8]), 1), []).append(path)
    for split, videos in groups.items():
        plain(videos, out / split, frames_in)


# --------------------------------------------------------------------------------------------------------------- ours
def ours(module, source: Path, out: Path, workers: int) -> None:
    args = module.parse(
        [
            "--source",
            str(source),
            "--out",
            str(out),
            "--image_size",
            str(SIZE),
            "--workers",
            str(workers),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        module.make(args)


# ---------------------------------------------------------------------------------------------------------- measuring
def check_same(a: Path, b: Path) -> int:
    """-> how many frames; raises where a pixel differs."""
    total = 0
    for split in sorted(path.name for path in a.iterdir() if path.is_dir()):
        one, two = Shards(a / split), Shards(b / split)
        if one.lengths.tolist() != two.lengths.tolist():
            raise AssertionError(f"{split}: videos of {one.lengths} and of {two.lengths} frames")
        for video, length in enumerate(one.lengths):
            if (one.read(video, slice(None)) != two.read(video, slice(None))).any():
                raise AssertionError(f"{split}: the frames of video {video} differ")
            total += int(length)
    return total


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(name: str, ways: dict[str, Callable[[Path], None]], folder: Path, repeats: int) -> dict:
    """Seconds of each way, in turn, so that what else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    with progress(repeats * len(ways), name, "run") as bar:
        for _ in range(repeats):
            for way, run in ways.items():
                shutil.rmtree(folder / way, ignore_errors=True)
                began, used = time.perf_counter(), cpu_seconds()
                run(folder / way)
                seconds[way].append(time.perf_counter() - began)
                cpu[way].append(cpu_seconds() - used)
                bar.update()
    count = check_same(*(folder / way for way in ways))
    rates = {way: count / min(values) for way, values in seconds.items()}
    one, two = rates
    return {
        "data": name,
        "frames": count,
        "ratio": round(rates[two] / rates[one], 2),
        "frames_per_second": {way: round(rate, 1) for way, rate in rates.items()},
        "cpu_ms_per_frame": {
            way: round(1000 * min(values) / count, 3) for way, values in cpu.items()
        },
        "seconds": {way: [round(value, 2) for value in values] for way, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prepare", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--videos", type=int, default=80, help="of either kind (default 80)")
    add("--png_frames", type=int, default=120, help="of each folder of PNGs (default 120)")
    add(
        "--avi_frames",
        type=int,
        default=240,
        help="of each AVI (default 240; KTH's have 480 on average)",
    )
    add(
        "--repeats",
        type=int,
        default=3,
        help="timed runs of each, of which the quickest counts (default 3)",
    )
    add("--workers", type=int, default=2, help="processes of ours (default 2)")
    add("--out", type=Path, default=HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    for name, high in (
        ("videos", 600),
        ("png_frames", 10**5),
        ("avi_frames", 10**5),
        ("repeats", 100),
        ("workers", 256),
    ):
        if not 1 <= getattr(args, name) <= high:
            raise UserError(f"--{name} must be from 1 to {high}, got {getattr(args, name)}")
    from benchmarks import (
        results,
    )  # late: it imports torch, and each of our processes reads this file again

    rows = []
    with tempfile.TemporaryDirectory(prefix="prepare_") as temporary:
        folder = Path(temporary)
        write_tree(folder / "tree", args.videos, args.png_frames)
        write_avis(folder / "avis", args.videos, args.avi_frames)
        for name, source, loop, module in (
            ("PNG tree, prepare.frames", folder / "tree", plain_tree, frames),
            ("AVIs, prepare.kth", folder / "avis", plain_avis, kth),
        ):
            ways = {
                "plain": lambda out, source=source, loop=loop: loop(source, out),
                "ours": lambda out, source=source, module=module: ours(
                    module, source, out, args.workers
                ),
            }
            rows.append(measure(name, ways, folder, args.repeats))
    lines = [
        "| from | frames | plain loop, frames/s | ours, frames/s | ratio | plain, CPU ms/frame | ours, CPU ms/frame |",
        "| --- |" + " ---: |" * 6,
    ]
    for row in rows:
        rates = " | ".join(f"{row['frames_per_second'][way]:,.0f}" for way in ("plain", "ours"))
        cpu = " | ".join(f"{row['cpu_ms_per_frame'][way]:.2f}" for way in ("plain", "ours"))
        lines.append(
            f"| {row['data']} | {row['frames']:,} | {rates} | {row['ratio']:.1f} | {cpu} |"
        )
    text = (
        f"Raw frames of {WIDTH}x{HEIGHT} to shards of {SIZE}x{SIZE}, the same in both, bit for bit; ours with "
        f"{args.workers} processes, whose start is counted; the quickest of {args.repeats} runs each. Neither has "
        f"Python's own start and imports counted. {results.machine()}.\n\n" + "\n".join(lines)
    )
    print(text, f"\ntable          {results.write('Preparing data', text, args.out)}")
    print(
        json.dumps(
            {
                "benchmark": "prepare",
                "machine": results.machine(),
                "workers": args.workers,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    run_command(main)
