"""PLAICraft, recorded sessions of Minecraft as latents of Stable Diffusion's autoencoder, to latent shards.

    python -m prepare.plaicraft --source PLAICRAFT --out data/plaicraft

The source holds global_database.db and, in whatever folders, <session_id>/encoded_video/<number>.pt: 100 latents (4, 96, 160)
each, 10 a second. A session becomes one video, or several where files are missing or broken; sessions lie in the order of their
start. Train, val and test are split by player. Nobody's name gets into what is written (a digest stands for it), and e-mail
addresses are not even read.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import re
import sqlite3
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from prepare import build
from prepare.decode import Broken, crop_boxes
from prepare.sources import Found, Source, Video, content, digest, hidden
from runtime.console import UserError, first_line, run_command

DATABASE, TABLE, FOLDER = "global_database.db", "session_metadata", "encoded_video"
COLUMNS = (
    "session_id",
    "player_name",
    "frame_count",
    "fps",
    "video",
)  # player_email stays where it is
RATE, LATENT, PER_FILE = 10.0, (4, 96, 160), 100  # latents per second; shape of one; in a file
DECODE_BATCH = 4  # latents decoded at a time: frames of 768x1280 take their room
PIP = "pip install diffusers"


class Session(NamedTuple):
    """A row of the database, less what names somebody."""

    id: str
    label: str  # what is written for it
    player: str  # see `identity`
    latents: int | None  # as the database has it, None where it does not say


# ---------------------------------------------------------------------------------------------------------- database
def identity(name: object) -> str:
    """Who `Alice` and ` alice` are."""
    return str(name or "").strip().casefold()


def digest_of(player: str) -> str:
    """What stands for a player in the manifest, and may stand for one in flags."""
    return hashlib.sha256(f"player {player}".encode()).hexdigest()[:12]


def label(text: str, players: set[str]) -> str:
    """`text`, if nobody's name or address is in it, else a digest of it."""
    hides = "@" in text or any(player in text.casefold() for player in players)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if hides else text


def read_sessions(root: Path) -> tuple[list[Session], set[str], int]:
    """Sessions with video in the order of their start, every player, and how many sessions have no video."""
    path = root / DATABASE
    if not path.is_file():
        raise UserError(
            f"{root}: holds no {DATABASE}; --source is the folder with it and the sessions"
        )
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
        try:
            rows = connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM {TABLE} ORDER BY start_time, session_id"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); need a table {TABLE} with {', '.join(COLUMNS)} and "
            "start_time"
        ) from None
    players = {identity(row[1]) for row in rows} - {""}
    filmed = [
        row for row in rows if str(row[4] or "").strip().lower() not in ("", "0", "false", "none")
    ]
    sessions = [
        Session(str(id), label(str(id), players), identity(name), latents_in(frames, fps))
        for id, name, frames, fps, _ in filmed
    ]
    return sessions, players, len(rows) - len(filmed)


def latents_in(frames: object, fps: object) -> int | None:
    """How many latents a video of so many frames has."""
    numbers = (
        isinstance(frames, (int, float))
        and isinstance(fps, (int, float))
        and frames > 0
        and fps > 0
    )
    return int(frames / fps * RATE) if numbers else None


# ------------------------------------------------------------------------------------------------------------- splits
def split_of(player: str, named: dict[str, str], shares: dict[str, float]) -> str:
    """The split of a player: the one named in flags, else by a hash of the name, so that whoever joins moves nobody else."""
    if player in named:
        return named[player]
    place = int.from_bytes(hashlib.sha256(f"split {player}".encode()).digest()[:8], "big") / 2**64
    if place < shares["test"]:
        return "test"
    return "val" if place < shares["test"] + shares["val"] else "train"


