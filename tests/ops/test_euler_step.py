from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowmo_kernels import euler_step, euler_step_ref, use

from .oracle import compiles, judge, random, sliced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (2, 7, 48), (3, 1, 5), (1, 23, 192), (0, 4, 48)]


def run(shape: tuple[int, ...], dtype: torch.dtype, guided: bool, implementation: str, device: str) -> None:
    z = sliced(random(*shape, device=device))
    v = sliced(random(*shape, dtype=dtype, device=device, seed=1))
    null = sliced(random(*shape, dtype=dtype, device=device, seed=2)) if guided else None
    options = {"dt": 0.07, "w": 1.5}
    judge(
        lambda *a: euler_step(*a, **options),
        lambda *a: euler_step_ref(*a, **options),
        (z, v, null),
        implementation,
        terms=4,
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(
    shape: tuple[int, ...], dtype: torch.dtype, guided: bool, implementation: str, device: str
) -> None:
    run(shape, dtype, guided, implementation, device)


@pytest.mark.gpu
def test_real_shape(implementation: str) -> None:
    run((8, 4096, 48), torch.bfloat16, True, implementation, "cuda")


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 200)), st.sampled_from(DTYPES), st.booleans())
def test_random_shapes(shape: tuple[int, ...], dtype: torch.dtype, guided: bool) -> None:
    run(shape, dtype, guided, "triton", "cuda" if torch.cuda.is_available() else "cpu")


def test_numbers_by_hand(implementation: str, device: str) -> None:
    z = torch.tensor([[[1.0, 2.0]]], device=device)
    v, null = torch.tensor([[[4.0, 0.0]]], device=device), torch.tensor([[[2.0, 2.0]]], device=device)
    with use(implementation):
        assert euler_step(z, v, dt=0.25)[0].tolist() == [[[0.0, 2.0]]]
        # velocity = null + 1.5 (v - null) = (5, -1)
        assert euler_step(z, v, null, dt=0.25, w=1.5)[0].tolist() == [[[-0.25, 2.25]]]


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_through_one_output(index: int, implementation: str, device: str) -> None:
    z, v = random(2, 3, 4, device=device).requires_grad_(), random(2, 3, 4, device=device, seed=1).requires_grad_()
    with use(implementation):
        dz, dv = torch.autograd.grad(euler_step(z, v, dt=0.5)[index].sum(), (z, v))
    assert (dz == 1).all() and (dv == -0.5).all()


def test_copy_is_the_state_rounded_and_its_own_memory(implementation: str, device: str) -> None:
    for dtype in DTYPES:
        with use(implementation):
            z, copy = euler_step(random(1, 3, 8, device=device), random(1, 3, 8, dtype=dtype, device=device), dt=0.1)
        assert torch.equal(copy, z.to(dtype)) and copy.dtype == dtype and copy.data_ptr() != z.data_ptr()


def test_library_ops(device: str) -> None:
    ops = torch.ops.flowmo_kernels
    z, v = random(2, 3, 8, device=device), random(2, 3, 8, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(ops.euler_step.default, (z, v, v.clone(), 0.1, 1.5, "triton"))
    torch.library.opcheck(ops.euler_step_backward.default, (z, None, v, True, 0.1, 1.5, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    inputs = tuple(random(2, 3, 8, device=device, seed=s) for s in range(3))
    compiles(lambda *a: euler_step(*a, dt=0.1, w=1.5), inputs, implementation)


def test_bad_input() -> None:
    z = torch.zeros(1, 2, 3)
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match="expected the fp32 state"):
                euler_step(z.bfloat16(), z, dt=0.1)
            with pytest.raises(ValueError, match="of z's shape"):
                euler_step(z, torch.zeros(1, 2, 4), dt=0.1)
            with pytest.raises(ValueError, match=r"v_null is torch\.bfloat16"):
                euler_step(z, z, z.bfloat16(), dt=0.1)
