"""Codes, tokens and packed bits: three spellings of one latent.

    codes   [B, T, C]        +1 or -1, the decoder's input
    tokens  [B, N]           int64 in [0, 2^E), N = T * F, F = C / E sub-codes to a latent token
    packed  [B, ceil(N*E/8)] uint8, the tokens of one image as a bit stream

Token n = t*F + f of an image holds bit k of channel k*F + f of latent token t (bit 0 least significant).
Bit k of token n is bit n*E + k of the stream; bit j of the stream is bit j % 8 of byte j // 8 (least
significant first), and the last byte is filled with zeros. Streams of different images do not touch.
Source: paper, section 3.1 (lookup-free quantization), with the bit order of the released implementation.

Tokens outside [0, 2^E) are refused on the CPU. On a CUDA device that check would stall the stream, so the low
E bits are taken instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import chosen
from ._library import register
from ._rows import Signature, signature_of
from ._triton import cdiv, jit, tl

MAX_PACKED_BITS = 32


def _check_bits(bits: int, most: int = MAX_PACKED_BITS) -> None:
    if not 1 <= bits <= most:
        raise ValueError(f"bits is {bits}; expected the number of bits to a token, 1 to {most} (9 or 14 in FlowMo)")


def _check_tokens(tokens: Tensor, bits: int) -> None:
    _check_bits(bits)
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; expected int64 [B, N]")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= 1 << bits:
            raise ValueError(f"tokens run from {low} to {high}; tokens of {bits} bits lie in 0 to {(1 << bits) - 1}")


def pack_tokens_ref(tokens: Tensor, bits: int) -> Tensor:
    batch, n = tokens.shape
    stream = (tokens[:, :, None] >> torch.arange(bits, device=tokens.device)) & 1
    stream = torch.nn.functional.pad(stream.reshape(batch, n * bits), (0, -(n * bits) % 8))
    weights = 1 << torch.arange(8, device=tokens.device)
    return (stream.reshape(batch, -(-n * bits // 8), 8) * weights).sum(-1).to(torch.uint8)


def unpack_tokens_ref(packed: Tensor, bits: int, n: int) -> Tensor:
    batch = packed.shape[0]
    stream = (packed.to(torch.int64)[:, :, None] >> torch.arange(8, device=packed.device)) & 1
    stream = stream.reshape(batch, packed.shape[1] * 8)[:, : n * bits].reshape(batch, n, bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(-1)


@jit
def pack_tokens_kernel(p_tokens, p_packed, n, n_bytes, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Every lane makes one byte from the tokens that overlap it."""
    i_block = tl.program_id(0).to(tl.int64)
    o_out = i_block * BLOCK + tl.arange(0, BLOCK)
    o_byte = o_out % n_bytes
    p_image = p_tokens + o_out // n_bytes * n
    b_byte = tl.zeros((BLOCK,), tl.int64)
    for i_token in tl.static_range((BITS + 6) // BITS + 1):
        o_token = o_byte * 8 // BITS + i_token
        m_token = (o_token < n) & (o_out < total)
        b_token = tl.load(p_image + o_token, mask=m_token, other=0) & ((1 << BITS) - 1)
        # Bit of the byte where the token starts; negative where it began in an earlier byte.
        b_shift = o_token * BITS - o_byte * 8
        b_token = (b_token >> tl.maximum(-b_shift, 0)) << tl.minimum(tl.maximum(b_shift, 0), 8)
        b_byte |= b_token & 255
    tl.store(p_packed + o_out, b_byte.to(tl.uint8), mask=o_out < total)


@jit
def unpack_tokens_kernel(p_packed, p_tokens, n, n_bytes, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Every lane makes one token from the bytes that hold it."""
    i_block = tl.program_id(0).to(tl.int64)
    o_out = i_block * BLOCK + tl.arange(0, BLOCK)
    o_bit = o_out % n * BITS
    p_image = p_packed + o_out // n * n_bytes
    b_token = tl.zeros((BLOCK,), tl.int64)
    for i_byte in tl.static_range((BITS + 14) // 8):
        o_byte = o_bit // 8 + i_byte
        m_byte = (o_byte < n_bytes) & (o_out < total)
        b_token |= tl.load(p_image + o_byte, mask=m_byte, other=0).to(tl.int64) << (8 * i_byte)
    b_token = (b_token >> (o_bit % 8)) & ((1 << BITS) - 1)
    tl.store(p_tokens + o_out, b_token, mask=o_out < total)


# One output to a lane; the arrays are small (512 tokens an image), so programs are kept small too.
BLOCK = 256


def _pack(tokens: Tensor, bits: int, impl: str) -> Tensor:
    tokens = tokens.contiguous()
    if impl == "cuda":
        from . import _cuda

        return _cuda.pack_tokens(tokens, bits)
    n = tokens.shape[1]
    packed = _pack_fake(tokens, bits, impl)
    total = packed.numel()
    if total:
        pack_tokens_kernel[(cdiv(total, BLOCK),)](
            tokens, packed, n, packed.shape[1], total, BITS=bits, BLOCK=BLOCK, num_warps=4
        )
    return packed


def _pack_fake(tokens: Tensor, bits: int, impl: str) -> Tensor:
    return tokens.new_empty((tokens.shape[0], (tokens.shape[1] * bits + 7) // 8), dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int, n: int, impl: str) -> Tensor:
    packed = packed.contiguous()
    if impl == "cuda":
        from . import _cuda

        return _cuda.unpack_tokens(packed, bits, n)
    tokens = _unpack_fake(packed, bits, n, impl)
    total = tokens.numel()
    if total:
        unpack_tokens_kernel[(cdiv(total, BLOCK),)](
            packed, tokens, n, packed.shape[1], total, BITS=bits, BLOCK=BLOCK, num_warps=4
        )
    return tokens


def _unpack_fake(packed: Tensor, bits: int, n: int, impl: str) -> Tensor:
    return packed.new_empty((packed.shape[0], n), dtype=torch.int64)


pack_tokens_op = register("pack_tokens(Tensor tokens, int bits, str impl) -> Tensor", _pack, _pack_fake)
unpack_tokens_op = register(
    "unpack_tokens(Tensor packed, int bits, int n, str impl) -> Tensor", _unpack, _unpack_fake
)


def pack_tokens(tokens: Tensor, bits: int) -> Tensor:
    """Tokens as a bit stream.

    Args:
        tokens: int64 [B, N], values in [0, 2^bits).
        bits: bits to a token.

    Returns:
        uint8 [B, ceil(N * bits / 8)], least significant bit first, last byte filled with zeros.

    Raises:
        ValueError: wrong dtype, shape or bits; on the CPU also a token outside [0, 2^bits).
    """
    _check_tokens(tokens, bits)
    impl = chosen("pack_tokens", tokens)
    return pack_tokens_ref(tokens, bits) if impl == "ref" else pack_tokens_op(tokens, bits, impl)


def unpack_tokens(packed: Tensor, bits: int, n: int) -> Tensor:
    """The tokens of a bit stream: the inverse of `pack_tokens`.

    Args:
        packed: uint8 [B, ceil(n * bits / 8)].
        bits: bits to a token.
        n: tokens to an image.

    Returns:
        int64 [B, n].

    Raises:
        ValueError: wrong dtype or bits, or a number of bytes that n tokens do not fill.
    """
    _check_bits(bits)
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed is {packed.dtype} of shape {tuple(packed.shape)}; expected uint8 [B, bytes]")
    if n < 0 or packed.shape[1] != (n * bits + 7) // 8:
        raise ValueError(
            f"packed has {packed.shape[1]} bytes to an image; {n} tokens of {bits} bits fill {(n * bits + 7) // 8}"
        )
    impl = chosen("unpack_tokens", packed)
    return unpack_tokens_ref(packed, bits, n) if impl == "ref" else unpack_tokens_op(packed, bits, n, impl)


def codes_to_tokens(codes: Tensor, bits: int) -> Tensor:
    """Tokens of codes: bit k of token t*F + f is the sign of channel k*F + f (1 where positive).

    Args:
        codes: [B, T, C] of any real dtype; only the signs are read.
        bits: E, bits to a token; C is a multiple of it.

    Returns:
        int64 [B, T * C / bits].

    Raises:
        ValueError: wrong shape, or channels that are no multiple of bits.
    """
    _check_bits(bits)
    if codes.ndim != 3 or codes.shape[2] % bits:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected [B, T, C] with C a multiple of {bits} bits")
    batch, length, channels = codes.shape
    groups = (codes > 0).reshape(batch, length, bits, channels // bits)
    weights = 1 << torch.arange(bits, device=codes.device)
    return (groups * weights[:, None]).sum(2).reshape(batch, length * (channels // bits))


def tokens_to_codes(tokens: Tensor, bits: int, channels: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes of tokens: the inverse of `codes_to_tokens`.

    Args:
        tokens: int64 [B, N], values in [0, 2^bits); N a multiple of channels / bits.
        bits: E, bits to a token.
        channels: C, channels to a latent token, a multiple of bits.
        dtype: of the result.

    Returns:
        [B, N * bits / channels, channels], +1 or -1.

    Raises:
        ValueError: wrong dtype, shape, bits or channels; on the CPU also a token outside [0, 2^bits).
    """
    _check_tokens(tokens, bits)
    if channels < bits or channels % bits:
        raise ValueError(f"channels is {channels}; expected a multiple of the {bits} bits of a token")
    factors = channels // bits
    batch, n = tokens.shape
    if n % factors:
        raise ValueError(f"tokens have {n} columns; {channels} channels need a multiple of {factors}")
    groups = tokens.reshape(batch, n // factors, 1, factors) >> torch.arange(bits, device=tokens.device)[:, None]
    return ((groups & 1) * 2 - 1).to(dtype).reshape(batch, n // factors, channels)


def aot_signatures() -> list[Signature]:
    """Token widths of FlowMo-Lo and Hi, for compilation without a card."""
    types = {"p_tokens": "*i64", "p_packed": "*u8", "n": "i32", "n_bytes": "i32", "total": "i32"}
    signatures: list[Signature] = []
    for bits in (9, 14):
        constexprs: dict[str, object] = {"BITS": bits, "BLOCK": BLOCK}
        for kernel in (pack_tokens_kernel, unpack_tokens_kernel):
            signatures.append((kernel, signature_of(kernel, types, constexprs), constexprs, 4, 3, f"E={bits}"))
    return signatures
