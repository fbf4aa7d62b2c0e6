"""The decode plan: the guided sampler with everything hoisted that the picture does not change.

Exact, up to the order of sums: modulation of all evaluations as one table, weights in the plan's dtype, rotary tables,
the latent input projection once a picture (that of the null condition, all zeros, is its bias), the conditional and the
null pass of a guided step as one batch, last layer + guidance + step + next patch embedding as one op, nothing computed
that the picture does not need. Opt-ins that change the picture: tail_merge, step caching, fp8 linear layers, attention
in fp8 or int8, solvers other than Euler.

Shapes: B images, S image side, T latent tokens, C latent channels, N image tokens, L = T + N, D width, P = 3 p^2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.engine.plan import Execution, Plan
from flowmo.engine.step_cache import StepCache
from flowmo.engine.trunk import Trunk
from flowmo.layers import patchify, unpatchify
from flowmo.sampling import guided_steps
from flowmo.solvers import combine, make_solver, solver_times
from flowmo_kernels import euler_step, gate_residual, norm_modulate, step_boundary

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo


class Schedule(NamedTuple):
    """Sampler options; see `FlowMo.decode`."""

    steps: int = 25
    rho: float = 4.0
    guidance: float = 1.5
    guidance_interval: tuple[float, float] | None = (0.17, 1.02)
    solver: str = "euler"
    tail_merge: int | None = None

    @property
    def times(self) -> list[float]:
        return solver_times(self.steps, self.rho, self.tail_merge)

    @property
    def evaluations(self) -> list[float]:
        """Times at which the network is evaluated."""
        return make_solver(self.solver, self.times).evaluations

    @property
    def guided(self) -> list[bool]:
        """Which evaluations need the null pass."""
        return guided_steps([*self.evaluations, 0.0], self.guidance, self.guidance_interval)

    @property
    def forwards(self) -> int:
        """Forward passes of one picture: 31 for the paper's sampler."""
        return sum(1 + g for g in self.guided)


