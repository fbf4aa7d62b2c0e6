"""CUDA launches of the multi-tensor updates: Adam, the hold of norms and the average in one pass over all weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._ext import Pointers, launch

CHUNK = 32768  # elements to a block
FREE, WHOLE, ROWS = 0, 1, 2


@lru_cache(maxsize=16)
def _chunks(shapes: tuple[tuple[int, ...], ...], rows: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Chunks int64 [n, 3] (tensor, first element, length), and the first chunk of every tensor [tensors + 1].

    With `rows` a chunk is a row of its tensor, otherwise at most CHUNK elements.
    """
    chunks, first = [], [0]
    for i, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        length = max(numel // shape[0], 1) if rows and shape and numel else CHUNK
        chunks += [(i, start, min(length, numel - start)) for start in range(0, numel, length)]
        first.append(len(chunks))
    table = torch.tensor(chunks, dtype=torch.int64, device="cpu").reshape(-1, 3)
    return table.to(device), torch.tensor(first, dtype=torch.int64, device="cpu").to(device)


@lru_cache(maxsize=16)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device; kept, so that an unchanged step and a captured graph copy nothing."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


Column = Sequence[Tensor | None] | None


def _update(
    columns: tuple[Column, Column, Column, Column, Column, Column], found_inf: Tensor | None, per_channel: bool,
    rate: float, beta1: float, beta2: float, root: float, eps: float, decay: float,
) -> None:  # fmt: skip
    """Launch over weight, gradient, first and second moment, average and norm of every tensor."""
    weights = columns[0]
    if not weights:
        return
    device = next(w for w in weights if w is not None).device
    hold = FREE if columns[5] is None else ROWS if per_channel else WHOLE
    chunks, first = _chunks(tuple(tuple(w.shape) for w in weights if w is not None), hold == ROWS, device)
    if not len(chunks):
        return
    tensors = [column[i] if column else None for i in range(len(weights)) for column in columns]
    for t in tensors:
        if t is not None and (t.dtype != torch.float32 or not t.is_contiguous()):
            raise TypeError(f"the CUDA update takes contiguous float32 tensors; one is {t.dtype}, strides {t.stride()}")
    table = _table(tuple(0 if t is None else t.data_ptr() for t in tensors), device)
    squares = torch.empty(len(chunks), dtype=torch.float32, device=device)
    scales = torch.empty(len(weights), dtype=torch.float32, device=device)
    launch(
        "adam_hold_ema", Pointers(tensors, table), chunks, first, squares, scales, found_inf, len(weights), len(chunks),
        int(columns[2] is not None), hold, int(columns[4] is not None), rate, beta1, beta2, root, eps, decay,
    )  # fmt: skip


def adam_hold_ema(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor | None] | None,
    averages: Sequence[Tensor] | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    per_channel: bool,
    decay: float,
    found_inf: Tensor | None = None,
) -> None:
    """Adam, then the hold of norms, then the average, in place, as `flowmo_kernels.adam_hold_ema_`.

    Raises:
        TypeError: a tensor is not contiguous float32.
    """
    _update(
        (weights, grads, exp_avgs, exp_avg_sqs, averages, norms), found_inf, per_channel, lr / (1.0 - beta1**step),
        beta1, beta2, (1.0 - beta2**step) ** -0.5, eps, decay,
    )  # fmt: skip


def hold_norms(weights: Sequence[Tensor], norms: Sequence[Tensor | None], per_channel: bool) -> None:
    """Rescale each weight to its norm at step 0, in place, as `flowmo_kernels.hold_norms_`."""
    _update((weights, None, None, None, None, norms), None, per_channel, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def ema(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, found_inf: Tensor | None = None) -> None:
    """a = decay a + (1 - decay) w, in place, as `flowmo_kernels.ema_`."""
    _update((weights, None, None, None, averages, None), found_inf, False, 0.0, 0.0, 0.0, 0.0, 0.0, decay)
