"""The benchmark against the oracle: its records, its table, its targets, a tiny run."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from conftest import launch

import configs
from benchmarks import measure, navier_stokes, navier_stokes_report, results
from configs import Latent
from runtime.console import Failure, UserError


def make_record(variant="follmer", sampler="default", seed=0, world="navier_stokes", **scores):
    """A record with scores at one lead time; scores: {name: (value, standard error)}."""
    values = {"crps": (1.1, 0.01), "energy": (1.1, 0.01), "mean_error": (0.04, 0.001)}
    values |= {"deviation_error": (0.03, 0.001), "spectrum_error": (0.1, 0.01)}
    values |= {"coverage_50": (0.5, 0.01), "coverage_90": (0.9, 0.01)} | scores
    found = {}
    for name, (value, se) in values.items():
        entry = {"value": [value], "se": [se]}
        found[name] = {"quotient": entry} if name in ("crps", "energy") else entry
    power = np.linspace(1, 0.1, 33).tolist()
    found["spectrum"] = {"forecast": [power], "oracle": [power]}
    found["divergence"] = {"enstrophy_histogram": [0.01]}
    record = {"world": world, "variant": variant, "tau": 0.5, "seed": seed, "flops": 1e15}
    record |= {"changes": [], "sampler": sampler, "updates": 10, "trained_flops": 1e15}
    record["scores"] = {**found, "evaluations": 10.0}
    if sampler == "default":
        rolled = {"steps": 100, "enstrophy": {"value": 1.02, "se": 0.02}, "spectrum_error": 0.1}
        record["rollout"] = {**rolled, "spectrum": power, "spectrum_true": power}
    return record


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Redirect the records and RESULTS.md to tmp_path. -> a function that writes records."""
    monkeypatch.setattr(navier_stokes_report, "FILE", tmp_path / "records.jsonl")
    monkeypatch.setattr(navier_stokes_report, "FIGURES", tmp_path)
    write = results.write
    monkeypatch.setattr(results, "write", lambda name, text: write(name, text, tmp_path))

    def append(*given) -> None:
        for record in given:
            navier_stokes_report.append(record)

    return append


def test_the_report_has_a_row_per_variant_and_sampler_and_names_the_best(records, tmp_path):
    records(
        make_record(crps=(1.10, 0.01)),
        make_record(seed=1, crps=(1.14, 0.01)),
        make_record("linear", crps=(1.3, 0.01)),
        make_record(sampler="0:5", crps=(1.2, 0.01)),
        make_record(sampler="0:10", crps=(1.19, 0.01)),
        make_record(sampler="follmer:10", crps=(1.15, 0.01)),
        make_record(sampler="follmer:5", crps=(1.3, 0.01)),
        make_record("repeat", crps=(2.5, 0.01)),
        make_record(world="heat", crps=(1.01, 0.01)),
    )
    navier_stokes_report.report(write=True, check=True)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| follmer | default | 2 | 10 | 10 | 1.120 ± 0.022 |" in text
    assert text.index("| follmer | default") < text.index("| follmer | 0:5")
    assert text.index("| linear") < text.index("| repeat")
    assert (
        "lowest CRPS by follmer, default (1.120 ± 0.022), not clearly below follmer, follmer:10"
        in text
    )
    assert "10 steps of exact2: that the Föllmer process is the best diffusion is borne out" in text
    not_best = "5 steps of exact2: that the Föllmer process is the best diffusion is not borne out"
    assert not_best in text
    assert "- none" in text
    for name in ("evaluations", "spectra"):
        assert (tmp_path / f"navier_stokes_{name}.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"crps": (1.2, 0.01)}, "navier_stokes: crps is 1.200 ± 0.010, target 0 to 1.15"),
        ({"coverage_90": (0.97, 0.01)}, "navier_stokes: coverage_90 is 0.970"),
        ({"spectrum_error": (0.2, 0.01)}, "navier_stokes: spectrum_error is 0.200"),
    ],
)
def test_missed_targets_are_named(records, capsys, scores, message):
    records(make_record(world="heat", crps=(1.01, 0.01)), make_record(**scores))
    with pytest.raises(Failure, match="1 targets"):
        navier_stokes_report.report(write=False, check=True)
    assert message in capsys.readouterr().out


def test_what_was_not_measured_or_took_more_operations_misses_the_targets(records, capsys):
    larger = make_record()
    larger["trained_flops"] = 2e15
    records(larger)
    with pytest.raises(Failure, match="9 targets"):
        navier_stokes_report.report(write=False, check=True)
    assert "navier_stokes: crps is not measured" in capsys.readouterr().out


