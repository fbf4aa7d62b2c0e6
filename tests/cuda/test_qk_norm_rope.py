"""qk_norm_rope: CUDA kernels against the reference, forward, in place and backward."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowmo_kernels import _cuda, qk_norm_rope_ref

from .conftest import Machine
from .tools import DTYPES, check, randn


class Case(NamedTuple):
    batch: int
    length: int
    heads: int
    width: int
    streams: int
    split: int = 0
    slices: bool = False


CASES = [
    Case(2, 5, 3, 96, 2, 2),
    Case(1, 3, 2, 64, 1),
    Case(1, 1, 5, 32, 2, 1),
    Case(2, 3, 2, 6, 2, 0),
    Case(1, 7, 1, 70, 1),
    Case(1, 3, 2, 96, 2, 3, slices=True),
    Case(0, 3, 2, 64, 1),
    Case(1, 13, 7, 64, 2, 5),
]


def tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv, its upstream gradient, both gains, cos and sin."""
    shape = (case.batch, case.length, 3, case.heads, case.width)
    qkv, dy = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    if case.slices:  # tokens and channels of a larger buffer, off by one element
        big = torch.full((case.batch, case.length + 2, 3, case.heads, case.width + 1), math.nan, dtype=dtype)
        big[:, 1:-1, ..., 1:] = qkv
        qkv = big[:, 1:-1, ..., 1:]
    gains = (2, case.width) if case.streams == 2 else (case.width,)
    q_scale = 1 + randn(*gains, seed=3, dtype=dtype, scale=0.3)
    k_scale = 1 + randn(*gains, seed=4, dtype=dtype, scale=0.3)
    angles = randn(case.length, case.width // 2, seed=5, scale=3.0)
    return qkv, dy, q_scale, k_scale, angles.cos(), angles.sin()


def with_gradients(case: Case, inputs: list[Tensor], dy: Tensor, rope: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = qk_norm_rope_ref(*leaves, rope, split=case.split)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:6])) + ("-slices" if c.slices else ""))
def test_qk_norm_rope(machine: Machine, case: Case, dtype: torch.dtype) -> None:
    qkv, dy, q_scale, k_scale, cos, sin = tensors(case, dtype)

    def body(qkv: Tensor, dy: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        y = _cuda.qk_norm_rope(qkv, *tables, case.split)
        gradients = _cuda.qk_norm_rope_backward(dy, qkv, *tables, case.split)
        _cuda.qk_norm_rope_(qkv, *tables, case.split)
        return y, *gradients, qkv

    y, dx, dq, dk, inplace = machine(body, qkv, dy, q_scale, k_scale, cos, sin)
    assert torch.equal(inplace, y), "in place differs"
    if y.numel():
        assert torch.equal(y[:, :, 2], qkv[:, :, 2]), "v is not a copy"
    inputs = [qkv, q_scale, k_scale]
    plain = with_gradients(case, inputs, dy, (cos, sin))
    oracle = with_gradients(case, [t.double() for t in inputs], dy, (cos, sin))
    for i, (name, got) in enumerate([("y", y), ("dx", dx), ("dq_scale", dq.to(dtype)), ("dk_scale", dk.to(dtype))]):
        assert not plain[i].numel() or not case.batch or plain[i].abs().max() > 0, f"{name} vanishes"
        check(got, plain[i], oracle[i], factor=3 if i else 2, name=name)


def test_surroundings_are_not_touched(machine: Machine) -> None:
    """In place on a slice: what lies around it stays as it was."""
    case = Case(1, 3, 2, 96, 2, 1, slices=True)
    qkv, _, *tables = tensors(case, torch.bfloat16)

    def body(big: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        _cuda.qk_norm_rope_(big[:, 1:-1, ..., 1:], *tables, case.split)
        return (big,)

    big = torch.as_strided(qkv, (1, 5, 3, 2, 97), (5 * 3 * 2 * 97, 3 * 2 * 97, 2 * 97, 97, 1), 0)
    (after,) = machine(body, big, *tables)
    assert after[:, 0].isnan().all() and after[:, -1].isnan().all() and after[..., 0].isnan().all()
    assert after[:, 1:-1, ..., 1:].isfinite().all()


def test_inplace_needs_contiguous_channels() -> None:
    qkv = torch.zeros(1, 2, 3, 32, 4).transpose(3, 4)
    gain, table = torch.ones(32), torch.zeros(2, 16)
    with pytest.raises(ValueError, match="channels"):
        _cuda.qk_norm_rope_(qkv, gain, gain, table, table)
