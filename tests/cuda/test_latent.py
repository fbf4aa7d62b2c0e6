"""lfq, pack_tokens and unpack_tokens: CUDA kernels against the reference."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowmo_kernels import _cuda, lfq_ref
from flowmo_kernels.pack_tokens import pack_tokens_ref

from .conftest import Machine
from .tools import DTYPES, check, inside, randn


class Case(NamedTuple):
    batch: int
    length: int
    channels: int
    bits: int
    slices: bool = False


CASES = [
    Case(2, 5, 18, 9),  # FlowMo-Lo
    Case(1, 6, 56, 14),  # FlowMo-Hi
    Case(1, 1, 1, 1),
    Case(1, 37, 14, 7, slices=True),
    Case(1, 3, 99, 3),  # more than 32 sub-codes of a token, and channels beyond one ballot
    Case(2, 2, 11, 11),
    Case(0, 4, 18, 9),
]


def results(x: Tensor, bits: int, upstream: list[Tensor]) -> list[Tensor]:
    """Codes, entropies and commitment of the reference, and the gradient of x."""
    leaf = x.detach().clone().requires_grad_()
    out = lfq_ref(leaf, bits, temperature=0.7)
    floats = [out.codes, out.per_sample_entropy, out.codebook_entropy, out.commitment]
    torch.autograd.backward(floats, [g.to(o.dtype) for g, o in zip(upstream, floats)])
    assert leaf.grad is not None
    return [*(t.detach() for t in floats), leaf.grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:4])) + ("-slices" if c.slices else ""))
def test_lfq(machine: Machine, case: Case, dtype: torch.dtype) -> None:
    """A temperature of 0.7 keeps probabilities away from 0 and 1, so that gradients of every bit can be compared."""
    x = randn(case.batch, case.length, case.channels, seed=1, dtype=dtype)
    dcodes = randn(case.batch, case.length, case.channels, seed=2, dtype=dtype)
    scalars = [torch.tensor(v) for v in (0.7, -1.3, 0.4)]
    upstream = [dcodes, *scalars]
    plain, oracle = results(x, case.bits, upstream), results(x.double(), case.bits, upstream)
    shaped = inside(x) if case.slices else x

    def body(x: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
        *outputs, gradient = _cuda.lfq(x, case.bits, 0.7)
        return *outputs, _cuda.lfq_backward(x, gradient, *upstream, case.bits, 0.7)

    codes, tokens, sample, codebook, commitment, dx = machine(body, shaped, *upstream)
    assert torch.equal(codes, plain[0])
    assert torch.equal(tokens, lfq_ref(x, case.bits).tokens)
    for name, got, a, b in zip(["per-sample", "codebook", "commitment"], [sample, codebook, commitment], plain[1:4],
                               oracle[1:4]):  # fmt: skip
        # float32 sums of a few hundred numbers, in another order than the reference's
        check(got, a, b, factor=2, name=name, floor=5e-6)
    check(dx, plain[4], oracle[4], factor=3, name="dx", floor=5e-6)


@pytest.mark.parametrize("bits", [17, 20])
def test_lfq_long_codes(machine: Machine, bits: int) -> None:
    """Codes whose half-codes do not fit one tile: several tiles, and the small number of tokens a block."""
    x = randn(1, 2, bits, seed=1)
    upstream = [torch.zeros_like(x), *(torch.tensor(v) for v in (0.0, 1.0, 0.0))]

    def body(x: Tensor, *upstream: Tensor) -> tuple[Tensor, ...]:
        *outputs, gradient = _cuda.lfq(x, bits, 0.7)
        return outputs[3], _cuda.lfq_backward(x, gradient, None, None, upstream[2], None, bits, 0.7)

    schedules = 1 if machine.executor is not None else None  # a million codes: one order of threads is enough here
    codebook, dx = machine(body, x, *upstream, schedules=schedules)
    plain, oracle = results(x, bits, upstream), results(x.double(), bits, upstream)
    check(codebook, plain[2], oracle[2], factor=2, name="codebook", floor=5e-6)
    check(dx, plain[4], oracle[4], factor=3, name="dx", floor=5e-6)


def test_lfq_extreme_values(machine: Machine) -> None:
    """Zero is not positive; probabilities of exactly 0 and 1 give finite numbers."""
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4, 0.3]).reshape(1, 1, 9)

    def body(x: Tensor, one: Tensor) -> tuple[Tensor, ...]:
        *outputs, gradient = _cuda.lfq(x, 9, 0.1)
        return *outputs, _cuda.lfq_backward(x, gradient, None, one, one, None, 9, 0.1)

    codes, tokens, sample, codebook, _, dx = machine(body, x, torch.ones(()))
    assert codes.flatten().tolist() == [-1, -1, 1, -1, 1, -1, 1, -1, 1]
    assert tokens.item() == 0b101010100
    expected = lfq_ref(x, 9)
    torch.testing.assert_close(sample, expected.per_sample_entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(codebook, expected.codebook_entropy, rtol=1e-5, atol=0)
    assert dx.isfinite().all()


@pytest.mark.parametrize("bits", [1, 7, 9, 14, 32])
@pytest.mark.parametrize("shape", [(2, 64), (3, 13), (1, 1), (0, 8), (2, 0)], ids=str)
def test_pack_and_unpack(machine: Machine, bits: int, shape: tuple[int, int]) -> None:
    tokens = torch.randint(1 << bits, shape, generator=torch.Generator().manual_seed(bits))

    def body(tokens: Tensor) -> tuple[Tensor, ...]:
        packed = _cuda.pack_tokens(tokens, bits)
        return packed, _cuda.unpack_tokens(packed, bits, shape[1])

    packed, unpacked = machine(body, tokens)
    assert torch.equal(packed, pack_tokens_ref(tokens, bits))
    assert torch.equal(unpacked, tokens)


def test_pack_slices(machine: Machine) -> None:
    """Tokens and bytes inside larger buffers, at odd distances; only the low bits of a token count."""
    big = torch.full((3, 40), -1, dtype=torch.int64)
    big[:, 1:30] = torch.arange(87).reshape(3, 29) * 7

    def body(big: Tensor) -> tuple[Tensor, ...]:
        whole = _cuda.pack_tokens(big, 9)
        return _cuda.pack_tokens(big[:, 1:30], 9), _cuda.unpack_tokens(whole[:, 9:27], 9, 16)

    packed, unpacked = machine(body, big)
    assert torch.equal(packed, pack_tokens_ref(big[:, 1:30] & 511, 9))
    assert torch.equal(unpacked, big[:, 8:24] & 511)
    assert packed.shape[1] == math.ceil(29 * 9 / 8)
