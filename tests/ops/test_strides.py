"""Kernels read channels side by side; tensors that lie otherwise give the same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowmo_kernels as fk
from flowmo_kernels import use

from .oracle import random


def apart(t: Tensor) -> Tensor:
    """The same numbers with every second place of the last axis left out, NaN in between (or a large integer)."""
    if not t.dim():
        return t
    filler = torch.full_like(t, torch.nan if t.is_floating_point() else 100)
    return torch.stack([t, filler], -1).flatten(-2)[..., ::2]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=i) for i, shape in enumerate(shapes)]


# B = 2, L = 3 of which one is latent, D = 24, P = 12
ROWS, ONE, TWO, PATCHES = (2, 3, 24), (2, 24), (2, 2, 24), (2, 3, 12)
Case = tuple[Callable[..., Any], list[Tensor], bool]
CASES: dict[str, Case] = {
    "norm_modulate": (lambda *a: fk.norm_modulate(*a, split=1), tensors(ROWS, TWO, TWO), True),
    "gate_residual": (lambda *a: fk.gate_residual(*a, split=1), tensors(ROWS, ROWS, TWO), True),
    "gate_residual_norm_modulate": (
        lambda *a: fk.gate_residual_norm_modulate(*a), tensors(ROWS, ROWS, ONE, ONE, ONE), True
    ),
    "norm_modulate_fp8": (lambda *a: fk.norm_modulate_fp8(*a, split=1), tensors(ROWS, TWO, TWO), False),
    "gate_residual_norm_modulate_fp8": (
        lambda *a: fk.gate_residual_norm_modulate_fp8(*a), tensors(ROWS, ROWS, ONE, ONE, ONE), False
    ),
    "gelu_fp8": (fk.gelu_fp8, tensors(ROWS), False),
    "qk_norm_rope": (
        lambda qkv, q, k, cos, sin: fk.qk_norm_rope(qkv, q, k, (cos.detach(), sin.detach()), split=1),
        tensors((1, 3, 3, 2, 8), (2, 8), (2, 8), (3, 4), (3, 4)), True,
    ),
    "linear_gelu": (fk.linear_gelu, tensors(ROWS, (12, 24), (12,)), True),
    "attention": (lambda *a: fk.joint_attention(*a, 0.5, backend="triton"), tensors(*[(1, 7, 2, 16)] * 3), True),
    "attention in fp8": (lambda *a: fk.attention_quantized(*a, 0.5), tensors(*[(1, 7, 2, 16)] * 3), False),
    "lfq": (lambda x: [out for out in fk.lfq(x, 8) if out.is_floating_point()], tensors(ROWS), True),
    "lfq tokens": (lambda x: fk.lfq(x, 8).tokens, tensors(ROWS), False),
    "pack_tokens": (lambda t: fk.pack_tokens(t, 9), [torch.arange(14).view(2, 7)], False),
    "unpack_tokens": (lambda t: fk.unpack_tokens(t, 9, 7), [torch.arange(16, dtype=torch.uint8).view(2, 8)], False),
    "euler_step": (lambda *a: fk.euler_step(*a, dt=0.1, w=1.5), tensors(PATCHES, PATCHES, PATCHES), True),
    "step_boundary": (
        lambda h, null, *a: fk.step_boundary(h, *a, dt=0.1, h_null=null, w=1.5),
        tensors(ROWS, ROWS, ONE, ONE, (12, 24), (12,), PATCHES, (24, 12), (24,)), False,
    ),
}  # fmt: skip


def results(case: Case, inputs: list[Tensor], upstream: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs that have one."""
    op, _, differentiable = case
    leaves = [t.detach().requires_grad_() for t in inputs] if differentiable else inputs
    out = op(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if not differentiable:
        return outputs
    given = [upstream(random(*y.shape, seed=50 + i)) for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    with torch.no_grad():  # some ops have a way of their own without a gradient
        again = op(*inputs)
    return [*outputs, *([again] if isinstance(again, Tensor) else again), *(g for g in gradients if g is not None)]


def same(got: Tensor, want: Tensor) -> bool:
    """The same bits; on a card up to the order of sums, since libraries and compilers look at strides and alignment."""
    if not got.is_cuda or not got.is_floating_point():
        return torch.equal(got, want)
    unit = 2**-3 if got.element_size() == 1 else 2**-20
    return bool(((got.float() - want.float()).abs() <= unit * want.float().abs().max()).all())


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_wherever_they_lie(name: str, implementation: str, device: str) -> None:
    case = CASES[name]
    inputs = [t.to(device) for t in case[1]]
    with use(implementation):
        expected = results(case, inputs, lambda t: t.to(device))
        for i in range(len(inputs)):
            moved = [apart(t) if i == j else t for j, t in enumerate(inputs)]
            for got, want in zip(results(case, moved, lambda t: t.to(device)), expected, strict=True):
                assert same(got, want), f"input {i}"
        if case[2]:
            for got, want in zip(results(case, inputs, lambda t: apart(t.to(device))), expected, strict=True):
                assert same(got, want), "upstream gradient"
