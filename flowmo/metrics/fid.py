"""Fréchet distance of two sets of features, from means and covariances gathered in float64 (FID, sFID, rFID).

    d = |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)),   S with N - 1 in the denominator

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017. On pooled
Inception features it is FID, on the spatial ones (Nash et al., "Generating images with sparse representations", 2021)
sFID, and between originals and reconstructions rFID. With S1 = A A', the trace of the root is the sum of the roots of
the eigenvalues of the symmetric A' S2 A: no complex numbers, and no root of a singular product.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of rows that arrive in batches, held in float64 on the CPU.

    Batches are merged by Chan's rule, so neither a large mean nor the number of rows costs digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of outer products of deviations

    def add(
        self,
        rows: Tensor,  # [N, D]
    ) -> None:
        """Raises ValueError for rows of another width, and for values that are not finite."""
        if not len(rows):
            return
        if rows.dim() != 2 or (self.n and rows.shape[1] != len(self.mean)):
            wanted = f"[N, {len(self.mean)}]" if self.n else "[N, D]"
            raise ValueError(f"Moments expects features {wanted}, got {list(rows.shape)}")
        rows = rows.double()
        mean = rows.mean(0)
        rows = rows - mean
        other = Moments.of(len(rows), mean.cpu(), (rows.T @ rows).cpu())
        if not bool(other.mean.isfinite().all()):
            raise ValueError("features hold values that are not finite; the network or its input has overflowed")
        self.merge(other)

    @classmethod
    def of(cls, n: int, mean: Tensor, scatter: Tensor) -> Moments:
        result = cls()
        result.n, result.mean, result.scatter = n, mean, scatter
        return result

    @classmethod
    def from_statistics(
        cls,
        mean: Tensor,  # [D]
        covariance: Tensor,  # [D, D]
    ) -> Moments:
        """Published statistics, whose number of rows is not known."""
        mean, covariance = mean.double(), covariance.double()
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"statistics expect mu [D] and sigma [D, D], got {mean.shape} and {covariance.shape}")
        return cls.of(2, mean, covariance)

    def merge(self, other: Moments) -> None:
        """Take in the rows of another set."""
        if not other.n:
            return
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean, other.scatter
            return
        n = self.n + other.n
        apart = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.n * other.n / n)
        self.mean = self.mean + apart * (other.n / n)
        self.n = n

    def covariance(self) -> Tensor:
        """[D, D] float64. Raises ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance of two sets.

    The directions without spread in the first set are left out of the root, exactly as they add nothing to it, so
    identical sets are 0 apart also with fewer pictures than features. Put the smaller set first.

    Raises:
        ValueError: sets of different width, or with fewer than two rows.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"a Fréchet distance needs features of one width, got {len(first.mean)} and {len(second.mean)}; "
            "were the statistics made with another network?"
        )
    s1, s2 = first.covariance(), second.covariance()
    values, vectors = torch.linalg.eigh(s1)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    root = vectors[:, kept] * values[kept].sqrt()
    inner = root.T @ s2 @ root
    trace_of_root = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + s1.trace() + s2.trace() - 2 * trace_of_root
    return float(distance)