def named_splits(args: argparse.Namespace, players: set[str]) -> dict[str, str]:
    """{player: split} of --test_players and --val_players, names or digests; from here on, the flags hold digests."""
    known, named = {digest_of(player): player for player in players}, {}
    for split in ("test", "val"):
        flag = f"{split}_players"
        for given in getattr(args, flag) or ():
            player = known.get(given, identity(given))
            if player not in players:
                raise UserError(
                    f"--{flag} {given}: no player of that name (or digest) in {DATABASE}"
                )
            if named.setdefault(player, split) != split:
                raise UserError(f"{given} is in --test_players and in --val_players")
        if getattr(args, flag):
            setattr(
                args, flag, sorted(digest_of(player) for player in named if named[player] == split)
            )
    return named


# -------------------------------------------------------------------------------------------------------------- files
def session_folders(root: Path) -> dict[str, list[Path]]:
    """{session_id: its encoded_video folders}."""
    found: dict[str, list[Path]] = {}
    for folder, folders, _ in os.walk(root):
        folders[:] = sorted(name for name in folders if not hidden(name))
        if FOLDER in folders:
            folders.remove(FOLDER)
            found.setdefault(os.path.basename(folder), []).append(Path(folder, FOLDER))
    return found


def numbered(folder: Path) -> tuple[list[tuple[int, Path]], list[tuple[str, str]]]:
    """The .pt files by the last number in their names, and (name, reason) of those that have none or another's."""
    by_number: dict[int, list[Path]] = {}
    bad = []
    for path in sorted(
        path for path in folder.iterdir() if path.suffix == ".pt" and not hidden(path.name)
    ):
        digits = re.findall(r"\d+", path.stem, re.ASCII)
        if digits:
            by_number.setdefault(int(digits[-1]), []).append(path)
        else:
            bad.append((path.name, "no number in its name"))
    for number, paths in by_number.items():
        bad += [
            (path.name, f"one of {len(paths)} files with the number {number}")
            for path in paths
            if len(paths) > 1
        ]
    return sorted((number, paths[0]) for number, paths in by_number.items() if len(paths) == 1), bad


