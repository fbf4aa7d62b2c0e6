"""Fréchet distance, Inception Score, precision and recall: closed forms, identities and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmo.metrics import Moments, frechet_distance, inception_score, precision_recall


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: Tensor, batch: int = 1000) -> Moments:
    result = Moments()
    for part in rows.split(batch):
        result.add(part)
    return result


def test_moments_are_numpys_whatever_the_batches_and_the_offset() -> None:
    rows = normal(103, 6) @ normal(6, 6, seed=1) + 1e6
    for batch in (1, 7, 103):
        m = moments(rows, batch)
        # the offset costs 1e6 eps in every deviation
        assert torch.allclose(m.mean, rows.mean(0), rtol=1e-14)
        assert torch.allclose(m.covariance(), torch.from_numpy(np.cov(rows.numpy().T)), rtol=1e-7, atol=1e-7)
    halves = moments(rows[:40], 9)
    halves.merge(moments(rows[40:], 9))
    assert halves.n == 103 and torch.allclose(halves.covariance(), m.covariance(), rtol=1e-9, atol=1e-9)


def test_moments_take_half_precision_and_empty_batches_and_refuse_the_rest() -> None:
    m = moments(normal(8, 3).half())
    m.add(torch.zeros(0, 3))
    m.merge(Moments())
    assert m.n == 8 and m.mean.dtype == torch.float64
    with pytest.raises(ValueError, match=r"\[N, 3\], got \[2, 4\]"):
        m.add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        m.add(torch.full((2, 3), math.inf))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        moments(normal(1, 3)).covariance()


def test_two_gaussians_that_share_axes() -> None:
    # closed form for commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2, along any rotation
    turn = torch.linalg.qr(normal(5, 5)).Q
    m1, m2 = normal(5, seed=1), normal(5, seed=2)
    s1, s2 = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 0.5, 1, 0]).double()
    first, second = (Moments.from_statistics(m, turn @ torch.diag(s**2) @ turn.T) for m, s in ((m1, s1), (m2, s2)))
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    # a zero eigenvalue comes back as some 1e-16 x 25, and its root as some 5e-8
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-6)


def test_covariances_that_do_not_commute_agree_with_the_root_of_their_product() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = moments(normal(50, 6) @ normal(6, 6, seed=1)), moments(normal(40, 6, seed=3) + 0.2)
    s1, s2 = first.covariance(), second.covariance()
    root = linalg.sqrtm((s1 @ s2).numpy()).real
    expected = (first.mean - second.mean).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("n", [20, 400])  # fewer rows than features, and more
def test_identical_sets_are_at_distance_zero(n: int) -> None:
    rows = normal(n, 200).relu().float()
    assert frechet_distance(moments(rows), moments(rows)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moments(rows, 7), moments(rows.flip(0), 11)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moments(rows), moments(rows + 0.1)) == pytest.approx(200 * 0.01, rel=1e-4)


def test_the_distance_scales_with_the_features() -> None:
    """Which directions have no spread is told relative to the widest one."""
    first, second = normal(50, 6), normal(40, 6, seed=3) * 1.5 + 0.2
    for scale in (1e-9, 1e9):
        there = frechet_distance(moments(scale * first), moments(scale * second)) / scale**2
        assert there == pytest.approx(frechet_distance(moments(first), moments(second)), rel=1e-9)


def test_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = moments(normal(60, 8)), moments(normal(50, 8, seed=1) * 1.5)
    expected = fid._compute_fid(first.mean, first.covariance(), second.mean, second.covariance())
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-10)


def test_statistics_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 and 4"):
        frechet_distance(moments(normal(9, 3)), moments(normal(9, 4)))
    with pytest.raises(ValueError, match="sigma"):
        Moments.from_statistics(torch.zeros(3), torch.zeros(4, 4))


def test_inception_score_by_its_definition() -> None:
    logits = normal(24, 5) * 3
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    parts = [p[:10], p[10:20], p[20:]]
    expected = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in parts]
    assert inception_score(logits, 10) == pytest.approx(np.mean(expected), rel=1e-12)
    # certain and evenly spread over 5 classes; a probability of e^-1000 must not become 0 log 0
    assert inception_score(1000 * torch.eye(5)) == pytest.approx(5)
    assert inception_score(torch.zeros(5, 5)) == pytest.approx(1)


def test_inception_score_splits_as_the_adm_evaluator_does() -> None:
    logits = normal(6000, 4) * 3
    whole, rest = inception_score(logits[:5000], 10_000), inception_score(logits[5000:], 10_000)
    assert inception_score(logits) == pytest.approx((whole + rest) / 2, rel=1e-12)


def test_inception_score_depends_on_the_order() -> None:
    by_class = 50 * torch.eye(4).repeat_interleave(6, 0)
    mixed = by_class[torch.arange(24).view(4, 6).T.flatten()]
    assert inception_score(by_class, 6) == pytest.approx(1) and inception_score(mixed, 6) > 3.5


def brute_force(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    def radius(points: Tensor, i: int) -> float:
        return sorted(float((points[i] - points[j]).norm()) for j in range(len(points)) if j != i)[k - 1]

    def inside(points: Tensor, balls: Tensor) -> float:
        radii = [radius(balls, i) for i in range(len(balls))]
        hits = [any(float((x - c).norm()) <= r for c, r in zip(balls, radii)) for x in points]
        return sum(hits) / len(hits)

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize(("k", "block"), [(3, 2048), (3, 7), (1, 1)])
def test_precision_and_recall_equal_brute_force(k: int, block: int) -> None:
    reference, samples = normal(31, 4), 0.8 * normal(23, 4, seed=1) + 0.5
    expected = brute_force(reference, samples, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
    assert precision_recall(reference, samples, k, block) == pytest.approx(expected, rel=1e-12)


def test_borders_of_balls_belong_to_them() -> None:
    line = torch.arange(8.0)[:, None]  # every neighbour at distance 1; only 3 and 4 are of different sets
    assert precision_recall(line[:4], line[4:], k=1) == (0.25, 0.25)


def test_precision_and_recall_of_extremes() -> None:
    reference = normal(20, 3).float()
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference, reference + 100) == (0, 0)
    one_mode = reference[:1] + 1e-3 * normal(20, 3, seed=1).float()
    assert precision_recall(reference, one_mode)[0] == 1 and precision_recall(reference, one_mode)[1] < 0.2
    with pytest.raises(ValueError, match="more than 3 pictures in either set, got 20 and 3"):
        precision_recall(reference, reference[:3])
    with pytest.raises(ValueError, match=r"\[20, 3\] and \[20, 2\]"):
        precision_recall(reference, reference[:, :2])
