"""Triton when it is installed; otherwise names that let the op files be imported without it.

Kernels are written with ``@jit``.  Without Triton the decorator hands the function back unused: `_dispatch` never
chooses an implementation that is not there, so the body is never run.

Triton reads ``TRITON_INTERPRET`` when a kernel is decorated.  `INTERPRETED` is that value as it was when this module
was imported; changing the variable later has no effect on kernels that already exist.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

HAS_TRITON: bool = find_spec("triton") is not None
INTERPRETED: bool = False

triton: Any = None
tl: Any = None

if HAS_TRITON:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    jit: Any = triton.jit
else:

    def jit(function: Any) -> Any:
        return function


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 if n <= 1 else 1 << (n - 1).bit_length()
