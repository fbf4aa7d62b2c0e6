"""Two streams: where the second one forks and joins, told by stand-ins; what a card makes of it is in test_graph.py."""

from __future__ import annotations

import contextlib

import pytest
import torch

from flowmo.engine import plan as plan_module
from flowmo.engine import trunk as trunk_module
from tests.engine.conftest import inputs


class Stream:
    device = torch.device("cpu")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """All forks, joins and matrix products in order, with the stream each was made on."""
    found: list[str] = []
    main, side = Stream("main", found), Stream("side", found)
    current = [main]

    @contextlib.contextmanager
    def stream(to: Stream):
        current.append(to)
        yield
        current.pop()

    product, product_fp8 = torch.addmm, trunk_module.linear_fp8

    def addmm(b, x, w, *, out):
        found.append(f"{len(x)} rows on {current[-1].name}")
        return product(b, x, w, out=out)

    def linear_fp8(x, *rest, **options):
        found.append(f"{x.shape[-2]} rows on {current[-1].name}")
        return product_fp8(x, *rest, **options)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(trunk_module, "second_stream", lambda device, thread: side)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(trunk_module, "linear_fp8", linear_fp8)
    return found


def test_forks_and_joins(lo, log, monkeypatch):
    codes, noise = inputs(lo, 2)
    exact = lo.decode_plan(2, steps=1, guidance=1.0)(codes, noise)
    assert not any("waits" in line for line in log)
    plan = lo.decode_plan(2, steps=1, guidance=1.0, overlap=True)
    assert not plan.overlap, "without effect on a CPU"
    plan._trunk.overlap = True
    log.clear()
    assert torch.equal(plan(codes, noise), exact)
    fork, join = "side waits for main", "main waits for side"
    latent, image = "32 rows on side", "128 rows on main"
    both = [fork, latent, image, join]
    # Block 0: qkv, projection, second layer of the MLP. Of block 1, the last, the image rows alone after its keys.
    assert log == both * 3 + both + [image] * 2


def test_forks_and_joins_with_fp8(lo, log):
    """The same, where the first layer of the MLP is a product to be told of too."""
    codes, noise = inputs(lo, 3)
    options = {"steps": 1, "guidance": 1.0, "fp8": True}
    exact = lo.decode_plan(3, **options)(codes, noise)
    plan = lo.decode_plan(3, **options, overlap=True)
    plan._trunk.overlap = True
    log.clear()
    assert torch.equal(plan(codes, noise), exact)
    fork, join = "side waits for main", "main waits for side"
    latent, image = "48 rows on side", "192 rows on main"
    both = [fork, latent, image, join]
    assert log == both * 2 + [fork, latent, latent, image, image, join] + both + [image] * 3


def test_the_option_is_part_of_the_plan(lo):
    one, two = lo.decode_plan(1, steps=1), lo.decode_plan(1, steps=1, overlap=True)
    assert one is not two and lo.encode_plan(1) is not lo.encode_plan(1, overlap=True)
    assert plan_module.Execution(torch.float32).overlap is False
    two.overlap = True
    assert "on two streams" in two.describe() and "two streams" not in one.describe()