def test_operations_of_an_update_are_those_of_its_network():
    config = configs.build(
        "navier_stokes", {"flow.draws": 2, "flow.start": 1.0, "train.batch_size": 4}
    )
    known = dataclasses.replace(config, latent=Latent((1, 64, 64)))
    three = measure.flops_per_update(known)
    one = configs.update(known, {"flow.draws": 1, "flow.start": 0.0})
    assert three == pytest.approx(3 * measure.flops_per_update(one), rel=0.01)
    # A backward pass takes twice the operations of the forward pass.
    own = configs.update(one, {"train.own": 2})
    assert measure.flops_per_update(own) == pytest.approx(
        4 / 3 * measure.flops_per_update(one), 0.02
    )


TINY = [
    "model.width=8",
    "model.depth=1",
    "model.mid_depth=1",
    "model.heads=2",
    "model.multipliers=1",
    "train.batch_size=4",
    "sample.steps=1",
]


def test_a_tiny_run_is_measured_once_for_each_sampler(records, tmp_path, monkeypatch, capsys):
    world = navier_stokes.World("heat", 1.0, 10, 30)
    monkeypatch.setattr(navier_stokes, "WORLDS", {"heat": world})
    monkeypatch.chdir(tmp_path)
    arguments = ["--worlds", "heat", "--flops", "2e8", "--samples", "4", "--rollout", "20"]
    arguments += ["--variants", "follmer", "repeat", "--samplers", "default", "0:2"]

    def run() -> str:
        monkeypatch.setattr(sys, "argv", ["navier_stokes", *arguments, "--set", *TINY])
        navier_stokes.main()
        return capsys.readouterr().out

    with pytest.raises(UserError, match="no data and oracle in data/heat; prepare them: python -m"):
        run()
    made = ("-m", "prepare.heat", "--out", "data/heat", "--size", "24", "--workers", "1")
    launch(tmp_path, *made, "--trajectories", "10", "--frames", "30")
    launch(tmp_path, *made, "--oracle", "8", "--members", "6")
    run()
    lines = navier_stokes_report.FILE.read_text().splitlines()
    first, second, repeated = map(json.loads, lines)
    assert [r["sampler"] for r in (first, second, repeated)] == ["default", "0:2", "default"]
    assert first["scores"]["times"] == [0.5, 1.0, 1.5, 2.0] and second["scores"]["times"] == [0.5]
    assert first["trained_flops"] <= 2e8 and first["updates"] > 1
    assert first["scores"]["evaluations"] == 1 and second["scores"]["evaluations"] == 2
    assert len(first["rollout"]["curve"]) == len(second["rollout"]["curve"]) == 20
    assert repeated["scores"]["deviation_error"]["value"][0] == 1
    assert "--samplers 0:2 --rollout 20 --set model.width=8" in second["command"]
    # Nothing is measured twice.
    assert run().count("measured already") == 3
    assert len(navier_stokes_report.FILE.read_text().splitlines()) == 3


def test_operations_of_the_other_objectives():
    """Energy: evaluations and members. Shortcut: for every fourth item two forward passes more, and
    one with its backward pass, of about twice the cost."""
    base = {"model.width": 16, "data.contexts": 1}
    latent = Latent((1, 32, 32))

    def count(**flow) -> int:
        overrides = base | {f"flow.{name}": value for name, value in flow.items()}
        config = configs.build("navier_stokes", overrides)
        return measure.flops_per_update(dataclasses.replace(config, latent=latent))

    plain = count()
    energy = count(objective="energy", members=3, evaluations=2)
    assert energy == pytest.approx(6 * plain, rel=0.01)
    assert count(objective="energy", unroll=2) == pytest.approx(4 * plain, rel=0.01)
    assert count(objective="shortcut") == pytest.approx((1 + (2 / 3 + 1) / 4) * plain, rel=0.02)


def test_a_tuned_run_starts_from_follmer(tmp_path, monkeypatch):
    made = []

    def train_network(config, process, start, clock):
        made.append((config, start))
        return config, tmp_path / f"{config}.pt", None

    monkeypatch.setattr(navier_stokes, "build_config", lambda run: run.variant)
    monkeypatch.setattr(navier_stokes, "train_network", train_network)
    navier_stokes.train(navier_stokes.Run("navier_stokes", "energy_2", 0.5, 0, 1e12, ()), None)
    assert made == [("follmer", None), ("energy_2", str(tmp_path / "follmer.pt"))]


def test_targets_are_judged_at_the_largest_budget():
    large = make_record(spectrum_error=(0.10, 0.01))
    small = make_record(spectrum_error=(0.30, 0.01)) | {"flops": 1e13, "trained_flops": 1e13}
    heat = make_record(world="heat", crps=(1.01, 0.01))
    assert navier_stokes_report.misses([small, large, heat]) == []
    assert "spectrum_error is 0.300" in navier_stokes_report.misses([small, heat])[0]
