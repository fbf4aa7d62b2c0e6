"""Hand-written kernels of FlowMo: every hot operation with its formula, plain PyTorch reference, kernels and gradient.

Importing needs neither Triton nor a GPU.  Which implementation runs is decided in `_dispatch`.
"""

from __future__ import annotations

from ._dispatch import KernelUnavailableError, chosen, describe, use
from .attention import attention_backend, joint_attention, joint_attention_ref
from .attention_quantized import attention_quantized, attention_quantized_ref
from .euler_step import euler_step, euler_step_ref
from .fp8 import (
    gate_residual_norm_modulate_fp8,
    gate_residual_norm_modulate_fp8_ref,
    linear_fp8,
    linear_fp8_ref,
    norm_modulate_fp8,
    norm_modulate_fp8_ref,
    quantize_rows,
)
from .gate_residual import (
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
    gate_residual_ref,
)
from .gelu_fp8 import gelu_fp8, gelu_fp8_ref
from .lfq import LFQOutput, lfq, lfq_ref
from .linear_gelu import linear_gelu, linear_gelu_ref
from .norm_modulate import norm_modulate, norm_modulate_ref
from .optim import adam_hold_ema_, ema_, hold_norms_, weight_norms
from .pack_tokens import codes_to_tokens, pack_tokens, tokens_to_codes, unpack_tokens
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from .step_boundary import StepBoundary, step_boundary, step_boundary_ref

__all__ = [
    "KernelUnavailableError",
    "LFQOutput",
    "StepBoundary",
    "adam_hold_ema_",
    "attention_backend",
    "attention_quantized",
    "attention_quantized_ref",
    "chosen",
    "codes_to_tokens",
    "describe",
    "ema_",
    "euler_step",
    "euler_step_ref",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_fp8",
    "gate_residual_norm_modulate_fp8_ref",
    "gate_residual_norm_modulate_ref",
    "gate_residual_ref",
    "gelu_fp8",
    "gelu_fp8_ref",
    "hold_norms_",
    "joint_attention",
    "joint_attention_ref",
    "lfq",
    "lfq_ref",
    "linear_fp8",
    "linear_fp8_ref",
    "linear_gelu",
    "linear_gelu_ref",
    "norm_modulate",
    "norm_modulate_fp8",
    "norm_modulate_fp8_ref",
    "norm_modulate_ref",
    "pack_tokens",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "quantize_rows",
    "step_boundary",
    "step_boundary_ref",
    "tokens_to_codes",
    "unpack_tokens",
    "use",
    "weight_norms",
]
