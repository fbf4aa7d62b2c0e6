"""The sampler: time spacing, guidance interval, Euler chain (paper, section 3.4; supplement B).

Convention of the released checkpoints: x_t = t z + (1 - t) x with noise z, velocity v = z - x, t from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, bool], Tensor]


def time_grid(steps: int, rho: float = 4.0) -> list[float]:
    """t_i = ((n - i) / n)^rho for i = 0..n, from 1 to 0 (paper, eq. 14); rho = 1 is the unshifted sampler."""
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho={rho}: expected a positive number; 1 spaces the steps evenly")
    return [((steps - i) / steps) ** rho for i in range(steps + 1)]


def guided_steps(times: Sequence[float], guidance: float, interval: tuple[float, float] | None) -> list[bool]:
    """Which steps need the null pass: guidance other than 1 and t inside the interval, both ends included.

    The interval is in EDM noise-to-signal ratios s, with t = s / (1 + s); None guides every step.
    """
    if not math.isfinite(guidance):
        raise ValueError(f"guidance={guidance}: expected a finite number; 1 is no guidance")
    if guidance == 1.0:
        return [False] * (len(times) - 1)
    if interval is None:
        return [True] * (len(times) - 1)
    low, high = (s / (1.0 + s) for s in interval)
    if not 0 <= low <= high:
        raise ValueError(f"guidance_interval={interval}: expected 0 <= low <= high, or None to guide every step")
    return [low <= t <= high for t in times[:-1]]


@torch.no_grad()
def euler_sample(
    velocity: Velocity,
    noise: Tensor,  # [B, N, 3 p^2] patch tokens, fp32
    *,
    steps: int = 25,
    rho: float = 4.0,
    guidance: float = 1.5,
    guidance_interval: tuple[float, float] | None = (0.17, 1.02),
    trace: list[Tensor] | None = None,
) -> Tensor:  # [B, N, 3 p^2] fp32, not clipped
    """Integrate the flow from noise to a picture: x <- x - (t_i - t_{i+1}) v, guided inside the interval.

    Args:
        velocity: (x, t [B], conditional) -> v; called once a step, twice on guided steps.
        trace: a list that receives the state after every step.
    """
    times = time_grid(steps, rho)
    x = noise.float()
    for i, guided in enumerate(guided_steps(times, guidance, guidance_interval)):
        t = torch.full((x.shape[0],), times[i], device=x.device)
        v = velocity(x, t, True).float()
        if guided:
            v_null = velocity(x, t, False).float()
            v = v_null + guidance * (v - v_null)
        x = x - (times[i] - times[i + 1]) * v
        if trace is not None:
            trace.append(x)
    return x


def euler_chain(
    velocity: Velocity,
    noise: Tensor,  # [B, N, 3 p^2]
    times: Tensor,  # [B, n + 1], each row falling from 1 to 0
) -> Tensor:  # [B, N, 3 p^2]
    """The differentiable chain of Stage 1B: n unguided steps with times of each image's own (paper, eq. 10, 11)."""
    x = noise
    for i in range(times.shape[1] - 1):
        x = x - (times[:, i] - times[:, i + 1])[:, None, None] * velocity(x, times[:, i], True)
    return x


def random_times(
    batch: int,
    steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:  # [batch, steps + 1], from 1 to 0
    """Random spacing for Stage 1B: cumulative sums of uniforms, scaled to run from 1 to 0 (supplement A.2)."""
    sums = torch.rand(batch, steps + 1, generator=generator, device=device).cumsum(1)
    sums = sums - sums[:, :1]
    return (sums / sums[:, -1:]).flip(1)
