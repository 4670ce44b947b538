"""Results of many runs, combined: methods, tables, pictures, and the command on a small sweep."""

import csv
import json
import os
import re

import imageio.v2 as imageio
import numpy as np
import pytest
from conftest import launch

from report import comparison, summary_page, tables
from report.methods import parse_run, rename, shorten, tabulate, warn_of_different_protocols
from report.tables import decimals, latex, mark_best, markdown, metrics_of
from runtime.console import UserError
from scripts.collect_results import folder_of, metrics_files

SCRIPT = "scripts/collect_results.py"


def result(
    interpolant="follmer", seed=0, crps=0.02, psnr=18.0, protocol=None, more=None, **settings
) -> dict:
    """A metrics.json; settings are group__field=value."""
    config = {
        "dataset": "ball_stn",
        "data": {"image_size": 8, "root": "data/ball_stn"},
        "train": {"seed": seed},
        "flow": {"interpolant": interpolant},
        "sample": {"diffusion": "auto"},
        "output": {"run_id": ""},
    }
    for key, value in settings.items():
        group, name = key.split("__")
        config.setdefault(group, {})[name] = value
    asked = {
        "split": "test",
        "videos": 3,
        "samples_per_video": 2,
        "condition": 2,
        "predict": 3,
        "skip": 0,
        "steps": 5,
        "diffusion": "0",
        "checkpoint": f"outputs/checkpoints/{interpolant}-{seed}/latest.pt",
        "network_evaluations_per_frame": 5.0,
        **(protocol or {}),
    }
    summary = {
        "psnr": {"mean": psnr, "se": 0.5},
        "crps": {"mean": crps, "se": 0.001},
        "crps_repeat_last": {"mean": 0.05, "se": 0.002},
        **(more or {}),
    }
    horizon = {"crps": [crps, crps, None], "crps_repeat_last": [0.04, 0.05, 0.06]}
    return {"protocol": asked, "config": config, "summary": summary, "horizon": horizon}


def table_of(*results):
    (table,), _ = tabulate([parse_run(own, f"run{k}", k) for k, own in enumerate(results)])
    return table


