"""Interpolants, diffusions and solvers compared: same latents, budget and seeds, quality against network evaluations.

    python -m benchmarks.interpolants

trains each interpolant with each seed on the bouncing balls, samples every checkpoint in many ways, and writes
benchmarks/RESULTS.md and benchmarks/interpolants.png. Stopped and run again, it goes on where it was.
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
from forecaster import load as load_forecaster
from main import Clock, train_network
from runtime import logs
from runtime.console import UserError, progress, run_command
from runtime.folders import stage_lock
from runtime.process import start

EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
PER_STEP = {"heun": 2, "rk4": 4, "stochastic_heun": 2}  # evaluations of the network
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
PROCESSES = [
    ("0", 0.0, 64),
    ("sigma", 0.0, 64),
    ("follmer", 0.0, 64),
    ("0", 0.2, 8),
]  # diffusion, warm_start, evaluations
# what is changed of the default, follmer with residual output, velocity weight and c = 1
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


def setting(args: argparse.Namespace) -> dict:
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


def run_of(
    name: str, interpolant: str, flow: dict, seed: int, args: argparse.Namespace, vqvae: str
) -> Path:
    """-> the checkpoint of one training, done now unless it is there."""
    extra = (
        "-" + hashlib.blake2b(repr(args.set).encode(), digest_size=4).hexdigest()
        if args.set
        else ""
    )
    run_id = (
        f"bench-{name}-{args.width}-{args.steps}{extra}-{seed}".replace(" ", "_")
        .replace(",", "")
        .replace("=", "")
    )
    config = configs.build(
        overrides={
            **setting(args),
            **flow,
            "flow.interpolant": interpolant,
            "train.seed": seed,
            "output.run_id": run_id,
            "vqvae.ckpt": vqvae,
        }
    )
    return train_network(config, start(), None, Clock())[1]


class Table:
    """Rows of metrics, one per (training, seed, sampler), kept on disk as they are made."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        self.cut_short = bool(text) and not text.endswith("\n")  # by a kill
        for line in text.splitlines():
            if logs.is_row(line):
                row = json.loads(line)
                self.rows[self.key(row["run"], row["sampler"])] = row

    @staticmethod
    def key(run: str, sampler: dict) -> str:
        return json.dumps([run, sampler], sort_keys=True)

    def measure(self, ckpt: Path, sampler: dict) -> None:
        run = ckpt.parent.name
        if self.key(run, sampler) in self.rows:
            return
        forecaster, step = load_forecaster(ckpt, start().device, sampler)
        truth, futures, _ = sample.forecast_split(forecaster, quiet=True)
        ratio = sample.score(truth, futures)["ratio_to_repeat_last"]
        mse = ratio["mse"]["horizon"]
        row = {
            "run": run,
            "sampler": sampler,
            "step": step,
            "evaluations": forecaster.evaluations / futures[..., 0, 0, 0].size,
            "crps": ratio["crps"]["all"],
            "mse1": mse[0],
            "mse5": mse[min(4, len(mse) - 1)],
        }
        with open(self.path, "a") as file:
            file.write("\n" * self.cut_short + json.dumps(row) + "\n")
        self.cut_short = False
        self.rows[self.key(run, sampler)] = row

    def over_seeds(
        self, ckpts: list[Path], sampler: dict, metric: str = "crps"
    ) -> tuple[float, float]:
        """Mean and standard error (NaN of one seed)."""
        values = np.array(
            [self.rows[self.key(ckpt.parent.name, sampler)][metric] for ckpt in ckpts]
        )
        return values.mean(), values.std(ddof=1) / np.sqrt(len(values)) if len(
            values
        ) > 1 else float("nan")


def sampler_of(
    args: argparse.Namespace,
    evaluations: int,
    solver: str = "exact",
    diffusion: str = "0",
    grid: str = "uniform",
    **more,
) -> dict:
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


def cell(mean: float, error: float) -> str:
    return f"{mean:.3f}" if np.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]
    )


