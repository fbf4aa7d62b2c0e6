"""Inference engine: plans that compute once what does not change, and a small cache of them for each model."""

from __future__ import annotations

from flowmo.engine.cache import Engine, psnr_to_exact
from flowmo.engine.decode import DecodePlan, Schedule
from flowmo.engine.encode import EncodePlan

__all__ = ["DecodePlan", "EncodePlan", "Engine", "Schedule", "psnr_to_exact"]
