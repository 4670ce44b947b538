"""Metrics of forecasts: pure functions on arrays. Pixels are in [0, 1]."""

from __future__ import annotations

import numpy as np


def mse(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error of single samples. samples: (V, S, T, H, W, 3), truth: (V, T, H, W, 3) -> (V, T)."""
    return ((samples - truth[:, None]) ** 2).mean((1, -3, -2, -1))


def psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each single frame, then the mean over samples; a perfect frame counts as
    100 dB. Shapes as for mse."""
    error = ((samples - truth[:, None]) ** 2).mean((-3, -2, -1))
    return (-10 * np.log10(np.maximum(error, 1e-10))).mean(1)


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score per pixel, averaged over pixels: E|X - y| - E|X - X'| / 2, the second term
    over distinct samples, so that the estimate is unbiased whatever their number (Gneiting and Raftery 2007, eq. 21;
    Ferro 2014). Of one sample it is the absolute error. Shapes as for mse."""
    S = samples.shape[1]
    error = np.abs(samples - truth[:, None]).mean((1, -3, -2, -1))
    if S == 1:
        return error
    # sum over pairs i < j of |x_i - x_j| = sum over k of (2k - S + 1) x_(k), x_(k) sorted
    rank = (2 * np.arange(S) - S + 1).astype(samples.dtype).reshape(1, S, *[1] * (samples.ndim - 2))
    pairs = (np.sort(samples, axis=1) * rank).sum(1).mean((-3, -2, -1))
    return error - pairs / (S * (S - 1))


ALL = {"mse": mse, "psnr": psnr, "crps": crps}


def summarize(per_video: np.ndarray) -> dict[str, float]:
    """(V, T) -> mean and its standard error over videos."""
    values = per_video.mean(1)
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "se": se}
