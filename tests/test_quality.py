"""The board of forecast quality: metrics of sharpness and motion, the physics oracle, records and
targets, a tiny run; the benchmark of drift."""

import json
import os

import numpy as np
import pytest
from conftest import TINY, launch

from batches.windows import Windows
from benchmarks import ball_oracle, board, drift, quality
from evaluation import metrics
from prepare import balls
from runtime.console import Failure
from shards import Shards


# -------------------------------------------------------------------- metrics
def test_the_spectrum_sums_to_the_mean_square_and_finds_a_wave():
    rng = np.random.default_rng(0)
    frames = rng.random((2, 24, 16, 3))
    spectrum = metrics.radial_spectrum(frames)
    assert spectrum.shape == (2, 9)
    assert np.allclose(spectrum.sum(-1), (frames**2).mean((1, 2)).sum(-1))
    x = np.arange(32) * 2 * np.pi / 32
    wave = np.sin(5 * x)[None, :, None].repeat(32, 0)
    power = metrics.radial_spectrum(wave)
    assert power.argmax() == 5 and power[5] == pytest.approx(0.5)
    diagonal = np.sin(3 * x[:, None] + 4 * x)[..., None]
    assert metrics.radial_spectrum(diagonal).argmax() == 5


def test_blurred_frames_are_less_sharp_and_grainy_ones_sharper():
    rng = np.random.default_rng(0)
    truth = rng.random((2, 3, 32, 32, 3))
    same = truth[:, None].repeat(2, 1)
    assert metrics.sharpness(same, truth) == pytest.approx(1)
    blurred = (same + np.roll(same, 1, 3) + np.roll(same, 1, 4) + np.roll(same, -1, 3)) / 4
    assert metrics.sharpness(blurred, truth) < 0.7
    assert metrics.sharpness(same + 0.3 * rng.standard_normal(same.shape), truth) > 1.5


def test_motion_energy_is_0_for_a_frozen_video_and_4_for_double_speed():
    frames = np.arange(12.0).reshape(1, 12, 1, 1, 1).repeat(2, 0)
    assert metrics.motion_energy(frames[:, None], frames) == 1
    assert metrics.motion_energy(2 * frames[:, None], frames) == 4
    assert metrics.motion_energy(0 * frames[:, None], frames) == 0


# -------------------------------------------------------------------- the oracle
@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    root = tmp_path_factory.mktemp("balls") / "data"
    balls.make(root, {"test": 600})
    return Shards(root / "test")


def test_the_oracle_without_errors_of_reading_repeats_the_truth(stream, monkeypatch):
    monkeypatch.setattr(ball_oracle, "reading_error", lambda *_: 0.0)
    windows = Windows(np.zeros(4, int), np.array([0, 130, 260, 390]), 40, 1)
    given = 30

    def same(frames):
        return frames

    rng = np.random.default_rng(0)
    found = ball_oracle.forecast(stream, windows, given, 3, same, rng)
    assert found.shape == (4, 3, 10, 32, 32, 3)
    for k, start in enumerate(windows.start):
        truth = stream.read(0, start + given + np.arange(10))
        # The colours differ where the given frames do not show the colour before; places do not.
        assert np.abs(found[k].max(-1).astype(int) - truth.max(-1)).max() <= 2


def test_the_oracle_spreads_with_the_error_of_reading(stream):
    windows = Windows(np.zeros(2, int), np.array([0, 200]), 20, 1)

    def noisy(frames):
        return np.clip(
            frames + np.random.default_rng(1).normal(0, 20, frames.shape), 0, 255
        ).astype(np.uint8)

    states = [ball_oracle.read_state(stream, 0, start, 20) for start in windows.start]
    exact = ball_oracle.reading_error(stream, windows, 10, states, lambda frames: frames)
    error = ball_oracle.reading_error(stream, windows, 10, states, noisy)
    # In box units; a pixel is 10 / 32.
    assert exact < error < 0.3
    rng = np.random.default_rng(0)
    found = ball_oracle.forecast(stream, windows, 10, 8, lambda frames: frames, rng)
    spread = found.astype(float).std(1).mean((0, 2, 3, 4))
    assert spread[-1] > spread[0]


