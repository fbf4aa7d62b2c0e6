"""When a plan captures, replays, and captures again: its own bookkeeping, with a stand-in for the CUDA graph.

What a card does with the graph is in test_graph.py; here a "graph" is a call that writes into its captured output.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from flowmo import FlowMo
from flowmo.engine.decode import DecodePlan
from flowmo.engine.plan import Plan
from tests.engine.conftest import inputs


class Recording:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.replays = plan, 0

    def replay(self) -> None:
        self.replays += 1
        self.plan._output.copy_(self.plan._run())


@pytest.fixture
def recorded(monkeypatch) -> list[Recording]:
    """All recordings made, in order; every plan believes that it can capture."""
    made: list[Recording] = []

    def record(plan: Plan) -> None:
        made.append(Recording(plan))
        plan._graph, plan._output = made[-1], plan._run()

    def prepare(plan: Plan, model: FlowMo) -> None:
        before(plan, model)
        plan.graph = True

    before = Plan._prepare
    monkeypatch.setattr(Plan, "_record", record)
    monkeypatch.setattr(Plan, "_prepare", prepare)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return made


def test_decode_captures_at_the_second_call_and_replays_then(lo, recorded):
    codes, noise = inputs(lo, 2)
    pictures = [lo.decode(codes, noise=noise, steps=3) for _ in range(4)]
    assert len(recorded) == 1 and recorded[0].replays == 3
    assert all(torch.equal(p, pictures[0]) for p in pictures)


def test_an_explicit_plan_captures_at_once(lo, recorded):
    plan = lo.decode_plan(2, steps=3)
    assert plan.captured and len(recorded) == 1
    assert lo.decode_plan(2, steps=3) is plan and len(recorded) == 1
    first = plan(*inputs(lo, 2, 0))
    kept = first.clone()
    assert not torch.equal(plan(*inputs(lo, 2, 1)), first)
    assert torch.equal(first, kept), "a later replay wrote over a picture that was handed out"


def test_changed_weights_drop_the_graph(lo, recorded):
    codes, noise = inputs(lo, 2)
    plan = lo.decode_plan(2, steps=3)
    before = plan(codes, noise)
    with torch.no_grad():
        lo.decoder.img_in.weight.mul_(2)
    after = plan(codes, noise)
    assert not plan.captured and not torch.equal(before, after)
    assert torch.equal(plan(codes, noise), after)
    assert plan.captured and len(recorded) == 2


def test_smaller_batches_take_a_captured_plan_of_up_to_twice_their_size(lo, recorded):
    codes, noise = inputs(lo, 4)
    expected = lo.decode(codes, noise=noise, steps=2, plan=False)
    for batch, built in ((4, 1), (3, 1), (2, 1), (1, 2), (4, 2)):
        picture = lo.decode(codes[:batch], noise=noise[:batch], steps=2)
        assert lo.engine.built == built
        assert (picture - expected[:batch]).abs().max() <= 1e-5


def test_a_failed_capture_is_said_and_runs_eagerly(lo, recorded, monkeypatch):
    def fail(plan: Plan) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Plan, "_record", fail)
    with pytest.warns(UserWarning, match="no CUDA graph.*not permitted"):
        plan = lo.decode_plan(1, steps=2)
    assert isinstance(plan, DecodePlan) and not plan.captured
    codes, noise = inputs(lo, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again, so it is said once
        assert torch.equal(plan(codes, noise), lo.decode(codes, noise=noise, steps=2))
        plan(codes, noise)
