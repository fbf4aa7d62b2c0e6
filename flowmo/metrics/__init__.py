"""Measures of reconstruction quality."""

from __future__ import annotations

from flowmo.metrics.reconstruction import bits_per_pixel, mean_colour_baseline, psnr

__all__ = ["bits_per_pixel", "mean_colour_baseline", "psnr"]
