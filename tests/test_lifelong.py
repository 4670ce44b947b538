"""Evaluation along a stream: which windows a protocol takes, curves of forgetting, and the
benchmark of ways of training.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, copy_of
from PIL import Image

import configs
import evaluate
from batches.stream import StreamWindows
from benchmarks import lifelong
from evaluation import measure, networks, protocols
from forecaster import Forecaster
from main import Clock, train_network
from report import plots
from runtime.console import UserError
from runtime.process import start
from scripts import forgetting
from shards import Shards

WEIGHTS = Path(os.environ.get("DRIFTCAST_METRIC_WEIGHTS", REPO / "weights/metrics"))
STREAM = [
    *TINY,
    "data.clip=10",
    "data.condition=5",
    "data.predict=5",
    "train.batch_size=4",
    "train.schedule=constant",
    "train.steps=12",
    "train.keep=1",
    "train.keep_every=4",
    "train.save_every=4",
    "data.frames=0:300",
]
RUN = "outputs/checkpoints/along"


# ------------------------------------------------------------------------------ clips of a protocol
@pytest.fixture
def clips(make_shards):
    """clips(**changes) -> [(video, start)] of the clips of lifelong_stream with these changes, for
    videos of 40, 3 and 30 frames and windows of 10 frames.
    """
    shards = Shards(make_shards([40, 3, 30]))
    config = configs.build("ball_stn", {"data.mode": "stream"})

    def taken(**changes) -> list[tuple[int, int]]:
        protocol = protocols.get("lifelong_stream", config, changes)
        windows = evaluate.clips_of(protocol, shards, changes.pop("skip", 0))
        assert (windows.clip, windows.stride) == (protocol.condition + protocol.predict, 1)
        return list(zip(windows.video.tolist(), windows.start.tolist()))

    return taken


def test_spaced_clips_reach_from_the_first_frame_of_the_range_to_the_last(clips):
    assert clips(videos=4) == [
        (0, 0),
        (0, 17),
        (2, 3),
        (2, 20),
    ]  # of 31 + 21 windows numbers 0, 17, 34 and 51
    assert clips(videos=3, frames="10:35") == [(0, 10), (0, 17), (0, 25)]
    assert len(clips()) == 52 and len(set(clips())) == 52  # no more than there are


def test_continuous_and_chunked_clips_are_the_first_that_there_are(clips):
    assert clips(clips="continuous", videos=3) == [(0, 0), (0, 1), (0, 2)]
    assert clips(clips="continuous", frames="29:55") == [(0, 29), (0, 30), (2, 0), (2, 1), (2, 2)]
    assert clips(clips="chunked") == [(0, 0), (0, 10), (0, 20), (0, 30), (2, 0), (2, 10), (2, 20)]
    assert clips(clips="chunked", frames="5:") == [
        (0, 5),
        (0, 15),
        (0, 25),
        (2, 0),
        (2, 10),
        (2, 20),
    ]


def test_random_clips_are_of_the_range_and_follow_their_seed(clips):
    drawn = clips(clips="random", videos=200, frames="25:60")
    assert set(drawn) == {(0, k) for k in range(25, 31)} | {(2, k) for k in range(8)}
    assert clips(clips="random", videos=200, frames="25:60", seed=1) != drawn


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": "70:80"}, "a stream of 73 frames, --frames=70:80 is not a part of it"),
        ({"frames": "38:45"}, "a window needs 10; lower --predict"),
        ({"frames": "a:b"}, "frames must be START:STOP, got a:b"),
        ({"clips": "some"}, "clips must be one of spaced, random, continuous, chunked, got some"),
    ],
)
def test_mistakes_about_streams_are_reported(clips, changes, message):
    with pytest.raises(UserError, match=message):
        clips(**changes)


def test_a_protocol_without_a_stream_has_no_range_and_no_strides():
    config = configs.build("ball_stn")
    with pytest.raises(UserError, match="lifelong_ball-frames_0-9 does not evaluate a stream"):
        protocols.get("lifelong_ball", config, {"frames": "0:9"})
    with pytest.raises(UserError, match="clips must be one of spaced, random, got chunked"):
        protocols.get("own", config, {"clips": "chunked"})


def test_lifelong_stream_gives_the_first_half_of_each_window():
    protocol = protocols.get("lifelong_stream", configs.build("kth", {"data.mode": "stream"}), {})
    assert (protocol.condition, protocol.predict, protocol.samples, protocol.videos) == (
        10,
        10,
        3,
        100,
    )
    odd = configs.build("ball_stn", {"data.mode": "stream", "data.clip": 11, "data.condition": 9})
    assert (
        protocols.get("lifelong_stream", odd, {}).condition,
        protocols.get("lifelong_stream", odd, {}).predict,
    ) == (5, 6)
    told = protocols.get(
        "lifelong_stream", odd, {"frames": "0:500", "clips": "chunked"}
    ).to_metadata(["mse"])
    assert (
        told["name"] == "lifelong_stream-clips_chunked-frames_0-500"
        and told["frames"] == "0:500"
        and told["stream"]
    )
    assert "of the stream's frames 0:500 (chunked" in protocols.describe(told)[0]


def test_features_of_known_videos_are_not_computed_again(monkeypatch):
    seen = []
    monkeypatch.setattr(
        networks,
        "i3d_features",
        lambda net, videos, device: (
            seen.extend(videos[:, 0, 0, 0, 0]) or videos[:, :, 0, 0, 0].astype(np.float32)
        ),
    )
    videos = (
        np.arange(4, dtype=np.uint8)[:, None, None, None, None, None].repeat(10, 2).repeat(3, 5)
    )
    nets = measure.Networks(None, None, torch.device("cpu"), known={})
    first, again = measure.i3d_logits(videos[:3], nets), measure.i3d_logits(videos, nets)
    assert (
        seen == [0, 1, 2, 3]
        and (again[:3] == first).all()
        and (again[:, 0, 0] == [0, 1, 2, 3]).all()
    )


# -------------------------------------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A folder in which a network was trained along 300 frames of a stream, and kept four times."""
    folder = copy_of(tiny_run[0], tmp_path_factory.mktemp("lifelong") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = configs.build(
            overrides=configs.parse_overrides(["data.mode=stream", *STREAM, "output.run_id=along"])
        )
        train_network(config, start(), None, Clock())
    return folder


def run(main, folder, monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    capsys.readouterr()
    main()
    return capsys.readouterr().out


def test_evaluation_along_the_stream(folder, monkeypatch, capsys):
    common = [
        "--ckpt",
        f"{RUN}/latest.pt",
        "--protocol",
        "lifelong_stream",
        "--metrics",
        "mse",
        "minade",
        "colorkl",
        "--out",
        "along",
        "--videos",
        "9",
        "--split",
        "train",
        "--frames",
        "100:200",
    ]
    printed = run(evaluate.main, folder, monkeypatch, capsys, *common)
    made = json.loads((folder / "along/metrics.json").read_text())
    assert made["protocol"]["name"] == "lifelong_stream-frames_100-200-split_train-videos_9"
    assert made["protocol"]["frames"] == "100:200" and made["protocol"]["samples_per_video"] == 3
    assert (
        "9 train clips of the stream's frames 100:200 (spaced, seed 0), 3 samples each, 5 -> 5 "
        "frames" in printed
    )
    truth, shards = np.load(folder / "along/truth.npy"), Shards(folder / "data/ball_stn/train")
    assert (truth[0] == shards.read_rows(np.arange(100, 110))).all()
    assert (truth[8] == shards.read_rows(np.arange(190, 200))).all()
    run(
        evaluate.main, folder, monkeypatch, capsys, *common[:-2]
    )  # another part of the stream is another evaluation
    assert (np.load(folder / "along/truth.npy")[8] == shards.read_rows(np.arange(590, 600))).all()
    run(evaluate.main, folder, monkeypatch, capsys, "--results", "along", "--metrics", "crps")
    assert json.loads((folder / "along/metrics.json").read_text())["protocol"]["stream"] is True


def test_fvd_of_ten_frames(folder, monkeypatch, capsys):
    if not (WEIGHTS / "i3d.safetensors").is_file():
        pytest.skip(
            f"the metric networks' weights are not in {WEIGHTS}; fetch them by `{networks.COMMAND}`"
        )
    run(
        evaluate.main,
        folder,
        monkeypatch,
        capsys,
        "--ckpt",
        f"{RUN}/latest.pt",
        "--protocol",
        "lifelong_stream",
        "--metrics",
        "fvd",
        "kvd",
        "--videos",
        "3",
        "--out",
        "ten",
        "--weights",
        str(WEIGHTS),
    )
    found = json.loads((folder / "ten/metrics.json").read_text())["summary"]
    assert found["fvd"]["mean"] > found["fvd_autoencoder"]["mean"] > 0


def test_forgetting_has_a_row_for_every_checkpoint_and_segment(folder, monkeypatch, capsys):
    command = ["--run", RUN, "--segments", "3", "--windows", "4", "--samples", "2"]
    asked, forecast = [], Forecaster.forecast
    monkeypatch.setattr(
        Forecaster, "forecast", lambda *a, **k: asked.append(a[1].shape) or forecast(*a, **k)
    )
    printed = run(forgetting.main, folder, monkeypatch, capsys, *command)
    out = folder / "outputs/results/along/convnet_exact-sigma-2/ball_stn-train-forgetting"
    rows = json.loads((out / "forgetting.json").read_text())["rows"]
    assert [(row["updates"], row["segment"]) for row in rows] == [
        (n, k) for n in (4, 8, 12) for k in range(3)
    ]
    assert [row["frames"] for row in rows[:3]] == ["0:100", "100:200", "200:300"]
    assert rows[0]["seen"] == 0.04 and rows[1]["seen"] == 0 and asked == [(4, 5, 32, 32, 3)] * 9
    for row in rows:
        assert all(
            row[name]["mean"] > 0
            for name in ("mse", "crps", "minade", "mse_repeat_last", "mse_ratio")
        )
    assert len({row["mse"]["mean"] for row in rows}) == 9  # each its own checkpoint and segment
    assert "12 updates" in printed and np.asarray(Image.open(out / "forgetting.png")).shape[0] > 300
    again = json.loads((out / "forgetting.json").read_text())
    again["rows"] = [row for row in again["rows"] if (row["updates"], row["segment"]) != (8, 1)]
    (out / "forgetting.json").write_text(json.dumps(again))
    assert (
        run(forgetting.main, folder, monkeypatch, capsys, *command) == printed and len(asked) == 10
    )
    assert json.loads((out / "forgetting.json").read_text())["rows"] == rows
    run(
        forgetting.main,
        folder,
        monkeypatch,
        capsys,
        *command[:-4],
        "--windows",
        "3",
        "--samples",
        "2",
    )
    assert len(asked) == 19  # others are measured anew


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--run", "nowhere"],
            "nowhere holds 0 numbered checkpoints, but a curve needs two; train with --set "
            "train.keep_every=N",
        ),
        (["--run", RUN, "--segments", "0"], "must be at least 1"),
        (["--run", RUN, "--segments", "40"], "8 frames within --frames=7:15, a window needs 10"),
    ],
)
def test_mistakes_about_forgetting_are_one_line_and_code_2(folder, command, arguments, message):
    code, err = command(folder, "scripts/forgetting.py", *arguments)
    if "40" in arguments:
        assert code == 2 and "a window needs 10" in err
    else:
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_the_seen_share_of_a_segment_counts_its_windows(make_shards):
    windows = StreamWindows(Shards(make_shards([100])), 10, "chunked")
    assert [forgetting.share_seen(windows, n, 50, 100, "stream") for n in (0, 5, 6, 10)] == [
        0,
        0,
        0.2,
        1,
    ]
    assert forgetting.share_seen(windows, 0, 50, 100, "offline") == 1
    assert forgetting.split_range(10, 20, 3) == [(10, 13), (13, 16), (16, 20)]