def written(folder, own: dict, truth=None):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(own))
    if truth is not None:
        np.save(folder / "truth.npy", truth)
        np.save(folder / "samples.npy", truth[:, None, 2:].repeat(2, 1) // 2)
    return folder


# ------------------------------------------------------------------------------------------ methods
def test_runs_that_differ_in_their_seed_are_one_method_with_numpys_error():
    crps = [0.021, 0.027, 0.019]
    table = table_of(
        *(
            result(
                seed=k,
                crps=value,
                output__run_id=f"run {k}",
                data__root=f"data/{k}",
                wandb__mode=str(k),
                latent__delta=0.1 * k,
                train__keep=k + 1,
            )
            for k, value in enumerate(crps)
        ),
        result("linear", crps=0.03),
    )
    method, other = table.methods
    assert (method.name, len(method.runs), other.name, len(other.runs)) == (
        "follmer",
        3,
        "linear",
        1,
    )
    score = method.score("crps")
    assert np.isclose(score.mean, np.mean(crps)) and np.isclose(
        score.se, np.std(crps, ddof=1) / np.sqrt(3)
    )
    assert (score.over, score.n) == ("seeds", 3)
    assert other.score("crps") == (0.03, 0.001, 1, "videos")  # of one seed, the metric's own
    mean, se = method.horizon("crps")
    assert (
        np.allclose(mean[:2], np.mean(crps)) and np.isnan(mean[2]) and np.allclose(se[:2], score.se)
    )


def test_a_setting_that_an_older_result_lacks_had_its_default():
    table = table_of(
        result(seed=0),
        result(seed=1, flow__c=1.0, train__keep_every=0),
        result(seed=2, flow__c=0.5),
    )
    assert [method.name for method in table.methods] == ["follmer, c=0.5", "follmer, c=1"]


def test_a_name_states_the_settings_that_distinguish_the_method():
    own = [
        result("linear"),
        result(protocol={"steps": 5}),
        result(protocol={"steps": 10}),
        result(protocol={"steps": 10}, model__width=64),
    ]
    table = table_of(*own)
    assert [method.name for method in table.methods] == [
        "follmer, steps=5, width=128",
        "follmer, steps=10, width=64",
        "follmer, steps=10, width=128",
        "linear",
    ]
    assert shorten("train.steps", ["train.steps"]) == "train.steps"  # `steps` is the sampler's
    confounded = table_of(result("linear"), result(protocol={"diffusion": "sigma"}))
    assert [method.name for method in confounded.methods] == ["follmer", "linear"]
    assert "also differ in diffusion" in markdown(confounded, ["crps"])


@pytest.mark.parametrize(
    "changed",
    [
        {"split": "val"},
        {"videos": 4},
        {"condition": 1},
        {"predict": 4},
        {"rule": "biased"},
        {"samples_per_video": 8},
        {"fvd_reference": "train"},
    ],
)
def test_results_of_another_protocol_form_another_table(changed):
    found, _ = tabulate(
        [
            parse_run(own, "a")
            for own in (result(), result("linear"), result("bridge", protocol=changed))
        ]
    )
    assert [[method.name for method in table.methods] for table in found] == [
        ["follmer", "linear"],
        ["bridge"],
    ]
    (warning,) = warn_of_different_protocols(found)
    assert f"differ in {next(iter(changed))} (" in warning and "2 tables" in warning
    sampled = result(
        "linear", protocol={"checkpoint": "b", "solver": "em", "network_evaluations_per_frame": 7.1}
    )
    (same,), told = tabulate([parse_run(own, "a") for own in (result(), sampled)])
    assert len(same.methods) == 2 and not told and not warn_of_different_protocols([same])


def test_results_on_other_clips_form_another_table_despite_the_same_protocol():
    other = result("linear")
    other["horizon"]["crps_repeat_last"] = [0.04, 0.05, 0.061]
    found, _ = tabulate([parse_run(own, "a") for own in (result(), other)])
    assert len(found) == 2 and "clip_set (1, 2)" in warn_of_different_protocols(found)[0]


def test_a_warning_names_results_that_are_no_new_seeds():
    own = [parse_run(result(crps=0.02), "old", 1), parse_run(result(crps=0.03), "new", 2)]
    (table,), (warning,) = tabulate(own[::-1])
    assert (
        table.methods[0].score("crps").mean == 0.03
        and "old has the same settings as new" in warning
    )
    resampled = [
        parse_run(result(seed=seed, protocol={"checkpoint": "one.pt"}), "a") for seed in range(2)
    ]
    assert "several seeds of one checkpoint (one.pt)" in tabulate(resampled)[1][0]


def test_nicknames_rename_order_and_select():
    def names(pairs, only=False):
        own = [
            result("linear"),
            result(protocol={"steps": 5}),
            result(protocol={"steps": 10}),
            result("bridge"),
        ]
        return [method.name for method in rename([table_of(*own)], pairs, only)[0].methods]

    assert names(["linear=Linear"]) == ["Linear", "bridge", "follmer, steps=5", "follmer, steps=10"]
    assert names(["follmer, steps=10=F = 10", "linear=L"], only=True) == ["F = 10", "L"]
    assert names(["follmer=Föllmer"], only=True) == ["Föllmer, steps=5", "Föllmer, steps=10"]
    with pytest.raises(UserError, match="nearest OLD: linear"):
        names(["liner=L"])
    with pytest.raises(UserError, match="the name L;"):
        names(["linear=L", "bridge=L"])


# ------------------------------------------------------------------------------------------- tables
def test_best_in_every_direction_and_ties():
    assert mark_best(["0.020", "0.021", "0.020", ""], "crps") == [True, False, True, False]
    assert mark_best(["18.1", "17.0", "18.1"], "psnr") == [True, False, True]
    assert mark_best(["0.90", "1.05", "1.30", "0.95"], "spread_skill") == [False, True, False, True]
    assert mark_best(["0.020"], "crps") == [False]  # alone it is no contest
    assert mark_best(["", ""], "crps") == [False, False]


def test_digits_follow_the_standard_error():
    table = table_of(
        *(
            result(seed=k, crps=value, psnr=17 + k)
            for k, value in enumerate((0.0211, 0.0213, 0.0224))
        ),
        *(result("linear", k, value, 17 + k) for k, value in enumerate((0.0211, 0.0213, 0.02241))),
    )
    text = markdown(table, ["crps", "psnr"])
    assert (
        text.count("**0.02160 ± 0.000") == 2 and text.count("**18.00 ± 0.58**") == 2
    )  # 0.021603 rounds to the same
    assert "| repeat last frame |  | 0.05000 | – |" in text and "bold: best" in text
    assert (
        decimals([]) == 2
        and decimals([table.methods[0].score("psnr")._replace(mean=123.0, se=float("nan"))]) == 1
    )
    assert tables.format_fixed(-0.001, 2) == "0.00" and tables.format_fixed(-0.01, 2) == "-0.01"


def test_metrics_that_were_not_measured_are_left_out():
    more = [
        {
            "fvd": {"mean": None, "se": None},
            "lpips": {"mean": float("nan"), "se": 1},
            "kvd": None,
            "ssim": 0.5,
        },
        {
            "fvd": {"mean": 100.0, "se": None},
            "lpips": {"mean": float("inf")},
            "ssim": {"mean": 0.7, "se": float("nan")},
        },
    ]
    table = table_of(
        *(result(seed=k, more=own) for k, own in enumerate(more)), result("linear", more=more[0])
    )
    assert metrics_of([table], []) == ["crps", "psnr", "ssim", "fvd"]
    assert metrics_of([table], ["fvd", "crps"]) == ["fvd", "crps"]
    follmer, linear, *_ = tables.rows(table, ["fvd", "ssim"])
    assert follmer.cells[0].mean == "100.0" and follmer.cells[0].n == 1 and not follmer.cells[0].se
    assert (
        follmer.cells[1].mean == "0.60"
        and follmer.cells[1].se == "0.10"
        and linear.cells[0].mean == ""
    )
    assert "| – |" in markdown(table, ["fvd"]) and " & -- & " in latex(table, ["fvd", "ssim"])
    with pytest.raises(
        UserError,
        match="--metrics vfd: in none of the results; they have crps, fvd, psnr, ssim",
    ):
        metrics_of([table], ["vfd"])


def test_latex_is_escaped_and_every_row_has_every_column():
    table = table_of(
        *(result(seed=k, crps=0.02 + 0.001 * k) for k in range(3)), result("linear", crps=0.04)
    )
    rename([table], [r"follmer=A & B_1 50% #{x} \~^ $c$"])
    text = latex(table, ["crps", "psnr"])
    assert (
        r"A \& B\_1 50\% \#\{x\} \textbackslash{}\textasciitilde{}\textasciicircum{} \$c\$ & 3 & "
        r"$\mathbf{0.0210" in text
    )
    assert r"\begin{tabular}{lrrr}" in text and r"^{\dagger}$" in text
    lines = [
        line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line
    ]
    assert len(lines) == 4 and all(len(re.findall(r"(?<!\\)&", line)) == 3 for line in lines)
    assert text.count(r"\multicolumn{4}") == 1
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    assert r"A & B\_1 50% \#".replace(r"\#", "#") in markdown(table, ["crps"])


def test_page_is_escaped(tmp_path):
    table = table_of(result(), result("linear"))
    table.methods[0].nickname = "<script>&"
    for method in table.methods:
        method.runs[0].folder = tmp_path / "a b#1"
    text = summary_page.section(
        table, ["crps"], {"mosaic": "mosaic.mp4"}, tmp_path / "summarized" / "x", 1
    )
    assert (
        "<script>" not in text
        and "&lt;script&gt;&amp;" in text
        and 'href="../../a%20b%231/"' in text
    )


# ----------------------------------------------------------------------------------------- pictures
def test_mosaic_has_a_row_per_clip_and_a_column_per_method(tmp_path):
    truth = np.random.default_rng(0).integers(0, 255, (3, 5, 8, 8, 3), np.uint8)
    own = [result(), result("linear"), result("bridge")]
    runs = [parse_run(each, written(tmp_path / str(k), each, truth)) for k, each in enumerate(own)]
    (table,), _ = tabulate(runs)
    shown, columns = comparison.select_clips(table, 2)
    assert shown.shape == (2, 5, 8, 8, 3) and [name for name, _ in columns] == [
        "bridge",
        "follmer",
        "linear",
    ]
    frames, cell = comparison.draw_mosaic(shown, columns), 96 + 8
    assert frames.shape == (5, 2 * cell + 16, 4 * cell + 3 * 4, 3)
    assert (frames[:, 20:112, 4:100] == shown[0].repeat(12, -3).repeat(12, -2)[:, :92]).all()
    assert (
        frames[2:, 20:112, 112:208] == shown[0, 2:].repeat(12, -3).repeat(12, -2)[:, :92] // 2
    ).all()
    assert (
        comparison.draw_mosaic(shown, [("a name too long for a column", columns[0][1])]).shape[1]
        > frames.shape[1]
    )
    np.save(tmp_path / "0" / "truth.npy", truth[::-1])
    assert (
        comparison.select_clips(table, 2)
        == "follmer and bridge were not measured on the same clips"
    )
    for k in range(3):
        (tmp_path / str(k) / "truth.npy").write_bytes(b"damaged")
    assert "no result has both" in comparison.select_clips(table, 2)


# ------------------------------------------------------------------------------------------ command
def test_globs_folders_and_files_count_each_result_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("r/a-1/x", "r/a-2/x/y", "r/b/x", "r/b/z.partial"):
        written(tmp_path / name, result())
    assert (
        len(metrics_files(["r/a-*", "r/a-1/x/metrics.json", "r/a-1", str(tmp_path / "r/a-2")])) == 2
    )
    assert [str(file.parent) for file in metrics_files(["r/**"])] == [
        "r/a-1/x",
        "r/a-2/x/y",
        "r/b/x",
    ]
    assert metrics_files(["r"]) == metrics_files(["r/**/metrics.json"])
    with pytest.raises(UserError, match=r"--runs r/c\*: no metrics.json there"):
        metrics_files(["r/a-*", "r/c*"])


def test_only_a_folder_of_this_command_is_replaced(tmp_path):
    out = folder_of(str(tmp_path), "sweep")
    written(out, result())
    with pytest.raises(UserError, match="holds files that are not of a summary"):
        folder_of(str(tmp_path), "sweep")
    (out / "metrics.json").rename(out / "summary.json")
    assert folder_of(str(tmp_path), "sweep") == out
    for name in ("", "../x", "a/b", ".x", "x.partial"):
        with pytest.raises(UserError, match="not the name of a folder"):
            folder_of(str(tmp_path), name)


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"summary"', "cannot be read"),
        ("[]", "holds no `protocol`"),
        ('{"protocol": {}, "config": {}, "summary": 3}', "holds no `summary`"),
    ],
)
def test_damaged_results_are_named(tmp_path, command, text, why):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "metrics.json").write_text(text)
    code, told = command(tmp_path, SCRIPT, "--runs", "r", "--name", "x")
    last = told.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: r/metrics.json") and why in last