class DecodePlan(Plan):
    """Pictures of codes: `plan(codes, noise) -> images`. Made by :meth:`FlowMo.decode_plan`."""

    part = "decoder"

    def __init__(
        self,
        model: FlowMo,
        batch: int,
        schedule: Schedule,
        execution: Execution,
        cache: StepCache | None = None,
    ) -> None:
        self.schedule = schedule
        self.guided = schedule.guided
        self.solver = make_solver(schedule.solver, schedule.times)
        self.cache = StepCache(()) if cache is None or not cache.steps else cache
        if self.cache.steps:
            self.cache.check(self.guided, model.config.decoder_depth)
        super().__init__(model, batch, execution)

    @property
    def forwards(self) -> float:
        """Forward passes of one picture; with step caching one of some of the blocks counts as a part of one."""
        return self.cache.forwards(self.guided, self.config.decoder_depth)

    def describe(self) -> str:
        s, c = self.schedule, self.cache
        words = [s.solver, f"{s.steps} steps"]
        if s.tail_merge:
            words.append(f"last {s.tail_merge} as one")
        if c.steps:
            words.append(f"{len(c.steps)} with {c.blocks} of {self.config.decoder_depth} blocks")
        return f"{super().describe()}; {', '.join(words)}, {self.forwards:.4g} forward passes"

    def __call__(
        self,
        codes: Tensor,  # [b, T, C], b at most the plan's batch
        noise: Tensor,  # [b, 3, S, S], standard normal
    ) -> Tensor:  # [b, 3, S, S] fp32 in [-1, 1]
        """Raises ValueError: codes or noise of another shape; RuntimeError: the model moved to another device."""
        c = self.config
        b = codes.shape[0]
        if codes.shape[1:] != (c.latent_tokens, c.latent_channels) or not 1 <= b <= self.batch:
            expected = f"[b, {c.latent_tokens}, {c.latent_channels}] with b from 1 to {self.batch}"
            raise ValueError(
                f"codes: expected shape {expected}, got {list(codes.shape)}; make a plan of a larger batch"
            )
        if tuple(noise.shape) != (b, 3, c.image_size, c.image_size):
            raise ValueError(f"noise: expected shape {[b, 3, c.image_size, c.image_size]}, got {list(noise.shape)}")
        self.refresh()
        return self.run(codes, noise)

    def _build(self, model: FlowMo) -> None:
        c, w, b = self.config, self._weights, self.batch
        self._codes = torch.zeros(b, c.latent_tokens, c.latent_channels, dtype=self.dtype, device=self.device)
        self._noise = torch.zeros(b, 3, c.image_size, c.image_size, device=self.device)
        self._table = model.engine.modulation(model, w, self.schedule.evaluations)
        widest = 2 * b if any(self.guided) else b
        self._trunk = Trunk(w, widest, self.attention, self.overlap)
        # Input rows of the first block, by guided and not: their latent rows last for all steps of a picture.
        self._rows: dict[bool, Tensor] = {}
        for guided in set(self.guided):
            copies = 2 if guided else 1
            rows = torch.zeros(w.length, copies, b, w.width, dtype=self.dtype, device=self.device)
            if guided:
                rows[: w.latents, 1] = w.txt_in.b
            self._rows[guided] = rows
        # What the blocks after the first few added at the last full evaluation, by copy: condition, null condition.
        self._stored = self.cache.stored(len(self.guided))
        shape = w.length - w.latents, widest // b, b, w.width
        self._rest = torch.empty(shape if self._stored else (0,), dtype=self.dtype, device=self.device)

    def _inputs(self) -> tuple[Tensor, ...]:
        return self._codes, self._noise

    def _run(self) -> Tensor:
        w, s = self._weights, self.schedule
        condition = torch.cat([self._codes, torch.ones_like(self._codes[..., :1])], -1)
        latents = F.linear(condition, w.txt_in.w, w.txt_in.b).transpose(0, 1)
        for rows in self._rows.values():
            rows[: w.latents, 0].copy_(latents)

        z = patchify(self._noise, self.config.patch)  # [B, N, P] fp32, patch tokens to the end
        x = self._embed(z)
        self.solver.restart()
        times, last = self.schedule.times, len(self.guided) - 1
        for j, guided in enumerate(self.guided):
            h, h_null = self._image_rows(x, j, guided)
            shift, scale = self._table.last[j, :1], self._table.last[j, 1:]
            if s.solver == "euler" and j < last:
                z, x = step_boundary(
                    h, shift, scale, w.out.w, w.out.b, z, w.img_in.w, w.img_in.b,
                    dt=times[j] - times[j + 1], h_null=h_null, w=s.guidance,
                )  # fmt: skip
                continue
            v = self._velocity(h, shift, scale)
            v_null = None if h_null is None else self._velocity(h_null, shift, scale)
            if s.solver == "euler":
                z, _ = euler_step(z, v, v_null, dt=times[j] - times[j + 1], w=s.guidance)
                continue
            z = self.solver.advance(j, z, v.float() if v_null is None else combine(v, v_null, s.guidance))
            if j < last:
                x = self._embed(z)
        return unpatchify(z, self.config.patch, self.config.image_size).clamp(-1, 1)

    def _embed(self, z: Tensor) -> Tensor:  # [B, N, D]
        return F.linear(z.to(self.dtype), self._weights.img_in.w, self._weights.img_in.b)

    def _image_rows(
        self,
        x: Tensor,  # [B, N, D] embedded patches
        j: int,
        guided: bool,
    ) -> tuple[Tensor, Tensor | None]:  # image rows after the last block, of the condition and of the null condition
        rows, latents, b = self._rows[guided], self._weights.latents, self.batch
        copies, width = rows.shape[1], rows.shape[3]
        rows[latents:].copy_(x.transpose(0, 1)[:, None])
        cut = j in self.cache.steps
        state, early = self._trunk(
            rows.flatten(0, 2), copies * b, self._table.blocks[j],
            last=self.cache.blocks if cut else None, early=self.cache.blocks if j in self._stored else None,
        )  # fmt: skip
        h = gate_residual(*state).view(-1, copies, b, width)
        if cut:
            h += self._rest[:, :copies]
        if early is not None:
            torch.sub(h, early.view_as(h), out=self._rest[:, :copies])
        h = h.flatten(1, 2).transpose(0, 1)
        return (h[:b], h[b:]) if guided else (h, None)

    def _velocity(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # [B, N, P]
        """The last layer, which normalizes twice."""
        y = norm_modulate(h, shift.expand(self.batch, -1), scale.expand(self.batch, -1))
        return F.linear(norm_modulate(y), self._weights.out.w, self._weights.out.b)
