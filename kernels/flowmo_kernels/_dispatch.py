"""Which implementation of an op runs: ``auto | ref | triton | cuda``.

Three places say so, the later one winning:

1. the environment, ``FLOWMO_KERNELS=triton`` or ``FLOWMO_KERNELS=auto,lfq=cuda`` (read once, at import);
2. ``with use("ref"):`` or ``with use(lfq="cuda"):``, for the process, until the block ends;
3. nothing else: ops take no implementation argument.

A default (``triton``) applies to the ops that have such an implementation, the others behave as under ``auto``.
A choice for one op (``lfq=cuda``) is binding.  ``auto`` takes Triton, then CUDA, then the reference on CUDA tensors.
CPU tensors take the reference, except that Triton asked for by name runs interpreted where ``TRITON_INTERPRET=1`` was
set before the import.  Asking for what this machine can never run is a `KernelUnavailableError` that says why.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from ._triton import HAS_TRITON, INTERPRETED, triton

IMPLEMENTATIONS = ("auto", "ref", "triton", "cuda")

# Implementations besides the reference, by op.
OPS: dict[str, tuple[str, ...]] = {
    "norm_modulate": ("triton", "cuda"),
    "gate_residual": ("triton", "cuda"),
    "gate_residual_norm_modulate": ("triton", "cuda"),
    "qk_norm_rope": ("triton", "cuda"),
    "joint_attention": ("triton",),
    "linear_gelu": ("triton",),
    "norm_modulate_fp8": ("triton",),
    "gate_residual_norm_modulate_fp8": ("triton",),
    "gelu_fp8": ("triton",),
    "linear_fp8": (),
    "attention_fp8": ("triton",),
    "lfq": ("triton", "cuda"),
    "pack_tokens": ("triton", "cuda"),
    "unpack_tokens": ("triton", "cuda"),
    "euler_step": ("triton", "cuda"),
    "step_boundary": ("triton", "cuda"),
    "hold_norms": ("triton", "cuda"),
    "ema": ("triton", "cuda"),
    "adam_hold_ema": ("triton", "cuda"),
}

# Ops whose own kernels run only when asked for by name.
NOT_IN_AUTO = ("joint_attention",)


Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the whole tracer with this package: twice the time
    that PyTorch itself takes.  What it does is to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class KernelUnavailableError(RuntimeError):
    """An implementation was asked for by name that cannot run here; the message says why."""


def why_no_triton() -> str | None:
    """The reason why Triton kernels cannot run on this machine, or None when they can."""
    if not HAS_TRITON:
        return "the package triton is not installed (pip install triton; Linux only)"
    if not torch.cuda.is_available() and not INTERPRETED:
        return "there is no CUDA device, and TRITON_INTERPRET=1 was not set before flowmo_kernels was imported"
    return why_no_interpreter() if INTERPRETED else None


@constant_result
def why_no_interpreter() -> str | None:
    """The reason why kernels cannot be interpreted with the installed packages, or None when they can."""
    import numpy

    found = triton.__version__, numpy.__version__
    releases = [tuple(int(n) for n in re.findall(r"\d+", v)[:2]) for v in found]
    if releases[0] < (3, 7) and releases[1] >= (2, 4):  # int() of an array with one element is an error since
        way_out = "install Triton 3.7 or newer, or 'numpy<2.4'"
        return f"the interpreter of Triton {found[0]} fails with NumPy {found[1]}: {way_out}"
    return None


def why_no_cuda() -> str | None:
    """The reason why the compiled CUDA kernels cannot run on this machine, or None when they can."""
    if find_spec("flowmo_kernels._ext") is None:
        return "flowmo_kernels has no compiled extension loader"
    from . import _ext

    reason: str | None = _ext.missing()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _why_not(impl: str) -> str | None:
    return why_no_triton() if impl == "triton" else why_no_cuda() if impl == "cuda" else None


def _check(default: str | None, per_op: dict[str, str]) -> None:
    """Refuse unknown names, and implementations this machine can never run."""
    for op, impl in [("", default or "auto"), *per_op.items()]:
        if op and op not in OPS:
            near = difflib.get_close_matches(op, OPS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the ops are {', '.join(OPS)}"
            raise ValueError(f"no op is called {op!r}{hint}")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"implementation {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
        if op and impl in ("triton", "cuda") and impl not in OPS[op]:
            has = ", ".join(("ref", *OPS[op]))
            raise KernelUnavailableError(f"{op} has no {impl} implementation; it has {has}")
        reason = _why_not(impl)
        if reason is not None:
            raise KernelUnavailableError(f"{op or 'kernels'}: {impl} was asked for, but {reason}")


def parse(text: str) -> tuple[str, dict[str, str]]:
    """``"auto,lfq=cuda"`` -> ``("auto", {"lfq": "cuda"})``; the form of the variable FLOWMO_KERNELS."""
    default, per_op = "auto", {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        op, equals, impl = word.partition("=")
        if equals:
            per_op[op.strip()] = impl.strip()
        else:
            default = word
    return default, per_op


_default, _per_op = parse(os.environ.get("FLOWMO_KERNELS", ""))
_checked = False


def _check_environment() -> None:
    # Not at import: a bad variable must not break `import flowmo_kernels`, only the first use of an op.
    global _checked
    if not _checked:
        _check(_default, _per_op)
        _checked = True


@contextmanager
def use(impl: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose implementations for the whole process until the block ends.

    Args:
        impl: default for every op: "auto", "ref", "triton" or "cuda"; None keeps the present one and the present
            choices for single ops.
        per_op: implementation of single ops by name, e.g. ``lfq="cuda"``.

    Raises:
        ValueError: unknown op or implementation.
        KernelUnavailableError: this machine cannot run what is asked for; the message says why.
    """
    global _default, _per_op, _checked
    _check(impl, per_op)
    before = _default, _per_op, _checked
    if impl is None:
        _per_op = {**_per_op, **per_op}
    else:
        _default, _per_op, _checked = impl, dict(per_op), True
    try:
        yield
    finally:
        _default, _per_op, _checked = before


def asked(op: str) -> str:
    """What environment and context ask of `op`: "auto", "ref", "triton" or "cuda"."""
    if not _checked:
        _check_environment()
    impl = _per_op.get(op)
    if impl is None:
        impl = _default if _default in ("auto", "ref") or _default in OPS[op] else "auto"
    return impl


def chosen(op: str, tensor: Tensor) -> str:
    """The implementation that `op` runs for `tensor`: "ref", "triton" or "cuda"."""
    impl = asked(op)
    if impl == "ref":
        return "ref"
    if not tensor.is_cuda:
        return "triton" if impl == "triton" and INTERPRETED else "ref"
    if impl == "auto":
        for candidate in OPS[op] if op not in NOT_IN_AUTO else ():
            if HAS_TRITON if candidate == "triton" else _has_cuda():
                return candidate
        return "ref"
    return impl


@constant_result
def _has_cuda() -> bool:
    return why_no_cuda() is None


def describe() -> str:
    """One line for commands to print: what was asked for, what is there, and why what is missing is missing."""
    _check_environment()
    words = [_default, *(f"{op}={impl}" for op, impl in _per_op.items())]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    parts = [f"kernels: {','.join(words)} on {device}"]
    for impl in ("triton", "cuda"):
        reason = _why_not(impl)
        interpreted = impl == "triton" and INTERPRETED
        parts.append(f"{impl} {'interpreted on CPU tensors' if interpreted else 'ready'}" if reason is None
                     else f"no {impl}: {reason}")
    return "; ".join(parts)
