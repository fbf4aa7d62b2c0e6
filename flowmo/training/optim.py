"""The optimizer of FlowMo: Adam, weights held at their first norm, exponential average, in one pass.

Source: paper, section 4.1 (Adam with betas 0.9 and 0.95, forced weight normalisation after EDM2, average 0.9999).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flowmo.config import OptimConfig
from flowmo_kernels import adam_hold_ema_, weight_norms


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Rate of the step after `step` steps, `progress` in [0, 1] being the part of the run that is done."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class AdamHoldEMA:
    """Adam over fp32 parameters, the norm hold of the block weights, and the average of everything.

    Parameters without a gradient (a frozen encoder) are left alone and keep their moments.

    Args:
        named: the trainable parameters by name.
        config: rates, decay and the kind of hold: "matrix" keeps the Frobenius norm of every Linear weight inside
            the blocks at its value of now, "channel" that of each row, "none" nothing.
    """

    def __init__(self, named: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.step_count = 0
        self.parameters = named
        self.exp_avg = {k: torch.zeros_like(p) for k, p in named.items()}
        self.exp_avg_sq = {k: torch.zeros_like(p) for k, p in named.items()}
        self.average = {k: p.detach().clone() for k, p in named.items()}
        held = [k for k in named if is_held(k)] if config.hold_norms != "none" else []
        norms = weight_norms([named[k].detach() for k in held], per_channel=config.hold_norms == "channel")
        self.norm: dict[str, Tensor] = dict(zip(held, norms))

    def step(self, lr: float) -> None:
        """One update from the gradients that are there; they are cleared."""
        self.step_count += 1
        grads = {k: p.grad for k, p in self.parameters.items() if p.grad is not None}
        keys = list(grads)
        every = self.config.ema_every
        due = self.step_count % every == 0
        adam_hold_ema_(
            [self.parameters[k].detach() for k in keys],
            list(grads.values()),
            [self.exp_avg[k] for k in keys],
            [self.exp_avg_sq[k] for k in keys],
            step=self.step_count,
            lr=lr,
            betas=self.config.betas,
            eps=self.config.eps,
            norms=[self.norm.get(k) for k in keys],
            per_channel=self.config.hold_norms == "channel",
            averages=[self.average[k] for k in keys] if due else None,
            decay=self.config.ema_decay**every,
        )
        for p in self.parameters.values():
            p.grad = None

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
                value.copy_(state[name][key])


def is_held(name: str) -> bool:
    """Whether the norm of this parameter is held: the Linear weights inside the double-stream blocks."""
    return "double_blocks" in name and name.endswith(".weight")
