"""What is measured of forecasts: a part of the videos at a time, then summed up over all of
them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import torch

from evaluation import balls, metrics, networks, protocols
from evaluation.protocols import Protocol
from runtime.console import UserError

SAMPLES = {
    "mse": False,
    "psnr": True,
    "ssim": True,
    "lpips": False,
}  # judged one by one; is more better?
ENSEMBLES = ("crps", "energy")
SETS = ("fvd", "kvd")  # of all videos together
BALL = ("minade", "colorkl", "two_balls")
ALL = (*SAMPLES, *ENSEMBLES, "spread_skill", *SETS, *BALL)


@dataclasses.dataclass
class Networks:
    """Those that metrics look through; None where none of theirs is asked for."""

    i3d: torch.nn.Module | None
    lpips: torch.nn.Module | None
    device: torch.device
    known: dict[bytes, np.ndarray] | None = (
        None  # I3D's logits by digest of a video, where the same come again
    )


NO_NETWORKS = Networks(None, None, torch.device("cpu"))
# the metrics of sample.py and main.py
SCORES = ["mse", "psnr", "crps"]

Tables = dict[str, np.ndarray]  # of one part, or of all: the first axis is the video


def measure(
    truth: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray | None,
    protocol: Protocol,
    which: list[str],
    nets: Networks,
    autoencode: Callable[[np.ndarray], np.ndarray] | None,
    seed: int,
) -> Tables:
    """truth (v, C + T, H, W, 3), samples (v, S, T, H, W, 3), mean frame (H, W, 3) if there is one,
    all uint8. autoencode: frames through encoder and decoder, if there are such. seed: of what is
    broken by chance in rank histograms.
    """
    rows = [
        pixels(t, s, mean, which, nets, np.random.default_rng([seed, k]))
        for k, (t, s) in enumerate(zip(truth, samples))
    ]
    tables = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    if nets.i3d is not None:
        T = samples.shape[2]
        given = truth[:, :-T]
        compared = samples[:, : protocol.compared]
        whole = np.concatenate([given[:, None].repeat(compared.shape[1], 1), compared], 2)
        sets = {"i3d_real": truth[:, None], "i3d_samples": whole}
        if autoencode is not None:
            future = autoencode(truth[:, -T:].reshape(-1, *truth.shape[2:])).reshape(
                truth[:, -T:].shape
            )
            sets["i3d_autoencoded"] = np.concatenate([given, future], 1)[
                :, None
            ]  # given frames as forecasts have them
        for name, videos in sets.items():
            tables[name] = seen_by_i3d(pieces(videos, T, protocol), nets)
    if set(which) & set(BALL):
        tables |= of_balls(truth, samples)
    return tables


def pixels(
    truth: np.ndarray,
    samples: np.ndarray,
    mean: np.ndarray | None,
    which: list[str],
    nets: Networks,
    rng: np.random.Generator,
) -> Tables:
    """Of one video: metrics of its samples, and of the baselines."""
    T = samples.shape[1]
    y = truth[None, -T:].astype(np.float32) / 255
    forecasts = {"": samples, "_repeat_last": truth[-T - 1][None, None].repeat(T, 1)}
    if mean is not None:
        forecasts["_mean_frame"] = mean[None, None].repeat(T, 1)
    found = {}
    for suffix, frames in forecasts.items():
        x = frames[None].astype(np.float32) / 255
        for name in which:
            if name == "lpips":
                found[name + suffix] = perceptual(frames, truth[-T:], nets)
            elif name in (*SAMPLES, *ENSEMBLES):
                found[name + suffix] = getattr(metrics, name)(x, y)[0]
    x = samples[None].astype(np.float32) / 255
    if "spread_skill" in which and len(samples) > 1:
        found |= {
            "spread": metrics.spread(x)[0],
            "skill": metrics.skill(x, y)[0],
            "ranks": metrics.rank_histogram(samples[None], truth[None, -T:], rng),
        }
    return found


def perceptual(samples: np.ndarray, truth: np.ndarray, nets: Networks) -> np.ndarray:
    """LPIPS of (S, T, H, W, 3) against (T, H, W, 3) -> (S, T)"""
    S, T = samples.shape[:2]
    flat = samples.reshape(-1, *samples.shape[2:])
    return networks.lpips_distance(
        nets.lpips, flat, np.concatenate([truth] * S), nets.device
    ).reshape(S, T)


def pieces(videos: np.ndarray, T: int, protocol: Protocol) -> np.ndarray:
    """What I3D is shown of (v, k, C + T, H, W, 3), of which T are forecast: (v, k * n, length, H,
    W, 3), n pieces that follow on one another; frames that are left at the end stay out.
    """
    frames = videos if protocol.fvd_given else videos[:, :, -T:]
    length = protocol.fvd_chunk or frames.shape[2]
    n = frames.shape[2] // length
    v, k, _, *shape = frames.shape
    return frames[:, :, : n * length].reshape(v, k * n, length, *shape)


def seen_by_i3d(videos: np.ndarray, nets: Networks) -> np.ndarray:
    """(v, k, length, H, W, 3) -> logits (v, k, 400)"""
    flat = videos.reshape(-1, *videos.shape[2:])
    if nets.known is None:
        found = networks.i3d_features(nets.i3d, flat, nets.device)
    else:
        keys = [
            hashlib.blake2b(np.ascontiguousarray(video), digest_size=16).digest() for video in flat
        ]
        if new := [k for k, key in enumerate(keys) if key not in nets.known]:
            nets.known |= zip(
                [keys[k] for k in new], networks.i3d_features(nets.i3d, flat[new], nets.device)
            )
        found = np.stack([nets.known[key] for key in keys])
    return found.reshape(*videos.shape[:2], -1)


def of_balls(truth: np.ndarray, samples: np.ndarray) -> Tables:
    """Where balls go, in pixels, and how their colours change: of what is seen in the frames, of
    the truth's as of samples'.
    """
    V, S, T = samples.shape[:3]
    places, colors = balls.follow(*balls.find(truth))
    start = places[:, None, -T - 1].repeat(S, 1).reshape(V * S, *places.shape[2:])
    seen, seen_colors = balls.find(samples.reshape(V * S, *samples.shape[2:]))
    two = (seen_colors != balls.LOST).all(-1).reshape(V, S, T)
    seen, seen_colors = balls.follow(seen, seen_colors, start)
    last = (
        colors[:, None, -T - 1 : -T].repeat(S, 1).reshape(V * S, 1, -1)
    )  # a ball may change in the first forecast frame
    modelled = (
        balls.transitions(np.concatenate([last, seen_colors], 1))
        .reshape(V, S, *[len(balls.RGB)] * 2)
        .sum(1)
    )
    return {
        "minade": metrics.min_ade(seen.reshape(V, S, T, *seen.shape[2:]), places[:, -T:]),
        "two_balls": two.mean(1),
        "colors_true": balls.transitions(colors[:, -T - 1 :]),
        "colors_modelled": modelled,
    }


def score(truth: np.ndarray, samples: np.ndarray, mean: np.ndarray | None = None) -> dict:
    """The metrics that need no network, averaged over samples, as in metrics.json.

    Arguments as for `measure`. The standard error of a summary is by bootstrap over videos.
    """
    protocol = protocols.PROTOCOLS["own"]
    tables = measure(truth, samples, mean, protocol, SCORES, NO_NETWORKS, None, seed=0)
    found = summarize(tables, protocol, SCORES)
    return {name: found[name] for name in ("summary", "ratio_to_repeat_last", "horizon")}


# --------------------------------------------------------------------------------------- summing up
def summarize(tables: Tables, protocol: Protocol, which: list[str]) -> dict:
    """{"summary": {metric: {"mean", "se"}}, "horizon": {metric: (T,)}, "horizon_se": {metric:
    (T,)}, …}. A summary's se is by bootstrap over videos (of fvd and kvd by jackknife), that of a
    frame of the horizon is the mean's.
    """
    rng = np.random.default_rng(0)
    summary, horizon, errors = {}, {}, {}
    for name, values in tables.items():
        base = name.removesuffix("_repeat_last").removesuffix("_mean_frame")
        if base in SAMPLES:
            values = metrics.chosen(values, protocol.rule, SAMPLES[base])
        elif base not in (*ENSEMBLES, "two_balls") or base not in which:
            continue
        summary[name] = over_videos(lambda i, values=values: values[i].mean(), len(values), rng)
        horizon[name] = values.mean(0).tolist()
        errors[name] = (
            values.std(0, ddof=1) / np.sqrt(len(values))
            if len(values) > 1
            else np.zeros(values.shape[1])
        ).tolist()
    result = {"summary": summary, "horizon": horizon, "horizon_se": errors}
    n = len(next(iter(tables.values())))
    if "spread" in tables:
        a, b = tables["spread"], tables["skill"]
        summary["spread_skill"] = over_videos(lambda i: metrics.spread_skill(a[i], b[i]), n, rng)
        horizon["spread_skill"] = [
            metrics.spread_skill(a[:, t], b[:, t]) for t in range(a.shape[1])
        ]
        result["rank_histogram"] = tables["ranks"].sum(0).tolist()
    if "minade" in which:
        summary["minade"] = over_videos(lambda i: tables["minade"][i].mean(), n, rng)
    if "colorkl" in which:
        summary["colorkl"] = over_videos(
            lambda i: metrics.transition_kl(
                tables["colors_true"][i].sum(0), tables["colors_modelled"][i].sum(0)
            ),
            n,
            rng,
        )
        result["color_transitions"] = {
            name: tables[f"colors_{name}"].sum(0).tolist() for name in ("true", "modelled")
        }
    summary |= between_sets(tables, protocol, which, n)
    result["ratio_to_repeat_last"] = {
        name: ratio(tables, name, protocol) for name in ("mse", "crps") if name in tables
    }
    return result


def between_sets(tables: Tables, protocol: Protocol, which: list[str], n: int) -> dict:
    """FVD and KVD of the samples, and of autoencoded videos: the best that a forecast through this
    autoencoder can have.
    """
    real, found = tables.get("i3d_real"), {}
    if real is None or not set(SETS) & set(which):
        return found
    check_set_size(n)
    against = tables["i3d_autoencoded"] if protocol.reference == "autoencoded" else real
    pairs = {"": (tables["i3d_samples"], against)}
    if "i3d_autoencoded" in tables:
        pairs["_autoencoder"] = (tables["i3d_autoencoded"], real)
    for suffix, (a, b) in pairs.items():
        sums = metrics.KernelSums(a, b)
        statistics = {
            "fvd": lambda i, a=a, b=b: metrics.fvd(flat(a[i]), flat(b[i])),
            "kvd": lambda i, sums=sums: metrics.kvd_of(sums, i, i),
        }
        for name in [name for name in SETS if name in which]:
            found[name + suffix] = value_of(
                statistics[name](np.arange(n)), metrics.jackknife(statistics[name], n)
            )
    return found


def check_set_size(videos: int) -> None:
    """Raise UserError if FVD and KVD, which compare sets of videos, have too few."""
    if videos < 2:
        raise UserError(
            f"fvd and kvd compare sets of at least two videos, there is {videos}: raise --videos, "
            "or choose --metrics without them"
        )


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def over_videos(
    statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator
) -> dict[str, float | None]:
    return value_of(statistic(np.arange(n)), metrics.bootstrap(statistic, n, rng))


def value_of(mean: float, se: float) -> dict[str, float | None]:
    return {
        "mean": float(mean) if np.isfinite(mean) else None,
        "se": se if np.isfinite(se) else None,
    }


def ratio(tables: Tables, name: str, protocol: Protocol) -> dict:
    """To the error of repeating the last frame, over all frames and by horizon."""
    values, base = tables[name], tables[f"{name}_repeat_last"]
    if name in SAMPLES:
        values, base = metrics.chosen(values, protocol.rule, False), base[:, 0]
    return {
        "all": float(values.mean() / max(base.mean(), 1e-12)),
        "horizon": (values.mean(0) / base.mean(0).clip(1e-12)).tolist(),
    }
