"""Metrics of forecasts: pure functions on arrays. Pixels are in [0, 1].

V videos, S samples (futures) of each, T forecast frames. What judges a sample by itself is (V, S,
T), what judges the samples of a video together (V, T), what judges all videos together one number.
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
# suffix of a metric's name: label of the baseline, scored on the same clips
BASELINES = {
    "_repeat_last": "repeat last frame",
    "_mean_frame": "mean frame",
    "_autoencoder": "autoencoder alone",
}


def own_metrics(table: dict) -> list[str]:
    """The metrics of the forecasts in a table that also holds those of the baselines."""
    return [name for name in table if not name.endswith(tuple(BASELINES))]


# ----------------------------------------------------------------------------------- single samples
def mse(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean squared error. samples: (V, S, T, H, W, 3), truth: (V, T, H, W, 3) -> (V, S, T)."""
    return ((samples - truth[:, None]) ** 2).mean(PIXELS)


def psnr(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame; a perfect one counts as 100 dB. Shapes as for
    mse.
    """
    return -10 * np.log10(np.maximum(mse(samples, truth), 1e-10))


def ssim(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame, at most 1, as torchmetrics has it: Gaussian window of 11
    pixels, sigma 1.5, edges reflected (Wang et al. 2004). Shapes as for mse.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = np.broadcast_arrays(samples, truth[:, None])
    x, y = (
        torch.from_numpy(np.ascontiguousarray(a, np.float32)).flatten(0, 2).permute(0, 3, 1, 2)
        for a in (x, y)
    )
    parts = [
        structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(-1)
        for a, b in zip(x.split(256), y.split(256))
    ]
    return torch.cat(parts).numpy().reshape(samples.shape[:3])


def chosen(values: np.ndarray, rule: str, higher_is_better: bool) -> np.ndarray:
    """(V, S, T) -> (V, T) by a rule: `mean` over samples, `first` sample, or the sample that is
    `best` over its frames.
    """
    if rule == "mean":
        return values.mean(1)
    if rule == "first":
        return values[:, 0]
    score = values.mean(2) if higher_is_better else -values.mean(2)
    return values[np.arange(len(values)), score.argmax(1)]


# ---------------------------------------------------------------------------------------- ensembles
def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score per pixel, averaged over pixels: E|X - y| - E|X - X'| /
    2, the second term over distinct samples, so that the estimate is unbiased whatever their number
    (Gneiting and Raftery 2007, eq. 21; Ferro 2014). Of one sample it is the absolute error. Shapes
    as for mse -> (V, T).
    """
    S = samples.shape[1]
    error = np.abs(samples - truth[:, None]).mean((1, *PIXELS))
    if S == 1:
        return error
    # sum over pairs i < j of |x_i - x_j| = sum over k of (2k - S + 1) x_(k), x_(k) sorted
    rank = (2 * np.arange(S) - S + 1).astype(samples.dtype).reshape(1, S, *[1] * (samples.ndim - 2))
    pairs = (np.sort(samples, axis=1) * rank).sum(1).mean(PIXELS)
    return error - pairs / (S * (S - 1))


def energy(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Energy score of whole frames: E|X - y| - E|X - X'| / 2 in the root mean square over a frame's
    values, over distinct samples (Gneiting and Raftery 2007, eq. 22). It sees what crps does not:
    whether pixels go together. Shapes as for mse -> (V, T).
    """
    V, S, T = samples.shape[:3]
    x = samples.reshape(V, S, T, -1).swapaxes(1, 2).astype(np.float64)
    error = np.sqrt(((x - truth.reshape(V, T, 1, -1)) ** 2).mean(-1)).mean(-1)
    if S == 1:
        return error
    pairs = sum(
        np.sqrt(((x[:, :, :k] - x[:, :, k : k + 1]) ** 2).mean(-1)).sum(-1) for k in range(1, S)
    )
    return error - pairs / (S * (S - 1))


def spread(samples: np.ndarray) -> np.ndarray:
    """Variance between samples, averaged over pixels, times (S + 1) / S: what the squared error of
    their mean would be on average, were the truth one of them (Fortin et al. 2014). -> (V, T); 0 of
    one sample.
    """
    S = samples.shape[1]
    return (
        samples.var(1, ddof=1).mean(PIXELS) * (S + 1) / S
        if S > 1
        else np.zeros((len(samples), samples.shape[2]))
    )


def skill(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared error of the mean over samples. Shapes as for mse -> (V, T)."""
    return ((samples.mean(1) - truth) ** 2).mean(PIXELS)


def spread_skill(spread: np.ndarray, skill: np.ndarray) -> float:
    """Ratio of root mean spread and skill over whatever is given: 1 where the ensemble is as wide
    as its error, below where it is too sure of itself.
    """
    return float(np.sqrt(spread.mean() / max(skill.mean(), 1e-12)))


def rank_histogram(samples: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often the truth of a pixel is the k-th among its samples, k = 0..S, ties broken at
    random: flat for samples that are drawn as the truth is (Hamill 2001). -> (S + 1,) counts.
    """
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    return np.bincount(
        (below + rng.integers(0, ties + 1)).reshape(-1), minlength=samples.shape[1] + 1
    )


def min_ade(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Displacement averaged over frames and objects, of the best sample. samples: (V, S, T,
    objects, 2), truth: (V, T, objects, 2), in one unit -> (V,) in the same.
    """
    return np.linalg.norm(samples - truth[:, None], axis=-1).mean((2, 3)).min(1)


# --------------------------------------------------------------------------- distances between sets
def frechet_distance(
    mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray
) -> float:
    """Squared Fréchet distance of two Gaussians, in float64: |m - m'|^2 + tr(C + C' - 2 (C
    C')^(1/2)) (Dowson and Landau 1982). By square roots of symmetric matrices, so that a singular
    covariance is no trouble.
    """
    root, other_root = (symmetric_root(np.asarray(c, np.float64)) for c in (cov, other_cov))
    difference = np.asarray(mean, np.float64) - other_mean
    cross = np.linalg.svd(
        root @ other_root, compute_uv=False
    ).sum()  # tr (C C')^(1/2), the nuclear norm of this product
    return float(difference @ difference + np.trace(cov) + np.trace(other_cov) - 2 * cross)


def symmetric_root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def fvd(features: np.ndarray, other: np.ndarray) -> float:
    """Fréchet video distance (Unterthiner et al. 2018) between two sets of I3D logits, (n, 400) and
    (m, 400), n, m >= 2. The covariances, mostly singular, are never formed: the nuclear norm of
    what centred features share is the same number.
    """
    a, b = (np.asarray(x, np.float64) for x in (features, other))
    difference = a.mean(0) - b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    total = (a**2).sum() + (b**2).sum()
    a, b = (np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x for x in (a, b))
    return float(
        difference @ difference + total - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    )


def kvd(features: np.ndarray, other: np.ndarray) -> float:
    """Kernel video distance: the unbiased squared maximum mean discrepancy under the kernel (x.y /
    d + 1)^3 of KID (Binkowski et al. 2018) on I3D logits, (n, d) and (m, d), n, m >= 2. It can be
    below 0.
    """
    return kvd_of(
        KernelSums(features[:, None], other[:, None]),
        np.arange(len(features)),
        np.arange(len(other)),
    )


class KernelSums:
    """Of kvd's kernel, over the logits of each pair of videos, (V, k, d) and (W, l, d): all that
    leaving videos out needs.
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
        return (x @ y / x.shape[-1] + 1) ** 3

    def blocks(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        flat = y.reshape(-1, y.shape[-1]).T
        return np.stack([self.kernel(one, flat).sum(0).reshape(y.shape[:2]).sum(1) for one in x])


def kvd_of(sums: KernelSums, i: np.ndarray, j: np.ndarray) -> float:
    """kvd of the videos i of one set and j of the other."""
    total = 0.0
    for (blocks, diagonal), size, chosen in zip(sums.within, sums.sizes, (i, j)):
        n = size * len(chosen)
        total += (blocks[np.ix_(chosen, chosen)].sum() - diagonal[chosen].sum()) / (n * (n - 1))
    return float(
        total - 2 * sums.between[np.ix_(i, j)].sum() / (len(i) * len(j) * np.prod(sums.sizes))
    )


def transition_kl(true: np.ndarray, modelled: np.ndarray) -> float:
    """ColorKL: the mean over old colours of KL(true || modelled) in nats between the chances of the
    next colour, of counts (colours, colours) [old, new] of changes. Half a count is added to each
    of the modelled, so that what never came has a chance; old colours that the truth never left do
    not count, and NaN comes of a truth without a change. Of few changes it is not 0 for a perfect
    model: two draws of 100 differ by some hundredths.
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
    """Standard error of statistic(indices) over n videos, drawn again with replacement (Efron
    1979). 0 for one video.
    """
    if n < 2:
        return 0.0
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(repeats)])
    return float(np.nanstd(values, ddof=1))


def jackknife(statistic: Callable[[np.ndarray], float], n: int) -> float:
    """Standard error of statistic(indices) over n videos, each left out in turn (Efron and Stein
    1981): for distances between sets, whose bootstrap takes a video that is drawn twice for two
    that are alike and gives about double.
    """
    if n < 3:
        return float("nan")
    values = np.array([statistic(np.delete(np.arange(n), k)) for k in range(n)])
    return float(np.sqrt((n - 1) * values.var()))


def summarize(per_video: np.ndarray) -> dict[str, float]:
    """(V, T) -> mean and its standard error over videos."""
    values = per_video.mean(1)
    se = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "se": se}