def test_a_hidden_colour_is_drawn_from_those_that_the_rules_allow():
    rng = np.random.default_rng(0)
    red, yellow, green = balls.RED, balls.YELLOW, balls.GREEN
    assert ball_oracle.previous_color(np.array([yellow, yellow, red, red]), rng) == yellow
    # Yellow turns green only by way of red, which two bounces within a frame hide.
    assert ball_oracle.previous_color(np.array([yellow, yellow, green]), rng) == red
    drawn = {ball_oracle.previous_color(np.array([red, red]), rng) for _ in range(50)}
    assert drawn == {yellow, green}
    assert {ball_oracle.previous_color(np.array([green]), rng) for _ in range(9)} == {red}


# -------------------------------------------------------------------- records
def record(world="ball_stn", variant="default", seed=0, crps=0.2, **changes) -> dict:
    return {
        "world": world,
        "variant": variant,
        "set": [],
        "seed": seed,
        "budget": 1.0,
        "gflops": 100.0,
        "seconds": {"VQVAE": 10, "latents": 1, "training": 20},
        "parameters": 1_000_000,
        "autoencoder": "vqvae-a",
        "bound": 0.1,
        "one_step": 0.1,
        "crps": {"all": crps, "first": crps, "last": crps},
        "lpips": None,
        "fvd": None,
        "spread_skill": 1.0,
        "sharpness": 1.0,
        "motion": 1.0,
        "evaluations": 5.0,
        "clips": {"crps": [crps, 2 * crps], "crps_repeat_last": [1, 1]},
        **changes,
    }


def test_a_record_is_found_again_and_its_bound_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "FILE", tmp_path / "board.jsonl")
    assert board.read() == [] and board.bound_of("ball_stn", "vqvae-a", 0.0) is None
    board.append(record())
    board.append(record(variant="before", crps=0.4) | {"autoencoder": "vqvae-b", "bound": 0.2})
    assert board.find("ball_stn", "before", 0, 1.0)["crps"]["all"] == 0.4
    assert board.find("ball_stn", "before", 1, 1.0) is None
    assert board.find("ball_stn", "before", 0, 0.25) is None
    assert board.bound_of("ball_stn", "vqvae-a", 0.0) == 0.1
    assert board.bound_of("ball_stn", "vqvae-b", 0.0) == 0.2
    assert board.bound_of("ball_stn", "vqvae-b", 0.06) is None
    assert board.bound_of("street", "vqvae-a", 0.0) is None


def test_the_table_pairs_a_variant_with_before_and_corrects_for_the_machine():
    before = record(variant="before", crps=0.4, gflops=50.0)
    records = [record(), before]
    found = board.summarize([record()], records)
    assert found["paired"] == pytest.approx(0.5) and found["attainable"] == pytest.approx(0.8 / 0.9)
    assert found["interval"] == pytest.approx((0.5, 0.5))
    # The same seconds on a machine of half the rate are half the work.
    assert found["seconds"] == pytest.approx(2)
    lines = board.table(records).splitlines()
    assert (
        lines[0].startswith("**ball_stn**") and len({line.count("|") for line in lines[2:6]}) == 1
    )


def test_missed_and_unmeasured_targets_are_listed_and_fail_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(board, "FILE", tmp_path / "board.jsonl")
    board.append(record(variant="before", crps=0.4))
    board.append(record(crps=0.3, sharpness=0.5))
    missed = board.misses(board.read())
    assert "ball_stn: crps is 0.3, target 0 to 0.25" in missed
    assert "ball_stn: sharpness is 0.5, target 0.8 to 1.25" in missed
    assert any(line.startswith("street: paired is not measured") for line in missed)
    assert not any("spread_skill" in line for line in missed)
    with pytest.raises(Failure, match="targets of the board are missed"):
        board.report(write=False, check=True)
    assert "street" in capsys.readouterr().out


