"""CUDA without a GPU: fake tensors of device cuda, and an error for every operation that would make
the host wait for the GPU.

Fake tensors have shapes, types and devices and no values. Operations on tensors of different
devices fail as they would on a GPU, and so do operations whose result must be known on the host
(`.item()`, `bool()`, `nonzero`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import forecaster
import interpolants
import solvers
import train
from batches import stream, windows
from objectives import energy, shortcut

GPU = torch.device("cuda", 0)


class HostWait(Exception):
    """An operation for which the host would wait until the GPU has done everything before it."""


class NoHostWaits(TorchDispatchMode):
    """Raise HostWait at a copy from the GPU, and at a copy to the GPU that blocks or reads pageable
    memory.

    `launches` counts the operations on GPU tensors that are not views.
    """

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_copy_from"):
            source = args[1] if name == "copy_" else args[0]
            check_copy(source, result, kwargs.get("non_blocking", False) or args[2:] == (True,))
        on_gpu = isinstance(result, Tensor) and result.device.type == "cuda"
        self.launches += on_gpu and not operation.is_view
        return result


def check_copy(source: Tensor, result: Tensor, non_blocking: bool) -> None:
    if source.device.type == result.device.type:
        return
    if source.device.type == "cuda":
        raise HostWait(f"a copy of {tuple(source.shape)} from the GPU")
    if not non_blocking:
        raise HostWait(f"a blocking copy of {tuple(source.shape)} to the GPU")
    if not getattr(source, "pinned", False):
        raise HostWait(f"a copy of {tuple(source.shape)} to the GPU from pageable memory")


def pin(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.pinned = True
    return copy


def move(module: nn.Module, device: torch.device | None = None, memory_format=None) -> nn.Module:
    """nn.Module.to, which cannot replace real weights by fake ones."""

    def moved(value: Tensor) -> Tensor:
        value = value.detach().to(device)
        if memory_format is not None and value.ndim == 4:
            value = value.contiguous(memory_format=memory_format)
        return value

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(moved(weight), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
    return module


def on_the_host(function):
    """Let `function`, which computes numbers from numbers, run with real tensors."""

    @functools.wraps(function)
    def run(*args):
        with unset_fake_temporarily():
            return function(*args)

    return run


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Context in which tensors are fake, CUDA supports bf16 autocast, and random numbers need no
    generator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", move)
        patch.setattr(Tensor, "pin_memory", pin)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        for module in (forecaster, train, energy, shortcut):
            patch.setattr(module, "generator", lambda *key: None)
        value = on_the_host(interpolants.value)
        patch.setattr(interpolants, "value", value)
        patch.setattr(solvers, "value", value)
        for module, name in (
            (solvers, "time_grid"),
            (solvers, "slope_weight"),
            (windows, "draw_frames"),
            (stream, "draw_frames"),
        ):
            patch.setattr(module, name, on_the_host(getattr(module, name)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


@contextmanager
def no_host_waits() -> Iterator[NoHostWaits]:
    """Context within `fake_cuda` in which every operation that makes the host wait raises HostWait
    or an error of torch."""
    tensor = torch.tensor

    def checked(data, *, device=None, **options):
        if device is not None and torch.device(device).type == "cuda":
            raise HostWait("torch.tensor, which copies from pageable memory to the GPU")
        return tensor(data, device=device, **options)

    with pytest.MonkeyPatch.context() as patch, NoHostWaits() as found:
        patch.setattr(torch, "tensor", checked)
        yield found