def files_of(session: Session, folder: Path, split: str, players: set[str]) -> Found:
    """A source for each .pt file; those that lie next to each other make one video."""
    files, bad = numbered(folder)
    bad = [(f"{session.label}/{label(name, players)}", reason) for name, reason in bad]
    if not files:
        return Found([], [*bad, (session.label, f"no .pt file in its {FOLDER}")])
    steps = sorted(after - before for (before, _), (after, _) in zip(files, files[1:]))
    usual = (
        steps[len(steps) // 2] if steps else 1
    )  # 1, or 100 where files are numbered by their first latents
    if files[0][0] not in (0, 1, usual):
        bad.append(
            (
                session.label,
                f"its first file has the number {files[0][0]}: those before it are missing",
            )
        )
    sources, part, last = [], 0, files[-1][0]
    for k, (number, path) in enumerate(files):
        if k and number - files[k - 1][0] != usual:
            bad.append(
                (
                    f"{session.label}, between the numbers {files[k - 1][0]} and {number}",
                    "files are missing; what comes behind them is another video",
                )
            )
            part += 1
        stat = path.stat()
        sources.append(
            Source(
                f"{session.label}/{label(path.name, players)}",
                split,
                str(path),
                size=stat.st_size,
                stamp=stat.st_mtime_ns,
                detail=(number == last,),
                video=f"{session.label}#{part}",
            )
        )
    return Found(sources, bad)


def find_sources(args: argparse.Namespace) -> tuple[Found, list[dict]]:
    """-> the files to read, and what the manifest says of each session."""
    root = Path(args.source)
    sessions, players, silent = read_sessions(root)
    named, folders = named_splits(args, players), session_folders(root)
    shares, found, facts, seen, short = (
        {"test": args.test_share, "val": args.val_share},
        Found(),
        [],
        set(),
        [],
    )
    for session in sessions:
        places = folders.get(session.id, [])
        wrong = (
            "is twice in the database"
            if session.id in seen
            else f"no folder {session.label}/{FOLDER} below the source"
            if not places
            else f"has {len(places)} folders {FOLDER}"
            if len(places) > 1
            else "no player_name: it could be anybody's of another split"
            if not session.player
            else None
        )
        seen.add(session.id)
        if wrong:
            found.broken.append((session.label, wrong))
            continue
        split = split_of(session.player, named, shares)
        part = files_of(session, places[0], split, players)
        found = Found(found.sources + part.sources, found.broken + part.broken)
        short += [session.label] * (
            len(part.sources) * args.per_file + args.per_file < (session.latents or 0)
        )
        facts.append(
            {
                "session": session.label,
                "player": digest_of(session.player),
                "split": split,
                "files": len(part.sources),
                "latents_by_database": session.latents,
            }
        )
    tell(root, found, silent, set(folders) - seen, short)
    return found, facts


def tell(root: Path, found: Found, silent: int, unknown: set[str], short: list[str]) -> None:
    if not found.sources:
        reasons = "".join(f"; {name}: {reason}" for name, reason in found.broken[:1])
        raise UserError(f"{root}: not one .pt file of a session that {DATABASE} knows{reasons}")
    if silent:
        print(f"{root}: sessions without video, by {DATABASE}: {silent:,}")
    if unknown:
        print(f"{root}: session folders that {DATABASE} does not know, left out: {len(unknown):,}")
    if short:
        print(
            f"{root}: sessions with fewer files than their frame_count asks for: {len(short):,}, {short[0]} the first"
        )
    for split in build.SPLITS:
        if not any(source.split == split for source in found.sources):
            print(f"{root}: no player is in {split}; name some by --test_players and --val_players")


# ------------------------------------------------------------------------------------------------------------ reading
def read(source: Source, args: argparse.Namespace) -> Video:
    """One .pt file: its latents, or the frames that they are decoded to; raises Broken."""
    data = content(source)
    latents = checked(
        tensor_in(data), tuple(args.latent_shape), args.per_file, last=source.detail[0]
    )
    clip = decode(latents, args) if args.decode else latents
    return Video(digest([data]), [clip], len(clip), RATE)


def tensor_in(data: bytes):
    """The tensor in a .pt file, which runs nothing of what else may be in it; raises Broken."""
    import torch  # only here and for --decode: what else prepares data needs no torch, and starts seconds sooner

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise Broken(f"not a whole file of tensors ({first_line(error)[:120]})") from None
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    if len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
        raise Broken(f"holds {type(found).__name__}, not one tensor")
    return tensors[0]


def checked(tensor, shape: tuple[int, ...], per_file: int, last: bool) -> np.ndarray:
    """(n, C, h, w) float16; raises Broken for what a file of a session is not."""
    import torch

    if (
        tuple(tensor.shape[1:]) != shape
        or not tensor.is_floating_point()
        or tensor.layout != torch.strided
    ):
        raise Broken(
            f"a tensor of {tuple(tensor.shape)}, {tensor.dtype}; need (n, {', '.join(map(str, shape))}) of floats"
        )
    n = len(tensor)
    if not 0 < n <= per_file or (n < per_file and not last):
        raise Broken(f"{n} latents, need {per_file}" + " or fewer, it is the last" * last)
    latents = tensor.detach().to(torch.float16).numpy()
    if not np.isfinite(latents).all():
        raise Broken("values that are not finite (as float16)")
    return latents


# ----------------------------------------------------------------------------------------------------------- decoding
@functools.lru_cache(1)
def autoencoder(folder: str, workers: int):
    """diffusers' AutoencoderKL from a local folder, which may be that of a whole pipeline: weights as numbers only."""
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        module.to(device, torch.float16 if device == "cuda" else torch.float32)
        .eval()
        .requires_grad_(False)
    )


