"""The ops' own CUDA branches, from the registered op down to the kernels, on the host executor.

On CPU tensors dispatch takes the reference, so the op is called with its implementation spelled out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import flowmo_kernels.step_boundary
from flowmo_kernels import _ext
from flowmo_kernels._triton import INTERPRETED

from .host.executor import HostExecutor
from .tools import randn

ops = torch.ops.flowmo_kernels


@pytest.fixture(autouse=True)
def on_the_host(executor: HostExecutor, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but the executor runs: interpreted Triton in its place would give the same numbers."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a Triton kernel was launched where a CUDA kernel was asked for")

    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", refuse)
    with _ext.launching_with(executor):
        yield


def agree(got: object, expected: object) -> None:
    """Equal up to float32 rounding of sums over a few dozen numbers; empty gradients may be None in the reference."""
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def gradients(op: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the inputs under upstream gradients randn(seed=50 + i)."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = op(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return torch.autograd.grad(outputs, leaves, [randn(*o.shape, seed=50 + i) for i, o in enumerate(outputs)])


X, BRANCH = randn(2, 5, 24, seed=1), randn(2, 5, 24, seed=2)
GATE, SHIFT, SCALE = (randn(2, 2, 24, seed=s, scale=0.5) for s in (3, 4, 5))


def test_norm_modulate() -> None:
    from flowmo_kernels import norm_modulate_ref

    def reference(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm_modulate_ref(x, shift, scale, split=2)

    agree(ops.norm_modulate(X, SHIFT, SCALE, 2, 1e-6, "cuda"), reference(X, SHIFT, SCALE))
    dy = randn(*X.shape, seed=50)
    agree(ops.norm_modulate_backward(dy, X, SCALE, 2, 1e-6, "cuda"), gradients(reference, X, SHIFT, SCALE))


def test_gate_residual() -> None:
    from flowmo_kernels import gate_residual_norm_modulate_ref, gate_residual_ref

    def plain(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return gate_residual_ref(x, branch, gate, split=2)

    def fused(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return gate_residual_norm_modulate_ref(x, branch, gate, shift, scale, split=2)

    agree(ops.gate_residual(X, BRANCH, GATE, 2, "cuda"), plain(X, BRANCH, GATE))
    upstream = [randn(*X.shape, seed=s) for s in (50, 51)]
    agree(ops.gate_residual_backward(upstream[0], BRANCH, GATE, 2, "cuda"), gradients(plain, X, BRANCH, GATE)[1:])
    x_new, y = fused(X, BRANCH, GATE, SHIFT, SCALE)
    agree(ops.gate_residual_norm_modulate(X, BRANCH, GATE, SHIFT, SCALE, 2, 1e-6, "cuda"), (x_new, y))
    got = ops.gate_residual_norm_modulate_backward(*upstream, x_new, BRANCH, GATE, SCALE, 2, 1e-6, "cuda")
    agree(got, gradients(fused, X, BRANCH, GATE, SHIFT, SCALE))


def test_qk_norm_rope() -> None:
    from flowmo_kernels import qk_norm_rope_ref

    qkv, gains = randn(1, 5, 3, 2, 32, seed=1), [1 + randn(2, 32, seed=s, scale=0.3) for s in (2, 3)]
    angles = randn(5, 16, seed=4)
    rope = (angles.cos(), angles.sin())

    def reference(qkv: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return qk_norm_rope_ref(qkv, q, k, rope, split=2)

    agree(ops.qk_norm_rope(qkv, *gains, *rope, 2, 1e-6, "cuda"), reference(qkv, *gains))
    dy = randn(*qkv.shape, seed=50)
    agree(ops.qk_norm_rope_backward(dy, qkv, *gains, *rope, 2, 1e-6, "cuda"), gradients(reference, qkv, *gains))
    inplace = qkv.clone()
    ops.qk_norm_rope_(inplace, *gains, *rope, 2, 1e-6, "cuda")
    agree(inplace, reference(qkv, *gains))


def test_lfq() -> None:
    from flowmo_kernels import lfq_ref

    x = randn(2, 3, 12, seed=1)
    got = ops.lfq_forward(x, 6, 0.7, "cuda")
    agree(got[:5], tuple(lfq_ref(x, 6, temperature=0.7)))
    upstream = [randn(2, 3, 12, seed=50), *(randn(seed=50 + i) for i in (1, 2, 3))]

    def reference(x: Tensor) -> tuple[Tensor, ...]:
        out = lfq_ref(x, 6, temperature=0.7)
        return out.codes, out.per_sample_entropy, out.codebook_entropy, out.commitment

    agree(ops.lfq_backward(x, got[5], *upstream, 6, 0.7, "cuda"), gradients(reference, x))


def test_pack_tokens() -> None:
    from flowmo_kernels.pack_tokens import pack_tokens_ref

    tokens = torch.arange(26).reshape(2, 13) * 19
    packed = ops.pack_tokens(tokens, 9, "cuda")
    assert torch.equal(packed, pack_tokens_ref(tokens, 9))
    assert torch.equal(ops.unpack_tokens(packed, 9, 13, "cuda"), tokens)


def test_euler_step() -> None:
    from flowmo_kernels import euler_step_ref

    z, v, null = (randn(2, 3, 12, seed=s) for s in (1, 2, 3))
    agree(ops.euler_step(z, v, null, 0.2, 1.5, "cuda"), euler_step_ref(z, v, null, dt=0.2, w=1.5))
    # The copy of the state has the velocity's dtype, and its gradient too.
    v, null = v.half(), null.half()
    upstream = randn(*z.shape, seed=50), randn(*z.shape, seed=51).half()
    got = ops.euler_step_backward(*upstream, v, True, 0.2, 1.5, "cuda")
    total = upstream[0] + upstream[1].float()
    agree(got, (total, (-0.2 * 1.5 * total).half(), (-0.2 * -0.5 * total).half()))


def test_step_boundary() -> None:
    from flowmo_kernels.step_boundary import step_boundary_ref

    h, null = randn(2, 5, 24, seed=1), randn(2, 5, 24, seed=2)
    shift, scale, z = randn(1, 24, seed=3), randn(1, 24, seed=4), randn(2, 5, 12, seed=5)
    w_out, b_out, w_in, b_in = randn(12, 24, seed=6), randn(12, seed=7), randn(24, 12, seed=8), randn(24, seed=9)
    assert flowmo_kernels.step_boundary is not None
    got = ops.step_boundary(h, null, shift, scale, w_out, b_out, z, w_in, b_in, 0.2, 1.5, 1e-6, "cuda")
    expected = step_boundary_ref(h, shift, scale, w_out, b_out, z, w_in, b_in, dt=0.2, h_null=null, w=1.5)
    agree(got, tuple(expected))


@pytest.mark.parametrize("kind", ["adam", "hold", "ema"])
def test_optimizer_updates(kind: str) -> None:
    from flowmo_kernels.optim import adam_hold_ema_ref_, ema_ref_, hold_norms_ref_, weight_norms

    def columns() -> list[list[Tensor]]:
        return [[randn(6, 7, seed=10 * c), randn(5, seed=10 * c + 1).abs()] for c in range(5)]

    w, g, m, v, a = columns()
    v = [t.abs() for t in v]
    norms = weight_norms([2 * t for t in w])
    got_w, got_m, got_v, got_a = ([t.clone() for t in c] for c in (w, m, v, a))
    if kind == "adam":
        ops.update_weights(got_w, g, got_m, got_v, norms, got_a, None, 3, 0.1, 0.9, 0.95, 1e-8, False, 0.7, "cuda")
        adam_hold_ema_ref_(w, g, m, v, step=3, lr=0.1, norms=norms, averages=a, decay=0.7)
    elif kind == "hold":
        ops.update_weights(got_w, [], [], [], norms, [], None, 1, 0.0, 0.0, 0.0, 0.0, False, 1.0, "cuda")
        hold_norms_ref_(w, norms)
    else:
        ops.update_weights(got_w, [], [], [], [], got_a, None, 1, 0.0, 0.0, 0.0, 0.0, False, 0.7, "cuda")
        ema_ref_(a, w, 0.7)
    agree([*got_w, *got_m, *got_v, *got_a], [*w, *m, *v, *a])
