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
from console import UserError

NETWORK, AUTOENCODER = "vector_field_regressor.", ("ae.backbone.", "ae.")
INTERPOLANTS = {"linear": "linear", "ours": "follmer", "follmer": "follmer"}  # the predecessor's names
FRAMES = {"num_observations": "data.clip", "skip_frames": "data.skip", "condition_frames": "data.condition",
          "frames_to_generate": "data.predict"}  # the predecessor's fields, and ours


def weights_of(state: dict, part: str, path: str | Path) -> dict[str, Tensor]:
    """Named tensors in state[part], less the `module.` in front of them."""
    weights = state[part]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: its `{part}` is not a dictionary of named tensors")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def autoencoder_weights(state: dict, path: str | Path) -> dict[str, Tensor]:
    """Of a published autoencoder, or of the one inside a main model. Its training's losses are left out."""
    part = next((part for part in ("state_dict", "model") if part in state), None)
    if part is None:
        raise UserError(f"{path}: not a published autoencoder (it holds neither `state_dict` nor `model`)")
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
    net = under(weights, NETWORK) or {name: value for name, value in weights.items() if not name.startswith("ae.")}
    told = vars(state["config"]) if "config" in state else {}
    fixed = {**sizes(net, path), "flow.interpolant": interpolant_of(told, path), "flow.output": "drift",
             "flow.weight": "published", "flow.normalize": False}
    for name, value in {"dataset": told.get("dataset"), **fixed}.items():
        asked = (dataset or value) if name == "dataset" else given.get(name, value)
        if value is not None and asked != value:
            raise UserError(f"{path} was trained with {name} = {value}, so {asked} does not go with it")
    if not (dataset or told.get("dataset")):
        raise UserError(f"{path} does not say what it was trained on; add --dataset ({', '.join(configs.DATASETS)})")
    frames = {ours: told[theirs] for theirs, ours in FRAMES.items() if isinstance(told.get(theirs), int)}
    config = configs.build(dataset or told["dataset"], {**frames, **fixed, **given})
    C, edge = net["project_in.1.weight"].shape[1] // 3, config.data.image_size // config.vqvae.downsample
    latent = configs.Latent((C, edge, edge), (0.0,) * C, (1.0,) * C)  # published models work on latents as they are
    step = state.get("step", state.get("global_step", 0))
    read = {"ema": net, "config": configs.to_dict(replace(config, latent=latent)), "step": int(step)}
    if any(name.startswith("ae.") for name in weights_of(state, "model", path)):
        read["vqvae"] = autoencoder_weights(state, path)
    return read


def interpolant_of(told: dict[str, Any], path: str | Path) -> str:
    """RIVER's models say nothing, and are linear."""
    name = told.get("interpolant_type", told.get("interpolant")) if told else "linear"
    if name not in INTERPOLANTS:
        raise UserError(f"{path}: its config names the interpolant {name!r}; known: {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[name]


def sizes(net: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The U-ViT's sizes, read off its weights."""
    if "project_in.1.weight" not in net:
        raise UserError(f"{path}: neither a checkpoint of main.py nor RIVER's network (it lacks project_in.1.weight; it "
                        f"holds {', '.join(list(net)[:3]) or 'no weights'})")
    blocks = {name: len({key.split(".")[1] for key in net if key.startswith(name)}) for name in ("in_blocks", "mid_blocks")}
    return {"model.name": "uvit", "model.width": len(net["project_in.1.weight"]), "model.depth": blocks["in_blocks"],
            "model.mid_depth": blocks["mid_blocks"],
            "model.out_norm": "bn" if "project_out.3.running_mean" in net else "ln"}
