"""What the row kernels share: how rows are divided among programs, how a row is held, and the reduction of partials.

A row of D channels is held in two parts of power-of-two lengths, HI and LO columns, so that D = 1152 takes
1024 + 128 lanes instead of 2048.  Tiles of rows never cross `split`: a program deals with one stream, so it reads
the modulation vectors once.

Vocabulary inside kernels: i_ program ids (int64 at once), o_ offsets, m_ masks, p_ pointers, b_ values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ._triton import cdiv, jit, next_power_of_2, tl


class RowLaunch(NamedTuple):
    """Launch sizes of a row kernel."""

    hi: int  # columns of the first part, a power of two, all inside the row
    lo: int  # columns of the second part, a power of two
    rows: int  # rows held at once
    iters: int  # times `rows` rows to a program
    num_warps: int


def row_launch(d: int, n_rows: int, reduces: bool) -> RowLaunch:
    """Launch sizes for rows of d channels; `reduces` where the kernel also sums over rows (backward)."""
    hi = next_power_of_2(d) // 2 if d > 1 else 1
    lo = next_power_of_2(d - hi) if d > hi else 1
    # Up to 32 values of the rows a thread; a reducing kernel also holds its sums, so it takes one row at once.
    rows = 1 if reduces or d > 2048 else 2 if d > 512 else 4
    # Eight channels a thread, the 16 bytes of a bf16 access; several rows feed more warps.
    num_warps = max(1, min(8, hi // 256)) if rows < 4 else max(1, min(4, hi // 128))
    if reduces:
        # Enough programs to fill a large card several times, few enough that the partial sums stay a small
        # part of the traffic (two fp32 rows for every `iters` rows).
        iters = max(1, min(64, n_rows // 1024))
    else:
        iters = 2 if n_rows >= 16384 else 1
    return RowLaunch(hi, lo, rows, iters, num_warps)


def n_tiles(length: int, split: int, tile: int) -> int:
    """Number of tiles of `tile` rows, those of the latent stream first."""
    return cdiv(split, tile) + cdiv(length - split, tile)


def vector_strides(m: Tensor | None) -> tuple[int, int]:
    """(stride of images, stride of streams) of a modulation tensor [B, D] or [B, S, D]."""
    if m is None:
        return 0, 0
    return m.stride(0), m.stride(1) if m.dim() == 3 else 0


@jit
def tile_rows(i_tile, length, split, TILE: tl.constexpr):
    """First row, end of the rows of its stream, and stream (0 latent, 1 image) of a tile."""
    n_first = tl.cdiv(split, TILE)
    second = i_tile >= n_first
    start = tl.where(second, split + (i_tile - n_first) * TILE, i_tile * TILE)
    return start, tl.where(second, length, split), second.to(tl.int64)


@jit
def load_rows(p_x, stride, o_row, m_row, D: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """Rows o_row of a matrix in fp32, as parts [ROWS, HI] and [ROWS, LO]; zero where masked."""
    p_row = p_x + (o_row * stride)[:, None]
    o_hi = tl.arange(0, HI)[None, :]
    o_lo = HI + tl.arange(0, LO)[None, :]
    b_hi = tl.load(p_row + o_hi, mask=m_row[:, None], other=0.0)
    b_lo = tl.load(p_row + o_lo, mask=m_row[:, None] & (o_lo < D), other=0.0)
    return b_hi.to(tl.float32), b_lo.to(tl.float32)


@jit
def store_rows(p_y, stride, o_row, m_row, b_hi, b_lo, D: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    p_row = p_y + (o_row * stride)[:, None]
    o_hi = tl.arange(0, HI)[None, :]
    o_lo = HI + tl.arange(0, LO)[None, :]
    tl.store(p_row + o_hi, b_hi, mask=m_row[:, None])
    tl.store(p_row + o_lo, b_lo, mask=m_row[:, None] & (o_lo < D))


@jit
def load_vector(p_v, D: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """One vector of D channels in fp32, as parts [1, HI] and [1, LO]."""
    o_hi = tl.arange(0, HI)
    o_lo = HI + tl.arange(0, LO)
    b_hi = tl.load(p_v + o_hi).to(tl.float32)
    b_lo = tl.load(p_v + o_lo, mask=o_lo < D, other=0.0).to(tl.float32)
    return b_hi[None, :], b_lo[None, :]


@jit
def store_vector(p_v, b_hi, b_lo, D: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    o_hi = tl.arange(0, HI)
    o_lo = HI + tl.arange(0, LO)
    tl.store(p_v + o_hi, b_hi)
    tl.store(p_v + o_lo, b_lo, mask=o_lo < D)


@jit
def row_mean(b_hi, b_lo, D: tl.constexpr):
    """Mean over the channels, [ROWS, 1]; masked columns must hold zero."""
    return ((tl.sum(b_hi, 1) + tl.sum(b_lo, 1)) * (1.0 / D))[:, None]


@jit
def normalise(b_hi, b_lo, eps, D: tl.constexpr, HI: tl.constexpr, LO: tl.constexpr):
    """LayerNorm without affine: the normalised parts, zero in masked columns, and 1/sqrt(variance + eps)."""
    b_mean = row_mean(b_hi, b_lo, D)
    o_lo = HI + tl.arange(0, LO)[None, :]
    b_hi = b_hi - b_mean
    b_lo = tl.where(o_lo < D, b_lo - b_mean, 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(row_mean(b_hi * b_hi, b_lo * b_lo, D) + eps)
    return b_hi * b_rstd, b_lo * b_rstd, b_rstd


@jit
def normalise_backward(b_g_hi, b_g_lo, b_n_hi, b_n_lo, b_rstd, D: tl.constexpr):
    """r (g - mean(g) - n mean(g n)) of both parts; garbage in masked columns."""
    b_mean = row_mean(b_g_hi, b_g_lo, D)
    b_dot = row_mean(b_g_hi * b_n_hi, b_g_lo * b_n_lo, D)
    return b_rstd * (b_g_hi - b_mean - b_n_hi * b_dot), b_rstd * (b_g_lo - b_mean - b_n_lo * b_dot)


@jit
def sum_tiles_kernel(
    p_part,  # [B, tiles, V, D] fp32
    p_sum0,  # [B, S, D] fp32, vector 0
    p_sum1,  # vector 1
    p_sum2,  # vector 2
    n_streams,
    n_first,  # tiles of stream 0
    n_all,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the partial vectors of all tiles of one image and stream, always in the same order."""
    i_d = tl.program_id(0).to(tl.int64)
    i_bs = tl.program_id(1).to(tl.int64)
    i_v = tl.program_id(2)
    i_b = i_bs // n_streams
    # With one stream there are no tiles of stream 0: all of them count as the last stream.
    last = i_bs % n_streams == n_streams - 1
    start = tl.where(last, n_first, 0)
    end = tl.where(last, n_all, n_first)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_t in range(start, end, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        p_tile = p_part + ((i_b * n_all + o_t) * tl.num_programs(2) + i_v)[:, None] * D + o_d[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=(o_t < end)[:, None] & (o_d < D)[None, :], other=0.0), 0)
    o_sum = i_bs * D + o_d
    tl.store(p_sum0 + o_sum, b_sum, mask=o_d < tl.where(i_v == 0, D, 0))
    tl.store(p_sum1 + o_sum, b_sum, mask=o_d < tl.where(i_v == 1, D, 0))
    tl.store(p_sum2 + o_sum, b_sum, mask=o_d < tl.where(i_v == 2, D, 0))