@pytest.mark.parametrize("world", quality.WORLDS)
@pytest.mark.parametrize("variant", quality.VARIANTS)
def test_every_variant_is_a_valid_config_of_every_world(world, variant):
    values = quality.settings_of(world, variant, 3, 0.25)
    config = quality.configs.build(quality.WORLDS[world].dataset, values)
    full = quality.configs.build(quality.WORLDS[world].dataset)
    assert config.train.steps == round(0.25 * full.train.steps)
    assert config.train.seed == 3 and config.output.run_id == f"{world}-{variant}-3-0.25"


def test_before_is_the_network_and_the_context_of_earlier_versions():
    config = quality.configs.build("ball_stn", quality.settings_of("ball_stn", "before", 0, 1.0))
    assert (config.model.name, config.model.width, config.train.batch_size) == ("convnet", 128, 32)
    assert (config.context, config.data.contexts, config.flow.start) == ("recent:3", 1, 0)
    assert config.train.optimizer == "adamw" and config.sample.redraw == "step"


# -------------------------------------------------------------------- runs
# Without the small sizes of the stream, so that the frames suffice for --condition 4.
SETTINGS = [item for item in TINY if not item.startswith(("train.steps", "vqvae.steps"))]


def test_a_run_adds_a_line_and_is_left_out_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(board, "FILE", tmp_path / "board.jsonl")
    monkeypatch.setattr(quality, "ORACLE_DRAWS", 2)
    monkeypatch.setattr(quality, "ONE_STEP_ITEMS", 32)
    command = ["quality", "--worlds", "ball_stn", "--variants", "before", "default"]
    command += ["--budget", "0.01", "--set", *SETTINGS, "train.steps=8", "vqvae.steps=8"]
    monkeypatch.setattr("sys.argv", command)
    quality.main()
    before, after = board.read()
    assert before["variant"].startswith("before data.stream=600")
    assert after["variant"].startswith("default data.stream=600")
    assert before["bound"] > 0 and after["bound"] > 0
    assert after["one_step"] > 0 and len(after["clips"]["crps"]) == 3
    assert after["settings"]["train.seed"] == 0 and after["seconds"]["training"] > 0
    # The run `before` has an autoencoder of its own.
    assert len(list((tmp_path / "outputs/board/checkpoints").glob("vqvae-*"))) == 2
    capsys.readouterr()
    quality.main()
    assert len(board.read()) == 2 and "on the board already" in capsys.readouterr().out


def test_a_world_without_shards_names_the_command_that_makes_them(tmp_path):
    command = ["-m", "benchmarks.quality", "--worlds", "moving_mnist"]
    done = launch(tmp_path, *command, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "python -m prepare.moving_mnist --out data/moving_mnist" in done.stderr


def test_true_frames_are_sound_and_odd_ones_are_not(stream):
    frames = stream.read(0, np.arange(200))
    errors = drift.ball_errors(frames)
    limit = np.quantile(errors, 0.99)
    assert np.isfinite(errors).mean() > 0.95
    squashed = frames.copy()
    squashed[:, ::2] = 0
    assert (drift.ball_errors(squashed) > limit).all()
    one = balls.draw(np.full((3, 1, 2), 5.0), np.zeros((3, 1), int), np.zeros(3))
    assert np.isinf(drift.ball_errors(one)).all()


def test_drift_writes_a_table_curves_and_frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "output.run_id=tiny", "wandb.mode=disabled"]
    launch(tmp_path, "main.py", "--set", *settings)
    command = ["-m", "benchmarks.drift", "--ckpts", "outputs/checkpoints/tiny/latest.pt"]
    done = launch(tmp_path, *command, "--frames", "30", "--videos", "2", "--out", ".")
    for name in ("RESULTS.md", "drift.png", "drift_tiny.png"):
        assert (tmp_path / name).stat().st_size
    assert "| tiny |" in (tmp_path / "RESULTS.md").read_text()
    share = json.loads(done.stdout.splitlines()[-1])["tiny"]
    assert 0 <= share <= 1 and os.environ["OMP_NUM_THREADS"] == "1"
