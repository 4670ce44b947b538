"""The expected time of a run, and --minutes."""

import json
import math
import re
import time

import pytest
import torch
from conftest import TINY, launch

import configs
import main
from runtime import budget
from runtime.budget import Stage
from runtime.console import UserError
from runtime.process import Process

CPU = torch.device("cpu")
PROCESS = Process(0, 1, CPU)
# 100 s of fixed work and 1,000 s of updates.
STAGES = [
    Stage("latents", 100, 1.0),
    Stage("VQVAE", 200, 2.0, updates=True),
    Stage("training", 100, 6.0, updates=True),
]


def test_a_rate_is_measured_per_item_at_the_largest_size_that_is_quick(monkeypatch):
    monkeypatch.setattr(budget, "ENOUGH", 0.1)
    sizes = []

    def work(n):
        sizes.append(n)
        time.sleep(0.01 * n)

    seconds = budget.seconds_per_item(work, 64, CPU)
    assert 0.01 <= seconds < 0.02
    assert sizes == [1, 1, 4, 4, 16, 16]


def test_the_first_call_of_a_size_is_not_measured(monkeypatch):
    monkeypatch.setattr(budget, "ENOUGH", 0.02)
    sizes = []

    def work(n):
        time.sleep(0.03 if sizes else 1.0)
        sizes.append(n)

    assert 0.03 <= budget.seconds_per_item(work, 64, CPU) < 0.5
    assert sizes == [1, 1]


def test_the_share_that_fits_leaves_the_fixed_stages_their_time():
    minutes = 600 / 60 / budget.PLANNED
    assert budget.share_that_fits(STAGES, minutes) == pytest.approx(0.5)
    shortened = budget.shorten(STAGES, 0.5)
    assert [stage.count for stage in shortened] == [100, 100, 50]
    assert sum(stage.total for stage in shortened) == pytest.approx(600)


def test_a_run_that_fits_is_not_shortened():
    assert budget.share_that_fits(STAGES, 60) == 1


def test_too_few_minutes_are_refused_with_the_number_that_works():
    with pytest.raises(UserError, match="--minutes 1 is too short") as error:
        budget.share_that_fits(STAGES, 1)
    minutes = int(str(error.value).split("--minutes ")[-1].split()[0])
    assert budget.LEAST_SHARE <= budget.share_that_fits(STAGES, minutes) < 0.1


def test_the_expected_time_names_stages_and_end():
    noon = time.mktime((2026, 11, 27, 12, 0, 0, 0, 0, -1))
    line = budget.describe_run(STAGES, noon)
    assert "18 min, until 12:18" in line
    assert "latents 100 s" not in line and "latents 2 min" in line
    assert "VQVAE 7 min" in line and "training 10 min" in line


def test_measuring_changes_neither_random_state_nor_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "ENOUGH", 0.001)
    monkeypatch.setattr(budget, "AVERAGED", 0.001)
    config = configs.build(overrides=configs.parse_overrides(TINY))
    before = torch.get_rng_state()
    stages = main.remaining_stages(config, PROCESS)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    assert [stage.name for stage in stages] == [
        "data",
        "VQVAE",
        "latents",
        "training",
        "forecasts",
        "videos",
    ]
    assert all(stage.seconds > 0 for stage in stages)
    counts = {stage.name: stage.count for stage in stages}
    assert counts == {
        "data": 1_000,
        "VQVAE": 20,
        "latents": 600,
        "training": 12,
        "forecasts": 3 * 2 * 4,
        "videos": 3,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"data.mode": "stream", "train.steps": 9, "replay.n_live": 2},
        {"data.mode": "offline", "train.steps": 9, "model.name": "joint"},
        {"data.hue": 0.1, "train.accumulate": 2},
        {
            "model.name": "uvit",
            "model.depth": 2,
            "model.out_norm": "bn",
            "train.own": 0,
            "data.contexts": 2,
        },
        {"flow.interpolant": "linear", "sample.solver": "dopri5", "sample.redraw": "frame"},
        {"train.overfit": True},
    ],
)
def test_every_kind_of_run_is_measured(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "ENOUGH", 0.001)
    monkeypatch.setattr(budget, "AVERAGED", 0.001)
    config = configs.build(overrides=configs.parse_overrides(TINY) | changes)
    names = [stage.name for stage in main.remaining_stages(config, PROCESS)]
    assert {"VQVAE", "training", "forecasts"} <= set(names)
    assert ("latents" in names) != ("data.hue" in changes)


