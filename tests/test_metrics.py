"""Metrics against closed forms and brute force."""

import math

import numpy as np

import metrics


def arrays(V=2, S=4, T=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((V, S, T, 4, 4, 3)), rng.random((V, T, 4, 4, 3))


def test_mse_and_psnr():
    samples, truth = arrays()
    assert np.allclose(metrics.mse(samples, truth), [[np.mean([(s[t] - y[t]) ** 2 for s in x]) for t in range(3)]
                                                     for x, y in zip(samples, truth)])
    off = np.full((1, 2, 1, 4, 4, 3), 0.5)
    off[0, 1] = 0.6
    psnr = metrics.psnr(off, np.full((1, 1, 4, 4, 3), 0.4))
    assert np.allclose(psnr, (-10 * math.log10(0.01) - 10 * math.log10(0.04)) / 2)
    assert np.allclose(metrics.psnr(off[:, :1], off[:, 0]), 100)


def test_crps_against_brute_force():
    samples, truth = arrays(S=5)
    for v in range(2):
        for t in range(3):
            x, y = samples[v, :, t], truth[v, t]
            pairs = np.mean([np.abs(x[i] - x[j]).mean() for i in range(5) for j in range(5) if i != j])
            assert np.isclose(metrics.crps(samples, truth)[v, t], np.abs(x - y).mean() - pairs / 2)


def test_crps_of_one_sample_is_the_absolute_error():
    samples, truth = arrays(S=1)
    assert np.allclose(metrics.crps(samples, truth), np.abs(samples[:, 0] - truth).mean((-3, -2, -1)))


def test_crps_of_a_normal_forecast_is_the_closed_form():
    """For N(0, 1) and y = 0: E|X| - E|X - X'| / 2 = sqrt(2/pi) - 1/sqrt(pi), whatever the number of samples."""
    rng = np.random.default_rng(0)
    for S in (2, 6):
        samples = rng.standard_normal((1, S, 1, 400, 400, 3))
        value = metrics.crps(samples, np.zeros((1, 1, 400, 400, 3)))[0, 0]
        assert abs(value - (math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi))) < 3e-3


def test_summary_over_videos():
    summary = metrics.summarize(np.array([[1.0, 3.0], [5.0, 7.0]]))
    assert summary == {"mean": 4.0, "se": np.std([2, 6], ddof=1) / math.sqrt(2)}
