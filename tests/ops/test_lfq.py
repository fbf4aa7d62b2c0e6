from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import lfq, lfq_ref, use

from .oracle import compiles, judge, random, sliced

DTYPES = [torch.float32, torch.bfloat16]
# B, T, C, bits
SHAPES = [(1, 1, 9, 9), (2, 7, 18, 9), (1, 5, 56, 14), (3, 11, 3, 1), (2, 13, 10, 5), (0, 4, 18, 9)]
module = import_module("flowmo_kernels.lfq")


def floats(function):  # type: ignore[no-untyped-def]
    """The differentiable outputs of an lfq function."""

    def run(x: Tensor, bits: int) -> list[Tensor]:
        out = function(x, bits)
        return [out.codes, out.per_sample_entropy, out.codebook_entropy, out.commitment]

    return run


def run(shape: tuple[int, int, int, int], dtype: torch.dtype, implementation: str, device: str = "cpu") -> None:
    b, t, c, bits = shape
    x = sliced(0.2 * random(b, t, c, dtype=dtype, device=device))
    judge(floats(lfq), floats(lfq_ref), (x, bits), implementation, terms=b * t * c + 2 ** (bits // 2))
    with use(implementation):
        got = lfq(x, bits)
    want = lfq_ref(x, bits)
    assert torch.equal(got.tokens, want.tokens) and got.tokens.dtype == torch.int64
    assert torch.equal(got.codes, want.codes) and got.codes.dtype == dtype
    assert [s.dtype for s in got[2:]] == 3 * [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: tuple[int, int, int, int], dtype: torch.dtype, implementation: str, device: str) -> None:
    run(shape, dtype, implementation, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 256, 18, 9), (8, 256, 56, 14)])
def test_real_shapes(shape: tuple[int, int, int, int], implementation: str) -> None:
    run(shape, torch.bfloat16, implementation, "cuda")


def dense(x: Tensor, bits: int, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """The entropies as the paper writes them: a softmax over all 2^bits codes for every token."""
    tokens = x.reshape(-1, bits, x.shape[2] // bits).transpose(1, 2).reshape(-1, bits)
    signs = ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1).to(x) * 2 - 1
    log_p = (2 * tokens @ signs.T / temperature).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean(), -(mean * torch.log(mean + 1e-5)).sum()


@pytest.mark.parametrize("bits,channels", [(9, 18), (14, 28)])
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_equals_dense_computation(bits: int, channels: int, scale: float, device: str) -> None:
    """Exact in fp64; within 1e-6 in fp32, by reference and kernel, gradients relative to their largest."""
    x = (scale * random(2, 16, channels, seed=bits)).double().requires_grad_()
    entropies = dense(x, bits)
    gradients = [torch.autograd.grad(h, x, retain_graph=True)[0] for h in entropies]

    out = lfq_ref(x, bits)
    for got, want, gradient in zip(out[2:4], entropies, gradients):
        # 2^14 terms of at most 1, summed in fp64.
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got, x, retain_graph=True)[0], gradient, rtol=0, atol=1e-11)

    for implementation in ("ref", "triton"):
        single = x.detach().float().to(device).requires_grad_()
        with use(implementation):
            out = lfq(single, bits)
        for got, want, gradient in zip(out[2:4], entropies, gradients):
            assert abs(got.item() - want.item()) <= 1e-6 * max(1.0, want.item())
            (got_gradient,) = torch.autograd.grad(got, single, retain_graph=True)
            error = (got_gradient.cpu() - gradient).abs().max().item()
            assert error <= 1e-6 * max(1.0, gradient.abs().max().item())


def test_signs_bits_and_token_order(implementation: str, device: str) -> None:
    """Channel k*2 + f is bit k of sub-token f; zero counts as negative."""
    x = torch.tensor([[[0.1, -0.1, 0.0, 0.2, 0.3, -1e-30], [-1.0, 2.0, 3.0, -0.0, -1.0, 1e-30]]], device=device)
    with use(implementation):
        out = lfq(x, 3)
    # Latent token 0: f=0 has bits (1, 0, 1), f=1 has (0, 1, 0); latent token 1: (0, 1, 0) and (1, 0, 1).
    assert out.tokens.tolist() == [[5, 2, 2, 5]]
    assert out.codes.tolist() == [[[1, -1, -1, 1, 1, -1], [-1, 1, 1, -1, -1, 1]]]


