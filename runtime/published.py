"""Conversion of published checkpoints to the format of main.py.

* RIVER's main models: {"model": …}, with the network under the prefix `vector_field_regressor.` and
  the autoencoder under `ae.`
* Models of the predecessor of this repository, one per interpolant: {"model", "ema", "config",
  "step"}, where config is a pickled object of the predecessor's class `configs.Config`.
* Autoencoders: {"state_dict": …} of taming-transformers, {"model": …} of RIVER, or the `ae.` part
  of a RIVER main model.

Prefixes of compiled and data-parallel networks are removed by `checkpoints.load_checkpoint`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import configs
from runtime import checkpoints
from runtime.console import UserError

NETWORK = "vector_field_regressor."
AUTOENCODER = ("ae.backbone.", "ae.")
# {the predecessor's name of an interpolant: our name}
INTERPOLANTS = {
    "linear": "linear",
    "ours": "follmer",
    "follmer": "follmer",
}
# {the predecessor's config field: our field}
FRAMES = {
    "num_observations": "data.clip",
    "skip_frames": "data.skip",
    "condition_frames": "data.condition",
    "frames_to_generate": "data.predict",
}
# Settings that all published models have in common.
FIXED = {
    "data.contexts": 1,
    "model.heads": 8,
    "flow.c": 0.1,
    "flow.output": "drift",
    "flow.weight": "published",
    "flow.normalize": False,
}


# ------------------------------------------------------------------------------------------ weights


def weights_of(state: dict, part: str, path: str | Path) -> dict[str, Tensor]:
    """The named tensors in state[part]. Raises UserError if it holds anything else."""
    weights = state[part]
    named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not named:
        raise UserError(f"{path}: its `{part}` is not a dictionary of named tensors")
    return weights


def strip_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the weights whose names start with the prefix, and remove the prefix."""
    found = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
    return found


def autoencoder_weights(state: dict, path: str | Path) -> dict[str, Tensor]:
    """The weights of a published autoencoder, or of the autoencoder inside a main model.

    Weights of the loss networks, under `loss.`, are left out.
    """
    if "state_dict" in state:
        weights = weights_of(state, "state_dict", path)
    elif "model" in state:
        weights = weights_of(state, "model", path)
    else:
        raise UserError(
            f"{path}: not a published autoencoder (it holds neither `state_dict` nor `model`)"
        )
    for prefix in AUTOENCODER:
        inside = strip_prefix(weights, prefix)
        if inside:
            weights = inside
            break
    return {name: value for name, value in weights.items() if not name.startswith("loss.")}


# ------------------------------------------------------------------------------------------- models
def is_foreign(state: dict) -> bool:
    """True for a model that was not written by main.py."""
    return "model" in state and not isinstance(state.get("config"), dict)


def convert(state: dict, path: str | Path, dataset: str, given: dict[str, Any]) -> dict:
    """Convert a published model. -> {"ema", "config", "step"}, and "vqvae" if the file holds it.

    Settings that the file does not hold come from the entry of `dataset` in configs.py and from
    `given`, {"group.field": value}. Raises UserError if these contradict the file.
    """
    # A main model of RIVER holds the network and the autoencoder under prefixes. A model of the
    # predecessor holds the network without a prefix, perhaps beside the autoencoder.
    weights = weights_of(state, "ema" if "ema" in state else "model", path)
    net = strip_prefix(weights, NETWORK)
    if not net:
        net = {name: value for name, value in weights.items() if not name.startswith("ae.")}
    given = {name: value for name, value in {"dataset": dataset, **given}.items() if value != ""}
    config = config_of(state, net, path, given)
    step = state.get("step", state.get("global_step"))
    converted = {
        "ema": net,
        "config": configs.to_dict(replace(config, latent=latents(config, net, path))),
        "step": step if type(step) is int else 0,
    }
    has_autoencoder = any(name.startswith("ae.") for name in weights_of(state, "model", path))
    if has_autoencoder and "vqvae.ckpt" not in given:
        converted["vqvae"] = autoencoder_weights(state, path)
    return converted


