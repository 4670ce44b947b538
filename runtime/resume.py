"""Compare the config of a checkpoint with that of the command, before a run resumes from the
checkpoint or starts from its weights."""

from __future__ import annotations

from pathlib import Path

import torch

import configs
from configs import Config
from runtime import checkpoints, published, settings
from runtime.console import UserError

# Settings that a resumed run may change.
FREE_TO_RESUME = {
    "data.workers",
    "data.held_out",
    "data.skip_bad",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.max_bad_steps",
    "train.compile",
    "train.accumulate",
    "train.recompute",
    "train.shard",
    "model.size",
}
# Settings of model and flow that a run may change when it starts from the weights of another run.
FREE_TO_START = {
    "flow.interpolant",
    "flow.c",
    "flow.s_min",
    "flow.weight",
    "flow.times",
    "flow.draws",
    "flow.start",
    "flow.objective",
    "flow.evaluations",
    "flow.members",
    "flow.local",
    "flow.unroll",
    "flow.begin",
    "flow.consistency",
    "model.dropout",
    "model.size",
}


def check_start(config: Config, ckpt: str) -> dict:
    """Read the averaged weights of another run, {"ema"}, to start from (--ckpt).

    UserError if the file is not a checkpoint, or if its network has other settings. The shapes of
    the weights are checked later, when they are loaded.
    """
    state = checkpoints.load_checkpoint(ckpt)
    if published.is_foreign(state):
        given = {"flow.interpolant": config.flow.interpolant}
        state = published.convert(state, ckpt, config.dataset, given)
    if not {"ema", "config"} <= state.keys():
        raise UserError(f"{ckpt}: not a checkpoint of main.py (it lacks ema or config)")
    old = configs.from_dict(state["config"])
    if changed := changes(old, config, ("model", "flow"), FREE_TO_START):
        raise UserError(
            f"{ckpt}: its network has other settings ({'; '.join(changed)}); use the old values"
        )
    if "shortcut" in (old.flow.objective, config.flow.objective):
        return {"ema": with_step_size(state["ema"], old, config, ckpt)}
    return {"ema": state["ema"]}


def with_step_size(weights: dict, old: Config, config: Config, ckpt: str) -> dict:
    """Add the weights of the step-size input, which start at 0, where the checkpoint lacks them.

    UserError if the checkpoint has this input and the new run does not.
    """
    import models  # imported late: most runs need no second network here

    if config.flow.objective != "shortcut":
        raise UserError(
            f"{ckpt}: its network has an input for the step size, which only "
            f"flow.objective=shortcut uses, not {config.flow.objective}; use that objective"
        )
    with torch.device("meta"):
        net = models.build(config.model.name, old.latent.shape, **config.network_sizes)
    found = dict(weights)
    for name, value in net.state_dict().items():
        if name.startswith("step_size."):
            found.setdefault(name, torch.zeros(value.shape))
    return found


def check_same_run(old: Config, config: Config, dir: Path) -> None:
    """UserError if the checkpoints in `dir`, of config `old`, belong to another run."""
    groups = ("data", "replay", "vqvae", "model", "flow", "train")
    if changed := changes(old, config, groups, FREE_TO_RESUME):
        raise UserError(
            f"{dir} holds a run of other settings ({'; '.join(changed[:3])}); "
            "use the old values, or name a new run: --set output.run_id=NAME"
        )


def changes(old: Config, new: Config, groups: tuple[str, ...], free: set[str]) -> list[str]:
    """The differences in these groups, `group.field: old -> new`, without the free settings."""
    found = settings.differences(old, new, groups)
    return [line for line in found if line.partition(":")[0] not in free]
