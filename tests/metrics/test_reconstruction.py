"""PSNR against scikit-image and by hand, the baseline, the size of a code."""

from __future__ import annotations

import math

import pytest
import torch

from flowmo.metrics import bits_per_pixel, mean_colour_baseline, psnr


def test_psnr_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = torch.randint(0, 256, (2, 4, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [metrics.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(a, b)]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    assert psnr(a / 127.5 - 1, b / 127.5 - 1).tolist() == pytest.approx(expected, rel=1e-12)


def test_psnr_is_per_picture_and_rounds_to_levels() -> None:
    a = torch.full((3, 3, 4, 4), 100.0)
    b = a + torch.tensor([0.4, 0.6, 10.0]).view(3, 1, 1, 1)  # off by 0, 1 and 10 levels
    values = psnr(a / 127.5 - 1, b / 127.5 - 1)
    assert values.dtype == torch.float64 and values[0] == math.inf
    assert values[1:].tolist() == pytest.approx([20 * math.log10(255), 20 * math.log10(25.5)], rel=1e-12)


def test_psnr_refuses_what_it_cannot_compare() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\[1, 3, 4, 4\] and \[1, 3, 4, 5\]"):
        psnr(x, torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"\[3, 4, 4\]"):
        psnr(x[0], x[0])
    with pytest.raises(ValueError, match="NaN"):
        psnr(x, x * math.nan)


def test_baseline_is_each_pictures_mean_colour() -> None:
    images = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat = mean_colour_baseline(images)
    assert flat.shape == images.shape
    for n in range(2):
        for c in range(3):
            assert torch.allclose(flat[n, c], torch.full((8, 6), images[n, c].mean().item()), atol=1e-6)
    # the mean is the best constant: any other colour is farther away
    assert (psnr(images, flat) > psnr(images, (flat + 0.1).clamp(-1, 1))).all()


def test_bits_per_pixel() -> None:
    assert bits_per_pixel(256, 18, 256, 256) == pytest.approx(0.0703125)
    assert bits_per_pixel(2, 9, 4, 9) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="bits=0"):
        bits_per_pixel(256, 0, 256, 256)
