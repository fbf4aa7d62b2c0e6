"""How a tokenizer uses its codes: which occur, how evenly, and how many bits they carry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CodeUsage(NamedTuple):
    used: float  # part of the vocabulary that occurs
    entropy: float  # bits a token, of the tokens of all positions together; at most log2(vocabulary)
    perplexity: float  # 2^entropy: the number of evenly used codes that would have it
    position_entropy: float  # bits, mean over the positions of the entropy of each one's own tokens
    tokens: int  # counted


class CodeCounts:
    """Counts tokens [N, T] in [0, vocabulary) by position, in int64 on the CPU."""

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < 1:
            raise ValueError(f"vocabulary={vocabulary}: expected at least 1 code")
        self.vocabulary = vocabulary
        self.counts = torch.zeros(0, vocabulary, dtype=torch.int64)

    def add(
        self,
        tokens: Tensor,  # [N, T] integer
    ) -> None:
        """Raises ValueError for another shape, number of positions, or values outside of the vocabulary."""
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers [N, T], got {tokens.dtype} {list(tokens.shape)}")
        if not tokens.numel():
            return
        tokens = tokens.cpu().long()
        positions = tokens.shape[1]
        if not len(self.counts):
            self.counts = torch.zeros(positions, self.vocabulary, dtype=torch.int64)
        if positions != len(self.counts):
            raise ValueError(f"tokens: expected {len(self.counts)} a picture as before, got {positions}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise ValueError(f"tokens: expected values in [0, {self.vocabulary}), got {low} to {high}")
        places = tokens + torch.arange(positions) * self.vocabulary
        ones = torch.ones(places.numel(), dtype=torch.int64)
        self.counts.view(-1).scatter_add_(0, places.flatten(), ones)

    def merge(self, other: CodeCounts) -> None:
        """Take in the counts of another process."""
        if not len(self.counts):
            self.counts = other.counts
        elif len(other.counts):
            self.counts = self.counts + other.counts

    def usage(self) -> CodeUsage:
        """Raises ValueError before anything was counted."""
        if not len(self.counts):
            raise ValueError("no tokens were counted")
        together = self.counts.sum(0)
        entropy = float(_entropy(together[None])[0])
        return CodeUsage(
            used=float((together > 0).double().mean()),
            entropy=entropy,
            perplexity=2**entropy,
            position_entropy=float(_entropy(self.counts).mean()),
            tokens=int(together.sum()),
        )


def _entropy(counts: Tensor) -> Tensor:
    """Bits, [P], of the distributions [P, K]."""
    p = counts.double() / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(1) / torch.log(torch.tensor(2.0, dtype=torch.float64))
