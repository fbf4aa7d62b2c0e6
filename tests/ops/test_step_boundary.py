from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import norm_modulate, step_boundary, step_boundary_ref, use

from .oracle import judge, random, sliced

DTYPES = [torch.float32, torch.bfloat16]
# B, N, D, P, whether shift and scale are shared by all images
SHAPES = [
    (1, 1, 1, 1, False),
    (2, 37, 96, 12, True),
    (1, 33, 130, 48, False),
    (3, 5, 17, 3, False),
    (0, 4, 8, 3, False),
]


def make(
    shape: tuple[int, int, int, int, bool], dtype: torch.dtype, guided: bool, device: str = "cpu"
) -> list[Tensor | None]:
    b, n, d, p, shared = shape

    def tensor(*size: int, seed: int, factor: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return sliced((factor * random(*size, device=device, seed=seed)).to(of))

    # h and h_null are the image rows of a joint sequence: rows with a gap between images.
    h, null = (random(b, n + 5, d, dtype=dtype, device=device, seed=seed)[:, 5:] + 0.5 for seed in (0, 1))
    m = 1 if shared else b
    return [
        h, tensor(m, d, seed=2, factor=0.5), tensor(m, d, seed=3, factor=0.5), tensor(p, d, seed=4, factor=d**-0.5),
        tensor(p, seed=5), tensor(b, n, p, seed=6, of=torch.float32), tensor(d, p, seed=7, factor=p**-0.5),
        tensor(d, seed=8), null if guided else None,
    ]  # fmt: skip


def run(shape: tuple[int, int, int, int, bool], dtype: torch.dtype, guided: bool, impl: str, device: str) -> None:
    judge(
        lambda *a: step_boundary(*a[:8], dt=0.3, h_null=a[8], w=1.5),
        lambda *a: step_boundary_ref(*a[:8], dt=0.3, h_null=a[8], w=1.5),
        make(shape, dtype, guided, device),
        impl,
        terms=shape[2] + shape[3],
        gradients=False,
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_oracle(
    shape: tuple[int, int, int, int, bool], dtype: torch.dtype, guided: bool, implementation: str, device: str
) -> None:
    run(shape, dtype, guided, implementation, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4096, 1152, 48, True), (2, 1024, 768, 192, False)])
def test_real_shapes(shape: tuple[int, int, int, int, bool], implementation: str) -> None:
    run(shape, torch.bfloat16, True, implementation, "cuda")


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(2, 80), st.integers(1, 70), st.booleans(), st.booleans())
def test_random_shapes(b: int, n: int, d: int, p: int, shared: bool, guided: bool) -> None:
    run((b, n, d, p, shared), torch.float32, guided, "triton", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("which", ["first", "second"])
def test_norms_of_a_variance_like_eps(which: str, implementation: str, device: str) -> None:
    inputs = make((1, 7, 40, 12, False), torch.float32, False, device)
    h, shift, scale, *rest = inputs[:8]
    assert h is not None and shift is not None and scale is not None
    if which == "first":
        h = 1e-3 * h
    else:
        shift, scale = 1e-3 * shift, 1e-3 * scale - 1
    judge(
        lambda *a: step_boundary(*a, dt=0.3),
        lambda *a: step_boundary_ref(*a, dt=0.3),
        (h, shift, scale, *rest),
        implementation,
        terms=52,
        gradients=False,
    )


def test_large_mean_does_not_lose_the_variance(implementation: str, device: str) -> None:
    """Rows of mean 1000 and deviation 1: a sum of squares in fp32 would lose three digits, deviations lose none."""
    inputs = make((1, 7, 130, 12, False), torch.float32, False, device)
    inputs[0] = inputs[0] + 1000.0  # type: ignore[operator]
    with torch.no_grad(), use(implementation):
        got = step_boundary(*inputs[:8], dt=0.3)  # type: ignore[misc]
    want = step_boundary_ref(*(t.double() for t in inputs[:8]), dt=0.3)  # type: ignore[misc, union-attr]
    # The mean of 130 numbers near 1000 is known to 2^-24 1000 sqrt(130), relative to a deviation of 1.
    bound = 2**-24 * 1000 * 130**0.5
    assert (got.z - want.z).abs().max() < 0.3 * bound * want.z.abs().max()


def test_equals_the_separate_layers(device: str) -> None:
    """The same as norm_modulate, a second LayerNorm, Linear, Euler step, Linear in fp32."""
    h, shift, scale, w_out, b_out, z, w_in, b_in, _ = make((2, 9, 24, 12, False), torch.float32, False, device)
    v = F.linear(F.layer_norm(norm_modulate(h, shift, scale), (24,), eps=1e-6), w_out, b_out)  # type: ignore[arg-type]
    z_next = z - 0.3 * v  # type: ignore[operator]
    got = step_boundary(h, shift, scale, w_out, b_out, z, w_in, b_in, dt=0.3)  # type: ignore[arg-type]
    # Two chains of the same fp32 operations, rounded about 24 + 12 times.
    for a, b in zip(got, (z_next, F.linear(z_next, w_in, b_in))):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=0, atol=36 * 2**-23 * b.abs().max().item())


