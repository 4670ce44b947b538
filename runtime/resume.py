"""Whether a checkpoint belongs to the run that is asked for."""

from __future__ import annotations

from pathlib import Path

import configs
from configs import Config
from runtime import checkpoints, published, settings
from runtime.console import UserError

# what may change between two starts of a run without making it another run
FREE = {
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


def check_start(config: Config, ckpt: str) -> dict:
    """--ckpt: another run's averaged weights. -> {"ema"}; whether they fit the network is seen when
    they are loaded.
    """
    state = checkpoints.load_checkpoint(ckpt)
    if published.is_foreign(state):
        state = published.checkpoint(
            state, ckpt, config.dataset, {"flow.interpolant": config.flow.interpolant}
        )
    if not {"ema", "config"} <= state.keys():
        raise UserError(f"{ckpt}: not a checkpoint of main.py (it lacks ema or config)")
    other = settings.differences(configs.from_dict(state["config"]), config, ("model", "flow"))
    free = {
        "flow.interpolant",
        "flow.c",
        "flow.s_min",
        "flow.weight",
        "flow.times",
        "model.dropout",
        "model.size",
    }
    clash = [d for d in other if d.partition(":")[0] not in free]
    if clash:
        raise UserError(
            f"{ckpt}: its network is another ({'; '.join(clash)}); set those fields as they were"
        )
    return {"ema": state["ema"]}


def check_same_run(old: Config, config: Config, dir: Path) -> None:
    changed = [
        d
        for d in settings.differences(
            old, config, ("data", "replay", "vqvae", "model", "flow", "train")
        )
        if d.partition(":")[0] not in FREE
    ]
    if changed:
        raise UserError(
            f"{dir} holds a run of other settings ({'; '.join(changed[:3])}); "
            "go on with those, or name a new run: --set output.run_id=NAME"
        )
