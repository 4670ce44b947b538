"""The tables of metrics of a part of the videos, and the summaries of all parts."""

import numpy as np
import pytest
import torch

from evaluation import measure, metrics, networks
from evaluation.protocols import Protocol
from prepare.balls import World, draw
from runtime.console import UserError

CPU = torch.device("cpu")


def protocol(**fields) -> Protocol:
    return Protocol(
        "test", "", (), **{"condition": 3, "predict": 12, "videos": 6, "samples": 2, **fields}
    )


def balls_of(n: int, frames: int, seed: int = 0) -> np.ndarray:
    clips = [World(np.random.default_rng([seed, k])).simulate(frames) for k in range(n)]
    return np.stack(
        [draw(positions, colors, np.zeros(frames, np.float32)) for positions, _, colors in clips]
    )


@pytest.fixture
def nets(monkeypatch) -> measure.Networks:
    """Stand-ins for I3D and LPIPS: a random projection of a few frames, and the absolute
    difference.
    """
    matrix = np.random.default_rng(0).standard_normal((8 * 8 * 3 * 2, 400)) / 10

    def seen(net, videos, device):
        return videos[:, [0, -1], ::4, ::4].reshape(len(videos), -1) / 255 @ matrix

    monkeypatch.setattr(networks, "i3d_features", seen)
    monkeypatch.setattr(
        networks,
        "lpips_distance",
        lambda net, a, b, device: np.abs(a / 255 - b / 255).mean((1, 2, 3)),
    )
    return measure.Networks(torch.nn.Identity(), torch.nn.Identity(), CPU)


def found(truth, samples, protocol, nets, which=measure.ALL, autoencode=lambda frames: frames):
    mean = truth.mean((0, 1)).astype(np.uint8)
    parts = [
        measure.measure(
            truth[k : k + 2], samples[k : k + 2], mean, protocol, list(which), nets, autoencode, k
        )
        for k in range(0, len(truth), 2)
    ]
    tables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return measure.summarize(tables, protocol, list(which))


def test_a_perfect_forecast(nets):
    truth = balls_of(6, 15)
    summary = found(truth, truth[:, None, 3:].repeat(2, 1), protocol(), nets)["summary"]
    perfect = {
        "mse": 0,
        "psnr": 100,
        "ssim": 1,
        "lpips": 0,
        "crps": 0,
        "energy": 0,
        "fvd": 0,
        "fvd_autoencoder": 0,
        "minade": 0,
        "two_balls": 1,
    }
    for name, value in perfect.items():
        assert abs(summary[name]["mean"] - value) < 1e-3, name
    assert summary["colorkl"]["mean"] < 0.1 and summary["kvd"]["mean"] < 1e-9


def test_numbers_are_those_of_the_metrics(nets):
    truth, other = balls_of(6, 15), balls_of(12, 12, seed=1).reshape(6, 2, 12, 32, 32, 3)
    result = found(truth, other, protocol(rule="best"), nets)
    x, y = other / 255, truth[:, 3:] / 255
    assert np.allclose(
        result["horizon"]["mse"],
        metrics.reduce_samples(metrics.mse(x, y), "best", False).mean(0),
        rtol=1e-4,
    )
    assert np.allclose(
        result["horizon"]["psnr"],
        metrics.reduce_samples(metrics.psnr(x, y), "best", True).mean(0),
        rtol=1e-4,
    )
    assert np.allclose(result["horizon"]["crps"], metrics.crps(x, y).mean(0), rtol=1e-4)
    assert np.isclose(result["summary"]["energy"]["mean"], metrics.energy(x, y).mean(), rtol=1e-4)
    ratio = metrics.spread_skill(metrics.spread(x), metrics.skill(x, y))
    assert np.isclose(result["summary"]["spread_skill"]["mean"], ratio, 1e-3)
    repeated = (truth[:, 2:3] / 255).repeat(12, 1)
    assert np.allclose(
        result["horizon"]["mse_repeat_last"], ((repeated - y) ** 2).mean((0, 2, 3, 4)), rtol=1e-4
    )
    against = metrics.crps(x, y).mean() / np.abs(repeated - y).mean()
    assert np.isclose(result["ratio_to_repeat_last"]["crps"]["all"], against, 1e-4)
    seen = [networks.i3d_features(None, videos, CPU) for videos in (other[:, 0], truth[:, 3:])]
    assert np.isclose(result["summary"]["fvd"]["mean"], metrics.fvd(*seen))
    assert sum(result["rank_histogram"]) == truth[:, 3:].size and result["summary"]["fvd"]["se"] > 0
    assert result["summary"]["minade"]["mean"] > 3 and len(result["horizon_se"]["lpips"]) == 12


def test_fvd_pieces_follow_the_protocol(nets):
    videos = np.arange(2 * 25)[:, None].reshape(2, 1, 25, 1, 1, 1).repeat(3, -1)

    def of(**fields):
        return measure.cut_into_pieces(videos, 22, protocol(**fields))[..., 0, 0, 0]

    assert of().shape == (2, 1, 22) and of()[0, 0, 0] == 3
    assert of(fvd_given=True)[0, 0].tolist() == list(range(25))
    assert of(fvd_chunk=10)[0].tolist() == [
        list(range(3, 13)),
        list(range(13, 23)),
    ]  # two frames stay out
    assert of(fvd_chunk=22).shape == (2, 1, 22)
    truth = balls_of(4, 15)
    blurred = lambda frames: frames // 2  # noqa: E731
    perfect = truth[:, None, 3:]
    real = found(truth, perfect, protocol(samples=1), nets, ["fvd"], blurred)["summary"]
    coded = found(
        truth, perfect, protocol(samples=1, reference="autoencoded"), nets, ["fvd"], blurred
    )["summary"]
    assert abs(real["fvd"]["mean"]) < 1e-6 < coded["fvd"]["mean"]
    assert np.isclose(coded["fvd"]["mean"], real["fvd_autoencoder"]["mean"])  # the same two sets
    through = found(
        truth, blurred(perfect), protocol(samples=1, fvd_given=True), nets, ["fvd"], blurred
    )["summary"]
    assert np.isclose(
        through["fvd"]["mean"], through["fvd_autoencoder"]["mean"]
    )  # given frames are not coded in either


def test_measures_of_one_video_and_of_one_sample(nets):
    truth = balls_of(1, 15)
    alone = protocol(videos=1, samples=1)
    with pytest.raises(UserError, match="at least two videos, there is 1"):
        found(truth, truth[:, None, 3:], alone, nets, ["fvd"])
    which = [name for name in measure.ALL if name not in measure.SETS]
    result = found(truth, truth[:, None, 3:], alone, nets, which)
    assert result["summary"]["mse"] == {"mean": 0.0, "se": 0.0}
    assert "spread_skill" not in result["summary"] and "rank_histogram" not in result


def test_only_the_chosen_metrics_are_measured(nets):
    truth = balls_of(2, 15)
    result = found(
        truth,
        truth[:, None, 3:].repeat(2, 1),
        protocol(),
        measure.Networks(None, None, CPU),
        ["psnr"],
    )
    assert (
        set(result["summary"]) == {"psnr", "psnr_repeat_last", "psnr_mean_frame"}
        and result["ratio_to_repeat_last"] == {}
    )
