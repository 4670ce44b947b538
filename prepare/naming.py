"""Put the images of a folder in order by their names alone.

`group_by_kind` separates kinds of images (img_0001.png, flow_x_0001.png), and `put_in_order` sorts
the names of one kind by their numbers and finds missing numbers. Neither opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import PurePath
from typing import NamedTuple

from prepare.container import Broken

# Numbers in a name. A decimal number has one point and is no part of a version such as 1.2.3.
DIGITS = re.compile(r"[0-9]+")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]+)(?:\.([0-9]+))?(?![0-9.])")
# Names may be times at a constant rate, rounded. Their steps are multiples of the median step, up
# to an error of this share of the median step.
ROUNDED = 0.1
# In other times, a step of more than this many median steps is a hole.
MAX_GAP = 3
# Maximum number of names that a note lists.
LISTED = 3


class Ordered(NamedTuple):
    """Names in order. breaks: indices of the names before which numbers are missing."""

    names: list[str]
    breaks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def natural(path: PurePath) -> tuple:
    """Sort key that sorts 2.png before 10.png."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], path.name


def stem_of(name: str) -> str:
    return name.rpartition(".")[0]


def kind_of(name: str) -> str:
    """The name without its numbers, in lower case: img_#.png for IMG_0007.PNG."""
    stem, _, ending = name.rpartition(".")
    ending = {"jpeg": "jpg"}.get(ending.lower(), ending.lower())
    return f"{re.sub(r'[0-9]+(?:[.][0-9]+)?', '#', stem).lower()}.{ending}"


def group_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by `kind_of`, sorted by kind."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        kinds.setdefault(kind_of(name), []).append(name)
    return dict(sorted(kinds.items()))


def put_in_order(names: Sequence[str]) -> Ordered:
    """Sort the names of one kind by their numbers.

    Raises Broken if two names have the same number, or if the numbers do not determine the order.
    """
    if len(names) < 2:
        return Ordered(list(names))
    values = numbers_of(names)
    pairs = sorted(zip(values, names))
    values, names = [value for value, _ in pairs], [name for _, name in pairs]
    for k in range(1, len(names)):
        if values[k] == values[k - 1]:
            raise Broken(f"{names[k - 1]} and {names[k]} have the same number")
    start = find_roll_over(values, names)
    if not start:
        return find_breaks(names, values, ())
    note = f"the counter rolls over after {names[-1]}: {names[0]} follows"
    # After 9999 a counter starts again at 0 or at 1.
    period = values[-1] + (1 if values[0] == 0 else 0)
    values = values[start:] + [value + period for value in values[:start]]
    return find_breaks(names[start:] + names[:start], values, (note,))


def select_kind(names: Iterable[str]) -> tuple[list[str], str | None]:
    """Select the only kind of which there are several images -> (its names, a note on single images
    of other kinds). Raises Broken if there are several images of several kinds."""
    kinds = group_by_kind(names)
    several = {kind: members for kind, members in kinds.items() if len(members) > 1}
    if len(several) > 1:
        listed = ", ".join(list(several)[:LISTED])
        raise Broken(f"holds {len(several)} kinds of images ({listed}); one folder per video")
    if not several:
        # One image, or images whose names have nothing in common.
        alone = [members[0] for members in kinds.values()]
        if len(alone) > 1:
            raise Broken(f"the names {alone[0]} and {alone[1]} do not determine an order")
        return alone, None
    ((kind, members),) = several.items()
    rest = [other[0] for name, other in kinds.items() if name != kind]
    note = f"{', '.join(rest[:LISTED])}: not of the kind {kind}; left out" if rest else None
    return members, note


def numbers_of(names: Sequence[str]) -> list[Fraction]:
    """The number of each name that determines the order. Raises Broken if there is none."""
    stems = [stem_of(name) for name in names]
    decimals = decimal_numbers(stems)
    if decimals is not None:
        return decimals
    rows = [[int(digits) for digits in DIGITS.findall(stem)] for stem in stems]
    columns = [column for column in zip(*rows, strict=True) if len(set(column)) > 1]
    if not columns:
        lacks = "have the same number" if rows[0] else "contain no number"
        raise Broken(f"{names[0]} and {names[1]} {lacks}")
    if len(columns) == 1:
        return [Fraction(value) for value in columns[0]]
    times = clock_times(stems)
    if times is not None:
        return times
    # Several numbers change. One may be a counter: it has no value twice, and gives the same order
    # as all numbers together. The last such number counts.
    order = sorted(range(len(names)), key=lambda k: [column[k] for column in columns])
    for column in reversed(columns):
        counted = [column[k] for k in order]
        if all(before < after for before, after in zip(counted, counted[1:])):
            return [Fraction(value) for value in column]
    raise Broken(
        f"several numbers change in its names, {names[0]} to {names[-1]}, so their order is "
        "unknown; put each video into a folder of its own, or number the images by one counter"
    )


