"""Metrics of forecasts: pure functions on arrays. Pixels are in [0, 1]; fields (…, C, H, W), whose
last three axes the metrics treat alike, are in units of their standard deviations (`to_values`).

V videos, S samples (futures) per video, T forecast frames. A metric of single samples returns an
array (V, S, T), a metric of the ensemble of a video (V, T), and a metric of all videos a number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

PIXELS = (-3, -2, -1)
# name: (label, unit, which values are better: lower, higher, or close to one)
ABOUT = {
    "crps": ("CRPS", "", "lower"),
    "energy": ("energy score", "", "lower"),
    "mse": ("MSE", "", "lower"),
    "rmse": ("ensemble RMSE", "", "lower"),
    "psnr": ("PSNR", "dB", "higher"),
    "ssim": ("SSIM", "", "higher"),
    "lpips": ("LPIPS", "", "lower"),
    "fvd": ("FVD", "", "lower"),
    "kvd": ("KVD", "", "lower"),
    "spread_skill": ("spread/skill", "", "one"),
    "minade": ("minADE", "pixels", "lower"),
    "colorkl": ("ColorKL", "nats", "lower"),
    "two_balls": ("two balls seen", "", "higher"),
}
# suffix of a metric's name -> label of the baseline, which is scored on the same clips
BASELINES = {
    "_repeat_last": "repeat last frame",
    "_mean_frame": "mean frame",
    "_autoencoder": "autoencoder alone",
}


def own_metrics(table: dict) -> list[str]:
    """The names in a table of metrics, without the names of baselines."""
    return [name for name in table if not name.endswith(tuple(BASELINES))]


def to_values(frames: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """Convert frames to values to score, float32: RGB frames (…, H, W, 3) uint8 to [0, 1]; fields
    (…, C, H, W) to units of `scale` (C,), see batches/fields.py."""
    if scale is None:
        return frames.astype(np.float32) / 255
    return frames / np.asarray(scale, np.float32)[:, None, None]


# ----------------------------------------------------------------------------------- single samples
def mse(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error. samples: (V, S, T, H, W, 3), truth: (V, T, H, W, 3) -> (V, S, T)."""
    return ((samples - truth[:, None]) ** 2).mean(PIXELS)


def psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB, at most 100. Shapes as for mse."""
    return -10 * np.log10(np.maximum(mse(samples, truth), 1e-10))


def ssim(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame, at most 1 (Wang et al. 2004). Shapes as for mse.

    Computed by torchmetrics: Gaussian window of 11 pixels, sigma 1.5, reflected edges.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    def images(frames: np.ndarray) -> torch.Tensor:
        frames = torch.from_numpy(np.ascontiguousarray(frames, np.float32))
        return frames.flatten(0, 2).permute(0, 3, 1, 2)

    x, y = map(images, np.broadcast_arrays(samples, truth[:, None]))
    parts = []
    # The moments of the windows need several copies of the images, so the images are split.
    for a, b in zip(x.split(256), y.split(256)):
        part = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        parts.append(part.reshape(-1))
    return torch.cat(parts).numpy().reshape(samples.shape[:3])


def reduce_samples(values: np.ndarray, rule: str, higher_is_better: bool) -> np.ndarray:
    """Reduce a metric (V, S, T) to (V, T).

    rule: `mean` over samples; the `first` sample; or the sample whose mean over frames is `best`.
    """
    if rule == "mean":
        return values.mean(1)
    if rule == "first":
        return values[:, 0]
    score = values.mean(2) if higher_is_better else -values.mean(2)
    return values[np.arange(len(values)), score.argmax(1)]


# ---------------------------------------------------------------------------------------- ensembles
def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score per pixel, averaged over pixels. Shapes as for mse ->
    (V, T).

    E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007, eq. 21). The second expectation is over
    pairs of different samples, so that the estimate is unbiased for any S (Ferro 2014). For S = 1
    the score is the absolute error.
    """
    S = samples.shape[1]
    error = np.abs(samples - truth[:, None]).mean((1, *PIXELS))
    if S == 1:
        return error
    # For sorted x, the sum of |x_i - x_j| over pairs i < j is the sum of (2k - S + 1) x_k over k.
    rank = (2 * np.arange(S) - S + 1).astype(samples.dtype).reshape(1, S, *[1] * (samples.ndim - 2))
    pairs = (np.sort(samples, axis=1) * rank).sum(1).mean(PIXELS)
    return error - pairs / (S * (S - 1))


