"""8-bit attention: rounding as the reference rounds, and sums that are exact up to the rounding of p."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from flowmo_kernels import (
    KernelUnavailableError,
    attention_quantized,
    attention_quantized_ref,
    joint_attention,
    joint_attention_ref,
    use,
)
from flowmo_kernels.fp8 import FP8

from .oracle import random, sliced

module = import_module("flowmo_kernels.attention_quantized")
Shape = tuple[int, int, int, int]
# B, L, H, d: one token, a tail of keys and channels, 64 + 32 channels in two blocks, one part, more than two blocks
SHAPES = [(1, 1, 1, 8), (2, 45, 2, 12), (1, 64, 1, 96), (1, 33, 1, 64), (1, 70, 2, 32)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.blocks
    monkeypatch.setattr(module, "blocks", lambda d, length: whole(d, length)._replace(m=32, n=32, warps=4, stages=1))


def make(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q and k of unit RMS as the query-key norm leaves them, as strided views; block sizes of v that differ."""
    b, length, h, d = shape
    qkv = random(b, length, 3, h, d, device=device)
    qkv[:, :, :2] *= qkv[:, :, :2].square().mean(-1, keepdim=True).rsqrt()
    qkv[:, : length // 2, 2] *= 30
    return list(sliced(qkv.to(dtype), margin=2).unbind(2))


def dequantized(z, length: int, block: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """q, k, v [B, H, L, d] as their 8-bit forms stand for, in fp64."""
    q = z.q.double() * z.q_scale[..., None].double()
    k = z.k.double() * z.k_scale.double().repeat_interleave(block, -1)[..., None]
    v = z.v.double().transpose(2, 3) * z.v_scale.double().repeat_interleave(block, -1)[..., None]
    return q, k[:, :, :length], v[:, :, :length]


def check(o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, format: str) -> None:
    """o against the exact attention of the rounded q, k and v."""
    length, block = k.shape[1], module.blocks(q.shape[-1], k.shape[1]).n
    z = module.quantize_ref(q, k, v, module._low(format), block)
    q64, k64, v64 = dequantized(z, length, block)
    p = (scale * q64 @ k64.transpose(2, 3)).softmax(-1)
    exact = (p @ v64).transpose(1, 2)
    # Each p is off by half a unit of e4m3's three bits, or of its smallest number 2^-9 below 256 g / G; fp32 sums.
    unit = 2**-10 / 256 * (z.v_scale.amax(-1, keepdim=True) / z.v_scale).double().repeat_interleave(block, -1)
    largest = p.amax(-1, keepdim=True)
    off = (p * 2**-4).maximum(largest * unit[..., None, :length]) @ v64.abs()
    # One rounding to the dtype of o, and fp32 logits of a few units.
    last = exact.abs() * (2**-8 if o.dtype == torch.bfloat16 else 0) + (p @ v64.abs()).transpose(1, 2) * 2**-16
    assert ((o.double() - exact).abs() <= off.transpose(1, 2) + last).all()


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_kernel_and_reference(shape: Shape, format: str, device: str) -> None:
    q, k, v = make(shape, device)
    scale = 8 / shape[3]
    check(attention_quantized_ref(q, k, v, scale, format=format), q, k, v, scale, format)
    size, low = module.blocks(shape[3], shape[1]), module._low(format)
    if device == "cpu" and not module.INTERPRETED:
        pytest.skip("no card, and Triton is not interpreted")
    got, expected = module.quantize(q, k, v, low, size), module.quantize_ref(q, k, v, low, size.n)
    for name, a, b in zip(module.Quantized._fields, got, expected):
        if name.endswith("scale"):
            torch.testing.assert_close(a, b, rtol=2**-22, atol=0)
        else:  # a quotient one unit of fp32 away may fall to the other side of a tie
            step = 1 if a.dtype == torch.int8 else 2**-3 * b.float().abs().clamp_min(2**-6)
            differs = a.float() != b.float()
            assert ((a.float() - b.float()).abs() <= step).all() and differs.float().mean() < 1e-3, name
    with use("triton"):
        check(attention_quantized(q, k, v, scale, format=format), q, k, v, scale, format)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("shape", [(1, 4352, 2, 96), (2, 1280, 2, 64), (1, 4351, 1, 96)])
def test_real_shapes(shape: Shape, format: str) -> None:
    q, k, v = make(shape, "cuda", torch.bfloat16)
    check(attention_quantized(q, k, v, 8 / shape[3], format=format), q, k, v, 8 / shape[3], format)


@pytest.mark.usefixtures("small_tiles")
def test_fewer_queries_and_both_orders_in_memory(device: str) -> None:
    q, k, v = make((2, 45, 2, 32), device)
    with use("triton"):
        whole = attention_quantized(q, k, v, 0.25)
        part = attention_quantized(q[:, 40:], k, v, 0.25)
        rows = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        by_sequence = attention_quantized(*rows, 0.25)
    assert torch.equal(part, whole[:, 40:]) and torch.equal(by_sequence, whole)
    assert whole.is_contiguous() and by_sequence.transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(("format", "most"), [("fp8", 0.05), ("int8", 0.04)])
def test_how_far_from_sixteen_bits(format: str, most: float, device: str) -> None:
    """Relative error of the whole result: v and p are each off by 2^-4 / sqrt(3) = 3.6 % at most, uniform rounding."""
    q, k, v = make((2, 200, 3, 96), device)
    exact = joint_attention_ref(q.double(), k.double(), v.double(), 8 / 96)
    o = attention_quantized_ref(q, k, v, 8 / 96, format=format)
    assert 1e-3 < (o - exact).norm() / exact.norm() < most


@pytest.mark.usefixtures("small_tiles")
def test_large_logits_and_rows_of_zeros(device: str) -> None:
    q, k, v = make((1, 40, 1, 16), device)
    q, k, v = 40 * q, k.clone(), v.clone()
    k[:, 3], v[:, 7], q[:, 5] = 0, 0, 0
    with use("triton"):
        for format in ("fp8", "int8"):
            check(attention_quantized(q, k, v, 0.5, format=format), q, k, v, 0.5, format)


@pytest.mark.parametrize("implementation", ["ref", "triton"])
@pytest.mark.parametrize("keys", [1, 3, 64])
@pytest.mark.usefixtures("small_tiles")
def test_a_mean_of_numbers_that_eight_bits_hold_is_exact(keys: int, implementation: str, device: str) -> None:
    """Queries of zero weigh all keys alike, at 256 / 256; so nothing but the scales could be off, by any factor."""
    v = 2.0 ** torch.randint(-3, 4, (1, keys, 2, 128), generator=torch.Generator().manual_seed(0))
    v[:, 0], v[:, -1] = 8, 8  # one scale for all blocks
    v = v.to(device)
    with use(implementation):
        o = attention_quantized(torch.zeros_like(v), v, v, 0.5)
    # Roundings of the scale, of the sum of up to 64 numbers and of the quotient.
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(v), rtol=70 * 2**-24, atol=0)


def test_backends_of_joint_attention(device: str) -> None:
    q, k, v = make((1, 5, 2, 16), device)
    for format in ("fp8", "int8"):
        o = joint_attention(q, k, v, 0.5, backend=format)
        assert torch.equal(o, attention_quantized(q, k, v, 0.5, format=format)) and o.is_contiguous()
    assert attention_quantized(q[:0], k[:0], v[:0], 0.5).shape == (0, 5, 2, 16)


@pytest.mark.usefixtures("small_tiles")
def test_library_op_and_compile(device: str) -> None:
    q, k, v = make((1, 5, 2, 16), device)
    torch.library.opcheck(torch.ops.flowmo_kernels.attention_quantized.default, (q, k, v, 0.5, "fp8"))
    with torch.no_grad(), use("triton"):
        compiled = torch.compile(
            lambda *a: joint_attention(*a, 0.5, backend="int8"), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(q, k, v), joint_attention(q, k, v, 0.5, backend="int8"))


def test_bad_input(device: str) -> None:
    q, k, v = make((1, 5, 2, 16), device)
    with pytest.raises(ValueError, match="expected one of fp8, int8"):
        attention_quantized(q, k, v, 0.5, format="int4")
    with pytest.raises(RuntimeError, match="has no gradient"):
        attention_quantized(q.clone().requires_grad_(), k, v, 0.5)
    with pytest.raises(KernelUnavailableError, match="at most 128 channels"):
        joint_attention(*make((1, 2, 1, 130), device), 0.5, backend="fp8")


def test_cards_that_cannot_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = import_module("flowmo_kernels.fp8")
    monkeypatch.setattr(fp8, "_architecture", lambda index: 80)
    reason = fp8.why_no_fp8(torch.device("cuda", 0))
    assert reason == "fp8 needs compute capability 8.9, this CUDA device has 8.0"
    assert FP8 in (module._low("fp8"),)
