"""The bench of Stage 1B's memory modes, at a size for a CPU."""

from __future__ import annotations

import torch

from bench import memory_modes


def test_a_row_says_what_ran_and_what_it_took() -> None:
    row = memory_modes.measure(["tiny"], 1, 1, "save10", 1)
    assert row.keys() <= set(memory_modes.FIELDS)
    assert (row["model"], row["checkpoint"], row["chain"], row["steps"]) == ("tiny", "save10", 1, 1)
    assert row["dtype"] == ("bf16" if torch.cuda.is_available() else "fp32")
    assert float(row["step_ms_min"]) > 0 and float(row["peak_gib"]) >= 0 and float(row["held_gib"]) > 0
