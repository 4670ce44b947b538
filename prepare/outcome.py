"""The outcome of each source of prepare/videos.py: counts, notes, and the printed table."""

from __future__ import annotations

from dataclasses import dataclass, field

from prepare.build import SPLITS
from prepare.decode import Film, count, lost_frames
from runtime.console import printable

LISTED = 200  # with more sources, the table names only those with a note
DAMAGED = "lost to damage"
INTERNAL = ("path", "images", "breaks", "data", "steps", "short", "part", "broken")


@dataclass
class Source(Film):
    """One video file or frame folder, and the counts of what was written and dropped."""

    sha256: str = ""  # of the content
    stored_rate: float | None = None  # frames per second of its clips
    clips: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    still: int = 0  # clips dropped because they lack motion
    remainder: int = 0  # frames dropped because they do not fill a clip
    skipped: str | None = None  # reason why the source, or the rest of it, was skipped

    def entry(self) -> dict:
        """Return the source's entry in the manifest."""
        known = {name: value for name, value in vars(self).items() if name not in INTERNAL}
        return {**known, "dropped": self.dropped()}

    def dropped(self) -> dict[str, int]:
        """Return the number of frames that are in no clip, by reason."""
        reasons = {
            "left over": self.remainder,
            "between the ticks of --fps": self.decoded - self.used,
            DAMAGED: lost_frames(self),
        }
        return {reason: frames for reason, frames in reasons.items() if frames}


def format_remarks(entry: dict) -> str:
    """Return the remarks about a source on one line: why it was skipped, notes, dropped frames."""
    rest = "rest " if entry["decoded"] else ""
    parts = [f"{rest}skipped: {entry['skipped']}"] if entry["skipped"] else []
    parts += entry["notes"]
    for reason, frames in entry["dropped"].items():
        # The notes state the frames that were lost to damage already.
        if reason != DAMAGED:
            parts.append(f"{count(frames, 'frame')} {reason}")
    if entry["still"]:
        parts.append(count(entry["still"], "still clip"))
    return printable("; ".join(parts))


def print_table(manifest: dict) -> None:
    """Print a row per source: frames, clips in each split, dropped frames, remarks."""
    sources, splits = manifest["sources"], list(manifest["splits"])
    rows = sources
    if len(sources) > LISTED:
        rows = [entry for entry in sources if entry["skipped"] or entry["notes"]][:LISTED]
    names = [printable(entry["name"]) for entry in rows]
    width = max(map(len, ["source", *names]))
    heads = ("frames", *splits, "dropped")
    print(f"  {'source':{width}} " + " ".join(f"{head:>7}" for head in heads) + "  remarks")
    # Columns are aligned for a terminal; the remarks come last, because they have any length.
    for name, entry in zip(names, rows):
        clips = [entry["clips"][split] for split in splits]
        counts = (entry["decoded"], *clips, sum(entry["dropped"].values()))
        columns = " ".join(f"{number:7,}" for number in counts)
        print(f"  {name:{width}} {columns}  {format_remarks(entry)}".rstrip())
    if len(rows) < len(sources):
        rest = len(sources) - len(rows)
        print(f"  … and {rest:,} more, in {printable(manifest['options']['out'])}/manifest.json")


def report(manifest: dict) -> None:
    """Print the summary of a manifest, and the table of its sources."""
    sources, args, fps = manifest["sources"], manifest["options"], manifest["fps"]
    print(
        f"{printable(args['out'])}: {len(sources):,} sources, split by {manifest['split_rule']}, "
        f"{manifest['seconds']:.1f} s"
    )
    for split, size in manifest["splits"].items():
        empty = ""
        if not size["clips"]:
            empty = (
                "; warning: no clips, because the part is too short or still; see "
                f"--{split}, --split_by"
            )
        print(f"  {split:5} {size['clips']:9,} clips {size['frames']:11,} frames{empty}")
    print_table(manifest)
    dropped = manifest["dropped"]
    print(
        f"  dropped: {dropped['still']:,} still clips, {dropped['remainder']:,} frames left over; "
        f"skipped: {dropped['skipped']:,} sources"
    )
    # Different rates are no error, but training on them mixes speeds of motion.
    rates = [entry["stored_rate"] for entry in sources if entry["stored_rate"]]
    if rates and max(rates) > 1.01 * min(rates):
        advice = "" if args["fps"] else "; --fps resamples all to one rate"
        print(
            f"  sources have {min(rates):g} to {max(rates):g} frames per second; the shards store "
            f"{fps:g}, the rate of the first source, and the rate of each video as `rates`{advice}"
        )
    if any(entry["skipped"] for entry in sources):
        print("  the shards are complete and usable without the skipped sources")
