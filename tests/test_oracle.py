"""Forecasts scored against an oracle: perfect ones, wrong ones, the closed form, the command."""

import json

import numpy as np
import pytest
from conftest import launch

from evaluation import fields, oracle
from prepare import heat
from shards import Shards

TINY = [
    "data.stream=360",
    "data.held_out=60",
    "data.clip=4",
    "model.width=8",
    "model.depth=1",
    "model.mid_depth=1",
    "model.heads=2",
    "model.multipliers=1",
    "train.steps=6",
    "train.batch_size=8",
    "train.sample_every=0",
    "sample.steps=2",
    "sample.num_videos=2",
    "sample.num_samples=2",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of the heat equation and their oracle."""
    folder = tmp_path_factory.mktemp("heat")
    run = ("-m", "prepare.heat", "--out", "data", "--size", "24", "--workers", "1")
    launch(folder, *run, "--trajectories", "24", "--frames", "40")
    launch(folder, *run, "--oracle", "48", "--members", "32", "--leads", "4")
    return folder / "data"


@pytest.fixture(scope="module")
def opened(root):
    return oracle.open_oracle(root, Shards(root / "test"), skip=1)


def score_all(opened, law: bool, change=lambda forecast, mean: forecast, leads: int = 2) -> dict:
    """Forecast every state by a part of its own draws, and score against the others."""
    rows = []
    for k in range(len(opened.video)):
        members = opened.members(k, leads).astype(np.float64)
        exact = opened.law(k, leads)
        samples = change(members[:12], exact.mean)
        rows.append(oracle.score_state(samples, members[12:], exact if law else None, opened.unit))
    tables = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return oracle.summarize(tables, opened.times(leads))


@pytest.mark.parametrize("law", [True, False])
def test_a_perfect_forecast_scores_as_the_oracle_itself(opened, law):
    found = score_all(opened, law)
    assert found["times"] == [1.0, 2.0]
    assert (found["states"], found["samples"], found["members"]) == (48, 12, 20)
    for name in ("crps", "energy", "enstrophy"):
        quotient = found[name]["quotient"]
        for value, se in zip(quotient["value"], quotient["se"]):
            assert abs(value - 1) < 4 * se and se < 0.03, (name, value, se)
    for level in (50, 90):
        assert found[f"coverage_{level}"]["value"] == pytest.approx([level / 100] * 2, abs=0.015)
    assert max(found["mean_error"]["value"] + found["deviation_error"]["value"]) < 0.12
    assert max(found["spectrum_error"]["value"]) < 0.15
    assert max(found["divergence"]["values_histogram"]) < 1e-3
    assert np.sum(found["rank_histogram"], 1) == pytest.approx(1)


def test_the_closed_form_and_the_draws_agree_on_a_wrong_forecast(opened):
    def change(forecast, mean):
        return 0.2 + mean + 1.5 * (forecast - mean)

    exact, drawn = (score_all(opened, law, change) for law in (True, False))
    world = heat.Heat(24, 0.5)
    for t, time in enumerate((1.0, 2.0)):
        deviation = world.conditional_deviation(time)
        # E|X - Y| - E|X - X'| / 2 of two Gaussians.
        spread = np.hypot(1, 1.5) * deviation
        z = 0.2 / spread
        expected = spread * (2 * fields.density(z) + z * (2 * fields.cumulative(z) - 1))
        expected -= 1.5 * deviation / np.sqrt(np.pi)
        for found in (exact, drawn):
            assert found["crps"]["forecast"][t] == pytest.approx(expected, rel=0.02)
            own = found["crps"]["oracle"][t]
            assert own == pytest.approx(world.crps(time), rel=0.02 if found is drawn else 1e-6)
            assert found["crps"]["quotient"]["value"][t] == pytest.approx(
                expected / world.crps(time), rel=0.02
            )
            assert found["deviation_error"]["value"][t] == pytest.approx(0.5, abs=0.03)
    for name in ("coverage_50", "coverage_90", "mean_error"):
        assert exact[name]["value"] == pytest.approx(drawn[name]["value"], abs=0.03)
    # Too wide an ensemble covers too much.
    assert min(exact["coverage_90"]["value"]) > 0.95
    assert drawn["enstrophy"]["quotient"]["value"][0] > 1.2


def test_standard_errors_are_those_over_states(opened):
    rng = np.random.default_rng(0)
    values = []
    for _ in range(200):
        table = 1 + 0.1 * rng.standard_normal((30, 1))
        found = oracle.compare(table, np.ones((30, 1)))["quotient"]
        values.append((found["value"][0], found["se"][0]))
    value, se = np.transpose(values)
    assert value.std() == pytest.approx(se.mean(), rel=0.15)
    assert se.mean() == pytest.approx(0.1 / np.sqrt(30), rel=0.05)


def test_an_oracle_of_other_shards_is_refused(root, tmp_path, make_shards):
    from runtime.console import UserError

    with pytest.raises(UserError, match="no oracle .*; simulate it: python -m prepare"):
        oracle.open_oracle(tmp_path, Shards(root / "test"))
    with pytest.raises(UserError, match="simulated for other shards"):
        oracle.open_oracle(root, Shards(root / "val"))
    with pytest.raises(UserError, match="reaches 4 frames ahead, but data.skip = 4 needs 5"):
        oracle.open_oracle(root, Shards(root / "test"), skip=4)


def test_evaluate_scores_a_checkpoint_against_the_oracle(tmp_path):
    settings = [*TINY, "data.skip=1"]
    launch(tmp_path, "main.py", "--dataset", "heat", "--set", *settings)
    ckpt = next(tmp_path.glob("outputs/checkpoints/heat-*/latest.pt"))
    run = ("evaluate.py", "--ckpt", str(ckpt), "--protocol", "navier_stokes", "--samples", "4")
    refused = launch(tmp_path, *run, check=False)
    assert refused.returncode == 2 and "no oracle data/heat/oracle.hdf5" in refused.stderr
    oracle_of = ("-m", "prepare.heat", "--out", "data/heat", "--oracle", "10", "--members", "6")
    launch(tmp_path, *oracle_of, "--leads", "5", "--workers", "1")
    done = launch(tmp_path, *run)
    # data.skip = 1: every second frame of the oracle.
    assert "against the oracle: 10 states, 4 samples, 6 truths each" in done.stdout
    assert "t + 1 " in done.stdout and "t + 2" in done.stdout and "t + 3" not in done.stdout
    path = next(tmp_path.glob("outputs/results/**/*navier_stokes*/metrics.json"))
    result = json.loads(path.read_text())
    assert result["protocol"]["oracle"] and result["protocol"]["videos"] == 10
    found = result["oracle"]
    assert found["times"] == [1.0, 2.0] and found["crps"]["quotient"]["value"][0] > 1
    # Stored forecasts are a part of those that were scored.
    stored = ("evaluate.py", "--results", str(path.parent), "--protocol", "navier_stokes")
    refused = launch(tmp_path, *stored, check=False)
    assert refused.returncode == 2 and "give --ckpt FILE" in refused.stderr
