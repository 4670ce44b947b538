"""Compare interpolants, diffusions and solvers: quality against network evaluations.

    python -m benchmarks.interpolants

The command trains each interpolant with each seed on the bouncing balls, with the same latents and
the same budget, samples every checkpoint in many ways, and writes benchmarks/RESULTS.md and
benchmarks/interpolants.png. A second start resumes: saved trainings and measurements are reused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np

import configs
import data
import interpolants
import sample
import vqvae
from benchmarks import results
from evaluation.measure import score
from forecaster import load as load_forecaster
from main import Clock, train_network
from runtime import logs
from runtime.console import UserError, progress, run_command
from runtime.folders import stage_lock
from runtime.process import start

EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
# Network evaluations per solver step; 1 for solvers that are not listed.
PER_STEP = {"heun": 2, "rk4": 4, "stochastic_heun": 2}
SOLVERS = [
    ("exact", "0"),
    ("exact2", "0"),
    ("euler", "0"),
    ("heun", "0"),
    ("rk4", "0"),
    ("exact", "sigma"),
    ("exact2", "sigma"),
    ("em", "sigma"),
    ("stochastic_heun", "sigma"),
]
GRIDS = ("uniform", "power:1.5", "cosine")
# (diffusion, warm_start, largest number of network evaluations per frame)
PROCESSES = [
    ("0", 0.0, 64),
    ("sigma", 0.0, 64),
    ("follmer", 0.0, 64),
    ("0", 0.2, 8),
]
# {name: changes to the default training}, which is follmer with residual output, velocity weight
# and c = 1.
PUBLISHED = {"flow.output": "drift", "flow.weight": "published"}
TRAININGS = {
    "follmer": {},
    "weight uniform": {"flow.weight": "uniform"},
    "weight published": {"flow.weight": "published"},
    "output drift": {"flow.output": "drift"},
    "output drift, weight published": PUBLISHED,
    "as published, c = 0.1": {**PUBLISHED, "flow.c": 0.1},
    "c = 0.5": {"flow.c": 0.5},
    "c = 0.1": {"flow.c": 0.1},
    "logit-normal s": {"flow.times": "logit_normal"},
}


# --------------------------------------------------------------------------------------- trainings
def base_overrides(args: argparse.Namespace) -> dict:
    """Settings that all trainings share."""
    return {
        "model.width": args.width,
        "train.steps": args.steps,
        "train.sample_every": 0,
        "wandb.mode": "disabled",
        "train.save_every": 200,
        "train.keep": 1,
        "sample.num_videos": args.videos,
        "sample.num_samples": args.samples,
        **configs.parse_overrides(args.set),
    }


def run_id_of(name: str, seed: int, args: argparse.Namespace) -> str:
    """The run id of a training: different settings have different ids, so that none is reused."""
    extra = ""
    if args.set:
        extra = "-" + hashlib.blake2b(repr(args.set).encode(), digest_size=4).hexdigest()
    run_id = f"bench-{name}-{args.width}-{args.steps}{extra}-{seed}"
    return run_id.replace(" ", "_").replace(",", "").replace("=", "")


def train(
    name: str, interpolant: str, flow: dict, seed: int, args: argparse.Namespace, vqvae: str
) -> Path:
    """Train one network, unless it is trained already; return its checkpoint."""
    overrides = {
        **base_overrides(args),
        **flow,
        "flow.interpolant": interpolant,
        "train.seed": seed,
        "output.run_id": run_id_of(name, seed, args),
        "vqvae.ckpt": vqvae,
    }
    config = configs.build(overrides=overrides)
    return train_network(config, start(), None, Clock())[1]


# ------------------------------------------------------------------------------------ measurements
class Table:
    """Rows of metrics, one per (training, seed, sampler), appended to a JSON Lines file."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        # A killed process may have left an incomplete last line.
        self.cut_short = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            if logs.is_row(line):
                row = json.loads(line)
                self.rows[self.key(row["run"], row["sampler"])] = row

    @staticmethod
    def key(run: str, sampler: dict) -> str:
        return json.dumps([run, sampler], sort_keys=True)

    def measure(self, ckpt: Path, sampler: dict) -> None:
        """Sample the test split from a checkpoint and add a row, unless the table has it."""
        run = ckpt.parent.name
        if self.key(run, sampler) in self.rows:
            return
        forecaster, step = load_forecaster(ckpt, start().device, sampler)
        truth, futures, _ = sample.forecast_split(forecaster, quiet=True)
        ratio = score(truth, futures)["ratio_to_repeat_last"]
        mse = ratio["mse"]["horizon"]
        # `evaluations` is counted, not computed: a solver may evaluate the network more than once
        # per step.
        row = {
            "run": run,
            "sampler": sampler,
            "step": step,
            "evaluations": forecaster.evaluations / futures[..., 0, 0, 0].size,
            "crps": ratio["crps"]["all"],
            "mse1": mse[0],
            "mse5": mse[min(4, len(mse) - 1)],
        }
        line = json.dumps(row) + "\n"
        with open(self.path, "a") as file:
            file.write("\n" + line if self.cut_short else line)
        self.cut_short = False
        self.rows[self.key(run, sampler)] = row

    def measure_all(self, pairs: list[tuple[Path, dict]], name: str) -> None:
        """Measure every (checkpoint, sampler)."""
        with progress(len(pairs), f"sample {name}", "sampler") as bar:
            for ckpt, sampler in pairs:
                self.measure(ckpt, sampler)
                bar.update()

    def over_seeds(
        self, ckpts: list[Path], sampler: dict, metric: str = "crps"
    ) -> tuple[float, float]:
        """Mean and standard error over checkpoints; the error of a single one is NaN."""
        rows = [self.rows[self.key(ckpt.parent.name, sampler)] for ckpt in ckpts]
        values = np.array([row[metric] for row in rows])
        if len(values) == 1:
            return values.mean(), float("nan")
        return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def sampler_settings(
    args: argparse.Namespace,
    evaluations: int,
    solver: str = "exact",
    diffusion: str = "0",
    grid: str = "uniform",
    **more,
) -> dict:
    """Settings of a sampler that takes at most `evaluations` network evaluations per frame."""
    return {
        "sample.solver": solver,
        "sample.diffusion": diffusion,
        "sample.grid": grid,
        "sample.redraw": "frame",
        "sample.num_videos": args.videos,
        "sample.num_samples": args.samples,
        "sample.steps": max(1, evaluations // PER_STEP.get(solver, 1)),
        **more,
    }


# ------------------------------------------------------------------------------------------ tables
def format_cell(mean: float, error: float) -> str:
    return f"{mean:.3f}" if np.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def make_table(head: list[str], rows: list[list[str]]) -> str:
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def compare_processes(args: argparse.Namespace, table: Table, runs: dict[str, list[Path]]) -> str:
    """Draw the figure and return the tables of every interpolant with every diffusion and warm
    start.

    runs: {interpolant: checkpoints}. A warm start begins the solver at a flow time s > 0, from the
    last frame.
    """
    counts = [n for n in EVALUATIONS if n <= args.most]
    samplers = {}
    for diffusion, warm, most in PROCESSES:
        more = {"sample.warm_start": warm}
        samplers[diffusion, warm] = [
            sampler_settings(args, n, "exact2", diffusion, **more) for n in counts if n <= most
        ]
    pairs = []
    for ckpts in runs.values():
        for own in samplers.values():
            pairs += [(ckpt, sampler) for sampler in own for ckpt in ckpts]
    table.measure_all(pairs, "interpolants")

    # {(interpolant, diffusion, warm start): [(mean, standard error) per count]}
    curves = {}
    for name, ckpts in runs.items():
        for process, own in samplers.items():
            curves[(name, *process)] = [table.over_seeds(ckpts, sampler) for sampler in own]
    draw_curves(curves, counts, args.out / "interpolants.png")

    figure = "![CRPS against network evaluations](interpolants.png)"
    least = make_table(
        ["interpolant", *counts, "enough"],
        [[name, *best_cells(curves, name, counts)] for name in runs],
    )
    every = make_table(
        ["interpolant", "diffusion", "begun at s", *counts],
        [[*key, *(format_cell(*point) for point in points)] for key, points in curves.items()],
    )
    return (
        f"{least}\n\n{figure}\n\nThe table above has the best value of each interpolant in the "
        "table of all diffusions and starts below, chosen on the same clips; `enough` is the "
        "smallest number of evaluations whose CRPS is within one standard error of that with "
        f"{counts[-1]}:\n\n{every}"
    )


def best_cells(curves: dict, name: str, counts: list[int]) -> list[str]:
    """Cells of an interpolant's best process at each count, then the count that is enough.

    Enough is the smallest count whose mean is at most one standard error above the mean of the
    largest count.
    """
    own = [points for key, points in curves.items() if key[0] == name]
    least = [min(points[k] for points in own if k < len(points)) for k in range(len(counts))]
    mean, error = least[-1]
    limit = mean + np.nan_to_num(error)
    # `not >`, so that a NaN ends the search.
    enough = next(n for n, point in zip(counts, least) if not point[0] > limit)
    return [*(format_cell(*point) for point in least), str(enough)]


def compare_solvers(args: argparse.Namespace, table: Table, ckpts: list[Path]) -> str:
    """Return the table of solvers and time grids, with a column per number of evaluations."""
    counts = [n for n in EVALUATIONS if n <= min(16, args.most)]
    kinds = [(solver, diffusion, "uniform") for solver, diffusion in SOLVERS]
    kinds += [("exact", "sigma", grid) for grid in GRIDS[1:]]
    samplers = {}
    for kind in kinds:
        for n in counts:
            # A solver of several stages takes its first or last step with another solver, so a
            # single step would not measure it.
            if kind[0] not in PER_STEP or n > PER_STEP[kind[0]]:
                samplers[(*kind, n)] = sampler_settings(args, n, *kind)
    table.measure_all(
        [(ckpt, sampler) for sampler in samplers.values() for ckpt in ckpts], "solvers"
    )
    rows = []
    for kind in kinds:
        row = list(kind)
        for n in counts:
            sampler = samplers.get((*kind, n))
            row.append(format_cell(*table.over_seeds(ckpts, sampler)) if sampler else "")
        rows.append(row)
    return make_table(["solver", "diffusion", "grid", *counts], rows)


def compare_trainings(args: argparse.Namespace, table: Table, vqvae: str) -> str:
    """Return the table of the trainings in TRAININGS, sampled by `exact` with diffusion sigma."""
    counts = (2, 5, 10)
    rows = []
    for name, flow in TRAININGS.items():
        ckpts = [train(name, "follmer", flow, seed, args, vqvae) for seed in range(args.seeds)]
        predicts_drift = flow.get("flow.output") == "drift"
        for first in (0.0, 0.01) if predicts_drift else (0.0,):
            label = f"{name}, first = {first}" if first else name
            more = {"sample.first": first}
            samplers = [sampler_settings(args, n, "exact", "sigma", **more) for n in counts]
            pairs = [(ckpt, sampler) for sampler in samplers for ckpt in ckpts]
            table.measure_all(pairs, label)
            row = [label]
            row += [format_cell(*table.over_seeds(ckpts, sampler)) for sampler in samplers]
            # The columns of MSE are for 5 evaluations, the second count.
            row += [
                format_cell(*table.over_seeds(ckpts, samplers[1], key)) for key in ("mse1", "mse5")
            ]
            rows.append(row)
    head = ["training", *(f"CRPS, {n} evaluations" for n in counts), "MSE, frame 1", "MSE, frame 5"]
    return make_table(head, rows)


def draw_curves(curves: dict, counts: list[int], path: Path) -> None:
    """Draw a panel per interpolant: CRPS against evaluations, a curve per process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # One y axis for all panels, so that the interpolants can be compared.
    names = list(dict.fromkeys(name for name, *_ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True)
    axes = np.atleast_1d(axes)
    for axis, name in zip(axes, names):
        for (own, diffusion, warm), points in curves.items():
            if own == name:
                label = f"g = {diffusion}, from s = {warm}" if warm else f"g = {diffusion}"
                mean, error = np.array(points).T
                own_counts = counts[: len(points)]
                style = {"marker": "o", "markersize": 3, "capsize": 2}
                axis.errorbar(own_counts, mean, error, label=label, **style)
        axis.set(
            title=name,
            xscale="log",
            xlabel="network evaluations a frame",
            xticks=counts,
            xticklabels=counts,
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="CRPS / CRPS of repeating the last frame")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------- the command
def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interpolants", description=__doc__.splitlines()[0]
    )
    for flag, default, help in (
        ("seeds", 3, "trainings of each kind"),
        ("steps", 1200, "updates per training"),
        ("width", 64, "model.width"),
        ("videos", 16, "held-out clips"),
        ("samples", 4, "futures per clip"),
        ("most", 64, "largest number of network evaluations per frame"),
    ):
        text = f"{help} (default {default})"
        parser.add_argument(f"--{flag}", type=int, default=default, help=text)
    parser.add_argument(
        "--out", type=Path, default=results.HERE, help="folder for RESULTS.md and the figure"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="GROUP.FIELD=VALUE",
        help="any other field of the trainings",
    )
    return parser.parse_args()


def introduction(args: argparse.Namespace, config: configs.Config) -> str:
    """The paragraph of RESULTS.md that states what was measured."""
    return (
        f"ball_stn, {config.data.condition} -> {config.data.predict} frames, "
        f"{args.videos} held-out clips x {args.samples} futures, conv net of width {args.width}, "
        f"{args.steps} updates of batch {config.train.batch_size}, {args.seeds} seeds: "
        f"mean ± standard error over seeds. {results.describe_machine()}. Made by `{command()}`. "
        "CRPS over all frames and MSE of single samples, "
        "as ratios to repeating the last frame (lower is better)."
    )


def main() -> None:
    args = parse()
    process = start()
    if process.world > 1:
        raise UserError("the benchmark runs as one process; start it without torchrun")

    # All trainings share the data and the autoencoder.
    base = configs.build(overrides=base_overrides(args))
    with stage_lock(base.output.root):
        data.ensure_data(base, process)
        splits = [data.open_split(base, split) for split in ("train", "val")]
        vqvae_path = str(vqvae.train(base, *splits, process.device))
    runs = {}
    for name in interpolants.TABLE:
        runs[name] = [train(name, name, {}, seed, args, vqvae_path) for seed in range(args.seeds)]

    table = Table(Path(base.output.root) / "benchmark" / "interpolants.jsonl")
    parts = [introduction(args, base)]

    def add(title: str, text: str) -> None:
        """Add a table to RESULTS.md at once, so that an interrupted run leaves what it has."""
        parts.extend([title, text])
        results.write("Interpolants and samplers", "\n\n".join(parts), args.out)
        print(f"{title}\n\n{text}\n")

    add(
        "CRPS of each interpolant's best process, solver `exact2`, by network evaluations a frame:",
        compare_processes(args, table, runs),
    )
    add(
        "CRPS of solvers and time grids on the follmer checkpoints, "
        "by the most evaluations they may take:",
        compare_solvers(args, table, runs["follmer"]),
    )
    add(
        "What follmer is trained on, each sampled by `exact` with diffusion sigma "
        "(MSE with 5 evaluations; `first` asks the network there in place of s = 0):",
        compare_trainings(args, table, vqvae_path),
    )
    print(f"table          {args.out / 'RESULTS.md'}")
    print(f"figure         {args.out / 'interpolants.png'}")


def command() -> str:
    """The command line, for RESULTS.md."""
    return shlex.join(["python", "-m", "benchmarks.interpolants", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
