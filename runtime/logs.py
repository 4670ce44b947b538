"""The log of a run: JSON lines and wandb, and what is logged of recent updates."""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

import configs
from runtime.console import UserError, print_once


def wandb_mode(mode: str) -> str:
    """`auto` -> disabled, with one line, without wandb; WANDB_MODE if set; online where a key is configured, else offline.
    UserError for another mode without wandb."""
    asked = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    if asked != "disabled" and importlib.util.find_spec("wandb") is None:
        if mode != "auto":
            raise UserError(
                f"wandb.mode={mode}, but wandb is not installed: pip install wandb, or set wandb.mode=disabled"
            )
        print_once(
            "wandb is not installed, so nothing is logged there (metrics.jsonl holds all of it): pip install wandb"
        )
        return "disabled"
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import wandb

    try:
        host = urlparse(wandb.Settings().base_url).hostname
        return "online" if netrc.netrc(os.environ.get("NETRC")).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class Log:
    """Rows of a run: appended to metrics.jsonl and sent to wandb. On resuming at `step`, later rows of the file go,
    since the steps that wrote them will be done again."""

    def __init__(self, dir: Path, config: configs.Config, step: int, enabled: bool = True):
        self.run, self.file = None, None
        if not enabled:
            return
        dir.mkdir(parents=True, exist_ok=True)
        path = dir / "metrics.jsonl"
        if path.exists():
            rows = [
                line
                for line in path.read_text().splitlines()
                if is_row(line) and json.loads(line)["step"] <= step
            ]
            temporary = path.with_name(".metrics.tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)
        mode = wandb_mode(config.wandb.mode)
        if mode != "disabled":
            self.run = start_wandb(dir, config, mode)

    def row(self, step: int, **values: float) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.run:
            self.run.log(values, step=step)

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """frames: (T, H, W, 3) uint8."""
        if self.run and importlib.util.find_spec("moviepy") is None:
            print_once("moviepy is not installed, so wandb gets no videos: pip install moviepy")
        elif self.run:
            import wandb

            self.run.log(
                {
                    name: wandb.Video(
                        frames.transpose(0, 3, 1, 2), fps=max(1, round(fps)), format="mp4"
                    )
                },
                step=step,
            )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(int(kind is not None))

    def close(self, code: int = 0) -> None:
        if self.file:
            with suppress(OSError):  # a full disk has been told of by then
                self.file.close()
        if self.run:
            self.run.finish(exit_code=code)


class Recent:
    """Losses and gradient norms since the last log, kept on the device so that the loop never waits for them, and a count
    of the updates that were left out because their gradient was not finite. parts: names of what is logged beside them."""

    def __init__(self, batch_size: int, parts: Iterable[str] = ()):
        self.batch_size, self.bad, self.bad_in_a_row, self.names = (
            batch_size,
            0,
            0,
            ("loss", "grad_norm", *parts),
        )
        self.clear()

    def clear(self) -> None:
        self.pairs, self.counted, self.restored, self.began = (
            [],
            0,
            0,
            time.perf_counter(),
        )  # pairs (2 + parts,): loss, norm, …

    def add(self, loss: Tensor, norm: Tensor, *parts: Tensor) -> None:
        self.pairs.append(torch.stack([loss, norm, *parts]))

    def state_dict(self) -> dict:
        return {
            "pairs": [pair.cpu() for pair in self.pairs],
            "counted": self.counted,
            "bad": self.bad,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.pairs, self.restored = (
            [pair.to(device) for pair in state["pairs"]],
            len(state["pairs"]),
        )
        self.counted, self.bad, self.bad_in_a_row = (
            state["counted"],
            state["bad"],
            state["bad_in_a_row"],
        )

    def summary(self) -> dict[str, float]:
        """Means over the updates that were made; without `loss` and `grad_norm` if none was. Notes in `longest` how many in a
        row, of those not looked at before, were left out, and how many updates ago they began."""
        pairs, self.longest = torch.stack(self.pairs).tolist(), (0, 0)
        for k, (_, norm, *_) in enumerate(pairs[self.counted :], self.counted):
            self.bad_in_a_row = 0 if math.isfinite(norm) else self.bad_in_a_row + 1
            self.bad += not math.isfinite(norm)
            self.longest = max(
                self.longest, (self.bad_in_a_row, len(pairs) - k - 1 + self.bad_in_a_row)
            )
        self.counted = len(pairs)
        made = [pair for pair in pairs if math.isfinite(pair[1])]
        means = dict(zip(self.names, (sum(column) / len(made) for column in zip(*made))))
        rate = (len(pairs) - self.restored) * self.batch_size / (time.perf_counter() - self.began)
        return {
            **means,
            "samples_per_second": rate,
            **({"bad_steps": self.bad} if self.bad else {}),
        }


def is_row(line: str) -> bool:
    """False for a line that was cut short when the process was killed."""
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False


def start_wandb(dir: Path, config: configs.Config, mode: str):
    import wandb

    id_file = dir / "wandb_id.txt"  # its own id, since ids of deleted runs cannot be used again
    if not id_file.exists():
        id_file.write_text(f"{dir.name}-{os.urandom(4).hex()}")
    folder = Path(config.output.root)
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity or None,
        id=id_file.read_text(),
        name=dir.name,
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        config=configs.to_dict(config),
        settings=wandb.Settings(silent=True, console="off"),
    )
