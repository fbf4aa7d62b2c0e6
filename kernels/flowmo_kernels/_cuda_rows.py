"""CUDA launches of the row ops: `norm_modulate`, `gate_residual` and the two fused, forward and backward.

Legend: B images, L tokens (latent rows first), D channels, S streams (1, or 2 = latent and image).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ext import DTYPES, launch
from ._library import rows_contiguous

# A backward block walks a chunk of rows and writes one partial sum per column: enough chunks to fill the largest
# cards several times over, and chunks long enough that partial sums stay a small part of the traffic.
BACKWARD_BLOCKS = 1024
SHORTEST_CHUNK, LONGEST_CHUNK = 8, 64


def rows_per_chunk(batch: int, length: int) -> int:
    """Rows that one backward block sums over, for [batch, length] rows."""
    rows = -(-batch * length // BACKWARD_BLOCKS)
    return max(SHORTEST_CHUNK, min(LONGEST_CHUNK, -(-rows // 4) * 4))


def chunks(length: int, split: int, rows: int) -> int:
    """Chunks of `rows` rows, none of which crosses `split`."""
    return -(-split // rows) - (-(length - split) // rows)


def dtype_code(name: str, x: Tensor) -> int:
    """The number type as the launchers count them.

    Raises:
        TypeError: the kernels do not know the type.
    """
    code = DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(f"{name} is {x.dtype}; the CUDA kernels take float32, bfloat16 and float16")
    return code


def row_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """[B, L, D] as a launcher takes it: the tensor and its strides of images and rows."""
    return x, x.stride(0), x.stride(1)


def table_strides(name: str, m: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """[B, D] or [B, 2, D] as a launcher takes it: the tensor, its strides of images and streams, its type."""
    if m is None:
        return None, 0, 0, 0
    return m, m.stride(0), m.stride(1) if m.dim() == 3 else 0, dtype_code(name, m)


def _streams(m: Tensor | None) -> int:
    return 2 if m is not None and m.dim() == 3 else 1


def _contiguous(m: Tensor | None) -> Tensor | None:
    return None if m is None else rows_contiguous(m)


def _sums(m: Tensor | None, x: Tensor) -> Tensor:
    """Space for the gradient of a modulation table: float32 of its shape, empty where there is no table."""
    return torch.empty((0,) if m is None else m.shape, dtype=torch.float32, device=x.device)


def _out(m: Tensor | None, grad: Tensor) -> Tensor | None:
    return None if m is None else grad


def norm_modulate(
    x: Tensor,  # [B, L, D]
    shift: Tensor | None,  # [B, D] or [B, 2, D]
    scale: Tensor | None,  # as shift
    split: int = 0,
    eps: float = 1e-6,
) -> Tensor:  # [B, L, D], dtype of x
    """y = (1 + scale) * LN(x) + shift, as `flowmo_kernels.norm_modulate`."""
    x, shift, scale = rows_contiguous(x), _contiguous(shift), _contiguous(scale)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        "norm_modulate", *row_strides(y), *row_strides(x), *table_strides("shift", shift),
        *table_strides("scale", scale), *x.shape, split, eps, dtype_code("x", x),
    )  # fmt: skip
    return y


def norm_modulate_backward(
    dy: Tensor,  # [B, L, D]
    x: Tensor,  # [B, L, D]
    scale: Tensor | None,  # [B, D] or [B, 2, D]
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # dx as x; dshift, dscale float32 of scale's shape, empty without scale
    """Gradients of `norm_modulate`; the statistics of the rows are computed again."""
    dy, x, scale = rows_contiguous(dy.to(x.dtype)), rows_contiguous(x), _contiguous(scale)
    batch, length, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dshift, dscale = _sums(scale, x), _sums(scale, x)
    rows = rows_per_chunk(batch, length)
    partial = None if scale is None else _partial(x, chunks(length, split, rows), 2)
    launch(
        "norm_modulate_backward", *row_strides(dx), _out(scale, dshift), _out(scale, dscale), partial,
        *row_strides(dy), *row_strides(x), *table_strides("scale", scale), batch, length, width, split,
        _streams(scale), rows, eps, dtype_code("x", x),
    )  # fmt: skip
    return dx, dshift, dscale


def _partial(x: Tensor, n_chunks: int, sums: int) -> Tensor:
    """Work space [B, chunks, sums, D]; never without an element, since an address of 0 means "no sums wanted"."""
    batch, _, width = x.shape
    return torch.empty(max(1, batch * n_chunks * sums * width), dtype=torch.float32, device=x.device)


def _same_type(x: Tensor, branch: Tensor) -> bool:
    return x.dtype == branch.dtype


def gate_residual(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None,  # [B, D] or [B, 2, D]
    split: int = 0,
) -> Tensor:  # [B, L, D], dtype of x
    """x + gate * branch, as `flowmo_kernels.gate_residual`."""
    if not _same_type(x, branch):
        return gate_residual(x.float(), branch.float(), gate, split).to(x.dtype)
    x, branch, gate = rows_contiguous(x), rows_contiguous(branch), _contiguous(gate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        "gate_residual", *row_strides(out), *row_strides(x), *row_strides(branch), *table_strides("gate", gate),
        *x.shape, split, dtype_code("x", x),
    )  # fmt: skip
    return out


def gate_residual_norm_modulate(
    x: Tensor,  # [B, L, D]
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None,  # [B, D] or [B, 2, D]
    shift: Tensor | None,  # [B, D] or [B, 2, D]
    scale: Tensor | None,  # as shift
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # two of [B, L, D], dtype of x
    """x' = x + gate * branch and y = (1 + scale) * LN(x') + shift, as `flowmo_kernels.gate_residual_norm_modulate`."""
    if not _same_type(x, branch):
        out = gate_residual(x, branch, gate, split)
        return out, norm_modulate(out, shift, scale, split, eps)
    x, branch, gate = rows_contiguous(x), rows_contiguous(branch), _contiguous(gate)
    shift, scale = _contiguous(shift), _contiguous(scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty_like(out)
    launch(
        "gate_residual_norm_modulate", *row_strides(out), *row_strides(y), *row_strides(x), *row_strides(branch),
        *table_strides("gate", gate), *table_strides("shift", shift), *table_strides("scale", scale), *x.shape,
        split, eps, dtype_code("x", x),
    )  # fmt: skip
    return out, y


def gate_residual_backward(
    dout: Tensor,  # [B, L, D], d loss / d x'; also the gradient of x
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None,  # [B, D] or [B, 2, D]
    split: int = 0,
) -> tuple[Tensor, Tensor]:  # dbranch as branch; dgate float32 of gate's shape, empty without gate
    """Gradients of `gate_residual` in branch and gate; that in x is `dout` itself."""
    if not _same_type(dout, branch):
        dbranch, dgate = gate_residual_backward(dout.float(), branch.float(), gate, split)
        return dbranch.to(branch.dtype), dgate
    dout, branch, gate = rows_contiguous(dout), rows_contiguous(branch), _contiguous(gate)
    batch, length, width = branch.shape
    dbranch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    dgate = _sums(gate, branch)
    rows = rows_per_chunk(batch, length)
    partial = None if gate is None else _partial(branch, chunks(length, split, rows), 1)
    launch(
        "gate_residual_backward", *row_strides(dbranch), _out(gate, dgate), partial, *row_strides(dout),
        *row_strides(branch), *table_strides("gate", gate), batch, length, width, split, _streams(gate), rows,
        dtype_code("branch", branch),
    )  # fmt: skip
    return dbranch, dgate


def gate_residual_norm_modulate_backward(
    dout: Tensor,  # [B, L, D], d loss / d x' from the residual path
    dy: Tensor,  # [B, L, D]
    out: Tensor,  # [B, L, D], x' of the forward pass
    branch: Tensor,  # [B, L, D]
    gate: Tensor | None,  # [B, D] or [B, 2, D]
    scale: Tensor | None,  # [B, D] or [B, 2, D]
    split: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gate_residual_norm_modulate`.

    Returns:
        dx (as x'), dbranch (as branch), dgate, dshift, dscale (float32 of the shapes of gate and scale, empty where
        there is no gate or scale).
    """
    if not _same_type(out, branch):
        dnorm, dshift, dscale = norm_modulate_backward(dy.float(), out.float(), scale, split, eps)
        dx = dnorm + dout.float()
        dbranch, dgate = gate_residual_backward(dx, branch.float(), gate, split)
        return dx.to(out.dtype), dbranch.to(branch.dtype), dgate, dshift, dscale
    dout, dy = rows_contiguous(dout.to(out.dtype)), rows_contiguous(dy.to(out.dtype))
    out, branch, gate, scale = rows_contiguous(out), rows_contiguous(branch), _contiguous(gate), _contiguous(scale)
    batch, length, width = out.shape
    dx = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    dbranch = torch.empty_like(dx)
    dgate, dshift, dscale = _sums(gate, out), _sums(scale, out), _sums(scale, out)
    rows = rows_per_chunk(batch, length)
    partial = None if gate is None and scale is None else _partial(out, chunks(length, split, rows), 3)
    launch(
        "gate_residual_norm_modulate_backward", *row_strides(dx), *row_strides(dbranch), _out(gate, dgate),
        _out(scale, dshift), _out(scale, dscale), partial, *row_strides(dout), *row_strides(dy), *row_strides(out),
        *row_strides(branch), *table_strides("gate", gate), *table_strides("scale", scale), batch, length, width,
        split, _streams(gate), _streams(scale), rows, eps, dtype_code("x", out),
    )  # fmt: skip
    return dx, dbranch, dgate, dshift, dscale
