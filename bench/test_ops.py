"""`pytest bench/`: every case once through pytest-benchmark.

On a CPU the sizes are small and the references run: the numbers say that the benches work and nothing about a card.
On a card the sizes are FlowMo-Lo's and the kernels of `auto` run; bench/ops.py gives the full table.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import CARD, CPU, Case, cases, tensors

ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"
CASES = cases(CARD if ON_CARD else CPU)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.shape}".replace(" ", "_"))
def test_case(case: Case, benchmark) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    inputs = case.make(DEVICE)

    def run() -> object:
        result = case.call(*inputs)
        if ON_CARD:
            torch.cuda.synchronize()
        return result

    benchmark.extra_info["note"] = "card, FlowMo-Lo sizes" if ON_CARD else "CPU, small sizes: no performance claim"
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
    results = [t for t in (*tensors(run()), *tensors(inputs)) if t.is_floating_point()]
    assert all(torch.isfinite(t.float()).all() for t in results)
