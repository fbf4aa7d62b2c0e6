"""Inference engine: plans that compute once what does not change, and a small cache of them for each model."""

from __future__ import annotations

from flowmo.engine.cache import Engine, psnr_to_exact
from flowmo.engine.decode import DecodePlan, Schedule
from flowmo.engine.encode import EncodePlan
from flowmo.engine.plan import Execution
from flowmo.engine.step_cache import StepCache

__all__ = ["DecodePlan", "EncodePlan", "Engine", "Execution", "Schedule", "StepCache", "psnr_to_exact"]
