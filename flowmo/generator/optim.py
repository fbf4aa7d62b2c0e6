"""The optimizer of Stage 2: AdamW and an average that forgets the initial weights faster while it is young."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flowmo.generator_config import GeneratorOptimConfig
from flowmo.training.sharding import fill_
from flowmo_kernels import adam_hold_ema_

NO_DECAY = ("norm", "embedding", "bias", "scale", "shift")  # parts of parameter names


class AdamWEMA:
    """AdamW over fp32 parameters and the average of them all, in the passes that the autoencoder's Adam takes too.

    Matrices decay; norms, biases, embeddings and positions do not.

    Args:
        named: the trainable parameters by name.
        config: rates, decay and horizon.
    """

    def __init__(self, named: dict[str, nn.Parameter], config: GeneratorOptimConfig) -> None:
        self.config = config
        self.step_count = 0
        self.parameters = named
        self.exp_avg = {k: torch.zeros_like(p) for k, p in named.items()}
        self.exp_avg_sq = {k: torch.zeros_like(p) for k, p in named.items()}
        self.average = {k: p.detach().clone() for k, p in named.items()}

    def step(self, lr: float, found_inf: Tensor | None = None) -> None:
        """One update from the gradients, which every parameter has, or none by `found_inf`; they are cleared."""
        c = self.config
        weights = {k: p.detach() for k, p in self.parameters.items()}
        if c.weight_decay:
            keep: float | Tensor = 1.0 - lr * c.weight_decay
            if found_inf is not None:
                keep = torch.where(found_inf == 0, torch.full_like(found_inf, 1.0 - lr * c.weight_decay), 1.0)
            torch._foreach_mul_([w for k, w in weights.items() if decays(k, w)], keep)
        adam_hold_ema_(
            list(weights.values()),
            [p.grad for p in self.parameters.values() if p.grad is not None],
            list(self.exp_avg.values()),
            list(self.exp_avg_sq.values()),
            step=self.step_count + 1,
            lr=lr,
            betas=c.betas,
            eps=c.eps,
            averages=list(self.average.values()),
            decay=ema_decay(c, self.step_count),
            found_inf=found_inf,
        )
        self.step_count += 1
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the saved state is of other parameters.
        """
        if state["exp_avg"].keys() != self.exp_avg.keys():
            raise ValueError("the saved optimizer state belongs to other parameters; train into another run folder")
        self.step_count = int(state["step"])
        for name in ("exp_avg", "exp_avg_sq", "average"):
            for key, value in getattr(self, name).items():
                fill_(value, state[name][key])


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay pulls at a parameter."""
    return parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)


def learning_rate(config: GeneratorOptimConfig, step: int, steps: int, progress: float = 0.0) -> float:
    """Rate of the step after `step` of `steps`: linear warm-up, then a cosine to `lr_end`, or constant.

    A run that time may end sooner than its steps gives its `progress` in [0, 1], and anneals by that.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    part = min(1.0, max((step - config.warmup) / max(1, steps - config.warmup), progress))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * part))


def ema_decay(config: GeneratorOptimConfig, step: int) -> float:
    """Decay of the average after `step` steps: young averages forget the initial weights faster."""
    return min(config.ema_decay, (1 + step) / (10 + step))
