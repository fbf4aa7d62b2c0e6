"""adam_hold_ema, hold_norms and ema: the multi-tensor CUDA kernels against foreach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowmo_kernels import _cuda, _cuda_optim, weight_norms
from flowmo_kernels.optim import adam_hold_ema_ref_, ema_ref_, hold_norms_ref_

from .conftest import Machine
from .tools import check, randn

SHAPES = [(40, 33), (7,), (1, 1), (0, 5), (3, 4, 5), (64, 128)]


def tensors(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Weights, gradients, both moments (the second one positive) and averages."""
    columns = [[randn(*s, seed=10 * c + i, dtype=dtype) for i, s in enumerate(SHAPES)] for c in range(5)]
    columns[3] = [t.abs() for t in columns[3]]
    return columns


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so short that the larger weights span several, the last one short."""
    monkeypatch.setattr(_cuda_optim, "CHUNK", 1000)
    _cuda_optim._chunks.cache_clear()


def run(machine: Machine, per_channel: bool, hold: bool, average: bool, adam: bool = True) -> None:
    n = len(SHAPES)
    eps = 0.0 if hold else 0.01  # one that shows; none makes a NaN of what lies beyond a weight's end, if it counts
    columns = tensors()
    norms: list[Tensor | None] = [None] * n
    if hold:
        norms = list(weight_norms([2 * w for w in columns[0]], per_channel=per_channel))
        if not per_channel:
            norms[1] = None  # a free weight among held ones
            assert norms[2] is not None
            norms[2].zero_()  # a norm of zero leaves its weight alone
    flat = [t for column in columns for t in column]
    kept = [t for t in norms if t is not None]

    def body(*flat: Tensor) -> tuple[Tensor, ...]:
        w, g, m, v, a = (list(flat[i * n : (i + 1) * n]) for i in range(5))
        given = iter(flat[5 * n :])
        held = [None if t is None else next(given) for t in norms] if hold else None
        if adam:
            _cuda.adam_hold_ema(w, g, m, v, held, a if average else None, 3, 0.1, 0.9, 0.95, eps, per_channel, 0.7)
        elif hold:
            _cuda.hold_norms(w, held, per_channel)
        else:
            _cuda.ema(a, w, 0.7)
        return flat[: 5 * n]

    got = machine(body, *flat, *kept)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        w, g, m, v, a = ([t.to(dtype).clone() for t in column] for column in columns)
        held = [None if t is None else t.to(dtype) for t in norms] if hold else None
        if adam:
            adam_hold_ema_ref_(w, g, m, v, step=3, lr=0.1, eps=eps, norms=held, per_channel=per_channel,
                               averages=a if average else None, decay=0.7)  # fmt: skip
        elif held is not None:
            pairs = [(x, y) for x, y in zip(w, held) if y is not None]
            hold_norms_ref_([x for x, _ in pairs], [y for _, y in pairs], per_channel=per_channel)
        else:
            ema_ref_(a, w, 0.7)
        return [*w, *g, *m, *v, *a]

    plain, oracle = reference(torch.float32), reference(torch.float64)
    names = [f"{column}[{i}]" for column in ("weight", "grad", "exp_avg", "exp_avg_sq", "average") for i in range(n)]
    for name, a, b, c in zip(names, got, plain, oracle):
        check(a, b, c, factor=2, name=name)


@pytest.mark.parametrize("per_channel", [False, True], ids=["whole", "rows"])
@pytest.mark.parametrize("average", [False, True], ids=["", "ema"])
def test_adam_with_held_norms(machine: Machine, per_channel: bool, average: bool) -> None:
    run(machine, per_channel, hold=True, average=average)


@pytest.mark.parametrize("average", [False, True], ids=["", "ema"])
def test_adam_free(machine: Machine, average: bool) -> None:
    run(machine, per_channel=False, hold=False, average=average)


@pytest.mark.parametrize("per_channel", [False, True], ids=["whole", "rows"])
def test_hold_norms(machine: Machine, per_channel: bool) -> None:
    run(machine, per_channel, hold=True, average=False, adam=False)


def test_ema(machine: Machine) -> None:
    run(machine, per_channel=False, hold=False, average=True, adam=False)


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_found_inf_decides_on_the_device(machine: Machine, flag: float) -> None:
    """Not zero: nothing changes, whatever the gradients hold. Zero: the step is taken."""
    w, g, m, v, a = tensors()
    norms = weight_norms([2 * t for t in w])
    n = len(SHAPES)
    if flag:
        g = [torch.full_like(t, float("nan")) for t in g]
    given = [t for column in (w, g, m, v, a) for t in column]

    def body(found_inf: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        w, g, m, v, a = (list(flat[i * n : (i + 1) * n]) for i in range(5))
        _cuda.adam_hold_ema(w, g, m, v, list(flat[5 * n :]), a, 3, 0.1, 0.9, 0.95, 1e-8, False, 0.7, found_inf)
        _cuda.ema(a, w, 0.5, found_inf)
        return (*w, *m, *v, *a)

    got = machine(body, torch.tensor([flag]), *[t.clone() for t in given], *norms)
    same = [torch.equal(now, before) for now, before in zip(got, [*w, *m, *v, *a]) if before.numel()]
    assert all(same) if flag else not any(same)


def test_unaligned_weights(machine: Machine) -> None:
    """Weights that are pieces of one flat buffer start anywhere."""
    flat, average = randn(50, seed=1), randn(50, seed=2)

    def body(flat: Tensor, average: Tensor) -> tuple[Tensor, ...]:
        _cuda.ema([average[1:8], average[9:50]], [flat[1:8], flat[9:50]], 0.5)
        return (average,)

    (got,) = machine(body, flat, average)
    expected = (flat + average) / 2
    expected[0], expected[8] = average[0], average[8]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_weights_must_be_contiguous() -> None:
    with pytest.raises(TypeError, match="contiguous float32"):
        _cuda.ema([torch.zeros(4, 3).T], [torch.zeros(3, 4)], 0.5)
