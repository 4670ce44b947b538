"""Scores of ensembles of fields against closed forms of the Gaussian, and their oracle."""

import numpy as np
import pytest
from scipy.stats import norm

from evaluation import fields, metrics


def draws(n: int, mean: float = 0.0, deviation: float = 1.0, seed: int = 0, size: int = 60):
    """Independent Gaussian pixels, (n, 2, 1, size, size): two lead times, the second with twice the
    mean and deviation."""
    rng = np.random.default_rng(seed)
    values = mean + deviation * rng.standard_normal((n, 2, 1, size, size))
    return values * np.array([1.0, 2.0]).reshape(1, 2, 1, 1, 1)


def gaussian_distance(mean: float, deviation: float) -> float:
    """E|Z| for Z with this mean and deviation."""
    z = mean / deviation
    return deviation * (2 * norm.pdf(z) + z * (2 * norm.cdf(z) - 1))


@pytest.mark.parametrize("S", [2, 16])
def test_crps_has_the_closed_form_of_two_gaussians_for_any_number_of_samples(S):
    truths = draws(24, seed=1)
    samples = draws(S, 0.4, 0.7, seed=2)
    # Deviation of x - y, and of x - x'.
    expected = gaussian_distance(0.4, np.hypot(1, 0.7)) - 0.7 / np.sqrt(np.pi)
    assert fields.crps(samples, truths) == pytest.approx([expected, 2 * expected], rel=0.03)
    assert fields.own_crps(truths) * np.sqrt(np.pi) == pytest.approx([1, 2], rel=0.01)
    shape = (2, 1, 60, 60)
    scale = np.array([1.0, 2.0]).reshape(2, 1, 1, 1)
    exact = fields.crps_gaussian(samples, np.zeros(shape), scale * np.ones(shape))
    assert exact == pytest.approx([expected, 2 * expected], rel=0.03)


def test_scores_are_those_of_the_pairs_one_by_one():
    samples, truths = draws(5, 0.3, seed=1, size=6), draws(4, seed=2, size=6)
    for name in ("crps", "energy"):
        each = []
        for truth in truths:
            each.append(getattr(metrics, name)(samples[None], truth[None])[0])
        assert np.allclose(getattr(fields, name)(samples, truths), np.mean(each, 0))
        assert np.allclose(getattr(fields, name)(samples, truths[:1]), each[0])
        own = []
        for k in range(len(truths)):
            rest = np.delete(truths, k, 0)
            own.append(getattr(metrics, name)(rest[None], truths[k][None])[0])
        assert np.allclose(getattr(fields, f"own_{name}")(truths), np.mean(own, 0))


def test_energy_score_has_the_closed_form_of_one_and_of_many_pixels():
    # Many independent pixels: the root mean square of x - y is its expectation.
    truths, samples = draws(8, seed=1), draws(8, 0.5, 0.5, seed=2)
    expected = np.sqrt(1 + 0.25 + 0.25) - np.sqrt(2) * 0.5 / 2
    assert fields.energy(samples, truths) == pytest.approx([expected, 2 * expected], rel=0.01)
    assert fields.own_energy(truths) == pytest.approx([np.sqrt(2) / 2, np.sqrt(2)], rel=0.01)
    # One pixel: the CRPS.
    truths, samples = draws(30, seed=1, size=1), draws(20, 0.5, seed=2, size=1)
    assert np.allclose(fields.energy(samples, truths), fields.crps(samples, truths))


