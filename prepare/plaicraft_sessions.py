"""Find the sessions of PLAICraft: the database, the split of each player, and the .pt files."""

from __future__ import annotations

import argparse
import hashlib
import re
import sqlite3
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from prepare import build
from prepare.sources import Found, Source, is_hidden, walk
from runtime.console import UserError, first_line

DATABASE, TABLE, FOLDER = "global_database.db", "session_metadata", "encoded_video"
# The column player_email is not read.
COLUMNS = ("session_id", "player_name", "frame_count", "fps", "video")
RATE = 10.0  # latents per second


class Session(NamedTuple):
    """A row of the database without personal data."""

    id: str
    label: str  # name of the session in the output
    player: str  # normalised name, see `identity`
    latents: int | None  # number of latents that the database states; None if it states none


# ----------------------------------------------------------------------------------------- database
def identity(name: object) -> str:
    """Normalise a player name: `Alice` and ` alice` are the same player."""
    return str(name or "").strip().casefold()


def digest_of(player: str) -> str:
    """Return the digest that replaces a player's name in the manifest; flags accept it too."""
    return hashlib.sha256(f"player {player}".encode()).hexdigest()[:12]


def make_label(text: str, players: set[str]) -> str:
    """Return `text`, or a digest of it if it contains a player name or an e-mail address."""
    personal = "@" in text or any(player in text.casefold() for player in players)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if personal else text


def read_sessions(root: Path) -> tuple[list[Session], set[str], int]:
    """Read the database.

    Returns the sessions with video sorted by start time, the set of all players, and the number of
    sessions without video.
    """
    path = root / DATABASE
    if not path.is_file():
        raise UserError(
            f"{root}: contains no {DATABASE}; --source is the folder with it and the sessions"
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
            f"{path}: cannot be read ({first_line(error)}); need a table {TABLE} with "
            f"{', '.join(COLUMNS)} and start_time"
        ) from None
    # Players of sessions without video count, too: their names must not appear in the output.
    players = {identity(row[1]) for row in rows} - {""}
    filmed = [
        row for row in rows if str(row[4] or "").strip().lower() not in ("", "0", "false", "none")
    ]
    sessions = [
        Session(str(id), make_label(str(id), players), identity(name), count_latents(frames, fps))
        for id, name, frames, fps, _ in filmed
    ]
    return sessions, players, len(rows) - len(filmed)


def count_latents(frames: object, fps: object) -> int | None:
    """Return the number of latents of a video with `frames` frames at `fps` frames per second."""
    for value in (frames, fps):
        if not isinstance(value, (int, float)) or not value > 0:
            return None
    return int(frames / fps * RATE)


# ------------------------------------------------------------------------------------------- splits
def split_of(player: str, named: dict[str, str], shares: dict[str, float]) -> str:
    """Return the split of a player: the one set by flags, else one chosen by a hash of the name.

    The hash keeps the split of a player when other players are added.
    """
    if player in named:
        return named[player]
    # A number in [0, 1) that depends on the name only.
    place = int.from_bytes(hashlib.sha256(f"split {player}".encode()).digest()[:8], "big") / 2**64
    if place < shares["test"]:
        return "test"
    return "val" if place < shares["test"] + shares["val"] else "train"


def named_splits(args: argparse.Namespace, players: set[str]) -> dict[str, str]:
    """Return {player: split} for --test_players and --val_players, which list names or digests.

    Replaces the values of both flags by digests, so that the manifest contains no name.
    """
    known = {digest_of(player): player for player in players}
    named: dict[str, str] = {}
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
            chosen = [digest_of(player) for player in named if named[player] == split]
            setattr(args, flag, sorted(chosen))
    return named


# -------------------------------------------------------------------------------------------- files
def session_folders(root: Path) -> dict[str, list[Path]]:
    """Return {session_id: encoded_video folders of the session}."""
    found: dict[str, list[Path]] = {}
    for folder, _ in walk(root):
        if folder.name == FOLDER:
            found.setdefault(folder.parent.name, []).append(folder)
    return found


