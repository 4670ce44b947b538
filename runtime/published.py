"""Checkpoints that others published, read as ones of ours.

* RIVER's main models: {"model": …}, names under `vector_field_regressor.`, beside the autoencoder's under `ae.`;
* the predecessor's, one per interpolant: {"model", "ema", "config", "step"}, the config an object of its `configs.Config`;
* autoencoders: {"state_dict": …} of taming-transformers, {"model": …} of RIVER's own, or the `ae.` part of a main model.

Every name may carry a leading `module.`, of a model saved under DistributedDataParallel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import configs
from runtime import checkpoints
from runtime.console import UserError

NETWORK, AUTOENCODER = "vector_field_regressor.", ("ae.backbone.", "ae.")
INTERPOLANTS = {
    "linear": "linear",
    "ours": "follmer",
    "follmer": "follmer",
}  # the predecessor's names
FRAMES = {
    "num_observations": "data.clip",
    "skip_frames": "data.skip",
    "condition_frames": "data.condition",
    "frames_to_generate": "data.predict",
}  # the predecessor's fields, and ours


def weights_of(state: dict, part: str, path: str | Path) -> dict[str, Tensor]:
    """Named tensors in state[part], less the `module.` in front of them."""
    weights = state[part]
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise UserError(f"{path}: its `{part}` is not a dictionary of named tensors")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def autoencoder_weights(state: dict, path: str | Path) -> dict[str, Tensor]:
    """Of a published autoencoder, or of the one inside a main model. Its training's losses are left out."""
    part = next((part for part in ("state_dict", "model") if part in state), None)
    if part is None:
        raise UserError(
            f"{path}: not a published autoencoder (it holds neither `state_dict` nor `model`)"
        )
    weights = weights_of(state, part, path)
    inside = next((found for prefix in AUTOENCODER if (found := under(weights, prefix))), weights)
    return {name: value for name, value in inside.items() if not name.startswith("loss.")}


def is_foreign(state: dict) -> bool:
    """Is it a model that was not written by main.py?"""
    return "model" in state and not isinstance(state.get("config"), dict)


def checkpoint(state: dict, path: str | Path, dataset: str, given: dict[str, Any]) -> dict:
    """-> {"ema", "config", "step"} as main.py writes them, and "vqvae" where the file holds the autoencoder too.

    What the file does not say comes from the branch of `dataset` in configs.py and from `given`, {"group.field": value};
    UserError where these contradict what it does say.
    """
    weights = weights_of(state, "ema" if "ema" in state else "model", path)
    net = under(weights, NETWORK) or {
        name: value for name, value in weights.items() if not name.startswith("ae.")
    }
    told = said(state)
    frames = {
        ours: told[theirs] for theirs, ours in FRAMES.items() if type(told.get(theirs)) is int
    }
    fixed = {
        "dataset": str(told.get("dataset", "")) or None,
        "data.skip": frames.get("data.skip"),
        **sizes(net, path),
        "model.heads": 8,
        "flow.interpolant": interpolant_of(told, "ema" in state, path),
        "flow.c": 0.1,
        "flow.output": "drift",
        "flow.weight": "published",
        "flow.normalize": False,
    }
    fixed = {name: value for name, value in fixed.items() if value is not None}
    given = {name: value for name, value in {"dataset": dataset, **given}.items() if value != ""}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(
                f"{path} was trained with {name} = {value}, so {given[name]} does not go with it"
            )
    values = {
        "output.run_id": f"{Path(path).absolute().parent.name}-{Path(path).stem}",
        **frames,
        **fixed,
        **given,
    }
    for name, flag, known in (
        ("dataset", "--dataset", configs.DATASETS),
        ("flow.interpolant", "--interpolant", INTERPOLANTS),
    ):
        if not values.get(name):
            raise UserError(
                f"{path} does not say what {name} it was trained with; add {flag} ({', '.join(known)})"
            )
    config = configs.build(values.pop("dataset"), values)
    step = state.get("step", state.get("global_step"))
    read = {
        "ema": net,
        "config": configs.to_dict(replace(config, latent=latents(config, net, path))),
        "step": step if type(step) is int else 0,
    }
    if "vqvae.ckpt" not in given and any(
        name.startswith("ae.") for name in weights_of(state, "model", path)
    ):
        read["vqvae"] = autoencoder_weights(state, path)
    return read


def said(state: dict) -> dict[str, Any]:
    """Attributes of the config that the predecessor's files hold, numbers and names only."""
    config = next(
        (state[key] for key in ("config", "args") if isinstance(state.get(key), checkpoints.Inert)),
        checkpoints.Inert(),
    )
    return {name: value for name, value in vars(config).items() if type(value) in (int, float, str)}


def interpolant_of(told: dict[str, Any], averaged: bool, path: str | Path) -> str | None:
    """RIVER's models say nothing, hold no averaged weights, and are linear."""
    name = told.get("interpolant_type", told.get("interpolant", None if averaged else "linear"))
    if name is not None and name not in INTERPOLANTS:
        raise UserError(
            f"{path}: its config names the interpolant {name!r}; known: {', '.join(INTERPOLANTS)}"
        )
    return INTERPOLANTS.get(name)


def latents(config: configs.Config, net: dict[str, Tensor], path: str | Path) -> configs.Latent:
    """Published models work on latents as they are."""
    C, edge = (
        net["project_in.1.weight"].shape[1] // 3,
        config.data.image_size // config.vqvae.downsample,
    )
    if C != config.vqvae.channels:
        raise UserError(
            f"{path}: works on latents of {C} channels, those of --dataset {config.dataset} have "
            f"{config.vqvae.channels}; choose its dataset, or set vqvae.kind, vqvae.channels and vqvae.downsample"
        )
    return configs.Latent((C, edge, edge), (0.0,) * C, (1.0,) * C)


def sizes(net: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The U-ViT's sizes, read off its weights."""
    if "project_in.1.weight" not in net or net["project_in.1.weight"].ndim != 2:
        raise UserError(
            f"{path}: neither a checkpoint of main.py nor RIVER's network (it lacks project_in.1.weight; it "
            f"holds {', '.join(list(net)[:3]) or 'no weights'})"
        )
    blocks = {
        name: len({key.split(".")[1] for key in net if key.startswith(name)})
        for name in ("in_blocks", "mid_blocks")
    }
    return {
        "model.name": "uvit",
        "model.width": len(net["project_in.1.weight"]),
        "model.depth": blocks["in_blocks"],
        "model.mid_depth": blocks["mid_blocks"],
        "model.out_norm": "bn" if "project_out.3.running_mean" in net else "ln",
    }
