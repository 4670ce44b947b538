"""benchmarks.few_evaluations: variants, a tiny run, the table and the targets."""

import argparse

import numpy as np
import pytest
from conftest import TINY

import configs
from benchmarks import few_evaluations as few
from benchmarks import few_evaluations_table as table
from benchmarks import quality
from evaluation import metrics
from runtime import checkpoints
from runtime.console import Failure

# Without what the variants and the objectives set.
OWN = ("train.steps", "vqvae.steps", "train.warmup", "sample.")
SETTINGS = [item for item in TINY if not item.startswith(OWN)]


@pytest.mark.parametrize("world", quality.WORLDS)
@pytest.mark.parametrize("variant", few.VARIANTS)
def test_every_variant_is_a_valid_config_of_every_world(world, variant):
    args = argparse.Namespace(budget=1.0, set=[])
    config = configs.build(quality.WORLDS[world].dataset, few.settings_of(world, variant, 2, args))
    full = configs.build(quality.WORLDS[world].dataset)
    training = few.VARIANTS[variant].training
    assert config.run_id == f"{world}-default-2-1" + (
        "" if training == "default" else f"-{training}"
    )
    tuned = training not in ("default", "energy_scratch_1")
    assert config.train.lr == pytest.approx(full.train.lr * (few.RATE if tuned else 1))
    assert configs.update(config, few.VARIANTS[variant].sample)


def test_a_tiny_run_trains_the_default_once_and_measures_every_variant(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "FILE", tmp_path / "few.jsonl")
    monkeypatch.setattr(few, "PATCH", 16)
    monkeypatch.setattr(few.train, "measure_update", lambda config, *_: config.flow.members / 2)
    command = ["few_evaluations", "--clips", "3", "--members", "3", "--budget", "0.01"]
    settings = [*SETTINGS, "train.steps=40", "vqvae.steps=8", "train.warmup=2"]
    monkeypatch.setattr("sys.argv", [*command, "--set", *settings])
    few.main()
    records = {record["variant"].partition(" ")[0]: record for record in table.read()}
    assert list(records) == list(few.VARIANTS)
    evaluations = [record["evaluations"] for record in records.values()]
    assert evaluations == [5, 2, 1, 5, 2, 1, 1, 2, 1]
    # 15 % of 40 updates; an update with four members takes twice the seconds.
    updates = [record["updates"] for record in records.values()]
    assert updates == [40, 40, 40, 6, 3, 3, 23, 6, 6]
    runs = {path.name for path in (tmp_path / "outputs/board/checkpoints").glob("ball*")}
    assert len(runs) == 6
    for record in records.values():
        assert len(record["clips"]["crps"]) == 3 and len(record["spread_skill"]) == 4
        assert sum(record["ranks"]) == 3 * 4 * 32 * 32 * 3 and len(record["ranks"]) == 4
        assert record["frames_per_second"] > 0 and np.isfinite(record["clips"]["patches"]).all()
    # Tuning starts from the default's weights.
    default = tmp_path / "outputs/board/checkpoints/ball_stn-default-0-0.01/latest.pt"
    assert checkpoints.load_checkpoint(default)["step"] == 40
    before = default.stat().st_mtime_ns
    capsys.readouterr()
    few.main()
    assert len(table.read()) == 9 and capsys.readouterr().out.count("measured already") == 9
    assert default.stat().st_mtime_ns == before
    lines = table.make_table(table.read()).splitlines()
    assert len({line.count("|") for line in lines[2:]} - {0}) == 1


def test_squares_of_a_frame_become_videos():
    frames = np.random.default_rng(0).random((1, 2, 3, 19, 24, 3))
    squares = few.cut(frames)
    assert squares.shape == (2 * 3, 2, 3, 8, 8, 3)
    assert np.array_equal(squares[4], frames[0, :, :, 8:16, 8:16])


def test_the_measures_of_a_clip_are_those_of_metrics():
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 255, (1, 4, 2, 16, 16, 3), np.uint8)
    truth = rng.integers(0, 255, (1, 5, 16, 16, 3), np.uint8)
    found = few.measure_clip(samples, truth, 0)
    x, y = few.to_float(samples), few.to_float(truth[:, 3:])
    assert np.allclose(found["crps"], metrics.crps(x, y)[0])
    last = np.abs(few.to_float(truth[0, 3:]) - few.to_float(truth[0, 2])).mean((1, 2, 3))
    assert np.allclose(found["repeat_last"], last, atol=1e-6)
    corner = metrics.energy(x[..., :8, :8, :], y[..., :8, :8, :])[0]
    parts = [(slice(a, a + 8), slice(b, b + 8)) for a in (0, 8) for b in (0, 8)]
    every = [metrics.energy(x[:, :, :, a, b], y[:, :, a, b])[0] for a, b in parts]
    assert np.allclose(every[0], corner) and np.allclose(found["patches"], np.mean(every, 0))
    assert found["ranks"].shape == (2, 5) and (found["ranks"].sum(1) == 16 * 16 * 3).all()


# -------------------------------------------------------------------- records
def record(variant: str, seed: int = 0, crps: float = 0.2, **changes) -> dict:
    clips = {"crps": [crps] * 256, "repeat_last": [0.5] * 256, "patches": [2 * crps] * 256}
    return {
        "world": "ball_stn",
        "variant": variant,
        "seed": seed,
        "budget": 1.0,
        "members": 16,
        "updates": 100,
        "seconds": 10.0,
        "evaluations": 5,
        "frames_per_second": 100.0,
        "clips": clips,
        "spread_skill": [0.95, 1.0],
        "coverage": [0.88, 0.9],
        "ranks": [2, *[1] * 15, 2],
        "spectrum": [0.9, 1.1],
        "sharpness": 1.0,
        "motion": 1.0,
        **changes,
    }


def test_the_targets_are_checked_on_pairs_of_three_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "FILE", tmp_path / "few.jsonl")
    records = []
    for seed in range(3):
        for name in ("default", "longer"):
            records.append(record(name, seed))
        records.append(record("energy_2", seed, 0.201, frames_per_second=200.0))
        records.append(record("energy_1", seed, 0.199, frames_per_second=300.0))
    assert table.misses(records) == []
    found = table.summarize(records[2::4], records)
    assert found["default"][0] == pytest.approx(1.005) and found["faster"] == pytest.approx(2)
    assert found["crps"] == pytest.approx(0.402) and found["ranks"] == pytest.approx([34 / 19] * 2)

    bad = [dict(one) for one in records]
    bad[2] = record("energy_2", 0, 0.24, frames_per_second=80.0, spread_skill=[0.5, 1.0])
    missed = table.misses(bad)
    assert len(missed) == 4
    assert any("the upper bound of the CRPS over that of `longer` is" in line for line in missed)
    assert any("spread/skill is 0.80 to 1.00" in line for line in missed)
    assert any("2 of 3 seeds" in line for line in table.misses(records[:8]))

    for one in records[:8]:
        table.append(one)
    with pytest.raises(Failure, match="targets of one or two evaluations are missed"):
        table.report(write=False, check=True)
    assert "energy_1: 2 of 3 seeds" in capsys.readouterr().out
