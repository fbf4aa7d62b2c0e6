"""Measures of reconstruction and generation quality."""

from __future__ import annotations

from flowmo.metrics.codes import CodeCounts, CodeUsage
from flowmo.metrics.fid import Moments, frechet_distance
from flowmo.metrics.inception_score import inception_score
from flowmo.metrics.precision_recall import PrecisionRecall, precision_recall
from flowmo.metrics.reconstruction import (
    bits_per_pixel,
    mean_colour_baseline,
    mean_squared_error,
    pooled_psnr,
    psnr,
    psnr_of,
    truncated_levels,
)
from flowmo.metrics.ssim import ssim

__all__ = [
    "CodeCounts",
    "CodeUsage",
    "Moments",
    "PrecisionRecall",
    "bits_per_pixel",
    "frechet_distance",
    "inception_score",
    "mean_colour_baseline",
    "mean_squared_error",
    "pooled_psnr",
    "precision_recall",
    "psnr",
    "psnr_of",
    "ssim",
    "truncated_levels",
]
