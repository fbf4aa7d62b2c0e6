from __future__ import annotations

from importlib import import_module
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo_kernels import gelu_fp8, gelu_fp8_ref, linear_fp8, quantize_rows, use
from flowmo_kernels.fp8 import FP8

from .oracle import compare, random, sliced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of one number, of a power of two and of odd widths, several leading axes, no rows, and the widths of the models.
SHAPES = [(3, 1), (5, 64), (2, 3, 37), (0, 16), (7, 100), (2, 3072), (1, 4608)]
REAL = (4 * 4096 + 1, 4608)  # several rows to a program, the last of which has one
IMPLEMENTATIONS = ("ref", "triton")


def check(u: Tensor) -> None:
    with use("triton"):
        values, scales = gelu_fp8(u)
    assert values.dtype == FP8 and values.shape == u.shape
    assert scales.dtype == torch.float32 and scales.shape == (*u.shape[:-1], 1)
    if u.numel() == 0:
        return
    ref_values, ref_scales = gelu_fp8_ref(u)
    oracle = F.gelu(u.double(), approximate="tanh")
    compare("scales", scales, ref_scales, oracle.abs().amax(-1, keepdim=True) / 448, 2.0, terms=1)
    dequantized, ref_dequantized = values.double() * scales, ref_values.double() * ref_scales
    compare("values", dequantized, ref_dequantized, oracle, 2.0, terms=1)
    # Half a unit of the last of 3 mantissa bits, and of the smallest subnormal, 2^-9 of the scale.
    allowed = oracle.abs() * 2**-4 + scales * 2**-10 + 1e-6 * scales
    assert ((dequantized - oracle).abs() <= allowed).all()
    # PyTorch's u (1 + tanh) / 2 cancels where it is nearly zero.
    assert ((ref_dequantized - oracle).abs() <= allowed + u.double().abs() * 2**-23).all()
    smallest = 1e-12  # rows below it all over count as zeros
    assert (values.float().abs().amax(-1)[oracle.abs().amax(-1) > 1.01 * smallest] == 448).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    u = 3 * random(*shape, dtype=dtype, device=device)
    check(sliced(u))
    check(1e-3 * u)


@pytest.mark.gpu
def test_real_shapes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check(3 * random(*REAL, dtype=dtype, device="cuda"))


def test_several_rows_to_a_program(device: str) -> None:
    """As launches of many rows have it; the last program has rows that are not there."""
    module = import_module("flowmo_kernels.gelu_fp8")
    launch = module.row_launch
    with mock.patch.object(module, "row_launch", lambda *a, **k: launch(*a, **k)._replace(iters=3)):
        check(random(7, 40, dtype=torch.bfloat16, device=device))


def test_numbers_by_hand(device: str) -> None:
    """Far from zero GELU(u) is u or nothing, so that quotients are exact."""
    u = torch.tensor([[20.0, 10.0, 0.0, -20.0], [-30.0, 7.0, 14.0, 28.0]], device=device)
    for implementation in IMPLEMENTATIONS:
        with use(implementation):
            values, scales = gelu_fp8(u)
        assert values.tolist() == [[448.0, 224.0, 0.0, 0.0], [0.0, 112.0, 224.0, 448.0]]
        torch.testing.assert_close(scales.flatten(), torch.tensor([20 / 448, 28 / 448], device=device))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e38), (torch.float16, 65504.0), (torch.float32, 3e38)])
def test_zeros_and_huge_numbers(dtype: torch.dtype, most: float, device: str) -> None:
    """A row of zeros, or of numbers whose GELU is zero, has a finite scale; the largest numbers do not overflow."""
    u = torch.tensor([[0.0] * 3, [-most, -most, -1e3], [most, most / 2, -most]], dtype=dtype, device=device)
    for implementation in IMPLEMENTATIONS:
        with use(implementation):
            values, scales = gelu_fp8(u)
        assert values.tolist() == [[0.0] * 3, [0.0] * 3, [448.0, 224.0, 0.0]]
        assert (scales > 0).all() and scales.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(bad: float, device: str) -> None:
    """Every output of the next layer that reads the row is NaN; nothing else notices."""
    u = random(3, 48, device=device)
    w = quantize_rows(random(16, 48, device=device, seed=1))
    for implementation in IMPLEMENTATIONS:
        with use(implementation):
            good = linear_fp8(*gelu_fp8(u), *w)
            spoilt = u.clone()
            spoilt[1, 40] = bad
            got = linear_fp8(*gelu_fp8(spoilt), *w)
        assert got[1].isnan().all() and torch.equal(got[::2], good[::2]) and good.isfinite().all()


def test_library_op_and_compile(device: str) -> None:
    u = random(2, 5, 12, device=device)
    tests = ("test_schema", "test_faketensor")  # comparing fp8 tensors is not implemented in the others
    torch.library.opcheck(torch.ops.flowmo_kernels.gelu_fp8.default, (u,), test_utils=tests)

    def chain(u: Tensor) -> Tensor:
        values, scales = gelu_fp8(u)
        return linear_fp8(values, scales, values[0], scales[0])

    with torch.no_grad(), use("triton"):
        torch._dynamo.reset()
        compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
        if device == "cpu":
            assert torch.equal(chain(u), compiled(u))


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match="gelu_fp8 has no gradient"):
        gelu_fp8(random(3, 8).requires_grad_())
    with pytest.raises(ValueError, match=r"expected a float dtype and shape \[..., F\]"):
        gelu_fp8(torch.zeros(()))
    with pytest.raises(ValueError, match="expected a float dtype"):
        gelu_fp8(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="with F > 0"):
        gelu_fp8(torch.zeros(3, 0))
