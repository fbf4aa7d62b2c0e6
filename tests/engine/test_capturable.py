"""What a CUDA graph of a plan relies on, seen on a CPU: a call asks for no number of a tensor and uploads none."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowmo import FlowMo
from flowmo.engine import StepCache
from tests.engine.conftest import inputs
from tests.training.test_step import ASKING

FORBIDDEN = ASKING | {"lift_fresh"}  # the last one makes tensors from numbers of the host


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found |= {func._schema.name.removeprefix("aten::")} & FORBIDDEN
        return func(*args, **(kwargs or {}))


OPTIONS = [
    {},
    {"guidance": 1.0},
    {"tail_merge": 2},
    {"solver": "heun"},
    {"solver": "ab2"},
    {"solver": "dpm"},
    {"cache": StepCache((2, 4))},
    {"fp8": True},
    {"attention": "int8"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decode(lo: FlowMo, options: dict) -> None:
    plan = lo.decode_plan(2, steps=5, **options)
    given = inputs(lo, 2)
    plan(*given)
    with Watch() as watch:
        plan(*given)
    assert not watch.found


def test_encode(lo: FlowMo) -> None:
    plan = lo.encode_plan(2)
    images = inputs(lo, 2)[1].clamp(-1, 1)
    with Watch() as watch:
        plan(images)
    assert not watch.found
    with Watch() as watch:
        assert float(torch.tensor(1.0) + images.mean()) < 2
    assert watch.found == {"_local_scalar_dense", "lift_fresh"}, "the watch sees both"
