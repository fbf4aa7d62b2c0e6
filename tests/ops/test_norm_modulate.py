from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import _rows, norm_modulate, norm_modulate_ref, use

from .oracle import compiles, judge, random, sliced

Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
# B, L, D, split
SHAPES = [(2, 1, 8, 0), (2, 7, 96, 3), (1, 13, 37, 13), (3, 4, 1, 1), (0, 4, 16, 2)]
REAL = [(2, 4352, 1152, 256), (2, 4352, 768, 256)]


def make(
    shape: Shape, kind: str, dtype: torch.dtype, mods: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor | None], int]:
    """x, shift, scale and split; kind is "plain", "one" stream or "two" streams."""
    b, length, d, split = shape
    x = sliced(random(b, length, d, dtype=dtype, device=device) * 2 + 0.5)
    if kind == "plain":
        return [x, None, None], 0
    form = (b, 2, d) if kind == "two" else (b, d)
    shift, scale = (sliced(random(*form, dtype=mods, device=device, seed=s)) for s in (1, 2))
    return [x, shift, scale], split if kind == "two" else 0


def run(shape: Shape, kind: str, dtype: torch.dtype, implementation: str, **options: object) -> None:
    (x, shift, scale), split = make(shape, kind, dtype, **options)  # type: ignore[arg-type]
    judge(
        lambda *a: norm_modulate(*a, split=split),
        lambda *a: norm_modulate_ref(*a, split=split),
        (x, shift, scale),
        implementation,
        terms=shape[1] + shape[2],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "one", "two"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(
    shape: Shape, kind: str, dtype: torch.dtype, implementation: str, device: str
) -> None:
    run(shape, kind, dtype, implementation, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "two"])
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: Shape, kind: str, implementation: str) -> None:
    run(shape, kind, torch.bfloat16, implementation, device="cuda")


def test_modulation_of_another_dtype(implementation: str, device: str) -> None:
    run((2, 5, 24, 2), "two", torch.float32, implementation, mods=torch.bfloat16, device=device)
    run((2, 5, 24, 2), "two", torch.float16, implementation, mods=torch.float16, device=device)


def test_rows_of_a_variance_like_eps(implementation: str, device: str) -> None:
    """A row of one number, whose variance is zero, has a finite gradient."""
    x = 1e-3 * random(2, 4, 40, device=device)
    x[:, 1] = 0.5
    vectors = [random(2, 40, device=device, seed=s) for s in (1, 2)]
    judge(norm_modulate, norm_modulate_ref, (x, *vectors), implementation, terms=44)


def test_several_rows_to_a_program(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Tiles of 2 rows, 3 times over, so that programs loop, end early, and meet at the split."""
    launch = _rows.RowLaunch(hi=16, lo=8, rows=2, iters=3, num_warps=1)
    module = import_module("flowmo_kernels.norm_residual_triton")
    monkeypatch.setattr(module, "row_launch", lambda *_, **__: launch)
    run((2, 17, 23, 8), "two", torch.float32, "triton", device=device)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70), st.data())
def test_random_shapes(b: int, length: int, d: int, data: st.DataObject) -> None:
    shape = (b, length, d, data.draw(st.integers(0, length)))
    kind, dtype = data.draw(st.sampled_from(["plain", "one", "two"])), data.draw(st.sampled_from(DTYPES))
    run(shape, kind, dtype, "triton", device="cuda" if torch.cuda.is_available() else "cpu")


def test_expanded_inputs(device: str) -> None:
    """Modulation shared by all images, and an upstream gradient of one number, both with stride 0."""
    x, m = random(3, 4, 8, device=device), random(1, 8, device=device, seed=1).requires_grad_()
    grads = []
    for implementation in ("triton", "ref"):
        with use(implementation):
            y = norm_modulate(x, m.expand(3, 8), m.expand(3, 8))
        grads.append(torch.autograd.grad(y.sum(), m)[0])
    # 12 rows and 2 uses summed in another order.
    torch.testing.assert_close(*grads, rtol=0, atol=2**-23 * 24**0.5 * grads[1].abs().max().item())


def test_library_ops(device: str) -> None:
    (x, shift, scale), split = make((2, 5, 12, 2), "two", torch.float32, device=device)
    assert x is not None
    ops = torch.ops.flowmo_kernels
    torch.library.opcheck(ops.norm_modulate.default, (x, shift, scale, split, 1e-6, "triton"))
    torch.library.opcheck(ops.norm_modulate_backward.default, (x.clone(), x, scale, split, 1e-6, "triton"))
    torch.library.opcheck(ops.norm_modulate_backward.default, (x.clone(), x, None, 0, 1e-6, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    (x, shift, scale), split = make((2, 5, 12, 2), "two", torch.float32, device=device)
    assert x is not None and shift is not None and scale is not None
    compiles(lambda *a: norm_modulate(*a, split=split), (x, shift, scale), implementation)


@pytest.mark.gpu
def test_same_bits_every_time(implementation: str) -> None:
    (x, shift, scale), split = make(REAL[0], "two", torch.bfloat16, device="cuda")
    leaves = [t.detach().requires_grad_() for t in (x, shift, scale) if t is not None]
    with use(implementation):
        runs = [torch.autograd.grad(norm_modulate(*leaves, split=split).square().sum(), leaves) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    x, m = torch.zeros(2, 5, 8), torch.zeros(2, 8)
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match=r"expected \[B, L, D\]"):
                norm_modulate(x[0])
            with pytest.raises(ValueError, match="both shift and scale"):
                norm_modulate(x, m)
            with pytest.raises(ValueError, match=r"scale has shape \(3, 8\)"):
                norm_modulate(x, m, torch.zeros(3, 8))
            with pytest.raises(ValueError, match="split = 6"):
                norm_modulate(x, m[:, None].expand(2, 2, 8), m[:, None].expand(2, 2, 8), split=6)
            with pytest.raises(ValueError, match="one vector per image"):
                norm_modulate(x, m, m, split=2)
