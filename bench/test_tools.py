"""The parts of the bench programs that a machine without a card can check."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import first, ops, tune
from bench.cases import CARD, CPU, cases, tensors
from bench.timing import environment, percentiles, time_on_cpu

ROOT = Path(__file__).resolve().parents[1]
CASES = {f"{case.name} {case.shape}": case for case in cases(CPU)}


def test_every_op_of_the_dispatch_table_has_a_case() -> None:
    from flowmo_kernels._dispatch import OPS

    by_first = {"linear_fp8", "attention_fp8"}  # products and attention, by all backends, are probes of bench/first.py
    assert {case.op for case in CASES.values()} == set(OPS) - by_first


def test_every_library_op_backward_too_has_a_reference_that_agrees_with_itself() -> None:
    for case in CASES.values():
        assert ops.disagreement(case, ops.under(case.op, "ref", case.call), "cpu") == 0.0, case.name


def test_rows_name_the_commit_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing._output", lambda *words: "")
    assert environment()["commit"] == ""
    monkeypatch.setenv("FLOWMO_COMMIT", "0123abc")
    assert environment()["commit"] == "0123abc"


def test_a_wrong_result_is_seen() -> None:
    case = next(case for case in CASES.values() if case.name == "norm_modulate/forward")
    right = ops.under(case.op, "ref", case.call)
    assert ops.disagreement(case, lambda *a: 1.1 * right(*a), "cpu") > ops.AGREEMENT
    assert ops.disagreement(case, lambda *a: right(*a) * torch.nan, "cpu") == float("inf")
    in_place = next(case for case in CASES.values() if case.op == "ema")
    assert ops.disagreement(in_place, lambda a, w: None, "cpu") > ops.AGREEMENT


def test_formulas_by_hand() -> None:
    card = {f"{case.name} {case.shape}": case for case in cases(CARD)}
    tensor = 8 * 4352 * 1152 * 2
    assert card["norm_modulate/forward [8, 4352, 1152]"].bytes == 2 * tensor
    assert card["gate_residual_norm_modulate/forward [8, 4352, 1152]"].bytes == 4 * tensor
    assert card["qk_norm_rope/in place [8, 4352, 3, 12, 96]"].bytes == 4 * tensor
    numbers, rows = tensor // 2, 8 * 4352
    assert card["norm_modulate_fp8/forward [8, 4352, 1152]"].bytes == 3 * numbers + 4 * rows
    assert card["gate_residual_norm_modulate_fp8/forward [8, 4352, 1152]"].bytes == 7 * numbers + 4 * rows
    assert card["gelu_fp8/forward [34816, 4608]"].bytes == 3 * 4 * numbers + 4 * rows
    # Two products of L x L x 96 for each of 12 heads.
    assert card["joint_attention/forward [8, 4352, 12, 96]"].flops == 8 * 12 * 2 * 2 * 4352 * 4352 * 96
    assert card["lfq/forward [8, 256, 56] E=14"].flops == 2 * 8192 * 2**14
    # bf16 x and codes, 8-byte tokens.
    assert card["lfq/forward [8, 256, 56] E=14"].bytes == 8192 * (2 * 14 * 2 + 8)


@pytest.mark.parametrize("index", range(len(tune.SWEEPS)))
def test_sweeps_replace_what_exists(index: int) -> None:
    sweep = tune.SWEEPS[index]
    assert tune.case_of(sweep, cases(CARD)).op
    module = import_module(f"flowmo_kernels.{sweep.module}")
    present = getattr(module, sweep.attribute)
    candidate = sweep.candidates[-1]
    arguments = {
        "row_launch": (1152, 34816, False), "_launch": (96, 34816, False), "forward_launch": (14,),
        "backward_launch": (14,), "boundary_launch": (1152, 48),
        "blocks": (96, 4352, 2), "waves": (408, 68, 132),
    }.get(sweep.attribute)  # fmt: skip
    with tune.replaced(sweep, candidate):
        changed = getattr(module, sweep.attribute)
        if arguments is None:
            assert changed == candidate["value"]
        else:
            assert changed(*arguments)._asdict() == present(*arguments)._asdict() | candidate
    assert getattr(module, sweep.attribute) is present


def test_percentiles_are_ordered_and_of_the_samples() -> None:
    t = percentiles([5.0, 1.0, 4.0, 2.0, 3.0], captured=False)
    assert (t.p20, t.p50, t.p80) == (2.0, 3.0, 5.0)


def test_cpu_clock_measures_the_call() -> None:
    calls: list[int] = []
    t = time_on_cpu(calls.append, [(1,), (2,)], repeats=3)
    assert calls == [1, 1, 2, 1] and 0 <= t.p20 <= t.p80


def test_rows_carry_card_versions_and_commit() -> None:
    found = environment()
    assert {"card", "driver", "torch", "cuda", "triton", "commit"} == set(found) and found["torch"] == torch.__version__
    assert set(found) <= set(ops.FIELDS)


def test_first_questions_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe once, on the CPU and small: inputs fit calls, and both layouts give the same attention."""
    monkeypatch.setattr(first, "DEVICE", "cpu")
    monkeypatch.setattr(first, "BACKENDS", ("math",))
    monkeypatch.setattr(first, "LENGTH", 8)
    monkeypatch.setattr(first, "SHAPES", {"fc1": (16, 64), "fc2": (64, 16)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    probes = [*first.attention_probes((1, 8)), *first.linear_probes((5,))]
    assert len(probes) == 2 * (2 + 1 + 1) + 3 + 6
    for probe in probes:
        inputs = probe.make()
        assert all(torch.isfinite(t.float()).all() for t in tensors(probe.call(*inputs))), probe.name
        sequence = "sequence" in probe.shape
        if probe.kind.startswith("attention") and "B=8" in probe.shape:
            assert (inputs[0].stride(0) < inputs[0].stride(1)) == sequence


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no card")
@pytest.mark.parametrize("program", ["ops.py", "tune.py", "kernel_profile.py"])
def test_programs_say_that_there_is_no_card(program: str) -> None:
    done = subprocess.run([sys.executable, f"bench/{program}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "there is none" in done.stdout
