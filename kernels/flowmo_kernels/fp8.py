"""Row-scaled fp8 for inference: quantising forms of the norms, and the matrix product that takes them.

y is divided by one number a row, s = max|y| / 448, and stored as float8_e4m3fn (largest value 448); then

    linear_fp8(v, s, w, t, b)_mf = s_m t_f sum_d v_md w_fd + b_f.

The row maximum costs nothing where a row is being normalised anyway, so quantisation is part of the LayerNorm kernel
and y never exists in bf16.  Opt-in: the products carry about 3 bits of mantissa, and there are no gradients.

Legend: B images, L tokens (latent rows first), D channels, F output channels, M rows (all leading axes together).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dispatch import KernelUnavailableError, asked, chosen, constant_result, why_no_triton
from ._library import register, rows_contiguous, wants_grad
from ._rows import Signature
from .gate_residual import check_gate_residual, gate_residual_ref
from .norm_modulate import check_norm_modulate, norm_modulate_ref
from .norm_residual_triton import forward, forward_signatures

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
MINIMUM_ARCHITECTURE = 89  # sm_89; the kernels compile for nothing older
TINY = 1e-12  # rows smaller than this all over are stored as zeros of scale TINY / 448


def refuse_gradient(op: str, *tensors: Tensor | None) -> None:
    if wants_grad(*tensors):
        raise RuntimeError(f"{op} has no gradient: fp8 is for inference; call it under torch.no_grad()")


@constant_result
def _architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def why_no_fp8(device: torch.device) -> str | None:
    """The reason why a CUDA device has no fp8 kernels, or None where it has."""
    architecture = _architecture(device.index)
    if architecture < MINIMUM_ARCHITECTURE:
        return f"fp8 needs compute capability 8.9, this CUDA device has {architecture / 10}"
    return why_no_triton()


def implementation(op: str, x: Tensor) -> str:
    """What `chosen` says, on a device that knows fp8."""
    reason = why_no_fp8(x.device) if x.is_cuda and asked(op) != "ref" else None
    if reason is not None:
        raise KernelUnavailableError(
            f"{op}: {reason}; stay with bf16, or ask for the slow reference by use({op}='ref')"
        )
    return chosen(op, x)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-scaled fp8 form of a tensor, such as the weight of a linear layer (once, at load).

    Args:
        x: [..., D], any float dtype.

    Returns:
        (values, scales): float8_e4m3fn [..., D] and fp32 [..., 1], x being about values * scales.
    """
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / FP8_MAX
    return (x / scales).to(FP8), scales


