from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import linear_gelu, linear_gelu_ref, use

from .oracle import compare, compiles, judge, random, sliced

DTYPES = [torch.float32, torch.bfloat16]
# leading axes, D, F
SHAPES = [((1,), 1, 1), ((2, 19), 12, 37), ((40,), 16, 300), ((0, 4), 3, 5)]
REAL = [((2, 4352), 1152, 4608), ((2, 4352), 768, 3072)]


def make(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    lead, d, f = shape
    x = sliced(random(*lead, d, dtype=dtype, device=device), margin=2)
    w = (2 * random(f, d, device=device, seed=1) / d**0.5).to(dtype)
    return [x, w, random(f, dtype=dtype, device=device, seed=2)]


def run(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, device: str) -> None:
    rows = torch.Size(shape[0]).numel()
    judge(linear_gelu, linear_gelu_ref, make(shape, dtype, device), "triton", terms=shape[1] + shape[2] + rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, device: str) -> None:
    run(shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: tuple[tuple[int, ...], int, int]) -> None:
    run(shape, torch.bfloat16, "cuda")


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 80), st.sampled_from(DTYPES))
def test_random_shapes(rows: int, d: int, f: int, dtype: torch.dtype) -> None:
    run(((rows,), d, f), dtype, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(dtype: torch.dtype, device: str) -> None:
    """Without a gradient the epilogue computes it: on a card this is where an erf GELU would be caught."""
    judge(linear_gelu, linear_gelu_ref, make(SHAPES[1], dtype, device), "triton", terms=64, gradients=False)


def test_gelu_gradient_over_its_whole_range(device: str) -> None:
    """Slopes from the far left, where they vanish, to the far right, where they are 1; nothing overflows."""
    u = torch.cat([torch.linspace(-12, 12, 4096), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])]).to(device)[:, None]
    dy = torch.ones_like(u)
    du, db = torch.ops.flowmo_kernels.gelu_backward(dy, u)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = u.to(dtype).requires_grad_()
        grads.append(torch.autograd.grad(F.gelu(leaf, approximate="tanh").sum(), leaf)[0])
    compare("slope", du, grads[0], grads[1], 2.0, terms=1)
    compare("bias gradient", db, grads[0].sum(0), grads[1].sum(0), 3.0, terms=u.numel())


def test_autocast(device: str) -> None:
    """fp32 weights under autocast: computed in bf16, gradients in fp32."""
    x, w, b = (t.requires_grad_() for t in make(SHAPES[1], torch.float32, device))
    with use("triton"), torch.autocast(device, torch.bfloat16):
        y = linear_gelu(x, w, b)
    assert y.dtype == torch.bfloat16
    for g in torch.autograd.grad(y.float().sum(), (x, w, b)):
        assert g.dtype == torch.float32 and g.isfinite().all()


def test_library_ops(device: str) -> None:
    x, w, b = make(SHAPES[1], torch.float32, device)
    torch.library.opcheck(torch.ops.flowmo_kernels.linear_gelu.default, (x, w, b))
    u = random(7, 5, device=device)
    torch.library.opcheck(torch.ops.flowmo_kernels.gelu_backward.default, (u.clone(), u))


def test_compiles(device: str) -> None:
    compiles(linear_gelu, make(SHAPES[1], torch.float32, device), "triton")
    with torch.no_grad():
        x, w, b = make(SHAPES[1], torch.float32, device)
        compiles(linear_gelu, (x, w, b), "triton")


def test_bad_input(device: str) -> None:
    x, w, b = make(SHAPES[1], torch.float32, device)
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="do not fit"):
                linear_gelu(x, w.t(), b)
            with pytest.raises(ValueError, match="do not fit"):
                linear_gelu(x[..., 1:], w, b)
            with pytest.raises(ValueError, match="do not fit"):
                linear_gelu(x, w, b[:3])
    with use("triton"), pytest.raises(ValueError, match="give one dtype, or call it under autocast"):
        linear_gelu(x.bfloat16(), w, b)