def energy(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Energy score of whole frames (Gneiting and Raftery 2007, eq. 22). Shapes as for mse ->
    (V, T).

    E|X - y| - E|X - X'| / 2, where |.| is the root mean square over the values of a frame and the
    second expectation is over pairs of different samples. Unlike the CRPS, the score depends on the
    correlation between pixels.
    """
    V, S, T = samples.shape[:3]
    x = samples.reshape(V, S, T, -1).swapaxes(1, 2).astype(np.float64)
    error = np.sqrt(((x - truth.reshape(V, T, 1, -1)) ** 2).mean(-1)).mean(-1)
    if S == 1:
        return error
    pairs = 0.0
    # Each sample against all samples before it: memory grows with S, not with S^2.
    for k in range(1, S):
        differences = x[:, :, :k] - x[:, :, k : k + 1]
        pairs = pairs + np.sqrt((differences**2).mean(-1)).sum(-1)
    return error - pairs / (S * (S - 1))


def rmse(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean squared error of the ensemble mean. Shapes as for mse -> (V, T)."""
    return np.sqrt(skill(samples, truth))


def spread(samples: np.ndarray) -> np.ndarray:
    """Variance over samples, averaged over pixels, times (S + 1) / S. (V, S, T, H, W, 3) -> (V, T);
    0 for S = 1.

    This is the expected squared error of the ensemble mean if the truth has the distribution of the
    samples (Fortin et al. 2014).
    """
    S = samples.shape[1]
    if S == 1:
        return np.zeros((len(samples), samples.shape[2]))
    return samples.var(1, ddof=1).mean(PIXELS) * (S + 1) / S


def skill(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared error of the ensemble mean. Shapes as for mse -> (V, T)."""
    return ((samples.mean(1) - truth) ** 2).mean(PIXELS)


def spread_skill(spread: np.ndarray, skill: np.ndarray) -> float:
    """The square root of mean spread / mean skill: 1 for a calibrated ensemble, below 1 for an
    overconfident one, whose samples differ too little from each other.
    """
    return float(np.sqrt(spread.mean() / max(skill.mean(), 1e-12)))


def rank_histogram(samples: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Count the rank of each true pixel value among its samples -> (S + 1,) counts (Hamill 2001).

    Ties get a random rank. The histogram is flat if truth and samples have the same distribution.
    """
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    return np.bincount(
        (below + rng.integers(0, ties + 1)).reshape(-1), minlength=samples.shape[1] + 1
    )


def min_ade(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Minimum average displacement error: the distance to the truth, averaged over frames and
    objects, of the best sample of each video.

    samples: (V, S, T, objects, 2), truth: (V, T, objects, 2) -> (V,), in the same unit.
    """
    return np.linalg.norm(samples - truth[:, None], axis=-1).mean((2, 3)).min(1)


# ------------------------------------------------------------------------- sharpness and motion
def radial_spectrum(frames: np.ndarray) -> np.ndarray:
    """Power of frames (…, H, W, C) by wavenumber, over channels: (…, min(H, W) // 2 + 1).

    Entry k sums the squared Fourier coefficients whose wavenumber rounds to k, in cycles per
    frame; the last entry holds the larger ones too. Divided by (H W)^2, so that the sum over k of
    one channel is its mean square.
    """
    H, W = frames.shape[-3:-1]
    power = (np.abs(np.fft.fft2(frames, axes=(-3, -2))) ** 2).sum(-1) / (H * W) ** 2
    rows, columns = np.fft.fftfreq(H, 1 / H), np.fft.fftfreq(W, 1 / W)
    largest = min(H, W) // 2
    k = np.hypot(rows[:, None], columns).round().astype(int).clip(max=largest).ravel()
    rings = np.zeros((H * W, largest + 1))
    rings[np.arange(H * W), k] = 1
    return power.reshape(*power.shape[:-2], H * W) @ rings


def sharpness(samples: np.ndarray, truth: np.ndarray) -> float:
    """Power of the samples over the power of the truth, in the upper third of the wavenumbers.

    samples: (V, S, T, H, W, C), truth: (V, T, H, W, C). Below 1: blurred. Above 1: grainy.
    """
    fine = slice(-(min(truth.shape[-3:-1]) // 6), None)
    of_samples = radial_spectrum(samples)[..., fine].sum(-1).mean()
    return float(of_samples / max(radial_spectrum(truth)[..., fine].sum(-1).mean(), 1e-12))


def motion_energy(samples: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared change from frame to frame of the samples, over that of the truth.

    Shapes as for `sharpness`, with T >= 2. Below 1: too slow, or frozen.
    """
    of_samples = np.square(np.diff(samples, axis=2)).mean()
    return float(of_samples / max(np.square(np.diff(truth, axis=1)).mean(), 1e-12))


# --------------------------------------------------------------------------- distances between sets
def frechet_distance(
    mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray
) -> float:
    """Squared Fréchet distance of two Gaussians, in float64 (Dowson and Landau 1982):
    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    Only symmetric matrices are square-rooted, so a covariance may be singular.
    """
    root, other_root = (symmetric_root(np.asarray(c, np.float64)) for c in (cov, other_cov))
    difference = np.asarray(mean, np.float64) - other_mean
    # tr (C C')^(1/2) is the nuclear norm of the product of the roots.
    cross = np.linalg.svd(root @ other_root, compute_uv=False).sum()
    return float(difference @ difference + np.trace(cov) + np.trace(other_cov) - 2 * cross)


def symmetric_root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fvd(features: np.ndarray, other: np.ndarray) -> float:
    """Fréchet video distance (Unterthiner et al. 2018) between two sets of I3D logits, (n, 400) and
    (m, 400), with n, m >= 2.

    Computed from the centred features A and B instead of their covariances, which are singular for
    n < 400: tr (C C')^(1/2) is the nuclear norm of A B^T.
    """
    a, b = (np.asarray(x, np.float64) for x in (features, other))
    difference = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    total = (a**2).sum() + (b**2).sum()
    # The triangular factor of A has the same A^T A, and fewer rows.
    a, b = (np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x for x in (a, b))
    return float(
        difference @ difference + total - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    )


def kvd(features: np.ndarray, other: np.ndarray) -> float:
    """Kernel video distance of I3D logits, (n, d) and (m, d), with n, m >= 2.

    The unbiased estimate of the squared maximum mean discrepancy with KID's kernel (x.y / d + 1)^3
    (Binkowski et al. 2018). It can be negative.
    """
    return kvd_from_sums(
        KernelSums(features[:, None], other[:, None]),
        np.arange(len(features)),
        np.arange(len(other)),
    )


class KernelSums:
    """Sums of kvd's kernel for each pair of videos, so that videos can be left out without
    computing the kernel again. features: (V, k, d), k logits per video; other: (W, l, d).
    """

    def __init__(self, features: np.ndarray, other: np.ndarray):
        a, b = (np.asarray(x, np.float64) for x in (features, other))
        self.sizes = a.shape[1], b.shape[1]
        self.within = [
            (self.blocks(x, x), self.kernel(x, x.swapaxes(1, 2)).trace(axis1=1, axis2=2))
            for x in (a, b)
        ]
        self.between = self.blocks(a, b)

    @staticmethod
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """KID's kernel of all pairs: (…, n, d) and (…, d, m) -> (…, n, m)."""
        return (x @ y / x.shape[-1] + 1) ** 3

    def blocks(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The kernel summed over the logits of each pair of videos: (V, k, d), (W, l, d) -> (V, W).

        The loop is over V: the kernel of all V * k * W * l pairs at once may not fit into memory.
        """
        flat = y.reshape(-1, y.shape[-1]).T
        return np.stack([self.kernel(one, flat).sum(0).reshape(y.shape[:2]).sum(1) for one in x])


def kvd_from_sums(sums: KernelSums, i: np.ndarray, j: np.ndarray) -> float:
    """The kernel video distance between videos i of the first set and videos j of the second."""
    total = 0.0
    # The unbiased estimate leaves out the pairs of a feature with itself: the diagonal.
    for (blocks, diagonal), size, rows in zip(sums.within, sums.sizes, (i, j)):
        n = size * len(rows)
        total += (blocks[np.ix_(rows, rows)].sum() - diagonal[rows].sum()) / (n * (n - 1))
    return float(
        total - 2 * sums.between[np.ix_(i, j)].sum() / (len(i) * len(j) * np.prod(sums.sizes))
    )


def transition_kl(true: np.ndarray, modelled: np.ndarray) -> float:
    """ColorKL: KL(true || modelled) in nats between the distributions of the next colour, averaged
    over old colours. NaN if the true colours never change.

    true, modelled: counts of changes [old, new], (colours, colours). Each modelled count is
    increased by a half, so that no probability is zero. An old colour that never changes in the
    truth is left out. For few changes the value is above 0 even for a perfect model: some
    hundredths for 100 changes.
    """
    off = ~np.eye(len(true), dtype=bool)
    found = []
    for p, q, others in zip(true.astype(np.float64), modelled.astype(np.float64), off):
        if p[others].sum():
            p, q = p[others] / p[others].sum(), (q[others] + 0.5) / (q[others] + 0.5).sum()
            found.append((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return float(np.mean(found)) if found else float("nan")


# ---------------------------------------------------------------------------------------- summaries
def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator, repeats: int = 200
) -> float:
    """Standard error of statistic(indices) by resampling n videos with replacement (Efron 1979); 0
    for one video.
    """
    if n < 2:
        return 0.0
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(repeats)])
    return float(np.nanstd(values, ddof=1))


def jackknife(statistic: Callable[[np.ndarray], float], n: int) -> float:
    """Standard error of statistic(indices) by leaving out each of n videos in turn (Efron and Stein
    1981); NaN for n < 3.

    Used for distances between sets: there the bootstrap gives about twice the error, because a
    video that is drawn twice counts as two equal videos.
    """
    if n < 3:
        return float("nan")
    values = np.array([statistic(np.delete(np.arange(n), k)) for k in range(n)])
    return float(np.sqrt((n - 1) * values.var()))


def summarize(per_video: np.ndarray) -> dict[str, float]:
    """The mean of a metric (V, T), and its standard error over videos."""
    values = per_video.mean(1)
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "se": se}
