"""One branch per dataset: what it changes in the shared section of configs.py, and where its files come from."""

from __future__ import annotations

from typing import Any

from console import UserError, nearest

MODES = ("clips", "stream", "offline")  # of data.mode
STRIDES = ("continuous", "chunked", "spaced")  # of data.windows


def branch(dataset: str, mode: str = "clips") -> dict[str, Any]:
    """What a dataset changes in the shared section, and more where data.mode is not clips: {"group.field": value}."""
    return clips(dataset) | (stream(dataset) if mode in MODES[1:] else {})


def stream(dataset: str) -> dict[str, Any]:
    """What a dataset changes when its split is one stream: windows, batch and replay as in arXiv 2406.04814 (of the balls and
    the maze), the first half of a window given."""
    known = {"ball_stn": (10, 2, 1), "ball_nstn": (10, 2, 1), "plaicraft": (20, 8, 2)}
    clip, batch, live = known.get(dataset, (20, 4, 2))
    return {"data.clip": clip, "data.condition": clip // 2, "data.predict": clip // 2, "train.batch_size": batch,
            "replay.n_live": live, "replay.size": "0.2" if dataset == "plaicraft" else "0.05", "train.steps": 0,
            "train.schedule": "constant",
            "train.log_every": 100, "train.sample_every": 0, "train.save_every": 1_000, "train.ema": 0.999,
            **{f"data.{jitter}": 0.0 for jitter in ("brightness", "contrast", "saturation", "hue")}}


def clips(dataset: str) -> dict[str, Any]:
    published = {  # RIVER's and the predecessor's training, shared by their datasets
        "model.name": "uvit", "model.width": 768, "model.depth": 4, "model.mid_depth": 5, "model.heads": 8,
        "model.dropout": 0.05, "flow.c": 0.1, "flow.output": "drift", "flow.weight": "published", "flow.normalize": False,
        "data.context": "uniform", "sample.context": "uniform",
        "train.steps": 400_000, "train.batch_size": 256, "train.lr": 2e-4, "train.warmup": 10_000,
        "train.schedule": "constant", "train.beta2": 0.999, "train.ema": 0.9999, "train.log_every": 100,
        "train.sample_every": 10_000, "train.save_every": 5_000, "sample.steps": 100, "sample.reencode": False}
    if dataset in ("ball_stn", "ball_nstn"):
        return {"data.root": f"data/{dataset}", "data.generate": "balls", "data.color_shift": dataset == "ball_nstn"}
    ours = {"data.root": f"data/{dataset}", "data.image_size": 64, "data.clip": 16, "data.condition": 8, "data.predict": 16,
            "sample.num_videos": 32, "sample.solver": "exact2", "sample.grid": "cosine", "sample.steps": 10,
            "sample.redraw": "frame", "sample.reencode": False, "vqvae.batch_size": 32, "model.width": 96,
            "train.steps": 6_000, "train.batch_size": 16, "train.ema": 0.998, "train.sample_every": 2_000}
    if dataset in ("videos", "moving_mnist"):
        return ours | ({} if dataset == "videos" else {"data.condition": 10, "data.predict": 10})
    if dataset == "wmaze":
        return ours | {"data.generate": "maze", "data.stream": 20_000, "data.held_out": 2_000}
    if dataset == "plaicraft":  # latents of frames of 768 x 1280 pixels, 10 a second
        return ours | {"data.image_size": 768, "data.clip": 20, "data.condition": 10, "data.predict": 10,
                       "vqvae.kind": "latents", "vqvae.downsample": 8, "train.batch_size": 8, "sample.num_videos": 16,
                       "sample.num_samples": 2, "sample.batch": 8}
    if dataset == "clevrer_like":  # clips as CLEVRER's, networks for two cores
        return ours | {"data.image_size": 128, "data.clip": 16, "data.skip": 4, "data.condition": 2, "data.predict": 14,
                       "vqvae.downsample": 8, "vqvae.codes": 8192, "vqvae.batch_size": 16, "vqvae.steps": 2_000,
                       "train.steps": 4_000, "sample.num_videos": 16, "sample.steps": 5, "sample.reencode": True}
    if dataset == "kth":
        return published | {"data.root": "data/kth", "data.image_size": 64, "data.clip": 40, "data.condition": 10,
                            "data.predict": 30, "vqvae.kind": "taming_f8_small", "vqvae.downsample": 8,
                            "vqvae.codes": 16384, "vqvae.ckpt": "weights/river_kth_64/vqvae.ckpt"}
    if dataset == "clevrer":
        return published | {"data.root": "data/clevrer", "data.image_size": 128, "data.clip": 16, "data.skip": 4,
                            "data.condition": 2, "data.predict": 14, "data.brightness": 0.1, "data.contrast": 0.1,
                            "data.saturation": 0.1, "data.hue": 0.25, "vqvae.kind": "river", "vqvae.downsample": 8,
                            "vqvae.codes": 8192, "vqvae.ckpt": "weights/river_clevrer_128/vqvae.pth"}
    if dataset in ("bair_64", "bair_256"):
        small = dataset == "bair_64"
        return published | {"data.root": f"data/{dataset}", "data.image_size": 64 if small else 256, "data.clip": 16,
                            "data.condition": 1, "data.predict": 15, "vqvae.kind": "taming_f8_small" if small else "taming_f16",
                            "vqvae.downsample": 8 if small else 16, "vqvae.channels": 4 if small else 8, "vqvae.codes": 16384,
                            "vqvae.ckpt": f"weights/river_{dataset}/vqvae.ckpt", "model.out_norm": "ln" if small else "bn",
                            "train.steps": 300_000, "train.lr": 1e-4, "train.warmup": 5_000, "train.weight_decay": 5e-6}
    raise UserError(f"no dataset `{dataset}`{nearest(dataset, DATASETS)}")


DATASETS = ("ball_stn", "ball_nstn", "wmaze", "moving_mnist", "clevrer_like", "plaicraft", "videos",
            "kth", "clevrer", "bair_64", "bair_256")

PREPARE = {  # the command that makes the shards of a dataset which is not generated
    "videos": "python -m prepare.videos --source FOLDER_OF_VIDEOS --out {root} --image_size {size} --clip_length 24",
    "moving_mnist": "python -m prepare.moving_mnist --out {root}",
    "clevrer_like": "pip install pybullet && python -m prepare.clevrer_like --out {root} --image_size {size}",
    "plaicraft": "python -m prepare.plaicraft --source FOLDER_OF_PLAICRAFT --out {root}",
    "kth": "python -m prepare.kth --source FOLDER_OF_KTH --out {root} --image_size {size}",
    "clevrer": "python -m prepare.clevrer --source FOLDER_OF_CLEVRER --out {root} --image_size {size}",
    "bair_64": "python -m prepare.bair --source softmotion30_44k --out {root} --image_size {size}",
    "bair_256": "python -m prepare.bair --source FOLDER_OF_BAIR_FRAMES --out {root} --image_size {size}"}
FETCH = {dataset: f"hf download cvg-unibe/{name} --local-dir weights/{name}" for dataset, name in (  # its published VQVAE
    ("kth", "river_kth_64"), ("clevrer", "river_clevrer_128"), ("bair_64", "river_bair_64"), ("bair_256", "river_bair_256"))}
