"""Hand-written kernels of FlowMo: every hot operation with its formula, plain PyTorch reference, kernels and gradient.

Importing needs neither Triton nor a GPU.  Which implementation runs is decided in `_dispatch`.
"""

from __future__ import annotations

from ._dispatch import KernelUnavailableError, chosen, describe, use
from .attention import attention_backend, joint_attention, joint_attention_ref
from .gate_residual import (
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
    gate_residual_ref,
)
from .linear_gelu import linear_gelu, linear_gelu_ref
from .norm_modulate import norm_modulate, norm_modulate_ref
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

__all__ = [
    "KernelUnavailableError",
    "attention_backend",
    "chosen",
    "describe",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_ref",
    "gate_residual_ref",
    "joint_attention",
    "joint_attention_ref",
    "linear_gelu",
    "linear_gelu_ref",
    "norm_modulate",
    "norm_modulate_ref",
    "qk_norm_rope",
    "qk_norm_rope_ref",
    "use",
]
