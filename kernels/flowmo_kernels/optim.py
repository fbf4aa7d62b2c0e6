"""Optimizer updates over whole lists of weights: Adam, the hold of weight norms, the exponential average.

    Adam    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
            w = w - lr / (1 - b1^s) * m / (sqrt(v / (1 - b2^s)) + eps)          at step s = 1, 2, ...
    hold    w = w * |w_0| / |w|          the Frobenius norm at step 0, of the matrix or of each row
    EMA     a = d a + (1 - d) w          d = decay^k when it runs every k steps

A norm of zero, at step 0 or now, leaves its weights as they are: a row that starts at zero (the gates) must be
able to leave it. Everything is fp32 and in place.
Source: paper, supplement (Adam, EMA); Karras et al., Analyzing and Improving the Training Dynamics of Diffusion
Models (the hold, after every optimizer step).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _check(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(tensors) != len(weights):
        raise ValueError(f"{name} has {len(tensors)} tensors for {len(weights)} weights; expected one to a weight")
    for i, (tensor, weight) in enumerate(zip(tensors, weights)):
        if tensor.shape != weight.shape or tensor.dtype != torch.float32 or tensor.device != weight.device:
            raise ValueError(
                f"{name}[{i}] is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected fp32 "
                f"{tuple(weight.shape)} on {weight.device}, like its weight"
            )


def _check_norms(norms: Sequence[Tensor | None], weights: Sequence[Tensor], per_channel: bool) -> None:
    if len(norms) != len(weights):
        raise ValueError(f"norms has {len(norms)} entries for {len(weights)} weights; expected one to a weight")
    for i, (norm, weight) in enumerate(zip(norms, weights)):
        shape = weight.shape[:1] if per_channel else torch.Size()
        if norm is not None and (norm.shape != shape or norm.dtype != torch.float32):
            raise ValueError(
                f"norms[{i}] is {norm.dtype} {tuple(norm.shape)}; expected fp32 {tuple(shape)} as weight_norms "
                f"gives it for per_channel={per_channel}"
            )


def weight_norms(weights: Sequence[Tensor], *, per_channel: bool = False) -> list[Tensor]:
    """Frobenius norm of each weight (fp32, []), or of each of its rows (fp32, [rows]) with per_channel."""
    if per_channel:
        return [torch.linalg.vector_norm(w.detach().float().flatten(1), dim=1) for w in weights]
    return [torch.linalg.vector_norm(w.detach().float()) for w in weights]


@torch.no_grad()
def hold_norms_ref_(weights: Sequence[Tensor], norms: Sequence[Tensor], *, per_channel: bool = False) -> None:
    if not weights:
        return
    scales = []
    for now, held in zip(weight_norms(weights, per_channel=per_channel), norms):
        scale = torch.where((now > 0) & (held > 0), held / now, torch.ones_like(now))
        scales.append(scale)
    if per_channel:
        scales = [s.reshape(-1, *[1] * (w.ndim - 1)) for s, w in zip(scales, weights)]
    torch._foreach_mul_(list(weights), scales)


@torch.no_grad()
def ema_ref_(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    if averages:
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)


@torch.no_grad()
def adam_hold_ema_ref_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    norms: Sequence[Tensor | None] | None = None,
    per_channel: bool = False,
    averages: Sequence[Tensor] | None = None,
    decay: float = 1.0,
) -> None:
    if not weights:
        return
    w, g, m, v = list(weights), list(grads), list(exp_avgs), list(exp_avg_sqs)
    torch._foreach_lerp_(m, g, 1.0 - betas[0])
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, g, g, 1.0 - betas[1])
    denominator = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominator, (1.0 - betas[1] ** step) ** -0.5)
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(w, m, denominator, -lr / (1.0 - betas[0] ** step))
    if norms is not None:
        held = [(x, n) for x, n in zip(w, norms) if n is not None]
        hold_norms_ref_([x for x, _ in held], [n for _, n in held], per_channel=per_channel)
    if averages is not None:
        ema_ref_(averages, w, decay)


def hold_norms_(weights: Sequence[Tensor], norms: Sequence[Tensor], *, per_channel: bool = False) -> None:
    """Rescale each weight to the norm it had at step 0, in place.

    Args:
        weights: fp32 tensors of any shape (rows first with per_channel).
        norms: what `weight_norms(weights, per_channel=per_channel)` gave at step 0.
        per_channel: hold the norm of every row (output channel) rather than of the whole weight.

    Raises:
        ValueError: lists of different lengths, or norms of another shape or dtype.
    """
    _check("weights", weights, weights)
    _check_norms(norms, weights, per_channel)
    hold_norms_ref_(weights, norms, per_channel=per_channel)


def ema_(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """a = decay a + (1 - decay) w, in place.

    Args:
        averages: fp32 tensors, changed in place.
        weights: fp32 tensors of the same shapes.
        decay: of this update; 0.9999 ** 10 when the average is updated every 10 steps at a decay of 0.9999.

    Raises:
        ValueError: tensors that do not pair up, or a decay outside [0, 1].
    """
    _check("averages", averages, weights)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; expected a number from 0 to 1, such as 0.9999 ** 10")
    ema_ref_(averages, weights, decay)


def adam_hold_ema_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    norms: Sequence[Tensor | None] | None = None,
    per_channel: bool = False,
    averages: Sequence[Tensor] | None = None,
    decay: float = 1.0,
) -> None:
    """One Adam step, then the hold of norms, then the average, over all weights, in place.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: fp32 tensors, one of each to a weight. Grads are only read.
        step: 1 at the first update (bias correction).
        lr, betas, eps: Adam's.
        norms: per weight its norm at step 0 (from `weight_norms`), or None where the weight is free; None: all free.
        per_channel: as in `hold_norms_`.
        averages: the exponential averages, or None on the steps without an update.
        decay: of this update of the averages (decay ** k when it runs every k steps).

    Raises:
        ValueError: tensors that do not pair up, or a step below 1.
    """
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check(name, tensors, weights)
    _check("weights", weights, weights)
    if norms is not None:
        _check_norms(norms, weights, per_channel)
    if averages is not None:
        _check("averages", averages, weights)
    if step < 1:
        raise ValueError(f"step is {step}; expected 1 at the first update")
    adam_hold_ema_ref_(
        weights, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=betas, eps=eps,
        norms=norms, per_channel=per_channel, averages=averages, decay=decay,
    )  # fmt: skip
