"""Tables: dicts of arrays by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def merge_tables(tables: Sequence[Mapping[str, Any]], join: Callable = np.concatenate) -> dict:
    """Join the arrays of each name. All tables must have the same names. join: a function of the
    list of arrays, of NumPy or of torch."""
    merged = {}
    for name in tables[0]:
        merged[name] = join([table[name] for table in tables])
    return merged
