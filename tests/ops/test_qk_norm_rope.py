from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import qk_norm_rope, qk_norm_rope_ref, use

from .oracle import compiles, judge, random, sliced

Shape = tuple[int, int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
# B, L, H, d, split
SHAPES = [(1, 1, 1, 2, 0), (2, 19, 3, 12, 5), (1, 5, 2, 96, 2), (2, 3, 1, 64, 3), (1, 17, 2, 32, 16), (0, 4, 2, 8, 2)]
REAL = [(2, 4352, 12, 96, 256), (2, 4352, 12, 64, 256)]


def make(
    shape: Shape, streams: int, dtype: torch.dtype, gains: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], tuple[Tensor, Tensor], int]:
    """(qkv, q_scale, k_scale), (cos, sin), split."""
    b, length, h, d, split = shape
    qkv = sliced(random(b, length, 3, h, d, dtype=dtype, device=device), margin=2)
    form = (2, d) if streams == 2 else (d,)
    q, k = (1 + 0.5 * random(*form, device=device, seed=s) for s in (1, 2))
    angle = 3 * random(length, d // 2, device=device, seed=3)
    return [qkv, q.to(gains), k.to(gains)], (angle.cos(), angle.sin()), split if streams == 2 else 0


def run(shape: Shape, streams: int, dtype: torch.dtype, implementation: str, **options: object) -> None:
    inputs, rope, split = make(shape, streams, dtype, **options)  # type: ignore[arg-type]
    judge(
        lambda *a: qk_norm_rope(*a, rope, split=split),
        lambda *a: qk_norm_rope_ref(*a, rope, split=split),
        inputs,
        implementation,
        terms=shape[0] * shape[1] * shape[2] + shape[3],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(shape: Shape, streams: int, dtype: torch.dtype, implementation: str, device: str) -> None:
    run(shape, streams, dtype, implementation, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_real_shapes(shape: Shape, implementation: str) -> None:
    run(shape, 2, torch.bfloat16, implementation, device="cuda")


def test_gains_of_another_dtype(implementation: str, device: str) -> None:
    run((1, 5, 2, 12, 2), 2, torch.float32, implementation, gains=torch.bfloat16, device=device)


def test_several_rows_to_a_program(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    module = import_module("flowmo_kernels.qk_norm_rope")
    launch = module._Launch(hi=4, lo=2, rows=2, iters=3, num_warps=1)
    monkeypatch.setattr(module, "_launch", lambda *_, **__: launch)
    run((2, 17, 2, 10, 8), 2, torch.float32, "triton", device=device)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 50), st.data())
def test_random_shapes(b: int, length: int, h: int, half: int, data: st.DataObject) -> None:
    shape = (b, length, h, 2 * half, data.draw(st.integers(0, length)))
    streams, dtype = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from(DTYPES))
    run(shape, streams, dtype, "triton", device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: torch.dtype, implementation: str, device: str) -> None:
    """The same numbers as out of place, in the same memory, with v and what surrounds the slice untouched."""
    (qkv, q, k), rope, split = make((2, 19, 3, 12, 5), 2, dtype, device=device)
    buffer = torch.full((2, 19, 3, 4, 12), 7.0, dtype=dtype, device=device)
    view = buffer[:, :, :, :3]
    view.copy_(qkv)
    with use(implementation), torch.no_grad():
        expected = qk_norm_rope(qkv, q, k, rope, split=split)
        got = qk_norm_rope(view, q, k, rope, split=split, inplace=True)
    assert got.data_ptr() == buffer.data_ptr() and torch.equal(got, expected)
    assert torch.equal(got[:, :, 2], qkv[:, :, 2]) and (buffer[:, :, :, 3] == 7).all()


def test_gains_of_two_dtypes(implementation: str, device: str) -> None:
    """Gradients come back in the dtype of each; the numbers are exact in both."""
    (qkv, q, k), rope, split = make((1, 5, 2, 8, 2), 2, torch.float32, device=device)
    leaves = [t.detach().requires_grad_() for t in (q, k.bfloat16())]
    results = []
    for name in (implementation, "ref"):
        with use(name):
            y = qk_norm_rope(qkv, *leaves, rope, split=split)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert [t.dtype for t in results[0]] == [torch.float32, torch.float32, torch.bfloat16]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_expanded_gradient(device: str) -> None:
    """An upstream gradient of one number, with stride 0 along every axis."""
    (qkv, q, k), rope, split = make((1, 5, 2, 8, 2), 2, torch.float32, device=device)
    grads = []
    for implementation in ("triton", "ref"):
        leaf = qkv.detach().requires_grad_()
        with use(implementation):
            grads.append(torch.autograd.grad(qk_norm_rope(leaf, q, k, rope, split=split).sum(), leaf)[0])
    # A chain of about ten fp32 roundings.
    torch.testing.assert_close(*grads, rtol=0, atol=10 * 2**-24 * grads[1].abs().max().item())


def test_library_ops(device: str) -> None:
    (qkv, q, k), (cos, sin), split = make((1, 5, 2, 8, 2), 2, torch.float32, device=device)
    ops, rest = torch.ops.flowmo_kernels, (q, k, cos, sin, split, 1e-6, "triton")
    torch.library.opcheck(ops.qk_norm_rope.default, (qkv, *rest))
    torch.library.opcheck(ops.qk_norm_rope_.default, (qkv.clone(), *rest))
    torch.library.opcheck(ops.qk_norm_rope_backward.default, (qkv.clone(), qkv, *rest))


def test_compiles(implementation: str, device: str) -> None:
    inputs, rope, split = make((1, 5, 2, 8, 2), 2, torch.float32, device=device)
    compiles(lambda *a: qk_norm_rope(*a, rope, split=split), inputs, implementation)
    qkv, q, k = inputs

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inplace(x: Tensor) -> Tensor:
        return qk_norm_rope(x * 1, q, k, rope, split=split, inplace=True)

    with use(implementation), torch.no_grad():
        assert torch.equal(inplace(qkv), qk_norm_rope(qkv, q, k, rope, split=split))


@pytest.mark.gpu
def test_same_bits_every_time(implementation: str) -> None:
    inputs, rope, split = make(REAL[0], 2, torch.bfloat16, device="cuda")
    leaves = [t.detach().requires_grad_() for t in inputs]
    with use(implementation):
        runs = [torch.autograd.grad(qk_norm_rope(*leaves, rope, split=split).square().sum(), leaves) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    (qkv, q, k), (cos, sin), _ = make((1, 5, 2, 8, 2), 2, torch.float32)
    for implementation in ("ref", "triton"):
        with use(implementation):
            with pytest.raises(ValueError, match=r"expected \[B, L, 3, H, d\]"):
                qk_norm_rope(qkv[0], q, k, (cos, sin))
            with pytest.raises(ValueError, match=r"q_scale has shape \(2, 7\)"):
                qk_norm_rope(qkv, q[:, :7], k, (cos, sin))
            with pytest.raises(ValueError, match="differ in form"):
                qk_norm_rope(qkv, q, k[0], (cos, sin))
            with pytest.raises(ValueError, match="one row per stream"):
                qk_norm_rope(qkv, q[0], k[0], (cos, sin), split=2)
            with pytest.raises(ValueError, match=r"rope sin has shape \(4, 4\)"):
                qk_norm_rope(qkv, q, k, (cos, sin[:4]))
            with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
                qk_norm_rope(qkv.detach().requires_grad_(), q, k, (cos, sin), inplace=True)
