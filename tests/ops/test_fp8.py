from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowmo_kernels import (
    gate_residual_norm_modulate_fp8,
    gate_residual_norm_modulate_fp8_ref,
    gate_residual_ref,
    linear_fp8,
    linear_fp8_ref,
    norm_modulate_fp8,
    norm_modulate_fp8_ref,
    norm_modulate_ref,
    quantize_rows,
    use,
)
from flowmo_kernels.fp8 import FP8

from .oracle import compare, random, sliced

DTYPES = [torch.float32, torch.bfloat16]
# B, L, D, split
SHAPES = [(2, 1, 8, 0), (2, 7, 96, 3), (1, 11, 37, 11), (0, 4, 16, 2)]
REAL = (2, 4352, 1152, 256)


def make(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, branch, gate, shift, scale"""
    b, length, d, _ = shape
    x, r = (sliced(random(b, length, d, dtype=dtype, device=device, seed=s)) for s in (0, 1))
    return [x, r, *(random(b, 2, d, device=device, seed=s) for s in (2, 3, 4))]


def run(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    x, r, gate, shift, scale = make(shape, dtype, device)
    split = shape[3]
    with use("triton"):
        values, scales = norm_modulate_fp8(x, shift, scale, split=split)
        plain_values, plain_scales = norm_modulate_fp8(x)
        x_new, fused_values, fused_scales = gate_residual_norm_modulate_fp8(x, r, gate, shift, scale, split=split)
    # Not bit for bit: the compiler may contract gate * branch + x into one rounding.
    exact = gate_residual_ref(x.double(), r.double(), gate.double(), split=split)
    compare("x'", x_new, gate_residual_ref(x, r, gate, split=split), exact, 2.0, terms=2)
    for got, row_scale, base, mods in (
        (values, scales, x, (shift, scale)),
        (plain_values, plain_scales, x, ()),
        (fused_values, fused_scales, x_new, (shift, scale)),
    ):
        assert got.dtype == FP8 and row_scale.dtype == torch.float32
        assert got.shape == x.shape and row_scale.shape == (*x.shape[:2], 1)
        if got.numel() == 0:
            continue
        ref_values, ref_scales = norm_modulate_fp8_ref(base, *mods, split=split if mods else 0)
        oracle = norm_modulate_ref(base.double(), *(m.double() for m in mods), split=split if mods else 0)
        compare("scales", row_scale, ref_scales, oracle.abs().amax(-1, keepdim=True) / 448, 2.0, terms=shape[2])
        dequantized = got.float() * row_scale
        compare("values", dequantized, ref_values.float() * ref_scales, oracle, 2.0, terms=shape[2])
        # Half a unit of the last of 3 mantissa bits, and of the smallest subnormal, 2^-9 of the scale.
        bound = oracle.abs() * 2**-4 + row_scale * 2**-10 + 1e-6
        assert ((dequantized - oracle).abs() <= bound).all()
        assert (got.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    run(shape, dtype, device)


@pytest.mark.gpu
def test_real_shapes() -> None:
    run(REAL, torch.bfloat16, "cuda")


def test_rows_of_zeros(device: str) -> None:
    """A constant row normalises to zeros: a finite scale, and zeros."""
    x = torch.full((1, 3, 8), 5.0, device=device)
    for implementation in ("ref", "triton"):
        with use(implementation):
            values, scales = norm_modulate_fp8(x)
        assert (values.float() == 0).all() and (scales > 0).all() and scales.isfinite().all()


def test_linear(device: str) -> None:
    x, w, b = random(5, 3, 32, device=device), random(16, 32, device=device, seed=1), random(16, device=device, seed=2)
    (xv, xs), (wv, ws) = quantize_rows(x), quantize_rows(w)
    y = linear_fp8(xv, xs, wv, ws, b, dtype=torch.bfloat16)
    exact = (xv.double() * xs.double()) @ (wv.double() * ws.double()).t() + b.double()
    assert y.shape == (5, 3, 16) and y.dtype == torch.bfloat16
    # One rounding to bf16; a card adds up in more than 13 bits and rounds the bias to bf16.
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + b.abs() * 2**-9 + 2**-12).all()
    assert (exact - (x @ w.t() + b)).abs().max() < 1.0  # sums of 32 products with relative errors up to 2^-3
    wide = linear_fp8(xv, xs, wv, ws, b, dtype=torch.float32)
    # A card adds up in more than 13 bits of the largest partial sum.
    magnitude = (xv.double() * xs).abs() @ (wv.double() * ws).abs().t() + b.abs()
    assert ((wide.double() - exact).abs() <= magnitude * 2**-12).all()
    reference = linear_fp8_ref(xv, xs, wv, ws, b, dtype=torch.float32)
    torch.testing.assert_close(reference.double(), exact, rtol=0, atol=2**-23 * 33**0.5 * exact.abs().max().item())


def test_linear_into_memory_that_is_there(device: str) -> None:
    """As the engine writes its joint buffer: whole rows, and columns of rows that are wider."""
    x, w, b = random(24, 32, device=device), random(48, 32, device=device, seed=1), random(48, device=device, seed=2)
    arguments = *quantize_rows(x), *quantize_rows(w), b
    expected = linear_fp8(*arguments, dtype=torch.bfloat16)
    buffer = torch.zeros(2, 24, 64, dtype=torch.bfloat16, device=device)
    whole = torch.zeros(24, 48, dtype=torch.bfloat16, device=device)
    for out in (whole, buffer[1, :, 16:]):
        assert linear_fp8(*arguments, dtype=torch.float32, out=out) is out and torch.equal(out, expected)
    wide = torch.zeros(24, 48, device=device)
    assert torch.equal(linear_fp8(*arguments, out=wide), linear_fp8(*arguments, dtype=torch.float32))
    assert (buffer[0] == 0).all() and (buffer[1, :, :16] == 0).all()
    with pytest.raises(ValueError, match="expected \\(24, 48\\)"):
        linear_fp8(*arguments, out=whole[:3])


def test_no_gradient() -> None:
    x = random(1, 3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        norm_modulate_fp8(x)
    with pytest.raises(RuntimeError, match="no gradient"):
        gate_residual_norm_modulate_fp8(x, x.detach())


def test_library_op_and_compile(device: str) -> None:
    shape = (1, 5, 12, 2)
    x, r, gate, shift, scale = make(shape, torch.float32, device)
    op = torch.ops.flowmo_kernels.norm_modulate_fp8.default
    tests = ("test_schema", "test_faketensor")  # comparing fp8 tensors is not implemented in the others
    torch.library.opcheck(op, (x, r, gate, shift, scale, 2, 1e-6), test_utils=tests)
    torch.library.opcheck(op, (x, None, None, None, None, 0, 1e-6), test_utils=tests)

    def chain(*a: Tensor) -> tuple[Tensor, Tensor]:
        x_new, values, scales = gate_residual_norm_modulate_fp8(*a, split=2)
        return x_new, linear_fp8(values, scales, values[0], scales[0])

    with torch.no_grad(), use("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        inputs = (x, r, gate, shift, scale)
        if device == "cpu":
            for a, b in zip(chain(*inputs), compiled(*inputs), strict=True):
                assert torch.equal(a, b)


def test_bad_input() -> None:
    x, r, gate, shift, scale = make((1, 5, 16, 2), torch.float32, "cpu")
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="both shift and scale"):
                norm_modulate_fp8(x, shift)
            with pytest.raises(ValueError, match="both shift and scale"):
                gate_residual_norm_modulate_fp8(x, r, gate, shift, split=2)
            with pytest.raises(ValueError, match="must have one shape"):
                gate_residual_norm_modulate_fp8(x, r[:, :2])
    values, scales = gate_residual_norm_modulate_fp8_ref(x, r, gate, shift, scale, split=2)[1:]
    with pytest.raises(ValueError, match="see quantize_rows"):
        linear_fp8(x, scales, values[0], scales[0])
    with pytest.raises(ValueError, match="do not fit"):
        linear_fp8(values, scales[:, :2], values[0], scales[0])