def processes(args: argparse.Namespace, table: Table, runs: dict[str, list[Path]]) -> str:
    """Every interpolant by every diffusion, and with the solver begun part of the way from the last frame."""
    counts = [n for n in EVALUATIONS if n <= args.most]
    wanted = {
        (name, diffusion, warm, n): sampler_of(
            args, n, "exact2", diffusion, **{"sample.warm_start": warm}
        )
        for name in runs
        for diffusion, warm, most in PROCESSES
        for n in counts
        if n <= most
    }
    measure_all(
        table,
        [(ckpt, sampler) for (name, *_), sampler in wanted.items() for ckpt in runs[name]],
        "interpolants",
    )
    curves = {
        (name, *process): [
            table.over_seeds(runs[name], wanted[(name, *process, n)]) for n in counts if n <= most
        ]
        for name in runs
        for *process, most in PROCESSES
    }
    draw(curves, counts, args.out / "interpolants.png")
    figure = "![CRPS against network evaluations](interpolants.png)"
    least = markdown(
        ["interpolant", *counts, "enough"], [[name, *best(curves, name, counts)] for name in runs]
    )
    every = markdown(
        ["interpolant", "diffusion", "begun at s", *counts],
        [[*key, *(cell(*point) for point in points)] for key, points in curves.items()],
    )
    return (
        f"{least}\n\n{figure}\n\nThat is the best row of each, chosen on these same clips, in this table of every "
        "diffusion and start; `enough` is the fewest evaluations within one standard error of the CRPS with "
        f"{counts[-1]}:\n\n{every}"
    )


def best(curves: dict, name: str, counts: list[int]) -> list[str]:
    """Cells of the best process of interpolant `name` at each count, and the count that is enough."""
    own = [points for key, points in curves.items() if key[0] == name]
    least = [min(points[k] for points in own if k < len(points)) for k in range(len(counts))]
    mean, error = least[-1]
    enough = next(
        n for n, point in zip(counts, least) if not point[0] > mean + np.nan_to_num(error)
    )
    return [*(cell(*point) for point in least), str(enough)]


def solver_table(args: argparse.Namespace, table: Table, ckpts: list[Path]) -> str:
    counts = [n for n in EVALUATIONS if n <= min(16, args.most)]
    kinds = [(*kind, "uniform") for kind in SOLVERS] + [
        ("exact", "sigma", grid) for grid in GRIDS[1:]
    ]
    cells = {
        (*kind, n): sampler_of(args, n, *kind)
        for kind in kinds
        for n in counts
        if kind[0] not in PER_STEP or n > PER_STEP[kind[0]]
    }  # their first or last step is another solver's
    measure_all(table, [(ckpt, sampler) for sampler in cells.values() for ckpt in ckpts], "solvers")
    rows = [
        [
            *kind,
            *(
                cell(*table.over_seeds(ckpts, cells[(*kind, n)])) if (*kind, n) in cells else ""
                for n in counts
            ),
        ]
        for kind in kinds
    ]
    return markdown(["solver", "diffusion", "grid", *counts], rows)


def training_table(args: argparse.Namespace, table: Table, vqvae: str) -> str:
    rows, counts = [], (2, 5, 10)
    for name, flow in TRAININGS.items():
        ckpts = [run_of(name, "follmer", flow, seed, args, vqvae) for seed in range(args.seeds)]
        for first in (0.0, 0.01) if flow.get("flow.output") == "drift" else (0.0,):
            label = name + f", first = {first}" * (first > 0)
            samplers = [
                sampler_of(args, n, "exact", "sigma", **{"sample.first": first}) for n in counts
            ]
            measure_all(table, [(ckpt, sampler) for sampler in samplers for ckpt in ckpts], label)
            rows.append(
                [
                    label,
                    *(cell(*table.over_seeds(ckpts, sampler)) for sampler in samplers),
                    *(
                        cell(*table.over_seeds(ckpts, samplers[1], metric))
                        for metric in ("mse1", "mse5")
                    ),
                ]
            )
    return markdown(
        ["training", *(f"CRPS, {n} evaluations" for n in counts), "MSE, frame 1", "MSE, frame 5"],
        rows,
    )