def sum_tiles(
    partial: Tensor,  # [B, tiles, V, D] fp32
    sums: tuple[Tensor, ...],  # V of [B, D] or [B, 2, D], fp32 contiguous; written
    n_first: int,
) -> None:
    """Second stage of a reduction over rows: the tiles of each image and stream, `n_first` of them latent."""
    b, tiles, vectors, d = partial.shape
    streams = sums[0].shape[1] if sums[0].dim() == 3 else 1
    if sums[0].numel():
        # Many tiles are summed in larger steps by more programs.
        block_d, block_t = min(32 if tiles > 256 else 128, next_power_of_2(d)), 128 if tiles > 256 else 16
        targets = [sums[min(i, vectors - 1)] for i in range(3)]
        sum_tiles_kernel[(cdiv(d, block_d), b * streams, vectors)](
            partial, *targets, streams, n_first, tiles, D=d, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=4
        )


Signature = tuple[Any, dict[str, str], dict[str, Any], int, int, str]
"""(kernel, argument types, compile-time constants, warps, stages, label) for compilation ahead of time."""


def signature_of(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Types of all arguments of a kernel in order: those of `types`, and "constexpr" for the constants."""
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}


def signature(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int, label: str
) -> Signature:
    """Types of arguments not named in `kinds`: pointers ``p_*`` are bf16, strides multiples of 16, the rest int32."""
    types = {
        name: "*bf16" if name.startswith("p_") else "i32:16" if name.startswith("stride_") else "i32"
        for name in kernel.arg_names
    } | kinds
    return kernel, signature_of(kernel, types, constants), constants, num_warps, num_stages, label


ROW_KINDS = {
    "p_shift": "*fp32",
    "p_scale": "*fp32",
    "p_gate": "*fp32",
    "p_part": "*fp32",
    "p_row_scale": "*fp32",
    "eps": "fp32",
}


def row_signatures(name: str, kernel: Any, reduces: bool, **flags: bool) -> list[Signature]:
    """A row kernel at the widths of the published models, D = 768 and 1152."""
    found = []
    for d in (768, 1152):
        launch = row_launch(d, 8 * 4352, reduces)
        constants = {"D": d, "HI": launch.hi, "LO": launch.lo, "ROWS": launch.rows, "ITERS": launch.iters, **flags}
        found.append(signature(kernel, ROW_KINDS, constants, launch.num_warps, 3, f"{name} D={d}"))
    return found


def sum_tiles_signatures() -> list[Signature]:
    kinds = {name: "*fp32" for name in ("p_part", "p_sum0", "p_sum1", "p_sum2")}
    return [
        signature(sum_tiles_kernel, kinds, {"D": d, "BLOCK_D": cols, "BLOCK_T": rows}, 4, 3, f"sum_tiles D={d}")
        for d, cols, rows in ((96, 32, 128), (768, 128, 16), (1152, 128, 16))
    ]
