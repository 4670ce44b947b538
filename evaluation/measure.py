"""Measure forecasts: tables of metrics for each part of the videos, then summaries of all parts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import torch

from evaluation import balls, metrics, networks, protocols
from evaluation.protocols import Protocol
from runtime.console import UserError
from runtime.tables import merge_tables

# Metrics of single samples.
SAMPLES = ("mse", "psnr", "ssim", "lpips")
# Metrics of the ensemble of a video.
ENSEMBLES = ("crps", "energy", "rmse")
# Distances between sets of videos.
SETS = ("fvd", "kvd")
# Metrics of bouncing balls.
BALL = ("minade", "colorkl", "two_balls")
ALL = (*SAMPLES, *ENSEMBLES, "spread_skill", *SETS, *BALL)
# Metrics of RGB frames: they need a peak, three channels, or networks trained on pictures.
PICTURES = ("psnr", "ssim", "lpips", *SETS, *BALL)
# Metrics that are measured of fields only, unless --metrics names them.
FIELDS = ("rmse",)


@dataclasses.dataclass
class Networks:
    """The networks that metrics need; None for a network that no chosen metric needs."""

    i3d: torch.nn.Module | None
    lpips: torch.nn.Module | None
    device: torch.device
    # cache of I3D's logits, by the digest of the video, for callers that measure videos repeatedly
    known: dict[bytes, np.ndarray] | None = None


NO_NETWORKS = Networks(None, None, torch.device("cpu"))
# The metrics of sample.py and main.py.
SCORES = ["mse", "psnr", "crps"]
FIELD_SCORES = ["mse", "crps", "energy", "rmse", "spread_skill"]

# Arrays by name. The first axis is the video: the videos of one part, or all videos.
Tables = dict[str, np.ndarray]


def measure(
    truth: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray | None,
    protocol: Protocol,
    which: list[str],
    nets: Networks,
    autoencode: Callable[[np.ndarray], np.ndarray] | None,
    seed: int,
    scale: np.ndarray | None = None,
) -> Tables:
    """Measure a part of the videos -> tables of the metrics in `which`.

    truth: (v, C + T, H, W, 3) uint8, C given frames and T frames to forecast. samples: (v, S, T, H,
    W, 3) uint8. mean: the mean training frame (H, W, 3) uint8, a baseline, or None. autoencode:
    maps frames (n, H, W, 3) uint8 through encoder and decoder, or None. seed: seed of the random
    ranks of ties in rank histograms. scale: of fields (…, C, H, W) float32, which take the place of
    frames, the standard deviation (C,) of each channel, in whose units they are measured.
    """
    rows = []
    for k, (t, s) in enumerate(zip(truth, samples)):
        rng = np.random.default_rng([seed, k])
        rows.append(measure_pixels(t, s, mean, which, nets, rng, scale))
    tables = merge_tables(rows, np.stack)
    if nets.i3d is not None:
        for name, videos in videos_for_i3d(truth, samples, protocol, autoencode).items():
            tables[name] = i3d_logits(cut_into_pieces(videos, samples.shape[2], protocol), nets)
    if set(which) & set(BALL):
        tables |= measure_balls(truth, samples)
    return tables


def videos_for_i3d(
    truth: np.ndarray,
    samples: np.ndarray,
    protocol: Protocol,
    autoencode: Callable[[np.ndarray], np.ndarray] | None,
) -> dict[str, np.ndarray]:
    """The sets of videos (v, k, C + T, H, W, 3) that FVD and KVD compare, by the name of the table
    of their logits. Every video begins with the true given frames."""
    T = samples.shape[2]
    given, future = truth[:, :-T], truth[:, -T:]
    compared = samples[:, : protocol.compared]
    given_of_samples = given[:, None].repeat(compared.shape[1], 1)
    sets = {
        "i3d_real": truth[:, None],
        "i3d_samples": np.concatenate([given_of_samples, compared], 2),
    }
    if autoencode is not None:
        coded = autoencode(future.reshape(-1, *future.shape[2:])).reshape(future.shape)
        sets["i3d_autoencoded"] = np.concatenate([given, coded], 1)[:, None]
    return sets


def measure_pixels(
    truth: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray | None,
    which: list[str],
    nets: Networks,
    rng: np.random.Generator,
    scale: np.ndarray | None = None,
) -> Tables:
    """Measure the samples (S, T, H, W, 3) and the baselines of one video -> {metric: (S, T) or
    (T,)}. The baselines have one sample. scale: as for `measure`."""
    T = samples.shape[1]
    y = metrics.to_values(truth[None, -T:], scale)
    forecasts = {"": samples, "_repeat_last": truth[-T - 1][None, None].repeat(T, 1)}
    if mean is not None:
        forecasts["_mean_frame"] = mean[None, None].repeat(T, 1)
    found = {}
    # A baseline is scored by the same functions as the samples, as an ensemble of one.
    for suffix, frames in forecasts.items():
        x = metrics.to_values(frames[None], scale)
        for name in which:
            if name == "lpips":
                found[name + suffix] = measure_lpips(frames, truth[-T:], nets)
            elif name in (*SAMPLES, *ENSEMBLES):
                found[name + suffix] = getattr(metrics, name)(x, y)[0]
    x = metrics.to_values(samples[None], scale)
    if "spread_skill" in which and len(samples) > 1:
        found |= {
            "spread": metrics.spread(x)[0],
            "skill": metrics.skill(x, y)[0],
            "ranks": metrics.rank_histogram(samples[None], truth[None, -T:], rng),
        }
    return found


def measure_lpips(samples: np.ndarray, truth: np.ndarray, nets: Networks) -> np.ndarray:
    """LPIPS of samples (S, T, H, W, 3) against the truth (T, H, W, 3) -> (S, T)."""
    S, T = samples.shape[:2]
    flat = samples.reshape(-1, *samples.shape[2:])
    repeated = np.concatenate([truth] * S)
    return networks.lpips_distance(nets.lpips, flat, repeated, nets.device).reshape(S, T)


def cut_into_pieces(videos: np.ndarray, T: int, protocol: Protocol) -> np.ndarray:
    """Cut videos (v, k, C + T, H, W, 3) into n consecutive pieces for I3D -> (v, k * n, length, H,
    W, 3).

    The given frames count if protocol.fvd_given. Frames that do not fill a piece are dropped.
    """
    frames = videos if protocol.fvd_given else videos[:, :, -T:]
    length = protocol.fvd_chunk or frames.shape[2]
    n = frames.shape[2] // length
    v, k, _, *shape = frames.shape
    return frames[:, :, : n * length].reshape(v, k * n, length, *shape)


def i3d_logits(videos: np.ndarray, nets: Networks) -> np.ndarray:
    """Videos (v, k, length, H, W, 3) uint8 -> I3D's logits (v, k, 400)."""
    flat = videos.reshape(-1, *videos.shape[2:])
    if nets.known is None:
        return networks.i3d_features(nets.i3d, flat, nets.device).reshape(*videos.shape[:2], -1)
    # Only the videos that are not in the cache go through the network.
    keys = []
    for video in flat:
        keys.append(hashlib.blake2b(np.ascontiguousarray(video), digest_size=16).digest())
    new = [k for k, key in enumerate(keys) if key not in nets.known]
    if new:
        logits = networks.i3d_features(nets.i3d, flat[new], nets.device)
        nets.known |= zip([keys[k] for k in new], logits)
    return np.stack([nets.known[key] for key in keys]).reshape(*videos.shape[:2], -1)


