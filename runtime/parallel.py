"""A network among several processes, compiled or not, and how it comes back in one piece for a checkpoint.

Alike on all processes (DDP), or split over them (`train.shard`, FSDP2): each then holds a part of every weight, gradient,
average and moment, as DTensors, and gathers a block's weights when it is computed. A checkpoint holds whole tensors either way.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._triton import has_triton

from configs import GRAPHS, Config
from runtime.console import UserError
from runtime.process import Process


def spread(net: nn.Module, config: Config, process: Process) -> nn.Module:
    """What the loop calls in place of `net`, whose weights are the same on all processes. Compiles it, too."""
    sharded = config.train.shard and process.world > 1
    mode = compiled(
        net.blocks if sharded else [net], config.train.compile, config.model.name, process.device
    )
    if sharded and mode in GRAPHS:
        raise UserError(
            f"train.compile={mode} records where weights lie, and train.shard moves them; set "
            "train.compile=default"
        )
    if process.world == 1:
        return net
    if not sharded:
        # Gradients are views of the all-reduce buckets, not copies: one gradient's memory is saved.
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(process.device.type, (process.world,))
    net.to(memory_format=torch.contiguous_format)  # the only one that FSDP splits
    for module in [
        *net.blocks,
        net,
    ]:  # gathered in float32, so that autocast computes what it does of unsplit weights
        fully_shard(module, mesh=mesh)
    return net


def compiled(modules: list[nn.Module], asked: str, model: str, device: torch.device) -> str:
    """Have them compiled at their first call, by compile_mode, which is returned."""
    mode = compile_mode(asked, model, device)
    if mode != "off":
        for module in modules:
            module.compile(mode=None if mode == "default" else mode, dynamic=False)
    return mode


def compile_mode(asked: str, model: str, device: torch.device) -> str:
    """train.compile with `auto` resolved: on CPUs it is off, where compiling takes long and products of matrices are all."""
    if asked != "auto":
        return asked
    wanted = device.type == "cuda" and model == "uvit" and has_compiler() and has_triton()
    return "default" if wanted else "off"


def has_compiler() -> bool:
    """Does this machine have what torch.compile needs besides torch: a C compiler and Python's headers?"""
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    return bool(compiler) and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def last_of_step(net: nn.Module, last: bool) -> AbstractContextManager:
    """Around the forward and backward pass of one part of a batch: the processes exchange gradients with the last part."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def plain(value: Tensor) -> Tensor:
    """What is the same on all processes, as an ordinary tensor: a norm, say."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of each, as ordinary tensors that share their memory."""
    return {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in tensors.items()
    }


def alike(value: Tensor, own: Tensor) -> Tensor:
    """A copy of a whole tensor, split as `own` is and laid out in memory as it is, which the fused optimizer takes for granted.
    All processes call it, with the same value."""
    if isinstance(own, DTensor):
        value = value.detach().to(own.device).contiguous()
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own, requires_grad=False).copy_(value.detach())


def whole(state, keep: bool):
    """A nested state with the parts of all processes put together, in main memory. All processes call it; those that do not
    `keep` it get None in place of what was split."""
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    return [whole(value, keep) for value in state] if isinstance(state, list) else state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put the whole state of a checkpoint into an optimizer of weights that may be split."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        index: {
            name: alike(value, weights[index]) if value.shape == weights[index].shape else value
            for name, value in slot.items()
        }
        for index, slot in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
