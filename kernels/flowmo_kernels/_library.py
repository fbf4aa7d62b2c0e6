"""Registration of library ops: schema, implementation for CPU and CUDA tensors, and shape function for tracing.

The ops live in the namespace ``flowmo_kernels``.  They carry no autograd formula of their own: each op file puts a
plain `torch.autograd.Function` over its forward and backward op, which costs less per call.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._dispatch import KernelUnavailableError

NAMESPACE = "flowmo_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``flowmo_kernels::<schema>`` and return its overload, ready to be called.

    Args:
        schema: e.g. ``"gelu(Tensor x, str impl) -> Tensor"``.
        run: the implementation, for CPU tensors (interpreted Triton) and CUDA tensors alike.
        fake: allocates outputs of the right shapes, strides and dtypes without computing.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, on_device_of_inputs(run), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def on_device_of_inputs(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with the device of its first tensor as the current one, which is where Triton launches.

    PyTorch's own operators switch devices by themselves, operators written in Python do not.

    Raises:
        KernelUnavailableError: Triton finds no C compiler, or no headers of Python.
    """

    @functools.wraps(run)
    def guarded(*args: Any) -> Any:
        index = next(t.device.index for t in _tensors(args))
        try:
            if index == torch.cuda.current_device():
                return run(*args)
            with torch.cuda.device(index):
                return run(*args)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            # Triton compiles its launchers with the C compiler of the machine, in the first call.
            if isinstance(error, RuntimeError) and "C compiler" not in str(error):
                raise
            raise KernelUnavailableError(
                f"Triton cannot build what launches its kernels ({error}): install a C compiler and Python's headers "
                "(gcc, python3-dev), or take PyTorch's operators alone by FLOWMO_KERNELS=ref"
            ) from error

    return guarded


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous, as kernels expect; otherwise a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