def test_curves_of_forgetting_distinguish_unseen_segments(tmp_path):
    rows = [
        {
            "updates": n,
            "segment": k,
            "seen": float(n > k),
            "mse": {"mean": 0.1 * (n + k), "se": 0.01},
        }
        for n in (1, 2, 3)
        for k in range(3)
    ]
    pictures = []
    for name, seen in (("some", rows), ("none", [{**row, "seen": 0.0} for row in rows])):
        plots.forgetting(
            [("a", seen, "mse"), ("b", seen, "mse")],
            tmp_path / f"{name}.png",
            [{"step": k, "loss_live": 1.0, "loss_replay": 0.5} for k in range(50)],
        )
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")))
    colors = [
        (picture == [int(plots.SEGMENTS[1][k : k + 2], 16) for k in (1, 3, 5)]).all(-1).sum()
        for picture in pictures
    ]
    assert colors[0] > 300 > colors[1]


# ------------------------------------------------------------------------------------ the benchmark
def without_times(printed: str) -> list[str]:
    """The printed lines, without those of the expected time."""
    return [line for line in printed.splitlines() if not line.startswith("expected time")]


def test_the_benchmark_writes_its_table_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    """I3D is a stand-in: the mean colour of three frames."""
    monkeypatch.setattr(networks, "load_i3d", lambda path, device: torch.nn.Identity())
    monkeypatch.setattr(
        networks,
        "i3d_features",
        lambda net, videos, device: videos[:, :3].mean((2, 3)).reshape(-1, 9),
    )
    (tmp_path / "i3d.safetensors").write_bytes(b"")
    small = [item for item in TINY if item.startswith(("vqvae.", "model.", "sample.steps"))]
    command = [
        "--datasets",
        "ball_stn",
        "--ways",
        "offline",
        "no replay",
        "--stream",
        "100",
        "--windows",
        "4",
        "--segment_windows",
        "2",
        "--weights",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--set",
        *small,
    ]
    printed = run(lifelong.main, tmp_path, monkeypatch, capsys, *command)
    found = json.loads(printed.splitlines()[-1])
    assert set(found) == {"ball_stn, offline", "ball_stn, no replay"}
    offline = found["ball_stn, offline"]
    assert set(offline["test"]) == set(lifelong.COLUMNS) and offline["train"]["minade"] > 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert (
        "## Lifelong learning" in text
        and "| no replay |" in text
        and "| autoencoder alone |" in text
    )
    assert (
        "| ball_stn | FVD, train | FVD, test |" in text
        and (tmp_path / "lifelong.png").stat().st_size > 10_000
    )
    monkeypatch.setattr(Forecaster, "forecast", None)
    again = run(lifelong.main, tmp_path, monkeypatch, capsys, *command)
    assert without_times(again) == without_times(printed)


def test_the_benchmark_checks_the_weights_before_it_trains(command, tmp_path):
    code, err = command(tmp_path, "benchmarks/lifelong.py", "--weights", "nowhere")
    assert (
        code == 2
        and "nowhere/i3d.safetensors: no such file" in err
        and not (tmp_path / "outputs").exists()
    )