def test_straight_through_gradient_is_the_upstream_one(implementation: str, device: str) -> None:
    x, upstream = random(2, 3, 18, device=device), random(2, 3, 18, device=device, seed=1)
    x.requires_grad_()
    with use(implementation):
        (gradient,) = torch.autograd.grad(lfq(x, 9).codes, x, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("index", [2, 3, 4])
def test_one_output_at_a_time(index: int, implementation: str, device: str) -> None:
    x = (0.1 * random(2, 5, 18, device=device)).requires_grad_()
    gradients = []
    for name in (implementation, "ref"):
        with use(name):
            gradients.append(torch.autograd.grad(lfq(x, 9)[index], x)[0])
    # Sums of at most 2^5 products of terms, all rounded to fp32.
    tolerance = 2**-23 * 2**5 * gradients[1].abs().max().item()
    torch.testing.assert_close(*gradients, rtol=0, atol=tolerance)


def test_saturated_bits_have_finite_gradients(implementation: str, device: str) -> None:
    """Probabilities that are 0 in fp32 must not be divided by, and their logarithms not be multiplied by 0."""
    x = torch.cat((30 * random(1, 8, 18), torch.zeros(1, 8, 18)), 1).to(device).requires_grad_()
    with use(implementation):
        out = lfq(x, 9)
    loss = out.per_sample_entropy - out.codebook_entropy + out.commitment
    (gradient,) = torch.autograd.grad(loss, x)
    want = dense(x.detach().double().cpu(), 9)
    assert gradient.isfinite().all() and gradient[:, :8].abs().max() > 0
    assert abs(out.per_sample_entropy.item() - want[0].item()) < 1e-6 * want[0].item()
    assert abs(out.codebook_entropy.item() - want[1].item()) < 1e-6 * want[1].item()


def test_small_tiles_and_few_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Half-codes in several tiles, tokens in more blocks than programs, so that every loop runs more than once."""
    monkeypatch.setattr(module, "SPLITS", 4)
    monkeypatch.setattr(module, "REDUCE_BLOCK", 64)
    monkeypatch.setattr(module, "forward_launch", lambda bits: module.Launch(16, 16, 16, 4))
    monkeypatch.setattr(module, "backward_launch", lambda bits: module.Launch(16, 16, 16, 4))
    run((2, 53, 11, 11), torch.float32, "triton", device)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 10), st.integers(1, 3), st.sampled_from(DTYPES))
def test_random_shapes(b: int, t: int, bits: int, factors: int, dtype: torch.dtype) -> None:
    run((b, t, bits * factors, bits), dtype, "triton", "cuda" if torch.cuda.is_available() else "cpu")


def test_autocast_changes_nothing(implementation: str, device: str) -> None:
    x = 0.1 * random(2, 9, 56, device=device)
    with use(implementation):
        plain = lfq(x, 14)
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = lfq(x, 14)
    for a, b in zip(plain, cast):
        assert torch.equal(a, b)


def test_empty_batch_has_zero_entropies(implementation: str, device: str) -> None:
    with use(implementation):
        out = lfq(torch.empty(0, 4, 18, device=device), 9)
    assert [s.item() for s in out[2:]] == [0.0, 0.0, 0.0] and out.tokens.shape == (0, 8)


def test_library_ops(device: str) -> None:
    x = sliced(0.1 * random(2, 5, 18, device=device))
    ops = torch.ops.flowmo_kernels
    torch.library.opcheck(ops.lfq_forward.default, (x, 9, 0.1, "triton"))
    gradient = ops.lfq_forward(x, 9, 0.1, "triton")[-1]
    one = torch.ones((), device=device)
    torch.library.opcheck(ops.lfq_backward.default, (x, gradient, x.clone(), one, one, one, 9, 0.1, "triton"))
    torch.library.opcheck(ops.lfq_backward.default, (x, gradient, None, None, one, None, 9, 0.1, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    compiles(lambda x: floats(lfq)(x, 9), (0.1 * random(2, 5, 18, device=device),), implementation)


@pytest.mark.gpu
def test_same_bits_every_time(implementation: str) -> None:
    x = (0.1 * random(8, 256, 56, device="cuda")).requires_grad_()
    runs = []
    for _ in range(2):
        with use(implementation):
            out = lfq(x, 14)
        (gradient,) = torch.autograd.grad(out.per_sample_entropy - out.codebook_entropy, x)
        runs.append([*out, gradient])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="multiple of the 9 bits"):
                lfq(torch.zeros(1, 2, 17), 9)
            with pytest.raises(ValueError, match="x has 0 channels"):
                lfq(torch.zeros(1, 2, 0), 9)
            with pytest.raises(ValueError, match=r"expected floating point \[B, T, C\]"):
                lfq(torch.zeros(1, 2, 18, dtype=torch.int64), 9)
            with pytest.raises(ValueError, match=r"expected floating point \[B, T, C\]"):
                lfq(torch.zeros(2, 18), 9)
            with pytest.raises(ValueError, match="bits is 21"):
                lfq(torch.zeros(1, 2, 21), 21)
            with pytest.raises(ValueError, match="temperature is 0"):
                lfq(torch.zeros(1, 2, 18), 9, temperature=0)
