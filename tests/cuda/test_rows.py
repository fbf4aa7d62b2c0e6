"""norm_modulate, gate_residual and the two fused: CUDA kernels against the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowmo_kernels import (
    _cuda,
    gate_residual_norm_modulate_ref,
    gate_residual_ref,
    norm_modulate_ref,
)

from .conftest import Machine
from .tools import DTYPES, check, inside, randn


class Case(NamedTuple):
    batch: int
    length: int
    width: int
    streams: int  # 0: no modulation; 1: one vector an image; 2: latent and image rows
    split: int = 0
    slices: bool = False  # tensors are unaligned slices of larger buffers
    mods: torch.dtype | None = None  # dtype of the modulation; None: as x


CASES = [
    Case(2, 3, 768, 2, 1),
    Case(1, 2, 1152, 1),
    Case(2, 1, 32, 1),
    Case(1, 7, 53, 2, 3, mods=torch.float32),  # primes: every row is a tail
    Case(2, 5, 100, 0),
    Case(1, 5, 1153, 2, 5, slices=True),
    Case(2, 13, 40, 2, 0, slices=True),
    Case(1, 3, 2600, 2, 2, mods=torch.bfloat16),  # wider than the registers of a warp
    Case(1, 9, 3, 1),
    Case(0, 4, 64, 2, 1),
    Case(2, 0, 64, 1),
]
IDS = ["-".join(map(str, case[:5])) + ("-slices" if case.slices else "") for case in CASES]


def tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Inputs and upstream gradients of the fused op."""
    rows = (case.batch, case.length, case.width)
    table = (case.batch, 2, case.width) if case.streams == 2 else (case.batch, case.width)
    made: dict[str, Tensor | None] = {
        name: randn(*rows, seed=seed, dtype=dtype, scale=scale) + (0.5 if name == "x" else 0)
        for seed, (name, scale) in enumerate([("x", 2.0), ("branch", 1.0), ("dout", 1.0), ("dy", 1.0)])
    }
    for seed, name in enumerate(["gate", "shift", "scale"], 10):
        made[name] = randn(*table, seed=seed, dtype=case.mods or dtype, scale=0.5) if case.streams else None
    if case.slices:
        made = {name: None if t is None else inside(t) for name, t in made.items()}
    return made


