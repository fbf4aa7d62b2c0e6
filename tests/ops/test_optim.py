from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import adam_hold_ema_, ema_, hold_norms_, use, weight_norms

from .conftest import there
from .oracle import compare, random

module = import_module("flowmo_kernels.optim")
SHAPES = [(7, 5), (3,), (61, 37), (1, 1), (4, 8), (0, 3), (6, 4, 3, 3)]


@pytest.fixture(params=["ref", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    """The reference too: it trains on a CPU, and with `found_inf` takes another way than without."""
    return there(request.param)


def weights_of(shapes: list[tuple[int, ...]], device: str, seed: int = 0) -> list[Tensor]:
    return [random(*shape, device=device, seed=seed + i) for i, shape in enumerate(shapes)]


def train(
    adam, device: str, *, hold: str, average: bool, dtype: torch.dtype = torch.float32,
    shapes: list[tuple[int, ...]] = SHAPES, steps: int = 3,
) -> list[Tensor]:  # type: ignore[no-untyped-def]  # fmt: skip
    """Weights, moments and averages after some steps on random gradients; every second weight is held."""
    w = [t.to(dtype) for t in weights_of(shapes, device)]
    m, v = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w]
    a = [t.clone() for t in w]
    held = weight_norms(w, per_channel=hold == "rows")
    norms = None if hold == "none" else [n.to(dtype) if i % 2 == 0 else None for i, n in enumerate(held)]
    for step in range(1, steps + 1):
        g = [t.to(dtype) for t in weights_of(shapes, device, seed=100 * step)]
        adam(
            w, g, m, v, step=step, lr=0.05, norms=norms, per_channel=hold == "rows",
            averages=a if average else None, decay=0.9,
        )  # fmt: skip
    return [*w, *m, *v, *a]


def judge_adam(implementation: str, device: str, **options) -> None:  # type: ignore[no-untyped-def]
    with use(implementation):
        got = train(adam_hold_ema_, device, **options)
    plain = train(module.adam_hold_ema_ref_, device, **options)
    exact = train(module.adam_hold_ema_ref_, device, dtype=torch.float64, **options)
    for i, (a, b, c) in enumerate(zip(got, plain, exact)):
        # Three steps of about 8 roundings to a number, and a sum over the weight.
        compare(f"tensor {i}", a, b, c, 2.0, 24 + c.numel())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("hold", ["none", "whole", "rows"])
def test_adam_hold_ema_against_oracle(hold: str, average: bool, implementation: str, device: str) -> None:
    judge_adam(implementation, device, hold=hold, average=average)


@pytest.mark.parametrize("hold", ["none", "whole", "rows"])
def test_found_inf_leaves_everything_as_it_is(hold: str, implementation: str, device: str) -> None:
    """Whatever the gradients hold; a flag of zero, of either number of dimensions, is an ordinary step."""
    w = weights_of(SHAPES, device)
    m, v, a = ([t.abs() for t in weights_of(SHAPES, device, seed=s)] for s in (10, 20, 30))
    norms = None if hold == "none" else weight_norms([2 * t for t in w], per_channel=hold == "rows")
    g = weights_of(SHAPES, device, seed=40)
    columns = (w, m, v, a)

    def step(flag: Tensor | None, grads: list[Tensor]) -> list[Tensor]:
        w, m, v, a = ([t.clone() for t in column] for column in columns)
        options = {"norms": norms, "per_channel": hold == "rows", "averages": a, "decay": 0.9}
        with use(implementation):
            adam_hold_ema_(w, grads, m, v, step=3, lr=0.1, found_inf=flag, **options)  # type: ignore[arg-type]
            ema_(a, w, 0.5, found_inf=flag)
        return [*w, *m, *v, *a]

    bad = [torch.full_like(t, float("nan")) for t in g]
    bad[0], bad[1] = g[0], torch.full_like(g[1], float("inf"))
    for now, before in zip(step(torch.ones(1, device=device), bad), [t for column in columns for t in column]):
        assert torch.equal(now, before)
    taken = step(None, g)
    for i, (now, want) in enumerate(zip(step(torch.zeros((), device=device), g), taken)):
        # The reference adds in another order then: about 8 roundings each way of numbers below 10, and a norm's.
        assert torch.equal(now, want) if implementation != "ref" else torch.allclose(now, want, rtol=2e-6, atol=1e-6), i


def test_adam_is_torchs_adam(implementation: str, device: str) -> None:
    shapes = [(7, 5), (33,)]
    parameters = [torch.nn.Parameter(t) for t in weights_of(shapes, device)]
    theirs = torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.95), eps=0.01)  # one that shows
    w = weights_of(shapes, device)
    m, v = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w]
    for step in range(1, 6):
        g = weights_of(shapes, device, seed=10 * step)
        for p, t in zip(parameters, g):
            p.grad = t.clone()
        theirs.step()
        with use(implementation):
            adam_hold_ema_(w, g, m, v, step=step, lr=0.05, eps=0.01)
    for a, b in zip(w, parameters):
        # Five steps of at most 0.05 * a few, each rounded in about 8 operations.
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=5 * 8 * 2**-23 * b.abs().max().item())


