"""The last row tiles of attention, split over the keys, so that no wave of programs is left mostly empty.

    o = sum_i o_i / sum_i l_i,   o_i = p_i v_i,  l_i = sum p_i over part i of the keys

holds where p has no running maximum.  408 tiles of 128 rows (4352 tokens, 12 heads) on 132 processors are four waves,
the last of 12 programs; 396 tiles are three, and the other 12 in ten parts each are a wave of 120 short programs.  The
parts are added up in one order by a second kernel: no atomics and no counters, so the bits are the same every time, and
a CUDA graph has nothing to reset.  Split-key decoding of short queries is the same with all tiles split.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._rows import Signature, signature
from ._triton import cast, cdiv, jit, next_power_of_2, tl

# In units of one step of a program, a tile's rows by one block of keys (0.8 us at 128 x 64, 96 channels and 500
# TFLOP/s).  Estimates, for bench/tune.py to judge.
START = 3  # to launch a program, load queries, fill the pipeline and store
COMBINE = 5  # to launch the second kernel and run it
LEAST_GAIN = 0.03  # a smaller gain is inside the error of the estimate


class Waves(NamedTuple):
    """How the row tiles of all heads are shared out; whole tiles first, in order."""

    whole: int  # tiles that one program computes
    parts: int  # programs to each of the others, a part of the keys each; 1: nothing is split


@functools.lru_cache(maxsize=256)
def waves(tiles: int, steps: int, processors: int) -> Waves:
    """The division of `tiles` row tiles of `steps` key blocks each that takes the least time on `processors`.

    Programs run in waves of one to a processor; the tiles beyond the last full wave are the ones to split.  Of 64
    channels two programs fit a processor and share its matrix units, so there the estimate is on the hopeful side.
    """
    plain = cdiv(tiles, processors) * (START + steps)
    rest = tiles % processors
    if rest == 0 or steps < 2:
        return Waves(tiles, 1)
    full = tiles // processors * (START + steps)

    def time(parts: int) -> int:
        return full + cdiv(rest * parts, processors) * (START + cdiv(steps, parts)) + COMBINE

    parts = min(range(1, steps + 1), key=time)
    return Waves(tiles - rest, parts) if time(parts) < (1 - LEAST_GAIN) * plain else Waves(tiles, 1)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Programs that the device of x runs at once; one on a CPU, where splitting gains nothing."""
    return _multiprocessors(x.device.index) if x.is_cuda else 1


@jit
def attention_combine_kernel(
    p_po,  # [split tiles, parts, M, d] fp32
    p_pl,  # [split tiles, parts, M] fp32
    p_o,  # [B, Lq, H, d], heads contiguous
    n_queries,
    n_tiles,  # row tiles of a head
    H,
    whole,
    parts,
    n_beside,  # images whose rows lie side by side in o: 1, or all of them
    D: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """o of ROWS rows of a split tile."""
    i_split = tl.program_id(0).to(tl.int64)
    i_tile = whole + i_split
    i_bh = i_tile // n_tiles
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_part = tl.arange(0, PARTS)
    o_d = tl.arange(0, P)
    o_from = (i_split * parts + o_part[:, None]) * M + o_row[None, :]
    b_l = tl.sum(tl.load(p_pl + o_from, mask=(o_part < parts)[:, None], other=0.0), 0)
    m = (o_part < parts)[:, None, None] & (o_d < D)[None, None, :]
    b_o = tl.sum(tl.load(p_po + o_from[:, :, None] * D + o_d[None, None, :], mask=m, other=0.0), 0) / b_l[:, None]
    o_m = (i_tile % n_tiles) * M + o_row
    p_o += (i_bh // H * tl.where(n_beside == 1, n_queries, 1) * H + i_bh % H) * D
    m = (o_m < n_queries)[:, None] & (o_d < D)[None, :]
    tl.store(p_o + o_m[:, None] * (n_beside * H * D) + o_d[None, :], cast(b_o, p_o.dtype.element_ty), mask=m)


def combine_launch(d: int, m: int, parts: int) -> dict[str, int]:
    """Constants of `attention_combine_kernel`: about 64 numbers a thread, all loaded before the first is added."""
    p, n = next_power_of_2(d), next_power_of_2(parts)
    return {"D": d, "P": p, "M": m, "PARTS": n, "ROWS": min(m, max(1, 64 * 128 // (n * p)))}


def combine(
    po: Tensor,  # [split tiles, parts, M, d] fp32
    pl: Tensor,  # [split tiles, parts, M] fp32
    o: Tensor,  # [B, Lq, H, d], heads contiguous; the rows of split tiles are written
    whole: int,
) -> None:
    """Write o of the row tiles from number `whole` on, which were computed in parts."""
    n_split, parts, m, d = po.shape
    n_queries, h = o.shape[1:3]
    launch = combine_launch(d, m, parts)
    attention_combine_kernel[(n_split, m // launch["ROWS"])](
        po, pl, o, n_queries, cdiv(n_queries, m), h, whole, parts, o.stride(1) // (h * d), **launch, num_warps=4
    )


def aot_signatures() -> list[Signature]:
    """The kernel of this file at the real shapes, for compilation ahead of time."""
    kinds = {"p_po": "*fp32", "p_pl": "*fp32"}
    return [
        signature(attention_combine_kernel, kinds, combine_launch(d, 128, 10), 4, 3, f"attention combine d={d}")
        for d in (64, 96)
    ]
