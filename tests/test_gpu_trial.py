"""The GPU trial's record, limits, report and exit code, with groups that are small scripts."""

import json
import sys
import time

import pytest

from benchmarks import gpu_trial
from benchmarks.gpu_steps import record, report

PRELUDE = """
import os, pathlib, sys, time
from benchmarks.gpu_steps import record
deadline = float(os.environ["TRIAL_DEADLINE"])
steps = record.Steps(NAME, pathlib.Path(os.environ["OUT"]) / "steps.jsonl", deadline)
def fail():
    raise ValueError("a planted | error\\nin two lines")
def leave_out():
    raise record.LeftOut("no such package")
"""
SCRIPTS = {
    "good": "steps.run('rate', lambda: {'samples_per_s': 1234.5678, 'exact': True})",
    "bad": "steps.run('breaks', fail); steps.run('goes on', lambda: {'ms': 1.0})",
    "slow": "steps.run('quick', dict); steps.run('sleeps', time.sleep, 60)",
    "crash": "steps.run('quick', dict); os._exit(3)",
    "choosy": "steps.run('too long', dict, needs=1000); steps.run('lacks', leave_out)",
}


def command(name: str) -> list[str]:
    code = PRELUDE.replace("NAME", repr(name)) + SCRIPTS[name]
    return [sys.executable, "-c", code]


@pytest.fixture
def run(tmp_path):
    """run((name, limit), ..., total=60) -> {step: row}, exit code, the report."""

    def run_scripts(*groups, total=60.0):
        rows = gpu_trial.run_groups(list(groups), tmp_path, total, True, command)
        by_name = {f"{row['group']}: {row['step']}": row for row in rows}
        return by_name, gpu_trial.exit_code(rows), (tmp_path / "gpu_trial.md").read_text()

    return run_scripts


def test_steps_that_pass_give_exit_code_0(run, tmp_path):
    rows, code, text = run(("good", 30))
    assert code == 0
    assert "1 steps passed, 0 failed, 0 were left out" in text
    assert "Failed" not in text
    assert "samples_per_s 1235, exact yes" in text
    saved = json.loads((tmp_path / "gpu_trial.json").read_text())
    assert saved["steps"] == list(rows.values())
    assert saved["steps"][0]["values"]["samples_per_s"] == 1234.5678
    assert saved["groups"][0]["ended"] == "completed"
    assert "[good] rate: passed" in (tmp_path / "log.txt").read_text()


def test_a_failed_step_is_named_at_the_top_and_the_next_one_runs(run, tmp_path):
    rows, code, text = run(("bad", 30), ("good", 30))
    assert code == 1
    assert rows["bad: goes on"]["state"] == rows["good: rate"]["state"] == "passed"
    failure = "- **bad: breaks**: ValueError: a planted | error in two lines"
    assert failure in text
    assert text.index(failure) < text.index("## Groups") < text.index("## bad")
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_a_group_is_stopped_at_its_limit_and_the_next_one_runs(run):
    began = time.time()
    rows, code, text = run(("slow", 2), ("good", 30))
    assert time.time() - began < 25
    assert code == 1
    assert rows["slow: quick"]["state"] == rows["good: rate"]["state"] == "passed"
    assert "- **slow: sleeps**: the group stopped at its limit of 2 s" in text


def test_a_group_that_crashes_between_its_steps_is_named(run):
    rows, code, text = run(("crash", 30))
    assert code == 1
    assert rows["crash: quick"]["state"] == "passed"
    assert "- **crash: the group**: the group crashed with exit code 3" in text


def test_steps_are_left_out_by_time_and_by_what_is_missing(run):
    rows, code, text = run(("choosy", 30))
    assert code == 0
    assert "s left of the group's time, 1000 s needed" in rows["choosy: too long"]["reason"]
    assert "- **choosy: lacks**: no such package" in text


def test_groups_without_time_are_left_out(run):
    rows, code, text = run(("slow", 20), ("good", 20), total=3)
    assert rows["slow: the group"]["state"] == "left out"
    assert rows["good: the group"]["reason"] == "3 s left of 3 s"
    assert code == 0
    assert "0 steps passed, 0 failed, 2 were left out" in text


def test_a_table_has_only_columns_with_values():
    values = {"samples_per_s": 10.0, "ratio": 2.0, "mfu": None, "longest_kernels": "gemm x2"}
    row = {"group": "train", "step": "a|b", "state": "passed", "seconds": 1.0, "values": values}
    lines = report.section("train", [row])
    assert lines[2] == "| step | samples/s | ratio to straightforward |"
    assert lines[4] == "| a\\|b | 10 | 2 |"
    assert "- Longest kernels of a|b: gemm x2" in lines


def test_values_of_a_failed_step_are_kept(tmp_path):
    def check():
        record.require(False, "too different", {"samples_per_s": 7.0})

    steps = record.Steps("train", tmp_path / "steps.jsonl")
    assert steps.run("compiled", check) is None
    rows = record.read(tmp_path / "steps.jsonl")
    group = {"group": "train", "limit": 1.0, "seconds": 1.0, "ended": "completed"}
    text = report.write_markdown([group], rows)
    assert "- **train: compiled**: too different" in text
    assert "| compiled (failed) | 7 |" in text


def test_a_line_that_was_cut_off_is_skipped(tmp_path):
    file = tmp_path / "steps.jsonl"
    steps = record.Steps("group", file)
    steps.run("whole", dict)
    file.write_text(file.read_text() + '{"group": "gr')
    assert [row["step"] for row in record.read(file)] == ["whole"]


def test_limits_are_set_and_the_first_groups_fit():
    assert [group.name for group in gpu_trial.GROUPS][:3] == ["basics", "train", "sample"]
    assert sum(group.gpu_limit for group in gpu_trial.GROUPS[:3]) <= gpu_trial.GPU_SECONDS <= 480


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_found_by_the_name_of_the_gpu(name, peak):
    from benchmarks.gpu_steps.updates import find_peak

    assert find_peak(name) == peak
