"""Data-parallel training: replicate or shard a network, compile it, gather its state.

The network is either replicated on all processes (DDP) or sharded over them (`train.shard`, FSDP2).
In a sharded network, each process holds a part of every weight, gradient, averaged weight and
optimizer moment, as DTensors. It all-gathers the weights of a block when it computes the block. A
checkpoint holds full tensors in both cases.
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
from runtime import checkpoints
from runtime.console import UserError
from runtime.process import Process


def distribute(net: nn.Module, config: Config, process: Process) -> nn.Module:
    """Compile and parallelise a network with the same weights on all processes.

    -> the module that the training loop calls in place of `net`.
    """
    sharded = config.train.shard and process.world > 1
    modules = net.blocks if sharded else [net]
    mode = compile_modules(modules, config.train.compile, config.model.name, process.device)
    if sharded and mode in GRAPHS:
        raise UserError(
            f"train.compile={mode} records the addresses of weights, and train.shard moves the "
            "weights; set train.compile=default"
        )
    if process.world == 1:
        return net
    if not sharded:
        # Gradients are views of the all-reduce buckets: this saves the memory of one gradient.
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(process.device.type, (process.world,))
    # FSDP shards contiguous weights only.
    net.to(memory_format=torch.contiguous_format)
    # Weights are gathered in float32, so that autocast computes the same as without sharding.
    for module in [*net.blocks, net]:
        fully_shard(module, mesh=mesh)
    return net


def compile_modules(
    modules: list[nn.Module], setting: str, model: str, device: torch.device
) -> str:
    """Mark modules for compilation at their first call. -> the mode, see `compile_mode`.

    setting: train.compile or sample.compile.
    """
    mode = compile_mode(setting, model, device)
    if mode != "off":
        for module in modules:
            module.compile(mode=None if mode == "default" else mode, dynamic=False)
    return mode


def compile_mode(setting: str, model: str, device: torch.device) -> str:
    """Resolve the value `auto` of train.compile.

    It is `off` on CPUs, where compilation takes long and gains little: matrix products dominate the
    run time.
    """
    if setting != "auto":
        return setting
    useful = device.type == "cuda" and model == "uvit" and has_compiler() and has_triton()
    return "default" if useful else "off"


def has_compiler() -> bool:
    """True if the machine has a C compiler and Python's headers, which torch.compile needs."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler = os.environ.get("CC") or found
    return bool(compiler) and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def gradient_sync(net: nn.Module, last: bool) -> AbstractContextManager:
    """The context of the forward and backward pass of one part of a batch.

    With gradient accumulation, processes exchange gradients only in the last part of a batch.
    """
    if isinstance(net, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    return nullcontext()


def is_plain(net: nn.Module) -> bool:
    """True if methods of the network may be called directly: it is not replicated, not sharded and
    not compiled, which act on the call of the network itself."""
    wrapped = isinstance(net, nn.parallel.DistributedDataParallel)
    sharded = hasattr(net, "set_requires_gradient_sync")
    return not (wrapped or sharded or getattr(net, "_compiled_call_impl", None))


def to_plain(value: Tensor) -> Tensor:
    """Convert a DTensor that is equal on all processes, such as a norm, to an ordinary tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's shard of each tensor, as ordinary tensors that share its memory."""
    parts = {}
    for name, value in tensors.items():
        parts[name] = value.to_local() if isinstance(value, DTensor) else value
    return parts


def shard_like(value: Tensor, own: Tensor) -> Tensor:
    """Copy a full tensor to the sharding and memory layout of `own`.

    The fused optimizer requires the layout of the weights for its moments. All processes call this
    function with the same value.
    """
    if isinstance(own, DTensor):
        value = value.detach().to(own.device).contiguous()
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own, requires_grad=False).copy_(value.detach())


def load_tensors(own: dict[str, Tensor], values: dict[str, Tensor], where: str | Path) -> None:
    """Copy full tensors into a state dict, which may be sharded. where: for the error message.

    UserError if names or shapes differ. All processes call this function with the same values.
    """
    checkpoints.check_weights(own, values, where)
    for name, tensor in own.items():
        tensor.copy_(
            shard_like(values[name], tensor) if isinstance(tensor, DTensor) else values[name]
        )


def gather(state, keep: bool):
    """All-gather the sharded tensors of a nested state into CPU memory.

    All processes call this function. A process with keep=False receives None in place of sharded
    tensors.
    """
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the full optimizer state of a checkpoint. The optimizer's weights may be sharded."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {}
    for index, slot in state["state"].items():
        weight = weights[index]
        moments[index] = {}
        for name, value in slot.items():
            # Step counts are scalars and are not sharded.
            of_weight = value.shape == weight.shape
            moments[index][name] = shard_like(value, weight) if of_weight else value
    optimizer.load_state_dict({**state, "state": moments})
