"""Records of benchmarks: a file of JSON lines, one per run."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """All records, the oldest first; [] without a file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append(path: Path, record: dict) -> None:
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
