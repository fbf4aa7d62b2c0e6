from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import (
    _rows,
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
    gate_residual_ref,
    norm_modulate,
    use,
)

from .oracle import compiles, judge, random, sliced

Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
# B, L, D, split
SHAPES = [(2, 1, 8, 0), (2, 7, 96, 3), (1, 11, 37, 11), (0, 4, 16, 2)]
REAL = [(2, 4352, 1152, 256), (2, 4352, 768, 256)]
KINDS = ["gate alone", "sum alone", "gate, one stream", "gate, two streams", "plain norm", "no gate, modulated"]


def make(
    shape: Shape, kind: str, dtype: torch.dtype, mods: torch.dtype = torch.float32, branch: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Callable[..., object], Callable[..., object], list[Tensor | None], int]:  # fmt: skip
    """The op, its reference, its tensors and split."""
    b, length, d, split = shape
    x = sliced(random(b, length, d, dtype=dtype, device=device))
    r = sliced(random(b, length, d, dtype=branch or dtype, device=device, seed=1), margin=2)
    two = kind in ("gate alone", "gate, two streams", "no gate, modulated")
    form = (b, 2, d) if two else (b, d)
    gate, shift, scale = (sliced(random(*form, dtype=mods, device=device, seed=s)) for s in (2, 3, 4))
    split = split if two else 0
    if kind in ("gate alone", "sum alone"):
        return gate_residual, gate_residual_ref, [x, r, gate if kind == "gate alone" else None], split
    inputs = [x, r, gate if kind.startswith("gate") else None]
    inputs += [None, None] if kind == "plain norm" else [shift, scale]
    return gate_residual_norm_modulate, gate_residual_norm_modulate_ref, inputs, split


def run(shape: Shape, kind: str, dtype: torch.dtype, implementation: str, **options: object) -> None:
    op, reference, inputs, split = make(shape, kind, dtype, **options)  # type: ignore[arg-type]
    judge(
        lambda *a: op(*a, split=split),
        lambda *a: reference(*a, split=split),
        inputs,
        implementation,
        terms=shape[1] + shape[2],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: Shape, kind: str, dtype: torch.dtype, implementation: str, device: str) -> None:
    run(shape, kind, dtype, implementation, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: Shape, kind: str, implementation: str) -> None:
    run(shape, kind, torch.bfloat16, implementation, device="cuda")


def test_inputs_of_several_dtypes(implementation: str, device: str) -> None:
    for kind in ("gate alone", "gate, two streams", "plain norm"):
        options = {"branch": torch.bfloat16, "mods": torch.float16, "device": device}
        run((2, 5, 24, 2), kind, torch.float32, implementation, **options)


def test_several_rows_to_a_program(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launch = _rows.RowLaunch(hi=16, lo=8, rows=2, iters=3, num_warps=1)
    module = import_module("flowmo_kernels.norm_residual_triton")
    monkeypatch.setattr(module, "row_launch", lambda *_, **__: launch)
    run((2, 17, 23, 8), "gate, two streams", torch.float32, "triton", device=device)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 7), st.integers(1, 70), st.data())
def test_random_shapes(b: int, length: int, d: int, data: st.DataObject) -> None:
    shape = (b, length, d, data.draw(st.integers(0, length)))
    kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(DTYPES))
    run(shape, kind, dtype, "triton", device="cuda" if torch.cuda.is_available() else "cpu")


def test_equals_its_two_halves(implementation: str, device: str) -> None:
    """The fused op normalises x' as stored, so bf16 results are those of the two ops one after the other."""
    _, _, (x, r, gate, shift, scale), split = make((2, 5, 24, 2), KINDS[3], torch.bfloat16, device=device)
    assert x is not None and r is not None
    with use(implementation):
        x_new, y = gate_residual_norm_modulate(x, r, gate, shift, scale, split=split)
        assert torch.equal(x_new, gate_residual(x, r, gate, split=split))
        assert torch.equal(y, norm_modulate(x_new, shift, scale, split=split))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_output_only(used: int, implementation: str, device: str) -> None:
    op, reference, inputs, split = make((2, 5, 24, 2), KINDS[3], torch.float32, device=device)
    if used == 0:
        inputs = [*inputs[:3], *(t.detach() for t in inputs[3:] if t is not None)]
    judge(
        lambda *a: op(*a, split=split)[used],  # type: ignore[index]
        lambda *a: reference(*a, split=split)[used] + sum(t.sum() * 0 for t in a),  # type: ignore[index]
        inputs,
        implementation,
        terms=64,
    )


def test_library_ops(device: str) -> None:
    _, _, (x, r, gate, shift, scale), split = make((2, 5, 12, 2), KINDS[3], torch.float32, device=device)
    assert x is not None and r is not None
    ops, g = torch.ops.flowmo_kernels, x.clone()
    torch.library.opcheck(ops.gate_residual.default, (x, r, gate, split, "triton"))
    torch.library.opcheck(ops.gate_residual_backward.default, (g, r, gate, split, "triton"))
    torch.library.opcheck(ops.gate_residual_norm_modulate.default, (x, r, gate, shift, scale, split, 1e-6, "triton"))
    backward = ops.gate_residual_norm_modulate_backward.default
    torch.library.opcheck(backward, (g, g.clone(), x, r, gate, scale, split, 1e-6, "triton"))
    torch.library.opcheck(backward, (g, g.clone(), x, r, None, None, 0, 1e-6, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    for kind in ("gate alone", "gate, two streams"):
        op, _, inputs, split = make((2, 5, 12, 2), kind, torch.float32, device=device)
        tensors = [t for t in inputs if t is not None]
        compiles(lambda *a: op(*a, split=split), tensors, implementation)  # noqa: B023


@pytest.mark.gpu
def test_same_bits_every_time(implementation: str) -> None:
    op, _, inputs, split = make(REAL[0], KINDS[3], torch.bfloat16, device="cuda")
    leaves = [t.detach().requires_grad_() for t in inputs if t is not None]
    runs = []
    for _ in range(2):
        with use(implementation):
            x_new, y = op(*leaves, split=split)  # type: ignore[misc]
        runs.append(torch.autograd.grad((x_new * y).sum(), leaves))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    x, m = torch.zeros(2, 5, 8), torch.zeros(2, 8)
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="must have one shape"):
                gate_residual(x, x[:, :4])
            with pytest.raises(ValueError, match=r"gate has shape \(2, 7\)"):
                gate_residual_norm_modulate(x, x, m[:, :7])
            with pytest.raises(ValueError, match="both shift and scale"):
                gate_residual_norm_modulate(x, x, m, m)
            with pytest.raises(ValueError, match="one vector per image"):
                gate_residual(x, x, m, split=1)