@pytest.mark.parametrize(("S", "deviation"), [(9, 1.0), (64, 1.0), (64, 0.6), (64, 1.5)])
def test_coverage_is_that_of_the_gaussian(S, deviation):
    truths, samples = draws(16, seed=3), draws(S, 0.0, deviation, seed=4)
    counts = fields.rank_counts(samples, truths)
    assert counts.sum(1).tolist() == [16 * 3600] * 2
    shape = (2, 1, 60, 60)
    scale = np.broadcast_to(np.array([1.0, 2.0]).reshape(2, 1, 1, 1), shape)
    shares = fields.rank_shares_gaussian(samples, np.zeros(shape), scale)
    assert shares.sum(1) == pytest.approx(1) and np.abs(shares - counts / 57_600).max() < 0.004
    for level in (0.5, 0.9):
        expected = 2 * norm.cdf(norm.ppf((1 + level) / 2) * deviation) - 1
        assert fields.coverage(counts, level) == pytest.approx(expected, abs=0.02)
        assert fields.coverage(shares, level) == pytest.approx(expected, abs=0.02)
    assert fields.coverage(np.ones(12), 0.9) == pytest.approx(0.9)


def test_rank_counts_are_flat_only_for_the_distribution_of_the_samples():
    truths = draws(20, seed=1)
    flat = fields.rank_counts(draws(7, seed=2), truths)[0]
    assert flat.std() / flat.mean() < 0.03
    shifted = fields.rank_counts(draws(7, -0.5, seed=2), truths)[0]
    assert shifted[-1] > 2 * shifted[0]


def test_errors_of_mean_and_deviation_are_without_the_sampling_error():
    pixels = 2 * np.ones((2, 1, 60, 60))
    truths = pixels + draws(16, seed=1)
    for samples, mean_error, deviation_error in (
        (pixels + draws(8, seed=2), 0.0, 0.0),
        (pixels + draws(8, 0.5, 1.3, seed=3), 0.5, 0.3),
    ):
        found = fields.mean_error(samples, truths)[0]
        assert found == pytest.approx(mean_error**2, abs=0.03)
        # The plain squared error of the means has 1 / 8 + 1 / 16 more.
        plain = np.square(samples.mean(0) - truths.mean(0)).mean((1, 2, 3))[0]
        assert plain > found + 0.1
        found = fields.deviation_error(samples, truths)[0]
        assert found == pytest.approx(deviation_error**2, abs=0.02)
        # Against the exact values.
        found = fields.mean_error(samples, pixels)[0]
        assert found == pytest.approx(mean_error**2, abs=0.03)
        found = fields.deviation_error(samples, pixels / 2)[0]
        assert found == pytest.approx(deviation_error**2, abs=0.02)
    found = fields.relative_error(np.array([[0.2, -1.0], [0.0, 0.5]]), np.full((2, 2), 10.0))
    assert found.tolist() == [0.1, 0.0]


def test_the_deviation_of_two_and_of_ten_members_has_no_bias():
    for n in (2, 10):
        assert fields.deviation(draws(n, seed=1)).mean((1, 2, 3)) == pytest.approx([1, 2], rel=0.02)


def test_divergences_have_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(0)
    truths, samples = rng.standard_normal(200_000), 0.3 + 1.2 * rng.standard_normal(100_000)
    expected = np.log(1.2) + (1 + 0.09) / (2 * 1.44) - 0.5
    assert fields.kl_moments(truths, samples) == pytest.approx(expected, rel=0.03)
    assert fields.kl_histogram(truths, samples, 100) == pytest.approx(expected, rel=0.05)
    assert fields.kl_histogram(truths, rng.standard_normal(100_000)) < 1e-3


def test_spectrum_and_enstrophy_of_two_waves():
    y, x = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    wave = 2 * np.sin(2 * np.pi * 5 * x / 32) + np.cos(2 * np.pi * (3 * x + 4 * y) / 32)
    field = np.stack([wave, np.zeros_like(wave)])[None]
    power = fields.spectrum(field)[0]
    assert power[5] == pytest.approx(2.5) and power.sum() == pytest.approx(2.5)
    assert fields.enstrophy(field) == pytest.approx([1.25])
    truth = np.arange(1.0, 8.0)
    assert fields.spectrum_error(truth * [9, 1, 1.1, 0.8, 1, 1, 5], truth, 5) == pytest.approx(0.2)
