"""The CUDA twins of the ops: one plain function per op and gradient, over CUDA tensors, launched through `_ext`.

Each allocates its outputs and launches on the current stream; none synchronizes.  The op files call them when
dispatch says cuda, after checking shapes; what is checked here is only what the kernels themselves cannot serve.
The kernels are csrc/<op>.cu; this module is the table of them all.
"""

from __future__ import annotations

from ._cuda_rows import (
    gate_residual,
    gate_residual_backward,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_backward,
    norm_modulate,
    norm_modulate_backward,
)

__all__ = [
    "gate_residual",
    "gate_residual_backward",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_backward",
    "norm_modulate",
    "norm_modulate_backward",
]
