"""Scores of ensembles of fields against ensembles of truths: pure functions on arrays.

samples: (S, T, C, H, W), the S members of a forecast. truths: (M, T, C, H, W), M draws from the
true conditional law. Functions of both treat every truth as the observation in turn and average
over all; a score is then a number per lead time, (T,). The fair scores have an expectation that
does not depend on S. A truth is scored against the other truths by the `own` functions: the lowest
expectation that any forecast can have.
"""

from __future__ import annotations

import math

import numpy as np

from evaluation import metrics

PIXELS = (-3, -2, -1)
# Bins of histograms, each with an equal share of the truth.
BINS = 20


# ------------------------------------------------------------------------------------------ spectra
def spectrum(fields: np.ndarray) -> np.ndarray:
    """Power of fields (…, C, H, W) by wavenumber, summed over channels -> (…, min(H, W) // 2 + 1).
    See metrics.radial_spectrum."""
    return metrics.radial_spectrum(np.moveaxis(fields, -3, -1))


def spectrum_error(power: np.ndarray, truth: np.ndarray, largest: int) -> float:
    """The largest relative deviation of mean powers (K,) from the true ones (K,) over wavenumbers
    1 to `largest`, where the true power is not negligible."""
    part = slice(1, largest + 1)
    counted = truth[part] > 1e-6 * truth.sum()
    return float(np.abs(power[part][counted] / truth[part][counted] - 1).max())


# ---------------------------------------------------------------------------------------- enstrophy
def enstrophy(vorticity: np.ndarray) -> np.ndarray:
    """Half the mean square of fields (…, C, H, W) -> (…), summed over channels."""
    return np.square(vorticity).mean((-2, -1)).sum(-1) / 2


def kl_histogram(truths: np.ndarray, samples: np.ndarray, bins: int = BINS) -> float:
    """KL(truth || forecast) in nats of two sets of numbers, of any shape, by a histogram.

    The bins hold equal shares of the truth. Equal distributions give about
    (bins - 1) / 2 (1 / n + 1 / m) for n and m independent numbers, not 0.
    """
    inner = np.quantile(truths, np.arange(1, bins) / bins)
    counts = []
    for values in (truths, samples):
        counts.append(np.bincount(np.searchsorted(inner, values.ravel()), minlength=bins))
    return kl_counts(*counts)


def kl_counts(truth: np.ndarray, forecast: np.ndarray) -> float:
    """KL(truth || forecast) in nats of two histograms (bins,), with half a count more per bin."""
    p = (truth + 0.5) / (truth + 0.5).sum()
    q = (forecast + 0.5) / (forecast + 0.5).sum()
    return float((p * np.log(p / q)).sum())


def kl_moments(truths: np.ndarray, samples: np.ndarray) -> float:
    """KL(truth || forecast) in nats of the Gaussians with the mean and variance of two sets of
    numbers, of any shape."""
    mean, variance = truths.mean(), truths.var()
    other_mean, other_variance = samples.mean(), samples.var()
    ratio = variance / other_variance
    return float((ratio - 1 - np.log(ratio) + (mean - other_mean) ** 2 / other_variance) / 2)


# ---------------------------------------------------------------------------------- mean, deviation
def deviation(members: np.ndarray) -> np.ndarray:
    """Standard deviation over the first axis, of n >= 2, without bias for a Gaussian."""
    n = len(members)
    # E[s] = c4 sigma for the root s of the unbiased variance (Holtzman 1950).
    c4 = math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
    return members.std(0, ddof=1) / c4


