"""euler_step and step_boundary: CUDA kernels against the reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowmo_kernels import _cuda, euler_step_ref
from flowmo_kernels.step_boundary import step_boundary_ref

from .conftest import Machine
from .tools import DTYPES, check, inside, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", [(2, 16, 48), (1, 7, 3), (1, 1, 1), (0, 4, 48)], ids=str)
def test_euler_step(machine: Machine, shape: tuple[int, ...], guided: bool, dtype: torch.dtype) -> None:
    z, v = randn(*shape, seed=1), randn(*shape, seed=2, dtype=dtype)
    null = randn(*shape, seed=3, dtype=dtype) if guided else None
    dnext, dcopy = randn(*shape, seed=4), randn(*shape, seed=5, dtype=dtype)

    def body(z: Tensor, v: Tensor, null: Tensor | None, dnext: Tensor, dcopy: Tensor) -> tuple[Tensor, ...]:
        outputs = _cuda.euler_step(z, v, null, 0.13, 1.5)
        return *outputs, *_cuda.euler_step_backward(dnext, dcopy, v, guided, 0.13, 1.5)

    z_next, copy, dz, dv, dnull = machine(body, z, v, null, dnext, dcopy)

    def reference(dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (z, v, null) if t is not None]
        outputs = euler_step_ref(*leaves, dt=0.13, w=1.5)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip((dnext, dcopy), outputs)])
        return [*(o.detach() for o in outputs), *(t.grad for t in leaves if t.grad is not None)]

    plain, oracle = reference(None), reference(torch.float64)
    got = [z_next, copy, dz, dv, *([dnull] if guided else [])]
    for i, (name, a) in enumerate(zip(["z'", "copy", "dz", "dv", "dv_null"], got)):
        check(a, plain[i], oracle[i], factor=3 if i > 1 else 2, name=name)


def test_euler_step_unaligned(machine: Machine) -> None:
    z, v = inside(randn(1, 3, 48, seed=1)), inside(randn(1, 3, 48, seed=2, dtype=torch.bfloat16))
    z_next, copy = machine(lambda z, v: _cuda.euler_step(z[0, 0], v[0, 0], None, 0.5), z, v)
    torch.testing.assert_close(z_next, z[0, 0] - 0.5 * v[0, 0].float(), rtol=0, atol=1e-6)
    assert torch.equal(copy, z_next.bfloat16())


class Case(NamedTuple):
    batch: int
    tokens: int
    width: int
    patch: int
    embedding: int
    guided: bool
    shared: bool = False  # one modulation for all images
    slices: bool = False
    size: float = 2.0  # of the numbers of h


CASES = [
    Case(1, 17, 192, 48, 192, True),
    Case(2, 3, 64, 12, 64, False, shared=True),
    Case(1, 5, 37, 3, 29, True, slices=True),
    Case(1, 1, 8, 192, 300, False),
    Case(0, 4, 64, 48, 64, True),
    Case(1, 2, 40, 12, 24, False, size=1e-3),  # a variance like eps
]


@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:5])) + ("-guided" if c.guided else ""))
def test_step_boundary(machine: Machine, case: Case, dtype: torch.dtype, h_dtype: torch.dtype) -> None:
    b, n, d, p = case[:4]
    h = randn(b, n, d, seed=1, dtype=h_dtype, scale=case.size)
    null = randn(b, n, d, seed=2, dtype=h_dtype) if case.guided else None
    if case.slices:
        h, null = inside(h), None if null is None else inside(null)
    m = 1 if case.shared else b
    shift, scale = randn(m, d, seed=3, scale=0.5), randn(m, d, seed=4, dtype=dtype, scale=0.5)
    w_out, b_out = randn(p, d, seed=5, dtype=dtype, scale=d**-0.5), randn(p, seed=6, dtype=dtype)
    w_in = randn(case.embedding, p, seed=7, dtype=dtype, scale=p**-0.5)
    b_in = randn(case.embedding, seed=8, dtype=dtype)
    z = randn(b, n, p, seed=9)
    arguments = (h, null, shift, scale, w_out, b_out, z, w_in, b_in)
    z_next, x = machine(lambda *t: _cuda.step_boundary(*t, 0.3, 1.5), *arguments)

    def reference(*t: Tensor | None) -> tuple[Tensor, Tensor]:
        h, null, *rest = t
        return tuple(step_boundary_ref(h, *rest, dt=0.3, h_null=null, w=1.5))  # type: ignore[return-value]

    plain = reference(*arguments)
    oracle = reference(*(None if t is None else t.double() for t in arguments))
    # Both round n and z' to the weights' dtype; a number next to a rounding boundary may fall on either side.
    check(z_next, plain[0], oracle[0], factor=2, name="z'", floor=2e-6)
    check(x, plain[1], oracle[1], factor=2, name="x", floor=2e-6)


def test_bad_dtypes_are_named() -> None:
    t = torch.zeros(1, 1, 8)
    with pytest.raises(TypeError, match=r"z is torch\.bfloat16"):
        _cuda.euler_step(t.bfloat16(), t, None, 0.1)
    row, weight = torch.zeros(1, 8), torch.zeros(8, 8)
    with pytest.raises(TypeError, match="in one dtype"):
        _cuda.step_boundary(t, None, row, row, weight, row[0], t, weight.bfloat16(), row[0], 0.1)