@pytest.mark.parametrize("per_channel", [False, True])
def test_norms_are_held_without_eps(per_channel: bool, implementation: str, device: str) -> None:
    """What lies beyond the end of a row or weight is 0 / 0 then, and must not count."""
    (w,) = weights_of([(7, 5)], device)
    held = weight_norms([w], per_channel=per_channel)
    before = w.clone()
    with use(implementation):
        adam_hold_ema_(
            [w], [random(7, 5, device=device, seed=1)], [torch.zeros_like(w)], [torch.zeros_like(w)],
            step=1, lr=0.1, eps=0.0, norms=held, per_channel=per_channel,
        )  # fmt: skip
    torch.testing.assert_close(weight_norms([w], per_channel=per_channel)[0], held[0], rtol=1e-6, atol=0)
    assert not torch.equal(w, before)


@pytest.mark.parametrize("per_channel", [False, True])
def test_hold_restores_the_norms_and_keeps_the_direction(per_channel: bool, implementation: str, device: str) -> None:
    w = weights_of([(7, 5), (64, 129), (3,)], device)
    norms = weight_norms(w, per_channel=per_channel)
    moved = [2.5 * t + 0.1 for t in w]
    before = [t.clone() for t in moved]
    with use(implementation):
        hold_norms_(moved, norms, per_channel=per_channel)
    for now, held in zip(weight_norms(moved, per_channel=per_channel), norms):
        torch.testing.assert_close(now, held, rtol=1e-6, atol=0)
    for a, b in zip(moved, before):
        if not per_channel:
            torch.testing.assert_close(a / a.norm(), b / b.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_zero_norms_leave_weights_free(per_channel: bool, implementation: str, device: str) -> None:
    """A gate row that starts at zero may grow; a row that is zero now stays finite."""
    w = [torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device), torch.zeros(2, 3, device=device)]
    norms = weight_norms(w, per_channel=per_channel)
    grown = [torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device), torch.ones(2, 3, device=device)]
    with use(implementation):
        hold_norms_(grown, norms, per_channel=per_channel)
    assert grown[0].tolist() == ([[1.0, 0.0], [0.0, 0.0]] if per_channel else [[5.0, 0.0], [0.0, 0.0]])
    assert (grown[1] == 1).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_norms_of_low_precision_weights_are_fp32(per_channel: bool, device: str) -> None:
    (w,) = weights_of([(7, 300)], device)
    low = w.bfloat16()
    (norm,) = weight_norms([low], per_channel=per_channel)
    exact = torch.linalg.vector_norm(low.double(), dim=1 if per_channel else None)
    assert norm.dtype == torch.float32
    # Halving sums of up to 2100 squares: about 11 roundings, and those of square and root.
    torch.testing.assert_close(norm.double(), exact, rtol=14 * 2**-24, atol=0)


def test_ema(implementation: str, device: str) -> None:
    a, w = weights_of(SHAPES, device), weights_of(SHAPES, device, seed=50)
    want = [0.75 * x.double() + 0.25 * y.double() for x, y in zip(a, w)]
    with use(implementation):
        ema_(a, w, 0.75)
    for got, exact in zip(a, want):
        # Three roundings of numbers below 5.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=3 * 5 * 2**-24)


