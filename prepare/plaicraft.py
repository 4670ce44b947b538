"""Convert PLAICraft (Minecraft sessions, stored as Stable Diffusion latents) to latent shards.

    python -m prepare.plaicraft --source PLAICRAFT --out data/plaicraft

The source folder contains global_database.db and, at any depth, the files
<session_id>/encoded_video/<number>.pt. Each .pt file has 100 latents of shape (4, 96, 160), at 10
latents per second. A session becomes one video, or several videos if files are missing or broken.
Sessions are sorted by start time. Train, val and test are split by player. Player names are
replaced by digests in all output, and e-mail addresses are not read.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from prepare import build
from prepare.decode import Broken, crop_boxes
from prepare.plaicraft_sessions import DATABASE, RATE, find_sources
from prepare.sources import Source, Video, digest, read_content
from runtime.console import UserError, first_line, run_command

LATENT = (4, 96, 160)  # shape of one latent: channels, height, width
PER_FILE = 100  # latents per .pt file
DECODE_BATCH = 4  # latents per decoding step; small because frames are 768x1280
PIP = "pip install diffusers"


# ------------------------------------------------------------------------------------------ reading
def read(source: Source, args: argparse.Namespace) -> Video:
    """Read one .pt file as latents, or as decoded frames with --decode; raises Broken."""
    data = read_content(source)
    tensor = load_tensor(data)
    latents = check_latents(tensor, tuple(args.latent_shape), args.per_file, last=source.detail[0])
    clip = decode(latents, args) if args.decode else latents
    return Video(digest([data]), [clip], len(clip), RATE)


def load_tensor(data: bytes):
    """Load the tensor of a .pt file without running any code in the file; raises Broken."""
    # A late import: only this script needs torch, and torch takes seconds to import.
    import torch

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A damaged or hostile file can raise any exception.
    except Exception as error:
        raise Broken(f"not a whole file of tensors ({first_line(error)[:120]})") from None
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
        raise Broken(f"holds {type(found).__name__}, not one tensor")
    return tensors[0]


def check_latents(tensor, shape: tuple[int, ...], per_file: int, last: bool) -> np.ndarray:
    """Check the tensor of a file and convert it to an array (n, C, h, w) float16; raises Broken.

    last: whether the file is the last one of its session and may have fewer latents.
    """
    import torch

    if (
        tuple(tensor.shape[1:]) != shape
        or not tensor.is_floating_point()
        or tensor.layout != torch.strided
    ):
        need = f"(n, {', '.join(map(str, shape))}) of floats"
        raise Broken(f"a tensor of {tuple(tensor.shape)}, {tensor.dtype}; need {need}")
    n = len(tensor)
    if not 0 < n <= per_file or (n < per_file and not last):
        or_fewer = " or fewer in the last file" if last else ""
        raise Broken(f"{n} latents, need {per_file}{or_fewer}")
    latents = tensor.detach().to(torch.float16).numpy()
    if not np.isfinite(latents).all():
        raise Broken("values that are not finite (as float16)")
    return latents


# ----------------------------------------------------------------------------------------- decoding
@functools.lru_cache(1)
def autoencoder(folder: str, workers: int):
    """Load diffusers' AutoencoderKL from its local folder, or from the folder of a whole pipeline.

    Only safetensors files are loaded, because they cannot contain code.
    """
    import torch

    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError(f"--decode needs diffusers: {PIP}") from None
    path = Path(folder, "vae") if Path(folder, "vae", "config.json").is_file() else Path(folder)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    try:
        module = AutoencoderKL.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--decode {folder}: not the folder of an AutoencoderKL ({first_line(error)[:160]})"
        ) from None
    # float16 halves time and memory on a GPU; CPUs compute it slowly or not at all.
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    return module.to(device, dtype).eval().requires_grad_(False)


def decode(latents: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Decode latents (n, C, h, w) float16 to frames (n, size, size, 3) uint8."""
    import torch

    module = autoencoder(args.decode, args.workers)
    weight = next(module.parameters())
    scale = module.config.scaling_factor if args.scaled else 1.0
    frames = []
    for start in range(0, len(latents), DECODE_BATCH):
        z = torch.from_numpy(latents[start : start + DECODE_BATCH])
        z = z.to(weight.device, torch.float32) / scale
        with torch.no_grad():
            x = module.decode(z.to(weight.dtype)).sample
        # From floats in [-1, 1] to bytes, channels last.
        pixels = (x.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        for picture in pixels.permute(0, 2, 3, 1).cpu().numpy():
            frames.append(resize(picture, args.image_size, args.crop))
    return np.stack(frames)


def resize(picture: np.ndarray, size: int, crop: str) -> np.ndarray:
    """Resize a picture (H, W, 3) uint8, or its centre square, to (size, size, 3)."""
    image = Image.fromarray(picture)
    box = crop_boxes(*image.size, None)[0] if crop == "center" else None
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


# ------------------------------------------------------------------------------------------ command
def add_flags(parser: argparse.ArgumentParser) -> None:
    build.add_flags(parser, f"folder with {DATABASE} and the sessions, at any depth", 128)
    add = parser.add_argument
    for split in ("test", "val"):
        add(
            f"--{split}_players",
            nargs="+",
            metavar="NAME",
            help=f"players of {split}, by name or by the manifest's digest",
        )
        add(
            f"--{split}_share",
            type=float,
            help=f"share of the other players, chosen by a hash of the name, for {split} "
            f"(default: 0.1, or 0 with --{split}_players)",
        )
    add(
        "--decode",
        metavar="FOLDER",
        help=f"write frames: decode with the AutoencoderKL in this folder ({PIP}; on one GPU use "
        "--workers 1)",
    )
    scaled = "state that the stored latents are multiplied by the autoencoder's scaling_factor"
    add("--scaled", action="store_true", help=scaled)
    shape = "channels, height, width"
    add("--latent_shape", type=int, nargs=3, default=list(LATENT), metavar="N", help=shape)
    per_file = "latents per .pt file; the last file of a session may have fewer"
    add("--per_file", type=int, default=PER_FILE, help=per_file)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.plaicraft", description=__doc__.splitlines()[0]
    )
    add_flags(parser)
    args = build.check_flags(parser.parse_args(argv))
    if args.test_share is None:
        args.test_share = 0.0 if args.test_players else 0.1
    if args.val_share is None:
        args.val_share = 0.0 if args.val_players else 0.1
    if min(args.test_share, args.val_share) < 0 or args.test_share + args.val_share > 1:
        raise UserError("--test_share and --val_share must be at least 0, and at most 1 together")
    if min(*args.latent_shape, args.per_file) < 1:
        raise UserError("--latent_shape and --per_file must be at least 1")
    if args.decode is None:
        # Both flags describe frames. None are written, so the manifest must not state them.
        args.image_size = args.crop = None
    elif importlib.util.find_spec("diffusers") is None:
        raise UserError(
            f"--decode needs diffusers: {PIP}; without --decode the shards hold latents"
        )
    return args


def make(args: argparse.Namespace) -> dict:
    found, sessions = find_sources(args)
    packages = ["torch", "diffusers"] if args.decode else ["torch"]
    rule = (
        f"no player in two splits: {args.test_share:g} test and {args.val_share:g} val by a hash "
        "of the name"
    )
    if args.test_players or args.val_players:
        rule += ", but for those named in flags"
    # A source is a file of ten seconds, so a shard has several files, and sessions span shards.
    recipe = build.Recipe(
        dataset="PLAICraft",
        module="prepare.plaicraft",
        read=read,
        split_rule=rule,
        per_shard=20,
        key="frames" if args.decode else "latents",
        unit="file",
        frame_rule="" if args.decode else "latents as they are, float16",
        versions={name: importlib.metadata.version(name) for name in packages},
        facts={"sessions": sessions},
    )
    return build.make(recipe, found, args)


def main() -> int:
    args = parse()
    code = build.report(make(args), args, "file")
    if not args.decode:
        print(
            "  these are latents; for frames add --decode FOLDER, the folder of a diffusers "
            f"AutoencoderKL ({PIP})"
        )
    return code


if __name__ == "__main__":
    run_command(main)