def test_no_runs_is_one_line(tmp_path, command):
    code, told = command(tmp_path, SCRIPT, "--runs", "outputs/results/*", "--name", "x")
    assert (
        code == 2
        and told.startswith("error: --runs outputs/results/*: no metrics.json")
        and told.count("\n") == 1
    )


def test_a_sweep_of_three_interpolants_and_seeds(tmp_path, command):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (3, 5, 8, 8, 3), np.uint8)
    for k, interpolant in enumerate(("follmer", "linear", "bridge")):
        for seed in range(3):
            own = result(
                interpolant, seed, 0.02 + 0.01 * k + 0.001 * rng.random(), 18 + rng.random()
            )
            written(tmp_path / f"outputs/results/{interpolant}-{seed}/m/d", own, truth)
    arguments = [
        "--runs",
        "outputs/results/*-[01]",
        "outputs/results/*-2/**",
        "--name",
        "sweep",
        "--metrics",
        "crps",
        "psnr",
        "--nicknames",
        "linear=Linear",
        "follmer=Föllmer",
        "--clips",
        "2",
    ]
    done = launch(tmp_path, SCRIPT, *arguments, DRIFTCAST_QUIET="1")
    out = tmp_path / "outputs/summarized/sweep"
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "summary.json",
        "runs.csv",
        "methods.csv",
        "table.md",
        "table.tex",
        "horizon.png",
        "summary.png",
        "mosaic.mp4",
    }
    assert (
        (out / "table.md").read_text() in done.stdout
        and "| Linear | 3 | 0.03" in done.stdout
        and not done.stderr
    )
    assert str(out.relative_to(tmp_path) / "index.html") in done.stdout
    with open(out / "methods.csv", newline="", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    with open(out / "runs.csv", newline="", encoding="utf-8") as file:
        seeds = [float(row["crps"]) for row in csv.DictReader(file) if row["automatic"] == "linear"]
    assert list(rows) == ["Linear", "Föllmer", "bridge", "repeat last frame"] and len(seeds) == 3
    assert np.isclose(float(rows["Linear"]["crps"]), np.mean(seeds))
    assert np.isclose(float(rows["Linear"]["crps_se"]), np.std(seeds, ddof=1) / 3**0.5)
    text = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:href|src)="(?!data:)([^"#]+)"', text)
    assert len(links) > 20 and all((out / link).exists() for link in links)
    assert len(imageio.mimread(out / "mosaic.mp4", memtest=False)) == 5
    before = os.stat(out).st_ino
    assert command(tmp_path, SCRIPT, *arguments, "--only")[0] == 0 and os.stat(out).st_ino != before
    assert "bridge" not in (out / "table.md").read_text() and not list(out.parent.glob("*.partial"))
