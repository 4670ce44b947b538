"""sample.restore: forecasts keep the detail of a scene that does not change."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import configs
from forecaster import Forecaster, describe_sampler
from models.autoencoders.restore import restore
from report.results import results_dir
from runtime.console import UserError

CPU = torch.device("cpu")


class Blur(nn.Module):
    """An autoencoder that keeps the mean of each block of 4 x 4 pixels, exactly."""

    def encode(self, x):
        return F.pad(F.avg_pool2d(x, 4), (0, 0, 0, 0, 0, 1))

    def decode(self, z):
        return F.interpolate(z[:, :3], scale_factor=4.0)


class Still(nn.Module):
    """A network that forecasts the last frame again: its residual is 0."""

    def forward(self, z, s, reference, contexts, gaps, noise=None, step=None):
        return torch.zeros_like(z)


def test_an_unchanged_scene_gets_all_of_its_detail_and_a_changed_one_none():
    torch.manual_seed(0)
    last = torch.rand(2, 3, 32, 32) * 1.6 - 0.8
    decoded = Blur().decode(Blur().encode(last))
    assert torch.allclose(restore(decoded, decoded, last, 0.06), last, atol=1e-6)
    # A quarter of the first frame differs by more than the level.
    x = decoded.clone()
    x[0, :, :16, :16] += 1.0
    restored = restore(x, decoded, last, 0.06)
    assert torch.allclose(restored[0, :, :14, :14], x[0, :, :14, :14].clamp(-1, 1), atol=1e-6)
    assert torch.allclose(restored[0, :, 18:, 18:], last[0, :, 18:, 18:], atol=1e-6)
    assert torch.allclose(restored[1], last[1], atol=1e-6)


def test_the_level_is_in_units_of_the_range_of_values():
    """A difference of the level everywhere leaves exp(-1/2) of the detail."""
    last, decoded = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
    found = restore(decoded + 0.12, decoded, last, 0.06)
    assert torch.allclose(found, torch.full_like(found, 0.12 + 0.5 * np.exp(-0.5)))


def make_forecaster(**settings):
    changes = {"data.image_size": 16, "model.name": "convnet", "sample.diffusion": "0"}
    changes |= {"sample.batch": 3} | settings
    latent = configs.Latent((4, 4, 4), (0.0,) * 4, (1.0,) * 4, 1.0, 1.0)
    config = dataclasses.replace(configs.build("ball_stn", changes), latent=latent)
    return Forecaster(config, Still(), Blur(), CPU)


def test_forecasts_of_still_scenes_are_sharp_for_every_video_and_future():
    rng = np.random.default_rng(0)
    frames = rng.integers(40, 216, (4, 1, 16, 16, 3), np.uint8).repeat(3, 1)
    # The batches of three futures do not end where the videos do.
    forecaster = make_forecaster(**{"sample.restore": 0.06})
    futures = forecaster.forecast(frames, 2, 2, (0, "noise"), quiet=True)
    assert futures.shape == (4, 2, 2, 16, 16, 3)
    last = frames[:, None, -1:].astype(int)
    assert np.abs(futures - last).max() <= 1
    plain = make_forecaster(**{"sample.restore": 0.0})
    assert np.abs(plain.forecast(frames, 2, 2, (0, "noise"), quiet=True) - last).mean() > 20


def test_restore_is_refused_where_there_are_no_rgb_frames():
    for dataset in ("plaicraft", "fields"):
        with pytest.raises(UserError, match="sample.restore=0.1 restores RGB frames"):
            configs.build(dataset, {"sample.restore": 0.1})
    autoencoder = Blur()
    autoencoder.of_fields = True
    config = make_forecaster(**{"sample.restore": 0.1}).config
    with pytest.raises(UserError, match="sample.restore is for RGB frames"):
        Forecaster(config, Still(), autoencoder, CPU)


def test_published_branches_restore_nothing():
    for dataset in ("kth", "clevrer", "bair_64", "bair_256"):
        assert configs.build(dataset, {}).sample.restore == 0


def test_results_with_and_without_restore_are_kept_apart():
    restored, plain = (make_forecaster(**{"sample.restore": level}) for level in (0.06, 0.0))
    assert "_restore-0.06" in str(results_dir(restored, 10))
    assert "restore" not in str(results_dir(plain, 10))
    assert describe_sampler(restored, 10, "x.pt")["restore"] == 0.06
    assert "restore" not in describe_sampler(plain, 10, "x.pt")
