"""Reference of the optimizer updates: PyTorch's multi-tensor operations, as in `flowmo_kernels.optim`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weight_norms(weights: Sequence[Tensor], *, per_channel: bool = False) -> list[Tensor]:
    """Frobenius norm of each weight (fp32, []), or of each of its rows (fp32, [rows]) with per_channel."""
    if per_channel:
        return [torch.linalg.vector_norm(w.detach().float()[:, None].flatten(1), dim=1) for w in weights]
    return [torch.linalg.vector_norm(w.detach().float()) for w in weights]


@torch.no_grad()
def hold_norms_ref_(
    weights: Sequence[Tensor], norms: Sequence[Tensor], *, per_channel: bool = False, found_inf: Tensor | None = None
) -> None:
    if not weights:
        return
    scales = []
    for now, held in zip(weight_norms(weights, per_channel=per_channel), norms):
        wanted = (now > 0) & (held > 0)
        if found_inf is not None:
            wanted = wanted & (found_inf.reshape(()) == 0)
        scales.append(torch.where(wanted, held / now, torch.ones_like(now)))
    if per_channel:
        scales = [s.reshape(-1, *[1] * (w.ndim - 1)) for s, w in zip(scales, weights)]
    torch._foreach_mul_(list(weights), scales)


@torch.no_grad()
def ema_ref_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, found_inf: Tensor | None = None
) -> None:
    if not averages:
        return
    if found_inf is None:
        torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)
    else:
        towards = torch._foreach_sub(list(weights), list(averages))
        torch._foreach_mul_(towards, _unless(found_inf, 1.0 - decay, 0.0))
        torch._foreach_add_(list(averages), towards)


def _unless(found_inf: Tensor, value: float, otherwise: float) -> Tensor:
    """`value` where the flag is zero, as a tensor [] beside it."""
    zero = found_inf.reshape(()) == 0
    return torch.where(zero, zero.new_full((), value, dtype=torch.float32), otherwise)


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
    found_inf: Tensor | None = None,
) -> None:
    if not weights:
        return
    w, g, m, v = list(weights), list(grads), list(exp_avgs), list(exp_avg_sqs)
    rate = -lr / (1.0 - betas[0] ** step)
    if found_inf is None:
        torch._foreach_lerp_(m, g, 1.0 - betas[0])
        torch._foreach_mul_(v, betas[1])
    else:
        # With gradients of zero and factors of one every sum below adds nothing, to the bit.
        bad = found_inf.reshape(()) != 0
        g = [torch.where(bad, torch.zeros_like(x), x) for x in g]
        torch._foreach_mul_(m, _unless(found_inf, betas[0], 1.0))
        torch._foreach_add_(m, g, alpha=1.0 - betas[0])
        torch._foreach_mul_(v, _unless(found_inf, betas[1], 1.0))
    torch._foreach_addcmul_(v, g, g, 1.0 - betas[1])
    denominator = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominator, (1.0 - betas[1] ** step) ** -0.5)
    torch._foreach_add_(denominator, eps)
    if found_inf is None:
        torch._foreach_addcdiv_(w, m, denominator, rate)
    else:
        change = torch._foreach_div(m, denominator)
        torch._foreach_mul_(change, _unless(found_inf, rate, 0.0))
        torch._foreach_add_(w, change)
    if norms is not None:
        held = [(x, n) for x, n in zip(w, norms) if n is not None]
        pairs = [x for x, _ in held], [n for _, n in held]
        hold_norms_ref_(*pairs, per_channel=per_channel, found_inf=found_inf)
    if averages is not None:
        ema_ref_(averages, w, decay, found_inf)
