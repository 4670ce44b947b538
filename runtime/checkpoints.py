"""Checkpoints on the disk: written whole or not at all, read without running code."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from runtime.console import Failure, UserError, first_line


# -------------------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(dir: Path, state: dict, keep: int, keep_every: int = 0) -> Path:
    """Write step_<n>.pt and point latest.pt at it. Whenever the process dies, complete files only are left in place.
    Of the numbered ones the last `keep` stay, and every one whose number is a multiple of keep_every. Failure where it cannot
    be written; those from before are then left alone."""
    path = dir / f"step_{state['step']:08d}.pt"
    temporary, link = dir / f".{path.name}.tmp", dir / ".latest.tmp"
    try:
        dir.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, dir / "latest.pt")
    except (OSError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and "write" not in str(error)
            and "unexpected pos" not in str(error)
        ):
            raise  # which is not torch.save's word for a full disk
        for partial in (temporary, link):
            with suppress(OSError):
                partial.unlink()
        last = max(dir.glob("step_*.pt"), default=None)
        found = f"the last good checkpoint is {last}; " if last else ""
        what = f"{path}: cannot be written ({first_line(error)})"
        raise Failure(f"{what}; {found}make room, then run the same command again") from None
    for old in sorted(dir.glob("step_*.pt"))[:-keep]:
        if not keep_every or int(old.stem.partition("_")[2]) % keep_every:
            old.unlink()
    return path


class Inert:
    """Stands for a class of others whose objects lie in their checkpoints: it has attributes and does nothing."""


INERT = (
    "configs.Config",
    "pytorch_lightning.callbacks.",
)  # of the predecessor, of taming-transformers


def inert_classes(path: Path) -> list[tuple[type, str]]:
    """The names of INERT in a file, each let in as `Inert`; every other one that is not plain data stays refused."""
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Inert, name) for name in names if name.startswith(INERT)]


def load_checkpoint(path: str | Path) -> dict:
    """To the CPU; tensors and plain values only: a file that would run code on loading is refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(inert_classes(path)), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # what is wrong with the file is told below, in one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # a file that is none, or hostile, can make the unpickler fail in any way
        calls, told = (
            re.search(r"GLOBAL (\S+)", str(error)),
            str(error).rpartition("WeightsUnpickler error:")[2].strip(),
        )
        reason = (
            f"it would call {calls[1]}" if calls else (told or type(error).__name__).splitlines()[0]
        )
        raise UserError(
            f"{path}: not a checkpoint that can be loaded safely ({ascii(reason)[1:-1][:120]})"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def load_latest(dir: Path) -> dict | None:
    """The newest checkpoint of a run that can be read, or None at the start. A damaged one is named and passed over;
    UserError where all of them are damaged, rather than starting anew over what may be days of work."""
    newest_first = [dir / "latest.pt", *sorted(dir.glob("step_*.pt"), reverse=True)]
    found = [path for path in newest_first if path.exists()]
    for path in found:
        try:
            return load_checkpoint(path)
        except UserError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    if found:
        raise UserError(
            f"{dir}: none of its {len(found)} checkpoints can be read; move the folder away to start anew"
        )
    return None


def load_weights(
    module: torch.nn.Module, weights: dict, where: str | Path, assign: bool = False
) -> None:
    """Load a state dict in full; names that are missing, unknown or of another shape are an error naming the first few.
    assign: make these tensors the module's, for one built on the device `meta`."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if wrong:
        raise UserError(
            f"{where}: not weights of this architecture: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        )
    module.load_state_dict(weights, assign=assign)


def digest(module: torch.nn.Module) -> str:
    """A name for a module's weights."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(name.encode() + content.numpy().tobytes())
    return total.hexdigest()
