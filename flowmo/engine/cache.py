"""The plans of one model: prepared weights shared between them, and a bound on how many are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmo.engine.decode import DecodePlan, Schedule
from flowmo.engine.encode import EncodePlan
from flowmo.engine.plan import Execution, Plan
from flowmo.engine.step_cache import StepCache
from flowmo.engine.weights import DROPPED, Modulation, TransformerWeights, drop_modulation, modulation_dropped
from flowmo.transformer import MMDiT

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo

KEPT_PLANS = 4  # most recently used ones, encoder and decoder together
KEPT_WEIGHTS = 2  # precisions prepared at a time, for each of encoder and decoder


class Engine:
    """Plans of a model by what they were made for; copies and pickles of the model start with none.

    Attributes:
        built: plans made so far. A number that keeps growing says that shapes or options alternate between more
            settings than are kept.
        lock: held while a plan is made or runs: weights and buffers are shared, so threads take turns.
    """

    def __init__(self, kept_modulation: Modulation | None = None) -> None:
        self._plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
        self._weights: OrderedDict[tuple[Any, ...], TransformerWeights] = OrderedDict()
        self._kept = kept_modulation  # of the one schedule that is left after drop_modulation
        self.lock = threading.RLock()
        self.built = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Engine, (self._kept,)

    def clear(self) -> None:
        """Forget all plans and prepared weights; needed only after weights were written through `.data`."""
        self._plans.clear()
        self._weights.clear()

    def decode_plan(
        self,
        model: FlowMo,
        batch: int,
        schedule: Schedule,
        execution: Execution,
        cache: StepCache | None = None,
        drop: bool = False,
    ) -> DecodePlan:
        """The plan of these options, made where it is not kept already; its weights are up to date."""
        self.weights(model, "decoder", execution.dtype, execution.fp8)
        key = "decoder", schedule, execution, cache, model.device
        plan = self._find(key, batch)
        if plan is None:
            plan = self._keep(key, batch, DecodePlan(model, batch, schedule, execution, cache))
        assert isinstance(plan, DecodePlan)
        if drop and not modulation_dropped(model.decoder):
            self._drop(model, plan)
            self._plans[key, plan.batch] = plan
        return plan

    def encode_plan(self, model: FlowMo, batch: int, execution: Execution) -> EncodePlan:
        """As `decode_plan`, for the encoder."""
        self.weights(model, "encoder", execution.dtype, execution.fp8)
        key = "encoder", execution, model.device
        plan = self._find(key, batch)
        if plan is None:
            plan = self._keep(key, batch, EncodePlan(model, batch, execution))
        assert isinstance(plan, EncodePlan)
        return plan

    def weights(self, model: FlowMo, part: str, dtype: torch.dtype, fp8: bool) -> TransformerWeights:
        """Prepared weights of "encoder" or "decoder"; all that was made of older weights is forgotten."""
        module: MMDiT = getattr(model, part)
        key = part, dtype, fp8
        found = self._weights.get(key)
        if found is not None and found.fingerprint.matches(module):
            self._weights.move_to_end(key)
            return found
        if found is not None:
            for stale in [k for k in self._weights if k[0] == part]:
                del self._weights[stale]
            for old in [k for k in self._plans if k[0][0] == part]:
                del self._plans[old]
        with torch.inference_mode(False), torch.no_grad():
            found = TransformerWeights(module, dtype, fp8)
        same_part = [k for k in self._weights if k[0] == part]
        for surplus in same_part[: len(same_part) + 1 - KEPT_WEIGHTS]:
            del self._weights[surplus]
        self._weights[key] = found
        return found

    def modulation(self, model: FlowMo, weights: TransformerWeights, times: Sequence[float]) -> Modulation:
        """The decoder's modulation table of these times.

        Raises:
            RuntimeError: the modulation weights were dropped, and these are not the times that were kept.
        """
        if self._kept is None or not modulation_dropped(model.decoder):
            return weights.modulation(model.decoder, times)
        if tuple(times) != self._kept.times:
            raise RuntimeError(DROPPED)
        self._kept = self._kept.to(model.device)
        return self._kept

    def _find(self, key: tuple[Any, ...], batch: int) -> Plan | None:
        """The kept plan of this batch, or, where a new one would be captured, a plan of up to twice the batch."""
        sizes = sorted(b for k, b in self._plans if k == key and b >= batch)
        for size in sizes:
            plan = self._plans[key, size]
            if size == batch or (plan.graph and size <= 2 * batch):
                self._plans.move_to_end((key, size))
                return plan
        return None

    def _keep(self, key: tuple[Any, ...], batch: int, plan: Plan) -> Plan:
        self.built += 1
        while len(self._plans) >= KEPT_PLANS:
            self._plans.popitem(last=False)
        self._plans[key, batch] = plan
        return plan

    def _drop(self, model: FlowMo, plan: DecodePlan) -> None:
        self._kept = plan._table
        drop_modulation(model.decoder)
        for key in [k for k in self._weights if k[0] == "decoder"]:
            del self._weights[key]
        for old in [k for k in self._plans if k[0][0] == "decoder"]:
            del self._plans[old]
        plan.refresh()


@torch.no_grad()
def psnr_to_exact(
    model: FlowMo,
    codes: Tensor,  # [B, T, C]
    noise: Tensor,  # [B, 3, S, S]
    **options: Any,
) -> Tensor:  # [B] dB, infinite where nothing changed
    """PSNR of the pictures that `FlowMo.decode_plan(..., **options)` makes to those of the exact sampler.

    The exact sampler has the same steps, spacing, guidance and dtype, takes Euler steps without tail merge and without
    step caching, and uses neither fp8 nor a named attention backend.
    """
    exact = {k: v for k, v in options.items() if k not in ("tail_merge", "cache", "fp8", "attention", "solver")}
    changed, reference = (model.decode_plan(len(codes), **o)(codes, noise) for o in (options, exact))
    error = (changed.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)  # pictures span [-1, 1]
