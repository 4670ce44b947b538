"""Programs run on a machine that has torch but lacks PyAV, wandb and other packages.

GPU images often lack them. What does not need them must work.
"""

import json
import os
import textwrap

import numpy as np
import pytest
from conftest import REPO, TINY, launch
from PIL import Image

MISSING = (
    "av",
    "wandb",
    "moviepy",
    "albumentations",
    "imageio_ffmpeg",
    "lpips",
    "pybullet",
    "xdist",
    "ruff",
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """Environment variables for a Python that finds none of the packages in MISSING."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import sys
        from importlib.machinery import PathFinder

        class Bare(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                if name.partition(".")[0] in {MISSING}:
                    return None
                return super().find_spec(name, path, target)

        sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
    """)
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPO)]), "WANDB_MODE": None}


@pytest.fixture(scope="module")
def run(bare, tmp_path_factory):
    """(a folder in which main.py has run to its end, what it printed)"""
    folder = tmp_path_factory.mktemp("run")
    return folder, launch(folder, "main.py", "--set", *TINY, **bare).stdout


def test_every_module_is_imported(bare, tmp_path):
    names = []
    for path in sorted(REPO.rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        # tests/ is no package; folders such as .venv are not ours.
        if parts[0] != "tests" and not parts[0].startswith("."):
            names.append(".".join(parts).removesuffix(".__init__"))
    assert len(names) > 50
    script = tmp_path / "import_all.py"
    script.write_text(f"import importlib\nfor name in {names}: importlib.import_module(name)")
    launch(tmp_path, str(script), **bare)


def test_main_runs_and_prints_each_missing_package_once(run):
    folder, said = run
    assert said.count("wandb is not installed") == 1
    assert said.count("imageio-ffmpeg is not installed, so videos are GIFs") == 1
    (results,) = (path.parent for path in folder.rglob("metrics.json"))
    shown = Image.open(results / "forecasts.gif")
    assert shown.n_frames == 8
    assert len(list((results / "videos").glob("*.gif"))) == 3
    assert not list(results.rglob("*.mp4"))
    assert f"{results.relative_to(folder)}/forecasts.gif" in said
    assert (results / "index.html").is_file()


def test_sample_runs_from_its_checkpoint(run, bare):
    folder, _ = run
    ckpt = "outputs/checkpoints/ball_stn-follmer-0/latest.pt"
    command = ["sample.py", "--ckpt", ckpt, "--num_videos", "2", "--out", "again"]
    said = launch(folder, *command, **bare).stdout
    assert "again/forecasts.gif" in said
    assert (folder / "again/forecasts.gif").is_file()


def test_wandb_that_was_chosen_by_name_is_refused_before_any_work(bare, tmp_path):
    done = launch(tmp_path, "main.py", "--set", *TINY, "wandb.mode=online", check=False, **bare)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: wandb.mode=online, but wandb is not installed: pip install wandb"
    )
    assert not list(tmp_path.iterdir())


COMMANDS = [
    "benchmarks.train_step --sizes S --batches 1 --repeats 1 --compile off",
    "benchmarks.sample --size S --videos 1 --frames 1 --steps 1 --repeats 1",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_benchmarks_of_speed_run(bare, tmp_path, command):
    said = launch(tmp_path, "-m", *command.split(), "--out", str(tmp_path), **bare).stdout
    assert json.loads(said.strip().splitlines()[-1])["machine"]
    assert (tmp_path / "RESULTS.md").is_file()


def test_a_video_file_is_refused_in_one_line(bare, tmp_path):
    command = ["prepare.videos", "--source", str(REPO / "tests/data"), "--out", "out"]
    done = launch(tmp_path, "-m", *command, check=False, **bare)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "walk.mp4: decoding video needs PyAV, which is not installed: pip install av" in last
    assert not (tmp_path / "out").exists()


def test_folders_of_images_are_prepared(bare, tmp_path):
    for split in ("train", "val", "test"):
        for clip in range(2):
            folder = tmp_path / "frames" / split / f"clip_{clip}"
            folder.mkdir(parents=True)
            level = len(list(tmp_path.rglob("clip_*")))
            for t in range(4):
                Image.fromarray(np.full((16, 16, 3), 40 * t + level, np.uint8)).save(
                    folder / f"{t}.png"
                )
    command = "prepare.frames --source frames --out out --image_size 16"
    launch(tmp_path, "-m", *command.split(), **bare)
    assert list((tmp_path / "out/train").glob("shard_*.hdf5"))