def test_a_run_prints_the_expected_time(tmp_path):
    done = launch(tmp_path, "main.py", "--set", *TINY, "train.steps=1", "vqvae.steps=1")
    assert len(re.findall(r"^expected time  .*until \d\d:\d\d", done.stderr, re.M)) == 1


@pytest.mark.parametrize("dataset", ["kth", "plaicraft"])
def test_a_dry_run_without_data_measures_nothing(dataset, tmp_path):
    printed = launch(tmp_path, "main.py", "--dataset", dataset, "--dry_run", "1").stdout
    assert "missing: no shards" in printed and "expected time" not in printed


def test_finished_stages_count_nothing(tiny_run, monkeypatch):
    folder, _ = tiny_run
    monkeypatch.chdir(folder)
    monkeypatch.setattr(budget, "ENOUGH", 0.001)
    monkeypatch.setattr(budget, "AVERAGED", 0.001)
    config = configs.build(overrides=configs.parse_overrides(TINY))
    names = [stage.name for stage in main.remaining_stages(config, PROCESS)]
    assert names == ["forecasts", "videos"]
    longer = configs.update(config, {"train.steps": 20, "train.sample_every": 5})
    counts = {stage.name: stage.count for stage in main.remaining_stages(longer, PROCESS)}
    # One preview, at update 15, of four clips and two futures.
    assert counts == {"training": 8, "forecasts": 3 * 2 * 4 + 4 * 2 * 4, "videos": 3}


def test_minutes_shorten_both_trainings_and_resume_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "remaining_stages", lambda *_: STAGES)
    changes = [f for f in TINY if not f.startswith(("vqvae.steps", "train.steps"))]
    config = configs.build(overrides=configs.parse_overrides(changes))
    config = main.check_minutes(2.3, config, {})
    assert config.run_id == "ball_stn-follmer-0-2.3min"
    main.train_network(config, PROCESS, None, main.Clock(), minutes=2.3)

    # 2.3 minutes allow 24 of the 1,000 s of updates.
    share = (budget.PLANNED * 60 * 2.3 - 100) / 1_000
    dir = tmp_path / "outputs/checkpoints/ball_stn-follmer-0-2.3min"
    plan = json.loads((dir / "plan.json").read_text())
    assert plan["minutes"] == 2.3
    assert plan["settings"]["train.steps"] == math.ceil(share * 2_400)
    assert plan["settings"]["vqvae.steps"] == math.ceil(share * 1_000)
    state = torch.load(dir / "latest.pt", weights_only=True)
    assert state["step"] == state["config"]["train"]["steps"] == plan["settings"]["train.steps"]
    assert state["config"]["vqvae"]["steps"] == plan["settings"]["vqvae.steps"]

    # A second start of the same command reads the plan, whatever the machine does by now.
    monkeypatch.setattr(main, "remaining_stages", lambda *_: [])
    capsys.readouterr()
    main.train_network(config, PROCESS, None, main.Clock(), minutes=2.3)
    assert f"train.steps={state['step']}" in capsys.readouterr().out
    assert torch.load(dir / "latest.pt", weights_only=True)["step"] == state["step"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--minutes", "0"], "--minutes must be > 0, got 0"),
        (["--minutes", "5", "--set", "train.steps=10"], "leave one of the two out"),
        (["--minutes", "5", "--set", "data.mode=stream"], "lower data.stream"),
        (["--minutes", "0.0001", "--set", *TINY[:-2][:6]], "too short for this machine"),
    ],
)
def test_minutes_that_cannot_be_kept_are_refused(flags, message, command, tmp_path):
    code, error = command(tmp_path, "main.py", *flags)
    assert code == 2 and message in error
    assert not (tmp_path / "outputs").exists()


def test_a_run_begun_without_minutes_is_not_shortened(tiny_run, command):
    folder, _ = tiny_run
    settings = ["output.run_id=ball_stn-follmer-0"]
    code, error = command(folder, "main.py", "--minutes", "5", "--set", *settings)
    assert code == 2 and ("started without --minutes" in error or "other settings" in error)


def test_a_damaged_plan_is_an_error(tmp_path):
    file = tmp_path / "plan.json"
    for content in (
        "",
        "[]",
        '{"settings": 3, "minutes": 5}',
        '{"settings": {"train.steps": "x"}}',
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
            budget.read_plan(file)
