"""How a kernel is judged: by its distance to an fp64 oracle, next to that of plain PyTorch in the same dtype.

The oracle is the reference run on fp64 copies of the same numbers.  Outputs of a kernel may be at most 2 times, and
gradients 3 times, as far from it as the reference in the kernel's own dtype; both for the largest and for the
root-mean-square error.  A floor of fp32 rounding, 2^-23 sqrt(terms) of the largest magnitude, covers references that
happen to be exact: `terms` is the number of values that are summed for one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowmo_kernels import use

Function = Callable[..., Any]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def sliced(x: Tensor, margin: int = 3) -> Tensor:
    """The same numbers as a slice of a larger buffer whose other elements are NaN; channels stay contiguous."""
    buffer = torch.full([n + 2 * margin for n in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(margin, margin + n) for n in x.shape)]
    view.copy_(x)
    return view


def _run(function: Function, inputs: Sequence[Any], fp64: bool, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a function, and the gradients of its float inputs for random upstream gradients."""
    leaves = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.double() if fp64 else x
            x = x.detach().requires_grad_()
        leaves.append(x)
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = []
    for i, y in enumerate(outputs):
        # Drawn in bf16 so that all dtypes get the same numbers.
        dy = random(*y.shape, dtype=torch.bfloat16, seed=seed + i)
        upstream.append(dy.to(y.device, y.dtype))
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    if not torch.is_grad_enabled():
        return outputs, []
    gradients = torch.autograd.grad(outputs, wanted, upstream)
    for x, g in zip(wanted, gradients, strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape, f"gradient {g.dtype} {g.shape} of {x.dtype} {x.shape}"
    return [y.detach() for y in outputs], list(gradients)


def compare(name: str, got: Tensor, reference: Tensor, oracle: Tensor, factor: float, terms: int) -> None:
    """Assert that `got` is at most `factor` times as far from the oracle as the reference (see the module)."""
    assert got.shape == reference.shape and got.dtype == reference.dtype, f"{name}: {got.dtype} {tuple(got.shape)}"
    if got.numel() == 0:
        return
    floor = 2.0**-23 * terms**0.5 * oracle.abs().max().item()
    error, allowed = (got.double() - oracle).abs(), (reference.double() - oracle).abs()
    for kind, measure in (("largest", lambda e: e.max()), ("rms", lambda e: e.square().mean().sqrt())):
        e, a = measure(error).item(), factor * measure(allowed).item() + floor
        assert e <= a, f"{name}: {kind} error {e:.3g} exceeds {factor} times the reference's plus rounding, {a:.3g}"
    if got.dim():
        lost = (got == 0).all(-1) & (oracle.abs().amax(-1) > 1e-3 * oracle.abs().max())
        assert not lost.any(), f"{name}: {int(lost.sum())} rows are zero where the oracle's are not"


def judge(
    op: Function, reference: Function, inputs: Sequence[Any], implementation: str, terms: int, gradients: bool = True
) -> None:
    """Compare every output and gradient of `op`, run with `implementation`, with the reference and the oracle."""
    context = torch.enable_grad() if gradients else torch.no_grad()
    with context:
        with use(implementation):
            got, got_gradients = _run(op, inputs, False, 1000)
        plain, plain_gradients = _run(reference, inputs, False, 1000)
        exact, exact_gradients = _run(reference, inputs, True, 1000)
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        compare(f"output {i}", a, b, c, 2.0, terms)
    for i, (a, b, c) in enumerate(zip(got_gradients, plain_gradients, exact_gradients, strict=True)):
        compare(f"gradient of input {i}", a, b, c, 3.0, terms)


def compiles(op: Function, inputs: Sequence[Tensor], implementation: str) -> None:
    """The op is one graph for torch.compile, forward and backward, with the same results."""
    with use(implementation):
        eager, eager_gradients = _run(op, inputs, False, 7)
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        traced, traced_gradients = _run(compiled, inputs, False, 7)
    for a, b in zip(eager + eager_gradients, traced + traced_gradients, strict=True):
        assert torch.equal(a, b)
