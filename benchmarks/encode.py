"""Frames per second through a published VQVAE's encoder: as it was used, and as it is used here.

    python -m benchmarks.encode

The plain way is float32, contiguous, eager. Beside it: channels last in memory, bf16, torch.compile. Which of them a run takes
is vqvae.freeze's choice: channels last, and bf16 where the hardware multiplies in it. A JSON line comes last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import vqvae
from benchmarks import results
from models import autoencoders
from runtime.console import UserError, progress, run_command
from runtime.process import start, uses_bf16

SIZES = {
    "taming_f8_small": 64,
    "taming_f8": 256,
    "taming_f16": 256,
    "river": 128,
}  # pixels of the frames they were made for


def ways(kind: str, device: torch.device, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """name -> encode"""
    found = {}
    plain = autoencoders.build(kind).to(device).eval().requires_grad_(False)
    found["float32, contiguous"] = plain.encode
    for precision in ("float32", "bf16"):
        module = autoencoders.build(kind)
        module.load_state_dict(plain.state_dict())
        module = vqvae.freeze(module, device, precision)
        found[f"{precision}, channels last"] = module.encode
        if compiled:
            found[f"{precision}, channels last, compiled"] = torch.compile(module.encode)
    return found


@torch.no_grad()
def rate(encode: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> tuple[float, Tensor]:
    """(frames per second, latents), the median over repeats after one for warming up."""
    z, seconds = encode(x), []
    for _ in range(repeats):
        synchronize(x.device)
        began = time.perf_counter()
        encode(x)
        synchronize(x.device)
        seconds.append(time.perf_counter() - began)
    return len(x) / median(seconds), z.float()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--kind",
        default="taming_f8_small",
        help=f"{', '.join(SIZES)} (default taming_f8_small, KTH's)",
    )
    parser.add_argument("--batch", type=int, default=32, help="frames at once (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each (default 5)")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile too (minutes of compiling)"
    )
    parser.add_argument("--out", type=Path, default=results.HERE, help="folder for RESULTS.md")
    args = parser.parse_args()
    if args.kind not in SIZES:
        raise UserError(f"--kind must be one of {', '.join(SIZES)}, got {args.kind!r}")
    device, size = start().device, SIZES[args.kind]
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, size, size, device=device) * 2 - 1
    rows, line, reference = [], {}, None
    found = ways(args.kind, device, args.compile)
    with progress(len(found), "encode", "way") as bar:
        for name, encode in found.items():
            like = x if "contiguous" in name else x.contiguous(memory_format=torch.channels_last)
            speed, z = rate(encode, like, args.repeats)
            reference = z if reference is None else reference
            error = ((z - reference).norm() / reference.norm()).item()
            ratio = speed / rows[0][1] if rows else 1.0
            rows.append((name, speed, ratio, error))
            line[name] = {
                "frames_per_second": round(speed, 2),
                "ratio": round(ratio, 3),
                "relative_error": error,
            }
            bar.update()
    table = ["| way | frames/s | ratio | relative error of the latents |", "|---|---|---|---|"]
    table += [
        f"| {name} | {speed:.1f} | {ratio:.2f} | {error:.1e} |"
        for name, speed, ratio, error in rows
    ]
    fast = "bf16" if uses_bf16("auto", device) else "float32"
    text = (
        f"{args.kind}, batches of {args.batch} frames of {size} px, weights as initialised. {results.machine()}. The "
        f"default here is {fast}, channels last; `--set train.precision=float32` forces float32.\n\n"
        + "\n".join(table)
    )
    print(text, f"\ntable          {results.write('Encoding frames', text, args.out)}")
    print(
        json.dumps(
            {"benchmark": "encode", "kind": args.kind, "machine": results.machine(), "ways": line}
        )
    )


if __name__ == "__main__":
    run_command(main)