def measure_balls(truth: np.ndarray, samples: np.ndarray) -> Tables:
    """Find the balls in true and sampled frames; compare their tracks, in pixels, and their colour
    changes.
    """
    V, S, T = samples.shape[:3]
    # Sampled tracks start at the last given frame, so the order of the balls is that of the truth.
    places, colors = balls.follow(*balls.find(truth))
    start = places[:, None, -T - 1].repeat(S, 1).reshape(V * S, *places.shape[2:])
    seen, seen_colors = balls.find(samples.reshape(V * S, *samples.shape[2:]))
    two = (seen_colors != balls.LOST).all(-1).reshape(V, S, T)
    seen, seen_colors = balls.follow(seen, seen_colors, start)
    # Include the last given frame, because a colour may change in the first forecast frame.
    last = colors[:, None, -T - 1 : -T].repeat(S, 1).reshape(V * S, 1, -1)
    changes = balls.count_transitions(np.concatenate([last, seen_colors], 1))
    modelled = changes.reshape(V, S, *changes.shape[1:]).sum(1)
    return {
        "minade": metrics.min_ade(seen.reshape(V, S, T, *seen.shape[2:]), places[:, -T:]),
        "two_balls": two.mean(1),
        "colors_true": balls.count_transitions(colors[:, -T - 1 :]),
        "colors_modelled": modelled,
    }


def score(
    truth: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray | None = None,
    scale: np.ndarray | None = None,
) -> dict:
    """Measure the metrics that need no network, averaged over samples -> parts of metrics.json.

    truth, samples, mean, scale: as for `measure`.
    """
    protocol = protocols.PROTOCOLS["own"]
    which = SCORES if scale is None else FIELD_SCORES
    tables = measure(truth, samples, mean, protocol, which, NO_NETWORKS, None, 0, scale)
    found = summarize(tables, protocol, which)
    parts = ("summary", "ratio_to_repeat_last", "horizon", "rank_histogram")
    return {name: found[name] for name in parts if name in found}