def norm_modulate_fp8_ref(
    x: Tensor,  # [B, L, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # float8_e4m3fn [B, L, D], fp32 [B, L, 1]
    """`norm_modulate_fp8` in plain PyTorch."""
    return quantize_rows(norm_modulate_ref(x.float(), shift, scale, split=split, eps=eps))


def gate_residual_norm_modulate_fp8_ref(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, L, D], float8_e4m3fn [B, L, D], fp32 [B, L, 1]
    """`gate_residual_norm_modulate_fp8` in plain PyTorch."""
    x = gate_residual_ref(x, branch, gate, split=split)
    return x, *norm_modulate_fp8_ref(x, shift, scale, split=split, eps=eps)


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    split: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = rows_contiguous(x)
    branch, gate, shift, scale = (None if t is None else rows_contiguous(t) for t in (branch, gate, shift, scale))
    x_new, y, row_scale = _forward_fake(x, branch, gate, shift, scale, split, eps)
    forward(x, branch, gate, shift, scale, None if branch is None else x_new, y, row_scale, split, eps)
    return x_new, y, row_scale


def _forward_fake(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    split: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x_new = torch.empty((0,) if branch is None else x.shape, device=x.device, dtype=x.dtype)
    y = torch.empty(x.shape, device=x.device, dtype=FP8)
    return x_new, y, torch.empty((*x.shape[:2], 1), device=x.device, dtype=torch.float32)


_op = register(
    "norm_modulate_fp8(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, int split, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def norm_modulate_fp8(
    x: Tensor,  # [B, L, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # float8_e4m3fn [B, L, D], fp32 [B, L, 1]
    """`norm_modulate` with its result in row-scaled fp8; arguments as there, no gradient.

    Returns:
        (values, scales): float8_e4m3fn [B, L, D] and fp32 [B, L, 1]; y is about values * scales.

    Raises:
        ValueError: a shape does not fit, or only one of shift and scale is given.
        RuntimeError: a gradient is wanted.
        KernelUnavailableError: the CUDA device is older than compute capability 8.9.
    """
    refuse_gradient("norm_modulate_fp8", x, shift, scale)
    if implementation("norm_modulate_fp8", x) == "ref":
        return norm_modulate_fp8_ref(x, shift, scale, split=split, eps=eps)
    check_norm_modulate(x, shift, scale, split)
    _, y, row_scale = _op(x, None, None, shift, scale, split, eps)
    return y, row_scale


def gate_residual_norm_modulate_fp8(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D] or [B, 2, D]
    shift: Tensor | None = None,  # [B, D] or [B, 2, D]
    scale: Tensor | None = None,  # as shift
    *,
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, L, D], float8_e4m3fn [B, L, D], fp32 [B, L, 1]
    """`gate_residual_norm_modulate` with y in row-scaled fp8; arguments as there, no gradient.

    Returns:
        (x', values, scales): x' in the dtype of x, y as float8_e4m3fn [B, L, D] and fp32 [B, L, 1].

    Raises:
        ValueError: a shape does not fit, or only one of shift and scale is given.
        RuntimeError: a gradient is wanted.
        KernelUnavailableError: the CUDA device is older than compute capability 8.9.
    """
    refuse_gradient("gate_residual_norm_modulate_fp8", x, branch, gate, shift, scale)
    if implementation("gate_residual_norm_modulate_fp8", x) == "ref":
        return gate_residual_norm_modulate_fp8_ref(x, branch, gate, shift, scale, split=split, eps=eps)
    check_gate_residual(x, branch, gate, split)
    check_norm_modulate(x, shift, scale, split)
    out: tuple[Tensor, Tensor, Tensor] = _op(x, branch, gate, shift, scale, split, eps)
    return out


def linear_fp8_ref(
    x: Tensor,  # float8_e4m3fn [..., D]
    x_scale: Tensor,  # fp32 [..., 1]
    w: Tensor,  # float8_e4m3fn [F, D]
    w_scale: Tensor,  # fp32 [F, 1]
    b: Tensor | None = None,  # [F]
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # [..., F]
    """`linear_fp8` in plain PyTorch: the matrix product of the stored values in fp32, scaled afterwards."""
    y = (x.float() @ w.float().t()) * x_scale * w_scale.flatten()
    return (y if b is None else y + b.float()).to(dtype)


def linear_fp8(
    x: Tensor,  # float8_e4m3fn [..., D]
    x_scale: Tensor,  # fp32 [..., 1]
    w: Tensor,  # float8_e4m3fn [F, D]
    w_scale: Tensor,  # fp32 [F, 1]
    b: Tensor | None = None,  # [F]
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,  # [..., F]
) -> Tensor:  # [..., F]
    """Matrix product of row-scaled fp8 matrices, accumulated in fp32; inference only.

    Args:
        x, x_scale: values [..., D] and row scales [..., 1], from the quantising norms or `quantize_rows`.
        w, w_scale: values [F, D] and row scales [F, 1] of the weight, from `quantize_rows`.
        b: bias [F] or None.
        dtype: dtype of the result.
        out: [..., F], memory for the result, whose dtype then counts; the product goes there directly where `out` is
            contiguous, and by way of a copy elsewhere.

    Returns:
        [..., F] in `dtype`, or `out`.

    Raises:
        ValueError: shapes or dtypes do not fit; on CUDA D and F must be multiples of 16.
        KernelUnavailableError: the CUDA device is older than compute capability 8.9.
    """
    d, f = x.shape[-1], w.shape[0]
    if x.dtype != FP8 or w.dtype != FP8:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; expected {FP8} (see quantize_rows)")
    scales = (*x.shape[:-1], 1), (f, 1)
    if w.shape != (f, d) or (tuple(x_scale.shape), tuple(w_scale.shape)) != scales:
        raise ValueError(
            f"x {tuple(x.shape)}, x_scale {tuple(x_scale.shape)}, w {tuple(w.shape)}, w_scale {tuple(w_scale.shape)}"
            " do not fit; expected [..., D], [..., 1], [F, D], [F, 1]"
        )
    if out is not None and out.shape != (*x.shape[:-1], f):
        raise ValueError(f"out {tuple(out.shape)}; expected {(*x.shape[:-1], f)}")
    dtype = dtype if out is None else out.dtype
    implementation("linear_fp8", x)
    if not x.is_cuda or asked("linear_fp8") == "ref" or x.numel() == 0:
        reference = linear_fp8_ref(x, x_scale, w, w_scale, b, dtype=dtype)
        return reference if out is None else out.copy_(reference)
    if d % 16 or f % 16:
        raise ValueError(f"D = {d} and F = {f}; fp8 matrix products on CUDA need multiples of 16")
    target = out.view(-1, f) if out is not None and out.is_contiguous() else None
    arguments: dict[str, Any] = {
        "scale_a": x_scale.reshape(-1, 1),
        "scale_b": w_scale.t(),
        "bias": None if b is None or dtype == torch.float32 else b.to(dtype),
        "out_dtype": dtype,
        "use_fast_accum": True,
    }
    if target is not None:
        arguments["out"] = target
    y: Tensor = torch._scaled_mm(x.reshape(-1, d), w.t(), **arguments)
    if b is not None and dtype == torch.float32:  # the product takes a bias of the half types only
        y += b
    y = y.view(*x.shape[:-1], f)
    return y if out is None else out if target is not None else out.copy_(y)


def aot_signatures() -> list[Signature]:
    """Every kernel of this file at the real shapes, for compilation ahead of time (compute capability 8.9 and up)."""
    on = {"MODULATED": True, "ROW_SCALED": True}
    found = forward_signatures("gate_residual_norm_modulate_fp8", RESIDUAL=True, GATED=True, **on)
    found += forward_signatures("norm_modulate_fp8", **on)
    for _, types, *_ in found:
        types["p_y"] = "*fp8e4nv"
    return found
