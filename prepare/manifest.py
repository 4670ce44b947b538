"""The entries of manifest.json, one per source with its outcome, and the printed summary."""

from __future__ import annotations

import argparse
import sys

from runtime.console import printable

LISTED = 20  # maximum number of printed lines of a list; the manifest contains all


def entry_of(name: str, split: str | None = None, skipped: str | None = None) -> dict:
    return {
        "name": name,
        "split": split,
        "sha256": None,
        "frames": 0,
        "videos": [],
        "note": None,
        "damage": None,
        "copy_of": None,
        "skipped": skipped,
    }


def print_problem(entry: dict, bar) -> None:
    name = printable(entry["name"])
    if entry["skipped"]:
        bar.write(f"{name}: {entry['skipped']}; skipped", sys.stderr)
    elif entry["damage"]:
        bar.write(f"{name}: {entry['damage']}; the frames before are kept", sys.stderr)
    elif entry["note"]:
        bar.write(f"{name}: {entry['note']}", sys.stderr)


def find_copies(entries: list[dict]) -> list[list[str]]:
    """Return groups of source videos with identical bytes, including copies that are left out."""
    by_content: dict[str, list[str]] = {}
    contents = {entry["name"]: entry["sha256"] for entry in entries}
    for entry in entries:
        content = entry["sha256"] or contents.get(entry["copy_of"])
        if content:
            by_content.setdefault(content, []).append(entry["name"])
    return [names for names in by_content.values() if len(names) > 1]


def find_shared(entries: list[dict]) -> list[list[str]]:
    """Return groups of source videos with identical bytes that are in different splits."""
    by_content: dict[str, list[dict]] = {}
    for entry in entries:
        if entry["sha256"]:
            by_content.setdefault(entry["sha256"], []).append(entry)
    return [
        [entry["name"] for entry in same]
        for same in by_content.values()
        if len({e["split"] for e in same}) > 1
    ]


def report(manifest: dict, args: argparse.Namespace, unit: str = "source video") -> int:
    """Print the summary; return the exit code."""
    skipped = [entry for entry in manifest["sources"] if entry["skipped"]]
    print(
        f"{args.out}: {len(manifest['sources']):,} {unit}s in {manifest['seconds']:.1f} s; "
        f"{manifest['split_rule']}; {manifest['resize_rule']}"
    )
    for split, part in manifest["splits"].items():
        print(
            f"  {split:5} {part['videos']:9,} videos {part['frames']:11,} frames, "
            f"{part['shortest']} to {part['longest']} each"
        )
    # Skipped sources make the exit code 1, which must not look as if the shards were unusable.
    usable = "; the shards are complete and usable without them" if skipped else ""
    print(f"  skipped: {len(skipped):,} {unit}s{usable}")
    list_names([f"{entry['name']}: {entry['skipped']}" for entry in skipped], args)
    damaged = [entry for entry in manifest["sources"] if entry["damage"]]
    if damaged:
        print(f"  damaged: {len(damaged):,} {unit}s; the frames before the damage are kept")
        list_names([f"{entry['name']}: {entry['damage']}" for entry in damaged], args)
    # Copies in one split are kept but printed: they weigh more in training.
    left_out = sum(bool(entry["copy_of"]) for entry in manifest["sources"])
    if manifest["copies"]:
        print(
            f"  the same video under several names: {len(manifest['copies']):,}; each is in one "
            f"split only, {left_out:,} copies are left out"
        )
        list_names([", ".join(names) for names in manifest["copies"]], args)
    for names in manifest["shared"][:5]:
        more = f" and {len(names) - 4:,} more" if len(names) > 4 else ""
        print(f"  warning: the same video in different splits: {', '.join(names[:4])}{more}")
    failed = bool(skipped or damaged or manifest["shared"])
    return int(failed and not getattr(args, "allow_skips", False))


def list_names(lines: list[str], args: argparse.Namespace) -> None:
    """Print the first lines, and how many more the manifest names."""
    for line in lines[:LISTED]:
        print(f"  {line}")
    if len(lines) > LISTED:
        print(f"  … and {len(lines) - LISTED:,} more, named in {args.out}/manifest.json")
