"""evaluate.py: the whole command, work shared by several processes, work that was cut off."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, copy_of, launch

import configs
import evaluate
from evaluation import networks, protocols
from forecaster import Forecaster
from runtime.folders import Parts

CKPT = "outputs/checkpoints/ball_stn-follmer-0/latest.pt"
PLAIN = [
    "--ckpt",
    CKPT,
    "--metrics",
    "mse",
    "psnr",
    "ssim",
    "crps",
    "energy",
    "spread_skill",
    "minade",
    "colorkl",
    "two_balls",
]


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    folder = copy_of(tiny_run[0], tmp_path_factory.mktemp("evaluate") / "run", "ball_stn-follmer-0")
    launch(folder, "sample.py", "--ckpt", CKPT, "--out", "fine")
    return folder


@pytest.fixture
def here(folder, monkeypatch, capsys):
    """here(*arguments) -> what evaluate.py prints, run in this process."""

    def run(*arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        evaluate.main()
        return capsys.readouterr().out

    return run


def test_the_command_run_twice_gives_the_same_result(folder, here):
    printed = launch(folder, "evaluate.py", *PLAIN, "--videos", "9").stdout
    (path,) = (folder / "outputs/results").rglob("*-own-videos_9/metrics.json")
    made = json.loads(path.read_text())
    assert made["protocol"]["name"] == "own-videos_9" and made["protocol"]["rule"] == "mean"
    assert (
        "protocol own-videos_9: 9 test clips (spaced, seed 0), 4 samples each, 4 -> 4 frames"
        in printed
    )
    for metric in PLAIN[3:]:
        assert metric in printed and "mean" in made["summary"][metric]
    assert made["protocol"]["network_evaluations_per_frame"] == 2
    assert np.load(path.parent / "samples.npy").shape == (9, 4, 4, 32, 32, 3)
    for name in (
        "index.html",
        "curves.png",
        "rank_histogram.png",
        "contact_sheet.png",
        "forecasts.mp4",
        "videos/008.mp4",
    ):
        assert (path.parent / name).stat().st_size > 500
    assert not list(path.parent.parent.glob(".*"))  # of the parts
    before = path.stat().st_mtime_ns
    assert here(*PLAIN, "--videos", "9") == printed and path.stat().st_mtime_ns == before


def test_samples_made_before_give_the_same_numbers(folder, here):
    shutil.copytree(folder / "fine", folder / "made")
    before = json.loads((folder / "made/metrics.json").read_text())
    samples = np.load(folder / "made/samples.npy")
    here("--results", "made", "--metrics", "mse", "crps", "--keep", "1")
    after = json.loads((folder / "made/metrics.json").read_text())
    for name in ("mse", "crps", "mse_mean_frame", "crps_repeat_last"):
        assert np.allclose(after["horizon"][name], before["horizon"][name], rtol=1e-5)
    assert (np.load(folder / "made/samples.npy") == samples).all()
    assert after["protocol"]["checkpoint"] == CKPT and after["protocol"]["videos"] == 3


def test_an_interrupted_evaluation_resumes(folder, here, monkeypatch):
    command = [*PLAIN, "--videos", "20", "--out"]
    with monkeypatch.context() as patch:
        write = Parts.write
        patch.setattr(
            Parts, "write", lambda parts, k, arrays: write(parts, k, arrays) if k != 1 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            here(*command, "cut")
    (kept,) = folder.glob(".cut.*/part_0000.npz")
    asked = []
    with monkeypatch.context() as patch:
        forecast = Forecaster.forecast
        patch.setattr(
            Forecaster, "forecast", lambda *a, **k: asked.append(a[4]) or forecast(*a, **k)
        )
        here(*command, "cut")
    assert [key[-1] for key in asked] == [1, 2] and not kept.exists()
    here(*command, "whole")
    assert (np.load(folder / "cut/samples.npy") == np.load(folder / "whole/samples.npy")).all()
    cut, whole = (
        json.loads((folder / name / "metrics.json").read_text())["summary"]
        for name in ("cut", "whole")
    )
    assert cut == whole


def test_two_processes_at_once_end_in_one_result(folder):
    command = [
        sys.executable,
        str(REPO / "evaluate.py"),
        *PLAIN,
        "--videos",
        "20",
        "--out",
        "together",
    ]
    both = [
        subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=250) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0] and not list(folder.glob(".together.*"))
    assert np.load(folder / "together/samples.npy").shape[0] == 20


def test_by_default_fvd_of_one_video_is_left_out_and_named(capsys):
    config = configs.build()
    args = evaluate.parse(["--ckpt", CKPT])
    for videos, named in ((1, True), (2, False)):
        protocol = protocols.get("own", config, {"videos": videos})
        which = evaluate.choose_metrics(args, config, protocol)
        assert ("fvd" in which) == ("kvd" in which) != named
        assert ("fvd and kvd are left out" in capsys.readouterr().out) == named


def test_fvd_alone_and_with_an_autoencoder_that_was_not_there_before(
    folder, here, monkeypatch, tmp_path
):
    """I3D is a stand-in: the mean colour of three frames."""
    monkeypatch.setattr(networks, "load_i3d", lambda path, device: torch.nn.Identity())

    def seen(net, videos, device):
        return videos[:, :3].mean((2, 3)).reshape(len(videos), -1)

    monkeypatch.setattr(networks, "i3d_features", seen)
    (tmp_path / "i3d.safetensors").write_bytes(b"")
    common = ["--metrics", "fvd", "--weights", str(tmp_path)]
    printed = here("--ckpt", CKPT, "--predict", "12", "--videos", "6", "--out", "far", *common)
    first = json.loads((folder / "far/metrics.json").read_text())
    assert set(first["summary"]) == {"fvd", "fvd_autoencoder"} and first["summary"]["fvd"]["se"] > 0
    assert (
        first["protocol"]["i3d"].startswith("i3d.safetensors")
        and "fvd and kvd: the forecast frames" in printed
    )
    without = json.loads((folder / "far/metrics.json").read_text())
    without["protocol"]["checkpoint"] = "gone.pt"
    (folder / "far/metrics.json").write_text(json.dumps(without))
    printed = here("--results", "far", *common)
    assert "the checkpoint gone.pt does not exist" in printed
    again = json.loads((folder / "far/metrics.json").read_text())["summary"]
    assert set(again) == {"fvd"} and again["fvd"] == first["summary"]["fvd"]
    here("--results", "far", *common, "--ckpt", CKPT)  # it is not the old table that comes back
    assert json.loads((folder / "far/metrics.json").read_text())["summary"] == first["summary"]
    assert "fvd" not in here("--results", "far", "--metrics", "mse")
    assert "i3d" not in json.loads((folder / "far/metrics.json").read_text())["protocol"]


def test_other_settings_start_another_evaluation(folder, here):
    common = ["--ckpt", CKPT, "--metrics", "mse", "--videos", "4", "--out", "skips"]
    here(*common)
    before = json.loads((folder / "skips/metrics.json").read_text())
    here(*common, "--set", "data.skip=1")
    after = json.loads((folder / "skips/metrics.json").read_text())
    assert after["protocol"]["skip"] == 1 and after["summary"] != before["summary"]


def test_stored_samples_keep_their_clips(folder, here, command):
    here(
        "--ckpt",
        CKPT,
        "--metrics",
        "mse",
        "--videos",
        "4",
        "--clips",
        "random",
        "--seed",
        "7",
        "--out",
        "random",
    )
    here("--results", "random", "--metrics", "psnr")
    protocol = json.loads((folder / "random/metrics.json").read_text())["protocol"]
    assert (protocol["clips"], protocol["seed"]) == ("random", 7)
    code, err = command(
        folder, "evaluate.py", "--results", "random", "--clips", "spaced", "--metrics", "psnr"
    )
    assert code == 2 and "it has clips random, not spaced" in err
    here("--ckpt", CKPT, "--metrics", "mse", "--videos", "3", "--keep", "1", "--out", "kept")
    code, err = command(folder, "evaluate.py", "--results", "kept", "--metrics", "mse")
    assert code == 2 and "kept stores 1 of the 4 samples per video" in err


def test_killed_while_results_are_swapped_nothing_is_lost(folder, here, monkeypatch):
    shutil.copytree(folder / "fine", folder / "swapped")
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "replace",
            lambda a, b: 1 / 0 if str(a).endswith("swapped.partial") else replace(a, b),
        )
        with pytest.raises(ZeroDivisionError):
            here("--results", "swapped", "--metrics", "mse")
    assert not (folder / "swapped").exists()
    here("--results", "swapped", "--metrics", "mse")
    assert (np.load(folder / "swapped/samples.npy") == np.load(folder / "fine/samples.npy")).all()
    assert not list(folder.glob("swapped.*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give --ckpt FILE or --results DIR"),
        (
            ["--ckpt", CKPT, "--protocol", "lifelong"],
            "no protocol `lifelong`; nearest known: lifelong_ball",
        ),
        (
            ["--ckpt", CKPT, "--protocol", "srvp_kth"],
            "protocol srvp_kth is for kth, the checkpoint is of ball_stn",
        ),
        (["--ckpt", CKPT], "fvd and kvd need 10 frames, protocol own counts 4"),
        (["--ckpt", CKPT, "--metrics", "fdv"], "no metric `fdv`; nearest known: fvd"),
        (
            ["--ckpt", CKPT, "--predict", "12", "--weights", "nowhere"],
            "nowhere/i3d.safetensors: no such file; fetch it by",
        ),
        (
            ["--ckpt", CKPT, "--samples", "1", "--metrics", "spread_skill"],
            "spread_skill needs at least two samples",
        ),
        (
            ["--results", "fine", "--ckpt", "gone.pt", "--metrics", "fvd"],
            "gone.pt: no such checkpoint",
        ),
        (["--ckpt", CKPT, "--predict", "300"], "the longest video has 200 frames"),
        (["--ckpt", CKPT, "--videos", "0"], "videos must be >= 1"),
        (
            ["--ckpt", CKPT, "--predict", "12", "--videos", "1", "--metrics", "kvd", "mse"],
            "fvd and kvd compare sets of at least two videos, there is 1",
        ),
        (["--ckpt", CKPT, "--keep", "0"], "--keep must be >= 1"),
        (
            ["--ckpt", CKPT, "--metrics", "mse", "--out", "data"],
            "data exists and holds files that are not results",
        ),
        (
            ["--results", "fine", "--protocol", "lifelong_ball"],
            "fine does not match protocol lifelong_ball: it has videos 3",
        ),
        (
            ["--results", "fine", "--videos", "2"],
            "fine does not match protocol own-videos_2: it has videos 3, not 2",
        ),
        (["--results", "nowhere"], "nowhere/samples.npy: no such file"),
        (["--results", "damaged"], "damaged/samples.npy: not an array that sample.py wrote"),
        (
            ["--results", "unequal", "--metrics", "mse"],
            "unequal: samples .* and truth .* do not match",
        ),
    ],
)
def test_mistakes_are_one_line_and_code_2(folder, command, arguments, message):
    for name in ("damaged", "unequal"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "damaged/samples.npy").write_bytes(b"not an array")
    np.save(folder / "unequal/truth.npy", np.zeros((2, 8, 32, 32, 3), np.uint8))
    np.save(folder / "unequal/samples.npy", np.zeros((3, 1, 4, 32, 32, 3), np.uint8))
    code, err = command(folder, "evaluate.py", *arguments)
    assert code == 2 and re.search(message, err) and len(err.strip().splitlines()) == 1, err