def decimal_numbers(stems: Sequence[str]) -> list[Fraction] | None:
    """The changing decimal number of names such as 0.25; None if no name has a fraction."""
    found = [DECIMAL.findall(stem) for stem in stems]
    if not any(fraction for row in found for _, fraction in row):
        return None
    if len({len(row) for row in found}) != 1:
        return None
    changing = [column for column in zip(*found, strict=True) if len(set(column)) > 1]
    if len(changing) != 1 or not any(fraction for _, fraction in changing[0]):
        return None
    # Of v1.9 and v1.10, 10 is a counter and no fraction, although the names look like decimals.
    wholes = {whole for whole, _ in changing[0]}
    widths = {len(fraction) for _, fraction in changing[0]}
    if len(wholes) == 1 and len(widths) > 1:
        counters = sorted(int(fraction or 0) for _, fraction in changing[0])
        steps = [after - before for before, after in zip(counters, counters[1:])]
        if steps.count(1) > 0.8 * len(steps):
            # A counter without leading zeros after a constant prefix: v1.9, v1.10.
            return [Fraction(int(fraction or 0)) for _, fraction in changing[0]]
    return [Fraction(f"{whole}.{fraction or 0}") for whole, fraction in changing[0]]


def clock_times(stems: Sequence[str]) -> list[Fraction] | None:
    """The times in seconds of names whose digits are a date and a time, YYYYMMDDhhmmss with an
    optional fraction of a second; None for other names."""
    times = []
    widths = set()
    for stem in stems:
        digits = "".join(DIGITS.findall(stem))
        widths.add(len(digits))
        try:
            moment = datetime.strptime(digits[:14], "%Y%m%d%H%M%S")
        except ValueError:
            return None
        if not 1970 <= moment.year < 2200:
            return None
        seconds = moment.replace(tzinfo=timezone.utc).timestamp()
        times.append(Fraction(int(seconds)) + Fraction(f"0.{digits[14:] or 0}"))
    return times if len(widths) == 1 else None


def usual_step(values: Sequence[Fraction]) -> Fraction:
    """The median step of sorted values."""
    steps = sorted(after - before for before, after in zip(values, values[1:]))
    return steps[(len(steps) - 1) // 2]


def find_roll_over(values: Sequence[Fraction], names: Sequence[str]) -> int:
    """Index of the first name in time, if the sorted counter rolls over (DSC_9998, 9999, 0001); 0
    if it does not roll over."""
    widths = {len(digits) for name in names for digits in DIGITS.findall(stem_of(name))[-1:]}
    if len(widths) != 1 or values[0] > 1 or values[-1] != 10 ** widths.pop() - 1:
        return 0
    gaps = [after - before for before, after in zip(values, values[1:])]
    largest, second = max(gaps), sorted(gaps)[-2] if len(gaps) > 1 else 1
    # The counter has both ends of its range, and one large gap between them.
    return gaps.index(largest) + 1 if largest > 10 * second else 0


def find_breaks(names: list[str], values: Sequence[Fraction], notes: tuple[str, ...]) -> Ordered:
    """Find the holes between sorted values.

    In a counter, and in times at a constant rate, each missing number is a hole. In other times, a
    step of more than MAX_GAP median steps is a hole.
    """
    usual = usual_step(values)
    ratios = [float((after - before) / usual) for before, after in zip(values, values[1:])]
    regular = all(ratio > 0.5 and abs(ratio - round(ratio)) <= ROUNDED for ratio in ratios)
    limit = 1.5 if regular else MAX_GAP
    breaks = [k for k, ratio in enumerate(ratios, 1) if ratio > limit]
    if breaks:
        pairs = [f"{names[k - 1]} and {names[k]}" for k in breaks[:LISTED]]
        more = f" and {len(breaks) - LISTED} more" if len(breaks) > LISTED else ""
        what = "numbers are missing" if regular else "there is a hole in time"
        note = f"{what} between {', '.join(pairs)}{more}; no clip crosses that point"
        notes = (*notes, note)
    return Ordered(names, tuple(breaks), notes)
