"""Solvers of the flow ODE dx/dt = v(x, t) from t = 1 to 0, seen from the network that gives v.

Convention of the released checkpoints: x_t = t z + (1 - t) x with noise z, velocity v = z - x. With d = t - t' > 0:

    euler   x' = x - d v(x, t)                                                       1 evaluation a step, order 1
    heun    x' = x - d / 2 (v(x, t) + v(x - d v, t')), Euler in the last step        2 evaluations a step, order 2
    ab2     x' = x - d ((1 + r / 2) v - r / 2 v_last), r = d / d_last, Euler first   1 evaluation a step, order 2
    dpm     x' = (t' / t) x + (1 - t' / t) D, with the clean picture D = x - t v extrapolated in the log
            signal-to-noise ratio l = log((1 - t) / t): D <- D + (D - D_last) h / (2 h_last), h = l' - l;
            plain D where h or h_last is infinite                1 evaluation a step, order 2 up to log(steps)

Euler with 25 steps is the paper's sampler (section 3.4) and the default everywhere. Heun's rule with an Euler step at
the end follows Karras et al. 2022, dpm the second-order multistep DPM-Solver++ of Lu et al. 2022 in data prediction.

Legend: B images, N image tokens, P = 3 p^2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowmo.sampling import Velocity, guided_steps, time_grid


def solver_times(steps: int, rho: float = 4.0, tail_merge: int | None = None) -> list[float]:
    """Times from 1 to 0, the last `tail_merge` of the `steps` steps replaced by one from t = (tail_merge / steps)^rho.

    The shifted spacing crowds its steps at the end, where the velocity hardly changes any more: at 25 steps with rho 4
    a merge of 6 starts at t = 0.0033.

    Raises:
        ValueError: steps, rho or tail_merge out of range.
    """
    times = time_grid(steps, rho)
    if tail_merge is None:
        return times
    if not 1 <= tail_merge <= steps:
        raise ValueError(f"tail_merge={tail_merge}: expected None, or 1 to steps={steps} last steps to take as one")
    return [*times[: steps - tail_merge + 1], 0.0]


class Solver:
    """Euler's rule, and the interface of all solvers.

    A run calls `restart` once, then for j = 0, 1, ... evaluates the velocity at time `evaluations[j]` and hands it to
    `advance(j, ...)`, which returns where to evaluate next; the last result is the solution at t = 0.
    """

    order = 1

    def __init__(self, times: Sequence[float]) -> None:
        self.times = list(times)
        self.evaluations = self.times[:-1]

    def restart(self) -> None:
        """Forget the last run."""

    def advance(
        self,
        j: int,
        x: Tensor,  # any shape, where the velocity was evaluated
        v: Tensor,  # as x, the velocity
    ) -> Tensor:  # as x
        return x - (self.times[j] - self.times[j + 1]) * v


class Heun(Solver):
    order = 2

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(times)
        inner = [t for pair in zip(self.times[:-2], self.times[1:-1]) for t in pair]
        self.evaluations = [*inner, self.times[-2]]
        self.restart()

    def restart(self) -> None:
        self._start: tuple[Tensor, Tensor] | None = None

    def advance(self, j: int, x: Tensor, v: Tensor) -> Tensor:
        step = self.times[j // 2] - self.times[j // 2 + 1]
        if self._start is None:
            if j + 1 < len(self.evaluations):
                self._start = x, v
            return x - step * v
        x, first = self._start
        self._start = None
        return x - (0.5 * step) * (first + v)


class AdamsBashforth(Solver):
    order = 2

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(times)
        self.restart()

    def restart(self) -> None:
        self._last: Tensor | None = None

    def advance(self, j: int, x: Tensor, v: Tensor) -> Tensor:
        step = self.times[j] - self.times[j + 1]
        last, self._last = self._last, v
        if last is None:
            return x - step * v
        half = 0.5 * step / (self.times[j - 1] - self.times[j])
        return x - (step * (1 + half)) * v + (step * half) * last


class DPMSolver(Solver):
    order = 2

    def __init__(self, times: Sequence[float]) -> None:
        super().__init__(times)
        self._log_snr = [_log_snr(t) for t in self.times]
        self.restart()

    def restart(self) -> None:
        self._last: Tensor | None = None

    def advance(self, j: int, x: Tensor, v: Tensor) -> Tensor:
        t, to = self.times[j], self.times[j + 1]
        clean = x - t * v
        last, self._last = self._last, clean
        if last is not None:
            h, h_last = (self._log_snr[i + 1] - self._log_snr[i] for i in (j, j - 1))
            if math.isfinite(h) and math.isfinite(h_last):
                clean = clean + (0.5 * h / h_last) * (clean - last)
        return (to / t) * x + (1 - to / t) * clean


def _log_snr(t: float) -> float:
    """log((1 - t) / t), infinite at both ends."""
    return -math.inf if t >= 1 else math.inf if t <= 0 else math.log((1 - t) / t)


SOLVERS: dict[str, type[Solver]] = {"euler": Solver, "heun": Heun, "ab2": AdamsBashforth, "dpm": DPMSolver}


def make_solver(name: str, times: Sequence[float]) -> Solver:
    """The solver called `name` on a grid of times falling from 1 to 0.

    Raises:
        ValueError: no solver of that name.
    """
    if name not in SOLVERS:
        near = difflib.get_close_matches(str(name), SOLVERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"solver={name!r}: expected one of {', '.join(SOLVERS)}{hint}")
    return SOLVERS[name](times)


def combine(v: Tensor, v_null: Tensor, guidance: float) -> Tensor:
    """Guided velocity v_null + w (v - v_null), in fp32."""
    null = v_null.float()
    return null + guidance * (v.float() - null)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,  # [B, N, P] patch tokens
    *,
    steps: int = 25,
    rho: float = 4.0,
    guidance: float = 1.5,
    guidance_interval: tuple[float, float] | None = (0.17, 1.02),
    solver: str = "euler",
    tail_merge: int | None = None,
) -> Tensor:  # [B, N, P] fp32, not clipped
    """Integrate the flow from noise to a picture with any of the solvers, call by call; options as `FlowMo.decode`."""
    rule = make_solver(solver, solver_times(steps, rho, tail_merge))
    rule.restart()
    x = noise.float()
    guided = guided_steps([*rule.evaluations, 0.0], guidance, guidance_interval)
    for j, (time, guide) in enumerate(zip(rule.evaluations, guided)):
        t = torch.full((x.shape[0],), time, device=x.device)
        v = velocity(x, t, True).float()
        if guide:
            v = combine(v, velocity(x, t, False), guidance)
        x = rule.advance(j, x, v)
    return x