def measure_all(table: Table, wanted: list[tuple[Path, dict]], name: str) -> None:
    with progress(len(wanted), f"sample {name}", "sampler") as bar:
        for ckpt, sampler in wanted:
            table.measure(ckpt, sampler)
            bar.update()


def draw(curves: dict, counts: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, *_ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True)
    for axis, name in zip(np.atleast_1d(axes), names):
        for (own, diffusion, warm), points in curves.items():
            if own == name:
                mean, error = np.array(points).T
                label = f"g = {diffusion}" + f", from s = {warm}" * (warm > 0)
                axis.errorbar(
                    counts[: len(points)],
                    mean,
                    error,
                    marker="o",
                    markersize=3,
                    capsize=2,
                    label=label,
                )
        axis.set(
            title=name,
            xscale="log",
            xlabel="network evaluations a frame",
            xticks=counts,
            xticklabels=counts,
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set(ylabel="CRPS / CRPS of repeating the last frame")
    np.atleast_1d(axes)[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interpolants", description=__doc__.splitlines()[0]
    )
    for flag, default, help in (
        ("seeds", 3, "trainings of each kind"),
        ("steps", 1200, "updates of each"),
        ("width", 64, "model.width"),
        ("videos", 16, "held-out clips"),
        ("samples", 4, "futures of each"),
        ("most", 64, "evaluations a frame, at the most"),
    ):
        parser.add_argument(
            f"--{flag}", type=int, default=default, help=f"{help} (default {default})"
        )
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
    args = parser.parse_args()
    process = start()
    if process.world > 1:
        raise UserError("the benchmark runs as one process; start it without torchrun")
    base = configs.build(overrides=setting(args))
    with stage_lock(base.output.root):
        data.ensure_data(base, process)
        vqvae_path = str(
            vqvae.train(
                base, *(data.open_split(base, split) for split in ("train", "val")), process.device
            )
        )
    runs = {
        name: [run_of(name, name, {}, seed, args, vqvae_path) for seed in range(args.seeds)]
        for name in interpolants.TABLE
    }
    table = Table(Path(base.output.root) / "benchmark" / "interpolants.jsonl")
    parts = [
        f"ball_stn, {base.data.condition} -> {base.data.predict} frames, {args.videos} held-out clips x {args.samples} "
        f"futures, conv net of width {args.width}, {args.steps} updates of batch {base.train.batch_size}, {args.seeds} "
        f"seeds: mean ± standard error over seeds. {results.machine()}. Made by `{command()}`. CRPS over all frames "
        "and MSE of single samples, as ratios to repeating the last frame (lower is better)."
    ]
    tables = [
        (
            "CRPS of each interpolant's best process, solver `exact2`, by network evaluations a frame:",
            lambda: processes(args, table, runs),
        ),
        (
            "CRPS of solvers and time grids on the follmer checkpoints, by the most evaluations they may take:",
            lambda: solver_table(args, table, runs["follmer"]),
        ),
        (
            "What follmer is trained on, each sampled by `exact` with diffusion sigma (MSE with 5 evaluations; `first` asks the "
            "network there in place of s = 0):",
            lambda: training_table(args, table, vqvae_path),
        ),
    ]
    for title, make in tables:  # each is written as soon as it is there
        parts += [title, make()]
        file = results.write("Interpolants and samplers", "\n\n".join(parts), args.out)
        print("\n\n".join(parts[-2:]) + "\n")
    print(f"table          {file}\nfigure         {args.out / 'interpolants.png'}")


def command() -> str:
    return shlex.join(["python", "-m", "benchmarks.interpolants", *sys.argv[1:]])


if __name__ == "__main__":
    run_command(main)
