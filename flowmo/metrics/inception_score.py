"""Inception Score: how sure a classifier is of each picture, and how varied it finds them.

Salimans et al., "Improved Techniques for Training GANs", 2016: exp(mean_x KL(p(y | x) || p(y))).
"""

from __future__ import annotations

import torch
from torch import Tensor

SPLIT = 5000  # pictures, as in the ADM evaluator


def inception_score(
    logits: Tensor,  # [N, K], in the order of the pictures
    split: int = SPLIT,
) -> float:
    """Mean over consecutive splits of `split` pictures (the last may be shorter) of the score of each, in float64.

    The order counts: pictures sorted by class make each split poor in classes, and the score low.
    """
    if logits.dim() != 2 or not len(logits) or split < 1:
        raise ValueError(f"inception_score expects logits [N, K] and split >= 1, got {list(logits.shape)} and {split}")
    scores = []
    for part in logits.split(split):
        log_p = torch.log_softmax(part.double(), 1)
        log_marginal = torch.logsumexp(log_p, 0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
