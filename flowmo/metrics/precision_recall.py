"""Precision and recall of generated pictures from balls around features.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019; on pooled Inception
features with k = 3, as the ADM evaluator computes them. The evaluator takes squared distances in fp16; here they have
the features' own precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    precision: float  # part of the samples that lie in a ball of the reference
    recall: float  # part of the reference that lies in a ball of the samples


def precision_recall(
    reference: Tensor,  # [R, D], floating
    samples: Tensor,  # [S, D]
    k: int = 3,
    block: int = 2048,  # rows of distances held at once
) -> PrecisionRecall:
    """Balls reach to the k-th nearest other point of their own set, borders included.

    Raises:
        ValueError: sets of different width, or of no more than k points.
    """
    if reference.dim() != 2 or samples.dim() != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"expected features [R, D] and [S, D], got {list(reference.shape)} and {list(samples.shape)}")
    if min(len(reference), len(samples)) <= k:
        raise ValueError(
            f"precision and recall with k={k} need more than {k} pictures in either set, got {len(reference)} and "
            f"{len(samples)}"
        )
    centre = reference.mean(0)  # |a|^2 + |b|^2 - 2ab loses fewer digits near the origin
    reference, samples = reference - centre, samples - centre
    radii = _radii(samples, k, block)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=reference.device)
    for i, (rows, radius) in enumerate(zip(reference.split(block), _radii(reference, k, block).split(block))):
        for j, columns in enumerate(samples.split(block)):
            distance = _squared_distances(rows, columns)
            here = slice(j * block, j * block + len(columns))
            inside[here] |= (distance <= radius[:, None]).any(0)
            covered[i * block : i * block + len(rows)] |= (distance <= radii[here]).any(1)
    return PrecisionRecall(float(inside.double().mean()), float(covered.double().mean()))


def _radii(points: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of every point to its k-th nearest other point, [N]."""
    radii = []
    for i, rows in enumerate(points.split(block)):
        nearest = points.new_full((len(rows), 0), 0.0)
        for j, columns in enumerate(points.split(block)):
            distance = _squared_distances(rows, columns)
            if i == j:
                distance.fill_diagonal_(float("inf"))
            together = torch.cat([nearest, distance], 1)
            nearest = together.topk(min(k, together.shape[1]), largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return square.clamp_min_(0)