def with_gradients(op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor | None],
                   upstream: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor | None]:  # fmt: skip
    """Outputs of `op` and the gradients of its inputs (None where there is no input), computed by autograd."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(upstream, outputs)])
    return [*(o.detach() for o in outputs), *(None if t is None else t.grad for t in leaves)]


def compare(names: list[str], got: tuple[Tensor, ...], reference: list[Tensor | None], oracle: list[Tensor | None],
            outputs: int) -> None:  # fmt: skip
    for i, (name, a, b, c) in enumerate(zip(names, got, reference, oracle, strict=True)):
        if b is None or c is None:
            assert a.numel() == 0, f"{name}: a gradient of something that is not there"
            continue
        if a.dtype == torch.float32 and b.dtype != torch.float32:
            a = a.to(b.dtype)  # sums over rows come in float32; the op rounds them to the parameter's dtype
        assert a.numel() == 0 or reference[0].numel() == 0 or b.abs().max() > 0, f"{name} vanishes"
        check(a, b, c, factor=2 if i < outputs else 3, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_norm_modulate(machine: Machine, case: Case, dtype: torch.dtype) -> None:
    run_norm_modulate(machine, case, tensors(case, dtype))


@pytest.mark.parametrize("width", [40, 2600])
def test_rows_of_a_variance_like_eps(machine: Machine, width: int) -> None:
    """By either kernel; a row of one number, whose variance is zero, has a finite gradient."""
    case = Case(1, 4, width, 1)
    t = tensors(case, torch.float32)
    assert t["x"] is not None
    t["x"] = 1e-3 * t["x"]
    t["x"][:, 1] = 0.5
    run_norm_modulate(machine, case, t)


def run_norm_modulate(machine: Machine, case: Case, t: dict[str, Tensor | None]) -> None:
    def body(x: Tensor, shift: Tensor | None, scale: Tensor | None, dy: Tensor) -> tuple[Tensor, ...]:
        y = _cuda.norm_modulate(x, shift, scale, case.split, 1e-6)
        return y, *_cuda.norm_modulate_backward(dy, x, scale, case.split, 1e-6)

    inputs = [t["x"], t["shift"], t["scale"]]
    got = machine(body, *inputs, t["dy"])

    def reference(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        return norm_modulate_ref(x, shift, scale, split=case.split)

    plain = with_gradients(reference, inputs, [t["dy"]])
    oracle = with_gradients(reference, inputs, [t["dy"]], torch.float64)
    compare(["y", "dx", "dshift", "dscale"], got, plain, oracle, outputs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gate_residual(machine: Machine, case: Case, dtype: torch.dtype) -> None:
    t = tensors(case, dtype)

    def body(x: Tensor, branch: Tensor, gate: Tensor | None, dout: Tensor) -> tuple[Tensor, ...]:
        out = _cuda.gate_residual(x, branch, gate, case.split)
        return out, *_cuda.gate_residual_backward(dout, branch, gate, case.split)

    inputs = [t["x"], t["branch"], t["gate"]]
    got = machine(body, *inputs, t["dout"])

    def reference(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        return gate_residual_ref(x, branch, gate, split=case.split)

    plain = with_gradients(reference, inputs, [t["dout"]])
    oracle = with_gradients(reference, inputs, [t["dout"]], torch.float64)
    del plain[1], oracle[1]  # the gradient of x is the upstream gradient itself
    compare(["out", "dbranch", "dgate"], got, plain, oracle, outputs=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gate_residual_norm_modulate(machine: Machine, case: Case, dtype: torch.dtype) -> None:
    t = tensors(case, dtype)

    def body(x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
             dout: Tensor, dy: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        out, y = _cuda.gate_residual_norm_modulate(x, branch, gate, shift, scale, case.split, 1e-6)
        dx, dbranch, dgate, dshift, dscale = _cuda.gate_residual_norm_modulate_backward(
            dout, dy, out, branch, gate, scale, case.split, 1e-6
        )
        return out, y, dx, dbranch, dgate, dshift, dscale

    inputs = [t["x"], t["branch"], t["gate"], t["shift"], t["scale"]]
    upstream = [t["dout"], t["dy"]]
    got = machine(body, *inputs, *upstream)

    def reference(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return gate_residual_norm_modulate_ref(*tensors, split=case.split)  # type: ignore[arg-type]

    plain = with_gradients(reference, inputs, upstream)
    oracle = with_gradients(reference, inputs, upstream, torch.float64)
    compare(["out", "y", "dx", "dbranch", "dgate", "dshift", "dscale"], got, plain, oracle, outputs=2)


def test_mixed_dtypes(machine: Machine) -> None:
    """A float32 residual stream with a bfloat16 branch: the sum is exact in float32."""
    x, branch = randn(1, 3, 40, seed=1), randn(1, 3, 40, seed=2, dtype=torch.bfloat16)
    (out,) = machine(lambda x, branch: (_cuda.gate_residual(x, branch, None),), x, branch)
    assert out.dtype == torch.float32
    assert torch.equal(out, x + branch.float())


def test_many_chunks(machine: Machine) -> None:
    """More rows than one block sums over: the second stage adds the chunks of each stream, and only those."""
    x, dy = randn(1, 150, 8, seed=1), randn(1, 150, 8, seed=2)
    scale = randn(1, 2, 8, seed=3)
    got = machine(lambda dy, x, scale: _cuda.norm_modulate_backward(dy, x, scale, 37), dy, x, scale)
    n = torch.nn.functional.layer_norm(x.double(), (8,), eps=1e-6)
    for stream, rows in enumerate([slice(0, 37), slice(37, 150)]):
        # float32 sums of about a hundred numbers of size one
        torch.testing.assert_close(got[1][:, stream].double(), dy[:, rows].double().sum(1), rtol=0, atol=1e-4)
        dscale = (dy[:, rows].double() * n[:, rows]).sum(1)
        torch.testing.assert_close(got[2][:, stream].double(), dscale, rtol=0, atol=1e-4)


def test_unsupported_dtype_is_named() -> None:
    x = torch.zeros(1, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x is torch\.float64; the CUDA kernels take float32"):
        _cuda.norm_modulate(x, None, None)
