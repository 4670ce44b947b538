"""Make the small checkpoint that `python sample.py` samples from by default.

    python main.py --set output.run_id=demo
    python -m scripts.export_demo --ckpt outputs/checkpoints/demo/latest.pt

The checkpoint of a finished run is reduced to the averaged weights and the autoencoder, in float16.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import configs
from runtime import checkpoints
from runtime.console import UserError, run_command
from runtime.folders import write_atomically
from sample import DEMO

# The file is committed to the repository, so it must be small.
MAX_BYTES = 3_000_000


def to_half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the floating-point tensors of a state dict to float16."""
    return {
        name: value.half() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def reduce(state: dict, path: str | Path) -> dict:
    """Reduce a checkpoint of main.py to the parts that sampling needs. UserError if the run is not
    finished, or if the checkpoint does not contain the autoencoder."""
    lacking = {"ema", "vqvae", "config", "step"} - state.keys()
    if lacking:
        raise UserError(f"{path}: not a checkpoint with its autoencoder (no {min(lacking)})")
    config = configs.from_dict(state["config"])
    if state["step"] < config.train.steps:
        raise UserError(
            f"{path}: {state['step']} of {config.train.steps} updates are done; finish the run"
        )
    # Paths of the machine that trained the network are meaningless elsewhere.
    config = configs.update(config, {"output.root": "outputs", "output.run_id": "demo"})
    return {
        "ema": to_half(state["ema"]),
        "vqvae": to_half(state["vqvae"]),
        "step": state["step"],
        "config": configs.to_dict(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export_demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint of a finished run of main.py")
    parser.add_argument("--out", default=str(DEMO), help="file to write; default: %(default)s")
    args = parser.parse_args()
    file = io.BytesIO()
    torch.save(reduce(checkpoints.load_checkpoint(args.ckpt), args.ckpt), file)
    size = file.tell()
    if size > MAX_BYTES:
        raise UserError(
            f"{args.ckpt}: {size / 1e6:.1f} MB in float16, at most {MAX_BYTES / 1e6:.0f} MB are "
            "allowed; train a smaller network, e.g. --set model.width=48"
        )
    with write_atomically(args.out) as out:
        out.write(file.getbuffer())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_command(main)