def test_gradients_take_the_reference(implementation: str, device: str) -> None:
    inputs = [t.detach().clone().requires_grad_() for t in make((1, 3, 8, 3, False), torch.float32, False, device)[:8]]
    gradients = []
    for name in (implementation, "ref"):
        with use(name):
            gradients.append(torch.autograd.grad(step_boundary(*inputs, dt=0.3).x.square().sum(), inputs))
    for a, b in zip(*gradients):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_library_op(device: str) -> None:
    h, *rest, null = make((2, 5, 24, 12, True), torch.float32, True, device)
    op = torch.ops.flowmo_kernels.step_boundary.default
    torch.library.opcheck(op, (h, null, *rest, 0.3, 1.5, 1e-6, "triton"))
    torch.library.opcheck(op, (h, None, *rest, 0.3, 1.0, 1e-6, "triton"))


def test_compiles(implementation: str, device: str) -> None:
    inputs = make((2, 5, 24, 12, True), torch.float32, True, device)

    def step(*a: Tensor) -> tuple[Tensor, Tensor]:
        return step_boundary(*a[:8], dt=0.3, h_null=a[8], w=1.5)

    with use(implementation), torch.no_grad():
        torch._dynamo.reset()
        traced = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
        for a, b in zip(traced, step(*inputs)):  # type: ignore[arg-type]
            assert torch.equal(a, b)


def test_bad_input() -> None:
    good = [torch.zeros(*s) for s in ((2, 3, 8), (2, 8), (1, 8), (6, 8), (6,), (2, 3, 6), (8, 6), (8,))]

    def with_(index: int, tensor: Tensor) -> list[Tensor]:
        return [*good[:index], tensor, *good[index + 1 :]]

    for implementation in ("ref", "triton"):
        with use(implementation):
            for index, tensor, message in (
                (0, torch.zeros(3, 8), r"expected floating point \[B, N, D\]"),
                (1, torch.zeros(3, 8), r"shift has shape \(3, 8\); expected \(2, 8\) or \(1, 8\)"),
                (3, torch.zeros(6, 7), r"w_out has shape \(6, 7\)"),
                (4, torch.zeros(5), r"b_out has shape \(5,\); expected \(6,\)"),
                (5, torch.zeros(2, 3, 6).bfloat16(), "expected the fp32 state"),
                (6, torch.zeros(8, 5), r"w_in has shape \(8, 5\)"),
            ):
                with pytest.raises(ValueError, match=message):
                    step_boundary(*with_(index, tensor), dt=0.1)
            with pytest.raises(ValueError, match="h_null is"):
                step_boundary(*good, dt=0.1, h_null=torch.zeros(2, 3, 9))