def sort_by_number(folder: Path) -> tuple[list[tuple[int, Path]], list[tuple[str, str]]]:
    """Return the .pt files sorted by the last number in their names, and the rejected files.

    A file is rejected if its name has no number, or the number of another file: (name, reason).
    """
    by_number: dict[int, list[Path]] = {}
    bad = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".pt" or is_hidden(path.name):
            continue
        digits = re.findall(r"\d+", path.stem, re.ASCII)
        if digits:
            by_number.setdefault(int(digits[-1]), []).append(path)
        else:
            bad.append((path.name, "no number in its name"))
    # Which of two files with the same number is right is unknown, so both are rejected.
    files = []
    for number, paths in by_number.items():
        if len(paths) == 1:
            files.append((number, paths[0]))
            continue
        for path in paths:
            bad.append((path.name, f"one of {len(paths)} files with the number {number}"))
    return sorted(files), bad


def files_of(session: Session, folder: Path, split: str, players: set[str]) -> Found:
    """Return one source per .pt file; consecutive files belong to the same video."""
    files, bad = sort_by_number(folder)
    bad = [(f"{session.label}/{make_label(name, players)}", reason) for name, reason in bad]
    if not files:
        return Found([], [*bad, (session.label, f"no .pt file in its {FOLDER}")])
    steps = sorted(after - before for (before, _), (after, _) in zip(files, files[1:]))
    # The usual step is 1, or 100 if a file's number is the index of its first latent.
    usual = steps[len(steps) // 2] if steps else 1
    first, last = files[0][0], files[-1][0]
    if first not in (0, 1, usual):
        reason = f"its first file has the number {first}: the files before it are missing"
        bad.append((session.label, reason))
    sources = []
    part = 0
    for k, (number, path) in enumerate(files):
        # A new video starts after a gap in the numbers.
        if k and number - files[k - 1][0] != usual:
            gap = f"{session.label}, between the numbers {files[k - 1][0]} and {number}"
            bad.append((gap, "files are missing; the files after the gap are another video"))
            part += 1
        stat = path.stat()
        sources.append(
            Source(
                f"{session.label}/{make_label(path.name, players)}",
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
    """Return the files to read, and the manifest's entry of each session."""
    root = Path(args.source)
    sessions, players, silent = read_sessions(root)
    named = named_splits(args, players)
    folders = session_folders(root)
    shares = {"test": args.test_share, "val": args.val_share}
    found = Found()
    facts = []
    seen: set[str] = set()
    short = []  # sessions with fewer files than the database states
    for session in sessions:
        places = folders.get(session.id, [])
        reason = problem_of(session, places, seen)
        seen.add(session.id)
        if reason:
            found.broken.append((session.label, reason))
            continue
        # Split by player, not by session, so that no player of the test set was seen in training.
        split = split_of(session.player, named, shares)
        part = files_of(session, places[0], split, players)
        found = Found(found.sources + part.sources, found.broken + part.broken)
        # One file of tolerance, because the last file may be shorter than the others.
        if (len(part.sources) + 1) * args.per_file < (session.latents or 0):
            short.append(session.label)
        facts.append(
            {
                "session": session.label,
                "player": digest_of(session.player),
                "split": split,
                "files": len(part.sources),
                "latents_by_database": session.latents,
            }
        )
    print_findings(root, found, silent, set(folders) - seen, short)
    return found, facts


def problem_of(session: Session, places: list[Path], seen: set[str]) -> str | None:
    """Return the reason to skip a session, or None. places: its folders; seen: ids before it."""
    if session.id in seen:
        return "is twice in the database"
    if not places:
        return f"no folder {session.label}/{FOLDER} below the source"
    if len(places) > 1:
        return f"has {len(places)} folders {FOLDER}"
    if not session.player:
        return "no player_name: the player could be in another split"
    return None


def print_findings(
    root: Path, found: Found, silent: int, unknown: set[str], short: list[str]
) -> None:
    """Print warnings about the source folder; UserError if it contains no usable file."""
    if not found.sources:
        reasons = "".join(f"; {name}: {reason}" for name, reason in found.broken[:1])
        raise UserError(f"{root}: not one .pt file of a session that {DATABASE} knows{reasons}")
    if silent:
        print(f"{root}: sessions without video, by {DATABASE}: {silent:,}")
    if unknown:
        print(f"{root}: session folders that {DATABASE} does not know, left out: {len(unknown):,}")
    if short:
        print(
            f"{root}: sessions with fewer files than their frame_count requires: {len(short):,}, "
            f"the first is {short[0]}"
        )
    for split in build.SPLITS:
        if not any(source.split == split for source in found.sources):
            print(f"{root}: no player is in {split}; name some by --test_players and --val_players")
