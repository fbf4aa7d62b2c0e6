"""The compiled extension `flowmo_kernels._C`: found or not, and the one way to launch what it holds.

Absent is fine (`missing` says why); present but broken raises with the loader's own reason.  The extension links
CUDA's runtime statically and needs no driver to be imported, only to launch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Pointers(NamedTuple):
    """An argument that is a device table of addresses: `table` int64 [n] holds the addresses of `tensors` (0: None)."""

    tensors: Sequence[Tensor | None]
    table: Tensor


Argument = Tensor | Pointers | int | float | None
Launcher = Callable[[str, tuple[Argument, ...]], None]


class KernelLaunchError(RuntimeError):
    """CUDA refused a launch; the message names the op, its tensors and CUDA's reason."""


def missing() -> str | None:
    """Why the extension is not there, or None when it is.

    Raises:
        ImportError: it is there and does not load.
    """
    if find_spec("flowmo_kernels._C") is None:
        return (
            "flowmo_kernels was installed without its CUDA extension (no nvcc was found, or FLOWMO_CUDA=0); "
            "install again with FLOWMO_CUDA=1 where the CUDA toolkit is"
        )
    extension()
    return None


@functools.cache
def extension() -> ModuleType:
    """The module `flowmo_kernels._C`.

    Raises:
        ImportError: it is absent, or present and broken; the message says which and why.
    """
    if find_spec("flowmo_kernels._C") is None:
        raise ImportError(missing())
    try:
        return importlib.import_module("flowmo_kernels._C")
    except ImportError as error:
        raise ImportError(
            f"the CUDA extension of flowmo_kernels is installed but does not load: {error}. Build it again with "
            "FLOWMO_CUDA=1 pip install --force-reinstall --no-deps, or without it with FLOWMO_CUDA=0"
        ) from error


_launcher: ContextVar[Launcher | None] = ContextVar("launcher", default=None)


@contextmanager
def launching_with(launcher: Launcher) -> Iterator[None]:
    """Hand every launch in the block to `launcher(op, arguments)` instead of the extension.

    The tests run the same kernel sources on the CPU this way; tensors then lie in main memory.
    """
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


def _describe(argument: Argument) -> str | None:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"
    if isinstance(argument, Pointers):
        return f"{len(argument.tensors)} tensors"
    return None


def launch(op: str, *arguments: Argument) -> None:
    """Launch `op` on the current stream of the device of its tensors.

    Args:
        op: a launcher of csrc/launchers.h.
        arguments: its arguments in order, without the stream: tensors stand for their address, None for 0.

    Raises:
        KernelLaunchError: CUDA refused; the message names the op, its tensors and CUDA's reason.
        ImportError: the extension is absent or broken.
    """
    launcher = _launcher.get()
    if launcher is not None:
        launcher(op, arguments)
        return
    module = extension()
    devices: list[torch.device] = []
    values: list[int | float] = []
    for argument in arguments:
        tensor = argument.table if isinstance(argument, Pointers) else argument
        if isinstance(tensor, Tensor):
            devices.append(tensor.device)
            values.append(tensor.data_ptr())
        else:
            values.append(tensor or 0)
    device = devices[0] if devices else None
    if device is None or device.type != "cuda":
        raise ValueError(f"{op}: CUDA kernels need CUDA tensors; these lie on {device}")
    if any(other != device for other in devices):
        # A kernel would read an address of another memory, which ends the process's use of the card.
        raise ValueError(f"{op}: all tensors must lie on one device; these lie on {sorted(set(map(str, devices)))}")
    with torch.cuda.device(device):
        status = module.set_device(device.index) or getattr(module, op)(
            *values, torch.cuda.current_stream(device).cuda_stream
        )
    if status:
        tensors = ", ".join(text for text in map(_describe, arguments) if text)
        raise KernelLaunchError(
            f"{op} on {tensors} (device {device}): CUDA error {status}, {module.error_text(status)}"
        )