def decode(latents: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """(n, C, h, w) float16 -> frames (n, size, size, 3) uint8."""
    import torch

    module, frames = autoencoder(args.decode, args.workers), []
    weight = next(module.parameters())
    scale = module.config.scaling_factor if args.scaled else 1.0
    for start in range(0, len(latents), DECODE_BATCH):
        z = (
            torch.from_numpy(latents[start : start + DECODE_BATCH]).to(weight.device, torch.float32)
            / scale
        )
        with torch.no_grad():
            x = module.decode(z.to(weight.dtype)).sample
        pixels = (
            (x.float() + 1)
            .mul(127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .permute(0, 2, 3, 1)
            .cpu()
            .numpy()
        )
        frames += [resized(picture, args.image_size, args.crop) for picture in pixels]
    return np.stack(frames)


def resized(picture: np.ndarray, size: int, crop: str) -> np.ndarray:
    image = Image.fromarray(picture)
    box = crop_boxes(*image.size, None)[0] if crop == "center" else None
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


# ------------------------------------------------------------------------------------------------------------ command
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m prepare.plaicraft", description=__doc__.splitlines()[0]
    )
    build.add_flags(parser, f"folder with {DATABASE} and the sessions, in whatever folders", 128)
    add = parser.add_argument
    for split in ("test", "val"):
        add(
            f"--{split}_players",
            nargs="+",
            metavar="NAME",
            help=f"who is in {split}, by name or by the manifest's digest",
        )
        add(
            f"--{split}_share",
            type=float,
            help=f"of the players who are not named, chosen by a hash of the name, for {split} "
            f"(default: 0.1, and 0 beside --{split}_players)",
        )
    add(
        "--decode",
        metavar="FOLDER",
        help=f"write frames: decode by the AutoencoderKL in this folder ({PIP}; on one GPU with "
        "--workers 1)",
    )
    add(
        "--scaled",
        action="store_true",
        help="the latents are multiplied by the autoencoder's scaling_factor",
    )
    add(
        "--latent_shape",
        type=int,
        nargs=3,
        default=list(LATENT),
        metavar="N",
        help="channels, height, width",
    )
    add(
        "--per_file",
        type=int,
        default=PER_FILE,
        help="latents in each .pt file but the last of a session",
    )
    args = build.check_flags(parser.parse_args(argv))
    for split in ("test", "val"):
        share = getattr(args, f"{split}_share")
        setattr(
            args,
            f"{split}_share",
            (0.0 if getattr(args, f"{split}_players") else 0.1) if share is None else share,
        )
    if min(args.test_share, args.val_share) < 0 or args.test_share + args.val_share > 1:
        raise UserError("--test_share and --val_share must be at least 0, and at most 1 together")
    if min(*args.latent_shape, args.per_file) < 1:
        raise UserError("--latent_shape and --per_file must be at least 1")
    if args.decode is None:
        args.image_size = args.crop = None  # of frames, which there are none of
    elif importlib.util.find_spec("diffusers") is None:
        raise UserError(
            f"--decode needs diffusers: {PIP}; without --decode the shards hold latents"
        )
    return args


def make(args: argparse.Namespace) -> dict:
    found, sessions = find_sources(args)
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", *["diffusers"] * bool(args.decode))
    }
    rule = f"no player in two splits: {args.test_share:g} test and {args.val_share:g} val by a hash of the name"
    rule += ", but for those named in flags" * bool(args.test_players or args.val_players)
    recipe = build.Recipe(
        "PLAICraft",
        "prepare.plaicraft",
        read,
        rule,
        20,
        "frames" if args.decode else "latents",
        "file",
        "" if args.decode else "latents as they are, float16",
        versions,
        {"sessions": sessions},
    )
    return build.make(recipe, found, args)


def main() -> int:
    args = parse()
    code = build.report(make(args), args, "file")
    if not args.decode:
        print(
            f"  these are latents; frames: --decode FOLDER, where an AutoencoderKL of diffusers lies ({PIP})"
        )
    return code


if __name__ == "__main__":
    run_command(main)