def config_of(
    state: dict, net: dict[str, Tensor], path: str | Path, given: dict[str, Any]
) -> configs.Config:
    """The config of a published model. given: what the user set, {"group.field": value}."""
    stored = stored_fields(state)
    frames = {}
    for theirs, ours in FRAMES.items():
        if type(stored.get(theirs)) is int:
            frames[ours] = stored[theirs]
    # Settings that the file determines; None where the file does not state them.
    fixed = {
        "dataset": str(stored.get("dataset", "")) or None,
        "data.skip": frames.get("data.skip"),
        "flow.interpolant": interpolant_of(stored, "ema" in state, path),
        **sizes(net, path),
        **FIXED,
    }
    fixed = {name: value for name, value in fixed.items() if value is not None}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise UserError(
                f"{path} was trained with {name} = {value}, not with {given[name]}; "
                "use the value of the training"
            )
    run_id = f"{Path(path).absolute().parent.name}-{Path(path).stem}"
    values = {"output.run_id": run_id, **frames, **fixed, **given}
    require(values, "dataset", f"--dataset ({', '.join(configs.DATASETS)})", path)
    require(values, "flow.interpolant", f"--interpolant ({', '.join(INTERPOLANTS)})", path)
    return configs.build(values.pop("dataset"), values)


def require(values: dict[str, Any], name: str, flag: str, path: str | Path) -> None:
    """Raise UserError if neither the file nor the user set a field."""
    if not values.get(name):
        raise UserError(f"{path} does not say what {name} it was trained with; add {flag}")


def stored_fields(state: dict) -> dict[str, Any]:
    """The fields of the config object in a file of the predecessor: numbers and strings only."""
    for key in ("config", "args"):
        if isinstance(state.get(key), checkpoints.Inert):
            fields = vars(state[key])
            return {name: v for name, v in fields.items() if type(v) in (int, float, str)}
    return {}


def interpolant_of(stored: dict[str, Any], averaged: bool, path: str | Path) -> str | None:
    """Our name of a model's interpolant; None if unknown.

    RIVER's models are linear; they hold no config and no averaged weights.
    """
    default = None if averaged else "linear"
    name = stored.get("interpolant_type", stored.get("interpolant", default))
    if name is not None and name not in INTERPOLANTS:
        raise UserError(
            f"{path}: its config names the interpolant {name!r}; known: {', '.join(INTERPOLANTS)}"
        )
    return INTERPOLANTS.get(name)


def latents(config: configs.Config, net: dict[str, Tensor], path: str | Path) -> configs.Latent:
    """The shape of a published model's latents, with mean 0 and standard deviation 1, because its
    latents are not normalised."""
    # The input of the network is x_s, the reference and the context, concatenated.
    C = net["project_in.1.weight"].shape[1] // 3
    edge = config.data.image_size // config.vqvae.downsample
    if C != config.vqvae.channels:
        raise UserError(
            f"{path}: works on latents of {C} channels, those of --dataset {config.dataset} have "
            f"{config.vqvae.channels}; name the dataset of its training, or set vqvae.kind, "
            "vqvae.channels and vqvae.downsample"
        )
    return configs.Latent((C, edge, edge), (0.0,) * C, (1.0,) * C)


def sizes(net: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Infer the sizes of a U-ViT from the names and shapes of its weights."""
    if "project_in.1.weight" not in net or net["project_in.1.weight"].ndim != 2:
        found = ", ".join(list(net)[:3]) or "no weights"
        raise UserError(
            f"{path}: neither a checkpoint of main.py nor RIVER's network "
            f"(it lacks project_in.1.weight; it holds {found})"
        )
    return {
        "model.name": "uvit",
        "model.width": len(net["project_in.1.weight"]),
        "model.depth": count_blocks(net, "in_blocks"),
        "model.mid_depth": count_blocks(net, "mid_blocks"),
        "model.out_norm": "bn" if "project_out.3.running_mean" in net else "ln",
    }


def count_blocks(net: dict[str, Tensor], name: str) -> int:
    """Count the blocks in the module list `name`."""
    return len({key.split(".")[1] for key in net if key.startswith(name)})
