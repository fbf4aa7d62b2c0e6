"""The optimizer of FlowMo: Adam, weights held at their first norm, exponential average, in one pass.

Source: paper, section 4.1 (Adam with betas 0.9 and 0.95, forced weight normalisation after EDM2, average 0.9999).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowmo.autoencoder import FlowMo
from flowmo.config import ModelConfig, OptimConfig
from flowmo.training.distributed import sum_
from flowmo.training.sharding import fill_, full, local, shard_like
from flowmo_kernels import adam_hold_ema_, ema_, weight_norms


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Rate of the step after `step` steps, `progress` in [0, 1] being the part of the run that is done."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


_HIDDEN_OR_READOUT = re.compile(r"(time_in\.out_layer|adaLN_modulation\.1|final_layer_\w+\.linear)\.weight$")


class AdamHoldEMA:
    """Adam over fp32 parameters, the norm hold of the block weights, and the average of everything.

    Parameters without a gradient (a frozen encoder) are left alone and keep their moments; their average goes on
    towards them.

    Args:
        named: the trainable parameters by name.
        config: rates, decay and the kind of hold: "matrix" keeps the Frobenius norm of every Linear weight inside
            the blocks at its value of now, "channel" that of each row, "none" nothing.
        rate_scales: factors of the learning rate by name; those not named have 1.

    Parameters sharded over processes (FSDP) keep their state sharded by rows. A row's norm is then a matter of one
    process; that of a matrix is summed up over all processes between the update and the average.
    """

    def __init__(
        self, named: dict[str, nn.Parameter], config: OptimConfig, rate_scales: Mapping[str, float] | None = None
    ) -> None:
        self.config = config
        self.rate_scales = dict(rate_scales or {})
        self.step_count = 0
        self.parameters = named
        self.exp_avg = {k: torch.zeros_like(p) for k, p in named.items()}
        self.exp_avg_sq = {k: torch.zeros_like(p) for k, p in named.items()}
        self.average = {k: p.detach().clone() for k, p in named.items()}
        held = [k for k in named if is_held(k)] if config.hold_norms != "none" else []
        by_row = config.hold_norms == "channel"
        # Whether the norms of sharded matrices are held, for which the processes have to come together.
        self.joint = config.hold_norms == "matrix" and any(isinstance(p, DTensor) for p in named.values())
        norms = weight_norms([full(named[k].detach()) for k in held], per_channel=by_row)
        self.norm: dict[str, Tensor] = {k: shard_like(n, named[k]) if by_row else n for k, n in zip(held, norms)}

    def step(self, lr: float, found_inf: Tensor | None = None) -> None:
        """One update from the gradients that are there; they are cleared.

        Where `found_inf`, fp32 [] on the device, is not zero, nothing else changes; `step_count` counts it all the
        same, since the host does not know.
        """
        self.step_count += 1
        grads = {k: p.grad for k, p in self.parameters.items() if p.grad is not None}
        every = self.config.ema_every
        due = self.step_count % every == 0
        decay = self.config.ema_decay**every
        groups: dict[float, list[str]] = {}
        for key in grads:
            groups.setdefault(self.rate_scales.get(key, 1.0), []).append(key)
        for scale, keys in groups.items():
            adam_hold_ema_(
                [local(self.parameters[k].detach()) for k in keys],
                [local(grads[k]) for k in keys],
                [local(self.exp_avg[k]) for k in keys],
                [local(self.exp_avg_sq[k]) for k in keys],
                step=self.step_count,
                lr=lr * scale,
                betas=self.config.betas,
                eps=self.config.eps,
                norms=None if self.joint else [local(self.norm[k]) if k in self.norm else None for k in keys],
                per_channel=self.config.hold_norms == "channel",
                averages=[local(self.average[k]) for k in keys] if due and not self.joint else None,
                decay=decay,
                found_inf=found_inf,
            )
        if self.joint:
            self._hold_jointly([k for k in grads if k in self.norm], found_inf)
        still = [k for k in self.parameters if self.joint or k not in grads] if due else []
        if still:
            weights = [local(self.parameters[k].detach()) for k in still]
            ema_([local(self.average[k]) for k in still], weights, decay, found_inf=found_inf)
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def _hold_jointly(self, keys: list[str], found_inf: Tensor | None) -> None:
        if not keys:
            return
        shards = [local(self.parameters[k].detach()) for k in keys]
        squares = sum_(torch.stack([s.float().square().sum() for s in shards]))
        scales = torch.stack([self.norm[k] for k in keys]) / squares.sqrt()
        wanted = torch.isfinite(scales) & (scales > 0)
        if found_inf is not None:
            wanted = wanted & (found_inf == 0)
        torch._foreach_mul_(shards, list(torch.where(wanted, scales, torch.ones_like(scales)).unbind()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "average": self.average,
            "norm": self.norm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the saved state is of other parameters.
        """
        if state["exp_avg"].keys() != self.exp_avg.keys() or state["norm"].keys() != self.norm.keys():
            raise ValueError("the saved optimizer state belongs to other parameters; train into another run folder")
        self.step_count = int(state["step"])
        for name in ("exp_avg", "exp_avg_sq", "average", "norm"):
            for key, value in getattr(self, name).items():
                fill_(value, state[name][key])


def mup_scales(named: Mapping[str, Tensor], model: ModelConfig, base: int) -> dict[str, float]:
    """Factors of Adam's learning rate under muP: base / width for hidden matrices and for the readout.

    Hidden matrices have both sides growing with the width: the blocks' Linear weights, the time embedding's second
    and the last layer's modulation. The readout's output factor base / width is folded into its weights (see
    :func:`scale_readouts_`); Adam's steps do not see the size of gradients, so the factor comes back here as rate.
    Everything else (inputs, biases, gains) has one side that does not grow, and keeps the rate.
    Source: Yang et al., "Tensor Programs V", 2022, table 8, for Adam.
    """
    scales = {}
    for name in named:
        width = model.encoder_width if name.startswith("encoder.") else model.decoder_width
        if is_held(name) or _HIDDEN_OR_READOUT.search(name):
            scales[name] = base / width
    return scales


@torch.no_grad()
def scale_readouts_(model: FlowMo, base: int) -> None:
    """Give the readouts of a fresh FlowMo muP's initial size, in place: sqrt(base / width) of PyTorch's own.

    That is the base width's deviation, 1 / sqrt(base fan-in), times the output factor base / width.
    """
    for part, width in (("encoder", model.config.encoder_width), ("decoder", model.config.decoder_width)):
        transformer = getattr(model, part)
        for stream in ("img", "txt"):
            getattr(transformer, f"final_layer_{stream}").linear.weight.mul_((base / width) ** 0.5)


def is_held(name: str) -> bool:
    """Whether the norm of this parameter is held: the Linear weights inside the double-stream blocks."""
    return "double_blocks" in name and name.endswith(".weight")
