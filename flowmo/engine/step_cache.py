"""Step caching: at chosen evaluations only the first blocks run, and what the others added last time is added again.

The list of steps is fixed beforehand, so a whole sampler with caching still fits one CUDA graph. An opt-in that
changes the picture; `psnr_to_exact` tells how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StepCache(NamedTuple):
    """Which evaluations of the network are cut short, and where.

    Attributes:
        steps: numbers of the evaluations, 0 being that of pure noise; of Euler, AB2 and DPM these are the steps.
        blocks: how many of the decoder's blocks run then.
    """

    steps: tuple[int, ...]
    blocks: int = 1

    def check(self, guided: Sequence[bool], depth: int) -> None:
        """Raises ValueError where these evaluations or blocks do not exist, or nothing is there to take over."""
        if not 1 <= self.blocks < depth:
            raise ValueError(
                f"cache.blocks={self.blocks}: expected 1 to {depth - 1}, the decoder having {depth} blocks"
            )
        last: bool | None = None  # whether the last full evaluation was guided
        for j, guide in enumerate(guided):
            if j not in self.steps:
                last = guide
            elif last is None:
                raise ValueError("cache.steps: evaluation 0 has none before it; the first may be 1")
            elif guide and not last:
                raise ValueError(
                    f"cache.steps: evaluation {j} is guided and the last full one before it is not, so nothing is "
                    f"known of its null pass; leave out {j}"
                )
        unknown = sorted(j for j in self.steps if not 0 <= j < len(guided))
        if unknown:
            raise ValueError(f"cache.steps: expected numbers from 1 to {len(guided) - 1}, got {unknown}")

    def stored(self, evaluations: int) -> set[int]:
        """The full evaluations whose residual a later one takes over."""
        return {max(i for i in range(j) if i not in self.steps) for j in self.steps if j < evaluations}

    def forwards(self, guided: Sequence[bool], depth: int) -> float:
        """Forward passes of one picture, one of k of `depth` blocks counted as k / depth."""
        return sum((1 + g) * (self.blocks / depth if j in self.steps else 1) for j, g in enumerate(guided))
