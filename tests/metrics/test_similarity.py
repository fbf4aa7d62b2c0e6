"""SSIM and pooled PSNR against scikit-image and torchmetrics, truncation as released, and the use of codes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmo.data import normalize, to_uint8
from flowmo.metrics import CodeCounts, mean_squared_error, pooled_psnr, psnr, psnr_of, ssim, truncated_levels


def pairs(n: int = 3, height: int = 24, width: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 5, generator=generator) * 255, size=(height, width))
    noise = torch.randn(a.shape, generator=generator) * torch.tensor([2.0, 10, 60])[:n].view(-1, 1, 1, 1)
    return a.to(torch.uint8), (a + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_ssim_agrees_with_scikit_image(window: str) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    options = {} if window == "uniform" else {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    a, b = pairs()
    expected = [
        metrics.structural_similarity(x.numpy(), y.numpy(), data_range=255, channel_axis=0, **options)
        for x, y in zip(a, b)
    ]
    assert ssim(a, b, window).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(normalize(a), normalize(b), window).tolist() == pytest.approx(expected, rel=1e-10)
    assert ssim(a, a, window).tolist() == pytest.approx([1.0] * 3, rel=1e-12)


def test_ssim_and_psnr_agree_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pairs()
    x, y = a.double(), b.double()
    options = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    maps = functional.structural_similarity_index_measure(x, y, **options)[1]
    inside = maps[..., 5:-5, 5:-5].mean((1, 2, 3))  # it averages over mirrored borders too
    assert ssim(a, b, "gaussian").tolist() == pytest.approx(inside.tolist(), rel=1e-8)
    expected = functional.peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))
    assert psnr(a, b).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_ssim_of_a_negative_is_negative() -> None:
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert float(ssim(x, 255 - x)) < -0.5


def test_ssim_refuses_small_pictures_and_other_words() -> None:
    x = torch.zeros(1, 3, 10, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="sides of at least 11 pixels"):
        ssim(x, x, "gaussian")
    with pytest.raises(ValueError, match="sides of at least 11 pixels"):
        ssim(x.mT, x.mT, "gaussian")
    x = torch.zeros(1, 3, 11, 11, dtype=torch.uint8)
    assert ssim(x, x, "gaussian") == 1  # a single window
    with pytest.raises(ValueError, match="uniform, gaussian, got 'box'"):
        ssim(x, x, "box")


def test_pooled_psnr_is_that_of_the_batch_as_one_picture() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (torch.cat([p, p.flip(0), p[:1]]) for p in pairs())  # 7 pictures: a batch of five and one of two
    error = mean_squared_error(a, b)
    parts = [
        metrics.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255) for x, y in zip(a.split(5), b.split(5))
    ]
    assert pooled_psnr(error) == pytest.approx((5 * parts[0] + 2 * parts[1]) / 7, rel=1e-12)
    assert pooled_psnr(error) < float(psnr(a, b).mean()) - 0.5
    assert pooled_psnr(error, batch=1) == pytest.approx(float(psnr(a, b).mean()), rel=1e-12)
    assert pooled_psnr(error[:1].expand(10)) == pytest.approx(float(psnr_of(error[:1])), rel=1e-12)


def test_rounding_returns_every_grey_level_and_truncation_loses_95() -> None:
    level = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(normalize(level)), level)
    released = torch.from_numpy((level.numpy() / 127.5 - 1).astype(np.float32))
    lost = level.int() - truncated_levels(released).int()
    assert int(lost.sum()) == 95 and set(lost.tolist()) == {0, 1}
    assert truncated_levels(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_code_usage_of_known_distributions() -> None:
    counts = CodeCounts(8)
    counts.add(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]))
    usage = counts.usage()
    assert usage.used == 3 / 8 and usage.tokens == 8
    assert usage.entropy == pytest.approx(0.5 * 1 + 2 * 0.25 * 2) and usage.perplexity == pytest.approx(2**1.5)
    assert usage.position_entropy == pytest.approx((0 + 1) / 2)
    even = CodeCounts(8)
    even.add(torch.arange(8).repeat(3, 2))
    assert even.usage().entropy == pytest.approx(math.log2(8)) and even.usage().used == 1


def test_code_counts_merge_like_one() -> None:
    tokens = torch.randint(0, 16, (20, 5), generator=torch.Generator().manual_seed(0))
    whole, first, second = CodeCounts(16), CodeCounts(16), CodeCounts(16)
    whole.add(tokens)
    first.add(tokens[:3])
    second.add(tokens[3:])
    first.merge(CodeCounts(16))
    first.merge(second)
    assert torch.equal(first.counts, whole.counts) and first.usage() == whole.usage()
    assert whole.usage().tokens == 100


def test_tokens_of_another_tokenizer_are_refused() -> None:
    counts = CodeCounts(4)
    counts.add(torch.tensor([[0, 3]]))
    for tokens, words in (
        (torch.tensor([[0, 4]]), r"\[0, 4\), got 0 to 4"),
        (torch.tensor([[0, -1]]), r"\[0, 4\), got -1 to 0"),
        (torch.tensor([[0, 1, 2]]), "expected 2 a picture"),
        (torch.tensor([[0.0, 1.0]]), "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            counts.add(tokens)
    with pytest.raises(ValueError, match="no tokens"):
        CodeCounts(4).usage()