# ---------------------------------------------------------------------------------------- summaries
def summarize(tables: Tables, protocol: Protocol, which: list[str]) -> dict:
    """Summarize the tables of all videos.

    -> {"summary": {metric: {"mean", "se"}}, "horizon": {metric: (T,)}, "horizon_se": {metric:
    (T,)}, "ratio_to_repeat_last": ..., and histograms}. Standard errors are over videos: a
    bootstrap for summaries, a jackknife for FVD and KVD, and that of the mean for horizons.
    """
    rng = np.random.default_rng(0)
    n = len(next(iter(tables.values())))
    summary, horizon, errors = {}, {}, {}
    # Metrics with one value per video and frame. The others follow one by one: they are functions
    # of several tables, or of all videos at once.
    for name, values in tables.items():
        base = name.removesuffix("_repeat_last").removesuffix("_mean_frame")
        if base in SAMPLES:
            values = metrics.reduce_samples(
                values, protocol.rule, metrics.ABOUT[base][2] == "higher"
            )
        elif base not in (*ENSEMBLES, "two_balls") or base not in which:
            continue
        summary[name] = estimate_over_videos(lambda i, values=values: values[i].mean(), n, rng)
        horizon[name] = values.mean(0).tolist()
        errors[name] = standard_errors(values).tolist()
    result = {"summary": summary, "horizon": horizon, "horizon_se": errors}
    # The ratio of two means over videos, so the tables of both are needed for each resample.
    if "spread" in tables:
        a, b = tables["spread"], tables["skill"]
        summary["spread_skill"] = estimate_over_videos(
            lambda i: metrics.spread_skill(a[i], b[i]), n, rng
        )
        horizon["spread_skill"] = [
            metrics.spread_skill(a[:, t], b[:, t]) for t in range(a.shape[1])
        ]
        result["rank_histogram"] = tables["ranks"].sum(0).tolist()
    if "minade" in which:
        summary["minade"] = estimate_over_videos(lambda i: tables["minade"][i].mean(), n, rng)
    if "colorkl" in which:
        true, modelled = tables["colors_true"], tables["colors_modelled"]
        summary["colorkl"] = estimate_over_videos(
            lambda i: metrics.transition_kl(true[i].sum(0), modelled[i].sum(0)), n, rng
        )
        counts = {"true": true.sum(0).tolist(), "modelled": modelled.sum(0).tolist()}
        result["color_transitions"] = counts
    summary |= measure_sets(tables, protocol, which, n)
    result["ratio_to_repeat_last"] = {
        name: compare_with_repeat_last(tables, name, protocol)
        for name in ("mse", "crps", "rmse")
        if name in tables
    }
    return result


def standard_errors(values: np.ndarray) -> np.ndarray:
    """The standard error over videos of each column of (V, T); 0 for one video."""
    if len(values) < 2:
        return np.zeros(values.shape[1])
    return values.std(0, ddof=1) / np.sqrt(len(values))


def measure_sets(tables: Tables, protocol: Protocol, which: list[str], n: int) -> dict:
    """FVD and KVD of the samples, and of the autoencoded true videos: about the lowest values that
    forecasts decoded by this autoencoder can reach.
    """
    real, found = tables.get("i3d_real"), {}
    if real is None or not set(SETS) & set(which):
        return found
    check_set_size(n)
    against = tables["i3d_autoencoded"] if protocol.reference == "autoencoded" else real
    # The autoencoded videos are always compared with real ones, whatever the protocol's reference
    # is.
    pairs = {"": (tables["i3d_samples"], against)}
    if "i3d_autoencoded" in tables:
        pairs["_autoencoder"] = (tables["i3d_autoencoded"], real)
    for suffix, (a, b) in pairs.items():
        sums = metrics.KernelSums(a, b)
        statistics = {
            "fvd": lambda i, a=a, b=b: metrics.fvd(flatten_videos(a[i]), flatten_videos(b[i])),
            "kvd": lambda i, sums=sums: metrics.kvd_from_sums(sums, i, i),
        }
        for name in set(SETS) & set(which):
            mean = statistics[name](np.arange(n))
            found[name + suffix] = make_entry(mean, metrics.jackknife(statistics[name], n))
    return found


def check_set_size(videos: int) -> None:
    """Raise UserError if FVD and KVD, which compare sets of videos, have too few."""
    if videos < 2:
        raise UserError(
            f"fvd and kvd compare sets of at least two videos, there is {videos}: raise --videos, "
            "or choose --metrics without them"
        )


def flatten_videos(x: np.ndarray) -> np.ndarray:
    """Merge the axes of videos and samples: (n, k, features) -> (n * k, features)."""
    return x.reshape(-1, x.shape[-1])


def estimate_over_videos(
    statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator
) -> dict[str, float | None]:
    """Value of statistic(indices of all videos), and its standard error by bootstrap."""
    return make_entry(statistic(np.arange(n)), metrics.bootstrap(statistic, n, rng))


def make_entry(mean: float, se: float) -> dict[str, float | None]:
    """An entry of a summary. JSON has no NaN: None stands for values that are not finite."""
    return {
        "mean": float(mean) if np.isfinite(mean) else None,
        "se": se if np.isfinite(se) else None,
    }


def compare_with_repeat_last(tables: Tables, name: str, protocol: Protocol) -> dict:
    """Ratio of a metric to that of repeating the last frame: over all frames, and per frame."""
    values, base = tables[name], tables[f"{name}_repeat_last"]
    if name in SAMPLES:
        values, base = metrics.reduce_samples(values, protocol.rule, False), base[:, 0]
    return {
        "all": float(values.mean() / max(base.mean(), 1e-12)),
        "horizon": (values.mean(0) / base.mean(0).clip(1e-12)).tolist(),
    }
