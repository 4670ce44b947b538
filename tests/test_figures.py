"""Figures: readable image files for any metrics, and the labels, units and directions in them."""

import io

import numpy as np
import pytest
from PIL import Image

from evaluation import metrics
from evaluation.metrics import own_metrics
from report import plots


def picture(draw, *args) -> np.ndarray:
    file = io.BytesIO()
    draw(args[0], file, *args[1:])
    return np.asarray(Image.open(file).convert("RGB"))


def has(picture: np.ndarray, color: str) -> bool:
    return bool((picture == [int(color[k : k + 2], 16) for k in (1, 3, 5)]).all(-1).any())


def test_curves_show_the_forecast_its_band_and_the_baselines():
    horizon = {
        "psnr": [30, 25, 20],
        "psnr_repeat_last": [22, 20, 18],
        "psnr_mean_frame": [15, 15, 15],
    }
    drawn = picture(plots.curves, horizon)
    assert has(drawn, plots.MODEL)
    assert all(has(drawn, plots.STYLES[name][0]) for name in ("_repeat_last", "_mean_frame"))
    assert not has(picture(plots.curves, {"psnr": [30, 25, 20]}), plots.STYLES["_repeat_last"][0])
    assert (picture(plots.curves, horizon, {"psnr": [3, 3, 3]}) != drawn).any()


@pytest.mark.parametrize(
    "horizon",
    [
        {"crps": [0.1]},
        {"mse": [1e-6, 1e-3, 1.0]},
        {"mse": [0.0, 0.0]},
        {"fvd": [None, 3.0]},
        {"unheard_of": list(range(999))},
        # All metrics that are measured together: rmse is for fields, which lack most others.
        {name: [0.5, 0.6] for name in metrics.ABOUT if name != "rmse"},
    ],
)
def test_curves_of_one_frame_of_many_and_with_gaps(horizon):
    height, width, _ = picture(plots.curves, horizon).shape
    assert 400 < width < 2000 and height < 2000


def test_rank_histogram_draws_shares_and_the_expected_line():
    drawn = picture(plots.rank_histogram, np.array([30, 10, 10, 30]))
    assert has(drawn, plots.MODEL) and has(drawn, "#D55E00")
    assert (drawn == picture(plots.rank_histogram, np.array([3, 1, 1, 3]))).all()


def test_metrics_say_their_unit_and_direction():
    assert plots.describe("psnr") == ("PSNR", "dB", True)
    assert plots.describe("psnr_best") == ("PSNR best", "dB", True)
    assert plots.describe("odd_one") == ("odd one", "", None)
    assert own_metrics({"mse": 1, "mse_repeat_last": 2, "mse_mean_frame": 3, "psnr_best": 4}) == [
        "mse",
        "psnr_best",
    ]