def test_several_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Weights longer than a chunk, chunks longer than a block, both with tails."""
    monkeypatch.setattr(module, "CHUNK", 96)
    monkeypatch.setattr(module, "BLOCK", 32)
    for hold in ("whole", "rows"):
        judge_adam("triton", device, hold=hold, average=True, shapes=[(9, 43), (97,), (3, 32)], steps=2)


def test_unaligned_weights(implementation: str, device: str) -> None:
    """Views that start 4 bytes into a buffer, so that 16-byte accesses would be wrong."""
    buffers = weights_of([(401,), (401,)], device)
    w, a = (b[1:].view(20, 20) for b in buffers)
    want = 0.5 * (w + a)
    with use(implementation):
        ema_([a], [w], 0.5)
    torch.testing.assert_close(a, want, rtol=0, atol=2**-22)
    assert torch.equal(buffers[1][:1], random(401, device=device, seed=1)[:1])


def test_default_device_does_not_matter() -> None:
    """Tables of pointers are made on the CPU, where they can be pinned, whatever tensors are made on by default."""
    module._table.cache_clear()
    module._chunks.cache_clear()
    with torch.device("meta"):
        assert module._table(((1, 2, 3, 4, 5, 6),), torch.device("cpu")).tolist() == [[1, 2, 3, 4, 5, 6]]
        assert module._chunks(((3, 2),), False, 4, torch.device("cpu"))[0].tolist() == [[0, 0, 4], [0, 4, 2]]


def test_empty_list(implementation: str) -> None:
    with use(implementation):
        hold_norms_([], [])
        ema_([], [], 0.5)
        adam_hold_ema_([], [], [], [], step=1, lr=0.1)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4), st.booleans())
def test_random_shapes(shapes: list[tuple[int, ...]], rows: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge_adam("triton", device, hold="rows" if rows else "whole", average=True, shapes=shapes, steps=2)


def test_autograd_sees_the_change(implementation: str, device: str) -> None:
    w = torch.nn.Parameter(random(4, 4, device=device))
    loss = w.square().sum()
    with use(implementation):
        hold_norms_([w], [torch.ones((), device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_library_op(device: str) -> None:
    op = torch.ops.flowmo_kernels.update_weights.default
    w, g, a = (weights_of([(5, 4), (3,)], device, seed=s) for s in (0, 10, 20))
    m, v = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w]
    norms = weight_norms(w)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    flag = torch.zeros(1, device=device)
    given = (w, g, m, v, norms, a, flag, 1, 0.1, 0.9, 0.95, 1e-8, False, 0.9, "triton")
    torch.library.opcheck(op, given, test_utils=checks)


def test_compiles(implementation: str, device: str) -> None:
    def step(w: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], norms: list[Tensor]) -> None:
        adam_hold_ema_(w, g, m, v, step=1, lr=0.1, norms=norms)

    results = []
    for compiled in (False, True):
        w, g = weights_of([(5, 4), (3,)], device), weights_of([(5, 4), (3,)], device, seed=10)
        m, v = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w]
        torch._dynamo.reset()
        with use(implementation):
            run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
            run(w, g, m, v, weight_norms(w))
        results.append([*w, *m, *v])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_same_bits_every_time(implementation: str) -> None:
    runs = []
    for _ in range(2):
        with use(implementation):
            runs.append(train(adam_hold_ema_, "cuda", hold="whole", average=True, shapes=[(1152, 4608)] * 3))
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_bad_input(device: str) -> None:
    w = [torch.zeros(2, 3, device=device)]
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="grads has 0 tensors for 1 weights"):
                adam_hold_ema_(w, [], w, w, step=1, lr=0.1)
            with pytest.raises(ValueError, match=r"exp_avgs\[0\] is torch.float64"):
                adam_hold_ema_(w, w, [w[0].double()], w, step=1, lr=0.1)
            with pytest.raises(ValueError, match=r"norms\[0\] is torch.float32 \(\); expected fp32 \(2,\)"):
                hold_norms_(w, weight_norms(w), per_channel=True)
            with pytest.raises(ValueError, match=r"found_inf is torch.float64 \(\).*one fp32 number on"):
                adam_hold_ema_(w, w, w, w, step=1, lr=0.1, found_inf=torch.zeros((), dtype=torch.float64))
            with pytest.raises(ValueError, match="step is 0"):
                adam_hold_ema_(w, w, w, w, step=0, lr=0.1)
            with pytest.raises(ValueError, match=r"decay is 1\.5"):
                ema_(w, w, 1.5)
    with use("triton"), pytest.raises(ValueError, match="need contiguous memory"):
        ema_([torch.zeros(3, 2, device=device).T], w, 0.5)