def mean_error(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Squared difference of the means of two ensembles, averaged over pixels -> (T,).

    The sampling error is subtracted, so that the expectation has no bias and a value may be
    negative. An exact mean is given as truths (T, C, H, W).
    """
    noise = samples.var(0, ddof=1) / len(samples)
    true = truths
    if truths.ndim == samples.ndim:
        noise = noise + truths.var(0, ddof=1) / len(truths)
        true = truths.mean(0)
    return (np.square(samples.mean(0) - true) - noise).mean(PIXELS)


def deviation_error(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Squared difference of the deviations of two ensembles, averaged over pixels -> (T,).

    Without bias for Gaussians, so that a value may be negative: the differences of the two halves
    of the ensembles, whose errors are independent, are multiplied. At least 4 members each. An
    exact deviation is given as truths (T, C, H, W).
    """
    differences = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        true = truths
        if truths.ndim == samples.ndim:
            true = deviation(truths[half])
        differences.append(deviation(samples[half]) - true)
    return (differences[0] * differences[1]).mean(PIXELS)


def relative_error(squares: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """The root of mean squared errors (V, T) over mean squared norms (V, T) -> (T,); 0 where the
    estimate of the mean squared error is negative."""
    return np.sqrt(np.maximum(squares.mean(0), 0) / norms.mean(0))


# ------------------------------------------------------------------------------------------- scores
def pair_sum(members: np.ndarray) -> np.ndarray:
    """Sum of |x - x'| over pairs of members (S, T, C, H, W), averaged over pixels -> (T,)."""
    S = len(members)
    # For sorted x, the sum of |x_i - x_j| over pairs i < j is the sum of (2k - S + 1) x_k over k.
    rank = (2 * np.arange(S) - S + 1).reshape(S, *[1] * (members.ndim - 1))
    return (np.sort(members, axis=0) * rank).sum(0).mean(PIXELS)


def pair_distance(members: np.ndarray) -> np.ndarray:
    """Mean of |x - x'| over pairs of S >= 2 different members and over pixels -> (T,)."""
    S = len(members)
    return pair_sum(members) * 2 / (S * (S - 1))


def cross_distance(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Mean of |x - y| over pairs of a sample and a truth and over pixels -> (T,)."""
    both = pair_sum(np.concatenate([samples, truths]))
    return (both - pair_sum(samples) - pair_sum(truths)) / (len(samples) * len(truths))


def crps(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Fair continuous ranked probability score per pixel, E|X - y| - E|X - X'| / 2, averaged over
    pixels and truths -> (T,)."""
    samples, truths = samples.astype(np.float64), truths.astype(np.float64)
    return cross_distance(samples, truths) - pair_distance(samples) / 2


def own_crps(truths: np.ndarray) -> np.ndarray:
    """The CRPS of a truth against the other truths, averaged over all -> (T,)."""
    # E|Y - Y'| - E|Y' - Y''| / 2, all three different.
    return pair_distance(truths.astype(np.float64)) / 2


def crps_gaussian(samples: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The expectation of the fair CRPS where the truth is Gaussian in each pixel, with `mean` and
    `deviation` (T, C, H, W) -> (T,)."""
    z = (samples - mean) / deviation
    # E|x - Y| for Y of the normal distribution.
    distance = deviation * (2 * density(z) + z * (2 * cumulative(z) - 1))
    return distance.mean((0, *PIXELS)) - pair_distance(samples.astype(np.float64)) / 2


def density(z: np.ndarray) -> np.ndarray:
    """Density of the normal distribution."""
    return np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi)


def cumulative(z: np.ndarray) -> np.ndarray:
    """Cumulative distribution function of the normal distribution."""
    from scipy.special import ndtr

    return ndtr(z)


def norms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Root mean square over pixels of x_i - y_j, (S, T, C, H, W) and (M, T, C, H, W) -> (T, S,
    M)."""
    S, T = x.shape[:2]
    a = x.reshape(S, T, -1).swapaxes(0, 1).astype(np.float64)
    b = y.reshape(len(y), T, -1).swapaxes(0, 1).astype(np.float64)
    # |x - y|^2 by matrix products; rounding may make the smallest of them negative.
    squares = (a**2).sum(-1)[:, :, None] + (b**2).sum(-1)[:, None] - 2 * a @ b.swapaxes(1, 2)
    return np.sqrt(np.maximum(squares, 0) / a.shape[-1])


def energy(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Fair energy score of whole fields, E|X - y| - E|X - X'| / 2 with the root mean square over
    pixels as norm, averaged over truths -> (T,)."""
    return norms(samples, truths).mean((1, 2)) - own_energy(samples)


def own_energy(truths: np.ndarray) -> np.ndarray:
    """The energy score of a truth against the other truths, averaged over all -> (T,)."""
    distances = norms(truths, truths)
    off_diagonal = ~np.eye(len(truths), dtype=bool)
    return distances[:, off_diagonal].mean(1) / 2


# -------------------------------------------------------------------------------------- calibration
def rank_counts(samples: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Count the ranks of all true pixel values among the samples -> (T, S + 1), (Hamill 2001).

    Flat if the truth has the distribution of the samples.
    """
    S, T = samples.shape[:2]
    counts = np.zeros((T, S + 1), np.int64)
    lead = np.arange(T).reshape(T, 1, 1, 1) * (S + 1)
    for truth in truths:
        ranks = (samples < truth).sum(0) + lead
        counts += np.bincount(ranks.ravel(), minlength=T * (S + 1)).reshape(T, S + 1)
    return counts


def rank_shares_gaussian(
    samples: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """The expectation of the shares of ranks where the truth is Gaussian in each pixel -> (T, S +
    1), with sum 1 over ranks."""
    S, T = samples.shape[:2]
    below = cumulative((np.sort(samples, axis=0) - mean) / deviation).mean(PIXELS)
    edges = np.concatenate([np.zeros((1, T)), below, np.ones((1, T))])
    return np.diff(edges, axis=0).T


def coverage(ranks: np.ndarray, level: float) -> np.ndarray:
    """Share of the truths in the central interval of the samples with this nominal level, from
    counts or shares of ranks (…, S + 1) -> (…).

    Rank r stands for the quantiles r / (S + 1) to (r + 1) / (S + 1) of a calibrated forecast. A
    rank at an end of the interval counts by its part inside, so that flat ranks give `level`.
    """
    bins = ranks.shape[-1]
    edges = np.arange(bins + 1) / bins
    low, high = (1 - level) / 2, (1 + level) / 2
    inside = np.diff(np.clip(edges, low, high)) * bins
    return ranks @ inside / ranks.sum(-1)
