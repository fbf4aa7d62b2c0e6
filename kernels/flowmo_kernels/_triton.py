"""Triton when it is installed; otherwise names that let the op files be imported without it.

Kernels are written with ``@jit``.  Without Triton the decorator hands the function back unused: `_dispatch`
never chooses an implementation that is not there, so the body is never run.

Triton reads ``TRITON_INTERPRET`` when a kernel is decorated.  `INTERPRETED` is that value as it was when this
module was imported; changing the variable later has no effect on kernels that already exist.

Two helpers, `cast` and `dot`, exist because the interpreter differs from the compiler: it truncates where the
compiler rounds to the nearest (fp32 to bf16 and fp8), and multiplies the bit patterns of bf16 matrices.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

HAS_TRITON: bool = find_spec("triton") is not None
INTERPRETED: bool = False

if HAS_TRITON:
    # Contraction of a * b + c into one rounding is wanted; releases differ in their default and warn about it.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton import language as tl

    INTERPRETED = bool(triton.knobs.runtime.interpret)
    jit: Any = triton.jit
else:
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any) -> Any:
        return function


if INTERPRETED:

    @jit
    def cast(x, dtype: tl.constexpr):
        """x in `dtype`, rounded to nearest even as the compiled conversion does."""
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
        elif dtype == tl.float8e4nv:
            exponent = ((x.to(tl.uint32, bitcast=True) >> 23) & 255).to(tl.int32) - 127
            quantum = tl.exp2(tl.maximum(exponent, -6).to(tl.float32) - 3.0)
            # Adding and subtracting 1.5 * 2^23 rounds an fp32 number to an integer, ties to even.
            rounded = (((x / quantum + 12582912.0) - 12582912.0) * quantum).to(dtype).to(tl.uint8, bitcast=True)
            x = tl.where(x == x, rounded, 127).to(tl.uint8).to(dtype, bitcast=True)  # 127: not a number
        return x.to(dtype)

    @jit
    def dot(a, b, acc):
        """acc + a b with fp32 accumulation."""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")

else:

    @jit
    def cast(x, dtype: tl.constexpr):
        """x in `dtype`, rounded to nearest even."""
        return x.to(dtype)

    @jit
    def dot(a, b, acc):
        """acc + a b with fp32 accumulation; fp32 operands are multiplied in fp32."""
        return tl.dot(a, b, acc, input_precision="ieee")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 if n <= 1 else 1 << (n - 1).bit_length()
