from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import codes_to_tokens, lfq, pack_tokens, tokens_to_codes, unpack_tokens, use

from .oracle import random


def tokens_of(b: int, n: int, bits: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(b + n + bits)
    return torch.randint(0, 2**bits, (b, n), generator=generator).to(device)


def as_integer(tokens: Tensor, bits: int) -> int:
    """A row of tokens as one long number, the first token in its lowest bits."""
    return sum(int(t) << (bits * i) for i, t in enumerate(tokens))


def run(b: int, n: int, bits: int, implementation: str, device: str) -> None:
    tokens = tokens_of(b, n, bits, device)
    wide = torch.full((b + 2, n + 3), -1, device=device)
    wide[1 : b + 1, 2 : n + 2] = tokens
    with use(implementation):
        packed = pack_tokens(wide[1 : b + 1, 2 : n + 2], bits)
        back = unpack_tokens(packed, bits, n)
    assert packed.shape == (b, -(-n * bits // 8)) and packed.dtype == torch.uint8
    # Python's integers are the oracle: little-endian bytes of the same long number.
    for row, bytes_ in zip(tokens.cpu(), packed.cpu()):
        assert bytes(bytes_.tolist()) == as_integer(row, bits).to_bytes(len(bytes_), "little")
    assert torch.equal(back, tokens) and back.dtype == torch.int64


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 9, 14, 17, 32])
@pytest.mark.parametrize("n", [1, 37])
def test_against_python_integers(n: int, bits: int, implementation: str, device: str) -> None:
    run(2, n, bits, implementation, device)
    with use("ref"):
        run(2, n, bits, "ref", device)


@pytest.mark.parametrize("b,n", [(0, 5), (3, 0)])
def test_empty(b: int, n: int, implementation: str, device: str) -> None:
    run(b, n, 9, implementation, device)


def test_more_than_one_program(implementation: str, device: str) -> None:
    run(2, 512, 9, implementation, device)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 24))
def test_random_shapes(b: int, n: int, bits: int) -> None:
    run(b, n, bits, "triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits,channels", [(9, 18), (14, 56), (3, 3)])
def test_codes_and_tokens_invert_each_other_and_agree_with_lfq(bits: int, channels: int, device: str) -> None:
    out = lfq(random(2, 7, channels, device=device), bits)
    assert torch.equal(codes_to_tokens(out.codes, bits), out.tokens)
    codes = tokens_to_codes(out.tokens, bits, channels, dtype=torch.bfloat16)
    assert codes.dtype == torch.bfloat16 and torch.equal(codes.float(), out.codes)


def test_library_ops(device: str) -> None:
    ops = torch.ops.flowmo_kernels
    tokens = tokens_of(2, 5, 9, device)
    torch.library.opcheck(ops.pack_tokens.default, (tokens, 9, "triton"))
    torch.library.opcheck(ops.unpack_tokens.default, (ops.pack_tokens(tokens, 9, "triton"), 9, 5, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    tokens = tokens_of(2, 5, 9, device)

    def round_trip(t: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_tokens(t, 9)
        return packed, unpack_tokens(packed, 9, 5)

    with use(implementation):
        torch._dynamo.reset()
        packed, back = torch.compile(round_trip, fullgraph=True, backend="aot_eager")(tokens)
        assert torch.equal(packed, pack_tokens(tokens, 9)) and torch.equal(back, tokens)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="tokens run from 0 to 512; tokens of 9 bits lie in 0 to 511"):
        pack_tokens(torch.tensor([[0, 512]]), 9)
    with pytest.raises(ValueError, match="tokens run from -1 to 3"):
        tokens_to_codes(torch.tensor([[3, -1]]), 9, 18)
    with pytest.raises(ValueError, match=r"expected int64 \[B, N\]"):
        pack_tokens(torch.zeros(2, 3), 9)
    with pytest.raises(ValueError, match="bits is 33"):
        pack_tokens(torch.zeros(2, 3, dtype=torch.int64), 33)
    with pytest.raises(ValueError, match="10 tokens of 9 bits fill 12"):
        unpack_tokens(torch.zeros(1, 11, dtype=torch.uint8), 9, 10)
    with pytest.raises(ValueError, match="a multiple of 9 bits"):
        codes_to_tokens(torch.zeros(1, 2, 17), 9)
    with pytest.raises(ValueError, match="multiple of the 9 bits"):
        tokens_to_codes(torch.zeros(1, 4, dtype=torch.int64), 9, 17)
    with pytest.raises(ValueError, match="18 channels need a multiple of 2"):
        tokens_to_codes(torch.zeros(1, 3, dtype=torch.int64), 9, 18)
