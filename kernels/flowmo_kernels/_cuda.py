"""The CUDA twins of the ops: one plain function per op and gradient, over CUDA tensors, launched through `_ext`.

Each allocates its outputs and launches on the current stream; none synchronizes.  The op files call them when
dispatch says cuda, after checking shapes; what is checked here is only what the kernels themselves cannot serve.
The kernels are csrc/<op>.cu; this module is the table of them all.
"""

from __future__ import annotations

from ._cuda_latent import lfq, lfq_backward, pack_tokens, unpack_tokens
from ._cuda_optim import adam_hold_ema, ema, hold_norms
from ._cuda_qk import qk_norm_rope, qk_norm_rope_, qk_norm_rope_backward
from ._cuda_rows import (
    gate_residual,
    gate_residual_backward,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_backward,
    norm_modulate,
    norm_modulate_backward,
)
from ._cuda_sampler import euler_step, euler_step_backward, step_boundary

__all__ = [
    "adam_hold_ema",
    "ema",
    "euler_step",
    "euler_step_backward",
    "gate_residual",
    "gate_residual_backward",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_backward",
    "hold_norms",
    "lfq",
    "lfq_backward",
    "norm_modulate",
    "norm_modulate_backward",
    "pack_tokens",
    "qk_norm_rope",
    "qk_norm_rope_",
    "qk_norm_rope_backward",
    "step_boundary",
    "unpack_tokens",
]
