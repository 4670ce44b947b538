"""Checkpoints: atomic writes, reading without executing code, strict loading of weights."""

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
from runtime.folders import write_atomically


# ------------------------------------------------------------------------------------------ writing
def save_checkpoint(dir: Path, state: dict, keep: int, keep_every: int = 0) -> Path:
    """Write step_<n>.pt atomically and point latest.pt at it. n: state["step"].

    Keeps the last `keep` numbered checkpoints, and those whose number is a multiple of
    `keep_every`; deletes the others. If the checkpoint cannot be written, deletes none and raises
    Failure.
    """
    path = dir / f"step_{state['step']:08d}.pt"
    try:
        dir.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            torch.save(state, file)
        point_latest(path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError with one of these messages.
        full_disk = "write" in str(error) or "unexpected pos" in str(error)
        if isinstance(error, RuntimeError) and not full_disk:
            raise
        raise Failure(
            f"{path}: cannot be written ({first_line(error)}); {last_checkpoint(dir)}"
            "make room, then run the same command again"
        ) from None
    for old in sorted(dir.glob("step_*.pt"))[:-keep]:
        if not keep_every or int(old.stem.partition("_")[2]) % keep_every:
            old.unlink()
    return path


def last_checkpoint(dir: Path) -> str:
    """Part of an error message: the last numbered checkpoint in a folder; "" if there is none."""
    last = max(dir.glob("step_*.pt"), default=None)
    return f"the last good checkpoint is {last}; " if last else ""


def point_latest(path: Path) -> None:
    """Make latest.pt, in the same folder, a hard link to the checkpoint `path`, atomically."""
    latest = path.with_name("latest.pt")
    link = path.with_name(".latest.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        # A file system without hard links: latest.pt is a copy.
        with write_atomically(latest) as copy, open(path, "rb") as file:
            shutil.copyfileobj(file, copy)
        return
    try:
        os.replace(link, latest)
    except OSError:
        with suppress(OSError):
            link.unlink()
        raise


# ------------------------------------------------------------------------------------------ reading
class Inert:
    """Stands in for a class of another project whose objects are pickled in a checkpoint.

    An instance holds the attributes of the pickled object and has no methods.
    """


# Names, or beginnings of names, of classes that are read as Inert: that of the predecessor of this
# repository, and those in checkpoints of taming-transformers.
INERT = ("configs.Config", "pytorch_lightning.callbacks.")

# The parts of a checkpoint that hold named tensors.
WEIGHTS = ("model", "ema", "state_dict", "vqvae")
# Modules in which torch wraps a network. Their names become part of the weights' names: DDP and
# averaged models, compiled modules, FSDP, activation checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def inert_classes(path: Path) -> list[tuple[type, str]]:
    """The classes in a file that start with a name in INERT, paired with `Inert`.

    They are the argument of torch.serialization.safe_globals; every other class is still refused.
    """
    if not zipfile.is_zipfile(path):
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Inert, name) for name in names if name.startswith(INERT)]


def load_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint to the CPU: tensors and plain Python values only.

    Names of weights lose the prefixes of compiled and data-parallel networks, see WRAPPERS.
    Raises UserError for a missing or damaged file, and for a file that would run code when loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(inert_classes(path)), warnings.catch_warnings():
            # The UserError below describes the defect in one line.
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    # A failing disk is not a damaged file.
    except OSError:
        raise
    # A damaged or malicious file can make the unpickler raise any exception.
    except Exception as error:
        reason = ascii(refusal_of(error))[1:-1][:120]
        raise UserError(f"{path}: not a checkpoint that can be loaded safely ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    for part in WEIGHTS:
        if isinstance(state.get(part), dict):
            state[part] = without_wrappers(state[part], path)
    return state


def without_wrappers(weights: dict, path: str | Path) -> dict:
    """Remove the names of WRAPPERS, at any depth, from the names of tensors.

    Raises UserError if two tensors would then have the same name.
    """
    found = {}
    for name, value in weights.items():
        if isinstance(name, str):
            name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if name in found:
            raise UserError(
                f"{path}: holds {name} both with and without a prefix such as `module.`"
            )
        found[name] = value
    return found


def refusal_of(error: Exception) -> str:
    """Describe in one line why torch.load refused a file."""
    call = re.search(r"GLOBAL (\S+)", str(error))
    if call:
        return f"it would call {call[1]}"
    message = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return (message or type(error).__name__).splitlines()[0]


def load_latest(dir: Path) -> dict | None:
    """Load the newest readable checkpoint of a run; None if the folder holds no checkpoint.

    Warns of damaged checkpoints and skips them. Raises UserError if all are damaged: a new run in
    this folder would overwrite them, which may be days of work.
    """
    newest_first = [dir / "latest.pt", *sorted(dir.glob("step_*.pt"), reverse=True)]
    found = [path for path in newest_first if path.exists()]
    for path in found:
        try:
            return load_checkpoint(path)
        except UserError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    if found:
        raise UserError(
            f"{dir}: none of its {len(found)} checkpoints can be read; "
            "move the folder away to start a new run"
        )
    return None


# ------------------------------------------------------------------------------------------ weights
def load_weights(
    module: torch.nn.Module, weights: dict, where: str | Path, assign: bool = False
) -> None:
    """Load a state dict strictly, see `check_weights`.

    assign: make these tensors the module's own, for a module built on the device `meta`.
    """
    check_weights(module.state_dict(), weights, where)
    module.load_state_dict(weights, assign=assign)


def check_weights(own: dict, weights: dict, where: str | Path) -> None:
    """Raise UserError if names or shapes of `weights` differ from those of the state dict `own`.

    The error names the first three missing, unknown or wrongly shaped tensors. where: the file.
    """
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    for name, value in own.items():
        if name in weights and weights[name].shape != value.shape:
            wrong.append(f"{name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}")
    if wrong:
        first = "; ".join(wrong[:3])
        raise UserError(f"{where}: not weights of this architecture: {first} ({len(wrong)} in all)")


def digest(module: torch.nn.Module) -> str:
    """A hash of the names and values of a module's state dict, 32 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(name.encode() + content.numpy().tobytes())
    return total.hexdigest()
