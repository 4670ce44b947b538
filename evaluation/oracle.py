"""Score forecasts against an oracle: draws from the true conditional law of the same states.

`python -m prepare.navier_stokes --oracle 64 --members 64` stores the draws beside the shards. Every
draw is the truth in turn, and each score stands beside that of the draws themselves, which is the
best that any forecast can reach. For the heat equation the closed form replaces the draws in the
CRPS, the conditional mean and deviation, and the coverage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from evaluation import fields, metrics
from prepare import heat
from prepare.trajectories import ORACLE
from runtime.console import UserError
from runtime.tables import merge_tables
from shards import DAMAGED, Shards

LEVELS = (0.5, 0.9)
# Largest wavenumber at which spectra are compared.
LARGEST = 16
# Edges of the histogram of values, in units of the deviation of the states.
EDGES = np.linspace(-4, 4, 41)

# Arrays by name; the first axis is the state.
Tables = dict[str, np.ndarray]


class Law(NamedTuple):
    """A Gaussian in each pixel: mean and deviation (T, C, H, W)."""

    mean: np.ndarray
    deviation: np.ndarray


@dataclasses.dataclass
class Oracle:
    """Draws from the conditional law of states of a split.

    video, frame: (states,), the last given frame of each. file: the open HDF5 file. stride: frames
    of the shards per frame of a forecast. every: time between two frames of the shards. unit:
    deviation of the states. heat: the world, where the law has a closed form.
    """

    path: Path
    file: h5py.File
    shards: Shards
    video: np.ndarray
    frame: np.ndarray
    stride: int
    every: float
    unit: float
    heat: heat.Heat | None

    @property
    def leads(self) -> int:
        """Number of frames that the draws can score."""
        return self.file["members"].shape[2] // self.stride

    def times(self, leads: int) -> list[float]:
        """The lead times of the first frames, in units of time."""
        return [self.every * self.stride * (k + 1) for k in range(leads)]

    def members(self, k: int, leads: int) -> np.ndarray:
        """The draws of state k -> (M, leads, C, H, W)."""
        return self.file["members"][k][:, self.stride - 1 :: self.stride][:, :leads]

    def law(self, k: int, leads: int) -> Law | None:
        """The law of state k in closed form, if it has one."""
        if self.heat is None:
            return None
        field = self.shards.read(int(self.video[k]), self.frame[k : k + 1])
        means, deviations = [], []
        for time in self.times(leads):
            means.append(self.heat.conditional_mean(field, time)[0])
            deviations.append(np.full(field.shape[1:], self.heat.conditional_deviation(time)))
        return Law(np.stack(means), np.stack(deviations))


def open_oracle(root: str | Path, shards: Shards, skip: int = 0) -> Oracle:
    """Open the oracle of a data root for its test split. skip: data.skip.

    UserError if there is none, or if it was simulated for other shards.
    """
    path = Path(root) / ORACLE
    if not path.exists():
        raise UserError(
            f"no oracle {path}; simulate it: python -m prepare.navier_stokes (or prepare.heat) "
            f"--out {root} --oracle 64 --members 64"
        )
    try:
        file = h5py.File(path, "r")
        of_shards, every = str(file.attrs["fingerprint"]), float(file.attrs["every"])
        video, frame, states = file["video"][:], file["frame"][:], file["members"].shape[0]
    except DAMAGED as error:
        raise UserError(f"{path}: not a whole oracle ({error}); simulate it again") from None
    if of_shards != shards.fingerprint():
        raise UserError(f"{path} was simulated for other shards than {shards.dir}; do it again")
    if file["members"].shape[2] <= skip:
        raise UserError(
            f"{path} reaches {file['members'].shape[2]} frames ahead, but data.skip = {skip} needs "
            f"{skip + 1}; simulate it again with --leads"
        )
    given = []
    for k in range(states):
        given.append(shards.read(int(video[k]), frame[k : k + 1]))
    world = None
    if file.attrs["source"] == heat.source_name():
        world = heat.Heat(shards.shape[-1], every)
    unit = float(np.std(given))
    return Oracle(path, file, shards, video, frame, skip + 1, every, unit, world)


# ---------------------------------------------------------------------------------------- one state
def score_state(
    samples: np.ndarray, truths: np.ndarray, law: Law | None = None, unit: float = 1.0
) -> Tables:
    """Score a forecast of one state -> arrays by name.

    samples: (S, T, C, H, W). truths: (M, T, C, H, W). law: the law of the truths, if it is known.
    unit: of the histogram of values.
    """
    halves = truths[::2], truths[1::2]
    found = {
        "energy": fields.energy(samples, truths),
        "energy_own": fields.own_energy(truths),
        "spectrum": fields.spectrum(samples).mean(0),
        "spectrum_own": fields.spectrum(truths).mean(0),
        "enstrophy": fields.enstrophy(samples),
        "enstrophy_own": fields.enstrophy(truths),
        "values": count_values(samples, unit),
        "values_own": np.stack([count_values(half, unit) for half in halves]),
    }
    if law is None:
        means = [half.mean(0) for half in halves]
        found |= {
            "crps": fields.crps(samples, truths),
            "crps_own": fields.own_crps(truths),
            "mean": fields.mean_error(samples, truths),
            # The product of two independent estimates has no bias.
            "mean_norm": (means[0] * means[1]).mean(fields.PIXELS),
            "deviation": fields.deviation_error(samples, truths),
            "deviation_norm": truths.var(0, ddof=1).mean(fields.PIXELS),
            "ranks": fields.rank_counts(samples, truths) / truths[:, 0].size,
        }
    else:
        found |= {
            "crps": fields.crps_gaussian(samples, *law),
            "crps_own": law.deviation.mean(fields.PIXELS) / np.sqrt(np.pi),
            "mean": fields.mean_error(samples, law.mean),
            "mean_norm": np.square(law.mean).mean(fields.PIXELS),
            "deviation": fields.deviation_error(samples, law.deviation),
            "deviation_norm": np.square(law.deviation).mean(fields.PIXELS),
            "ranks": fields.rank_shares_gaussian(samples, *law),
        }
    return found


def count_values(members: np.ndarray, unit: float) -> np.ndarray:
    """Histogram of the pixels of members (n, T, C, H, W) -> (T, bins). Values beyond the edges are
    in the outermost bins."""
    bins = len(EDGES) - 1
    index = np.clip(np.searchsorted(EDGES * unit, members) - 1, 0, bins - 1)
    counts = [np.bincount(index[:, t].ravel(), minlength=bins) for t in range(members.shape[1])]
    return np.stack(counts)


def score_states(oracle: Oracle, first: int, samples: np.ndarray) -> Tables:
    """Score the forecasts (V, S, T, C, H, W) of the states from `first` on -> tables."""
    leads = samples.shape[2]
    rows = []
    for k, of_state in enumerate(samples, first):
        truths = oracle.members(k, leads)
        rows.append(score_state(of_state, truths, oracle.law(k, leads), oracle.unit))
    return merge_tables(rows, np.stack)


# ---------------------------------------------------------------------------------------- summaries
def estimate(statistic: Callable[[np.ndarray], np.ndarray], states: int) -> dict[str, list]:
    """statistic(indices of states) -> (T,), and its standard error by the jackknife over states."""
    value = np.atleast_1d(statistic(np.arange(states)))
    errors = []
    for t in range(len(value)):
        errors.append(metrics.jackknife(lambda i, t=t: np.atleast_1d(statistic(i))[t], states))
    return {"value": value.tolist(), "se": [None if np.isnan(e) else e for e in errors]}


def summarize(tables: Tables, times: list[float]) -> dict:
    """Summarize the tables of all states -> {"times", "states", "members", "samples", scores}.

    A score is {"forecast": (T,), "oracle": (T,), "quotient": {"value": (T,), "se": (T,)}}, of which
    a quotient of 1 is perfect; an error or a coverage is {"value": (T,), "se": (T,)}. Standard
    errors are over states. Coverage and rank histogram of the oracle itself are nominal and flat.
    """
    n, S = tables["enstrophy"].shape[:2]
    found = {
        "times": times,
        "states": n,
        "samples": S,
        "members": tables["enstrophy_own"].shape[1],
    }
    for name in ("crps", "energy"):
        found[name] = compare(tables[name], tables[f"{name}_own"])
    of_states = tables["enstrophy"].mean(1), tables["enstrophy_own"].mean(1)
    found["enstrophy"] = compare(*of_states)
    for name in ("mean", "deviation"):
        squares, norms = tables[name], tables[f"{name}_norm"]
        found[f"{name}_error"] = estimate(
            lambda i, a=squares, b=norms: fields.relative_error(a[i], b[i]), n
        )
    ranks = tables["ranks"]
    for level in LEVELS:
        found[f"coverage_{round(100 * level)}"] = estimate(
            lambda i, level=level: fields.coverage(ranks[i].mean(0), level), n
        )
    found["rank_histogram"] = ranks.mean(0).tolist()
    power, true = tables["spectrum"], tables["spectrum_own"]
    largest = min(LARGEST, power.shape[-1] - 1)
    found["spectrum_error"] = estimate(
        lambda i: np.array(
            [
                fields.spectrum_error(a, b, largest)
                for a, b in zip(power[i].mean(0), true[i].mean(0))
            ]
        ),
        n,
    )
    found["spectrum"] = {"forecast": power.mean(0).tolist(), "oracle": true.mean(0).tolist()}
    found["divergence"] = measure_divergences(tables)
    return found


def compare(forecast: np.ndarray, oracle: np.ndarray) -> dict:
    """The means over states of two tables (V, T), and their quotient with its standard error."""
    quotient = estimate(lambda i: forecast[i].mean(0) / oracle[i].mean(0), len(forecast))
    return {
        "forecast": forecast.mean(0).tolist(),
        "oracle": oracle.mean(0).tolist(),
        "quotient": quotient,
    }


def measure_divergences(tables: Tables) -> dict[str, list[float]]:
    """KL(truth || forecast) in nats of the distributions of enstrophy and of values over all
    states, per lead time; `_own` is that of one half of the draws from the other half."""
    samples, truths = tables["enstrophy"], tables["enstrophy_own"]
    values, halves = tables["values"].sum(0), tables["values_own"].sum(0)
    found = {}
    for name, function in (
        ("enstrophy_histogram", fields.kl_histogram),
        ("enstrophy_moments", fields.kl_moments),
    ):
        leads = range(samples.shape[2])
        found[name] = [function(truths[:, :, t], samples[:, :, t]) for t in leads]
        found[f"{name}_own"] = [function(truths[:, ::2, t], truths[:, 1::2, t]) for t in leads]
    found["values_histogram"] = [fields.kl_counts(*pair) for pair in zip(halves.sum(0), values)]
    found["values_histogram_own"] = [fields.kl_counts(*pair) for pair in zip(*halves)]
    return found


# name in the summary -> label, and how a perfect forecast scores
ROWS = {
    "crps": ("CRPS", "quotient 1"),
    "energy": ("energy score", "quotient 1"),
    "enstrophy": ("enstrophy", "quotient 1"),
    "mean_error": ("error of the mean", "0"),
    "deviation_error": ("error of the deviation", "0"),
    "coverage_50": ("coverage of 50 %", "0.5"),
    "coverage_90": ("coverage of 90 %", "0.9"),
    "spectrum_error": (f"spectrum to k = {LARGEST}", "0"),
}


def format_table(found: dict) -> str:
    """The summary as a table of text, with a column per lead time."""
    heads = [f"t + {time:g}" for time in found["times"]]
    lines = [
        f"against the oracle: {found['states']} states, {found['samples']} samples, "
        f"{found['members']} truths each; standard errors over states",
        f"{'':24}{'perfect':>12}" + "".join(f"{head:>18}" for head in heads),
    ]
    for name, (label, perfect) in ROWS.items():
        entry = found[name]
        entry = entry.get("quotient", entry)
        cells = []
        for value, se in zip(entry["value"], entry["se"]):
            error = "" if se is None else f" ± {se:.3f}"
            cells.append(f"{value:.3f}{error}")
        lines.append(f"{label:24}{perfect:>12}" + "".join(f"{cell:>18}" for cell in cells))
    for name, label in (
        ("enstrophy_histogram", "KL of enstrophy"),
        ("values_histogram", "KL of values"),
    ):
        own = found["divergence"][f"{name}_own"]
        pairs = zip(found["divergence"][name], own)
        cells = [f"{value:.4f} ({best:.4f})" for value, best in pairs]
        lines.append(f"{label:24}{'(its own)':>12}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
