"""What the op benches run: every case is data, with its shapes and its byte and FLOP formulas beside the call.

Symbols: B images, L = latent + image tokens, D width, H heads, d = D / H, P = 3 p^2, N code tokens of E bits.
U = one [B, L, D] tensor in bytes. Bytes count what must cross memory once; FLOPs count multiply and add as two.
Inputs are random: matrix products run faster on zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import flowmo_kernels as fk

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """One setting of all sizes."""

    name: str
    batch: int
    latent: int
    image: int
    width: int
    heads: int
    patch: int
    code_channels: int
    bits: int
    dtype: torch.dtype
    weights: int  # square weights in the optimizer cases


CARD = Sizes("FlowMo-Lo decoder, batch 8", 8, 256, 4096, 1152, 12, 4, 18, 9, torch.bfloat16, 64)
CPU = Sizes("small, CPU", 1, 16, 48, 64, 2, 4, 18, 9, torch.float32, 3)


@dataclass(frozen=True)
class Case:
    op: str  # name in the dispatch table
    variant: str  # "forward", "backward" (forward and backward together), or a word of its own
    shape: str
    make: Callable[[str], Inputs]  # device -> random inputs
    forward: Callable[..., Any]  # runs the public op on them; the dispatch decides which kernel that is
    call: Callable[..., Any]  # what is timed: forward, or forward and its gradients
    bytes: int
    flops: int
    bound: str  # "memory" or "compute": the peak it is compared with
    libraries: dict[str, Callable[..., Any]]  # other projects' calls for the same work, where installed
    size: int  # bytes of one set of inputs, for rotation through the cache

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}"


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples and lists, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for item in tree for t in tensors(item)]
    return []


def with_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    """call and the gradients of its float inputs; the upstream gradient is the outputs themselves."""

    def run(*inputs: Any) -> Any:
        wanted = [t for t in tensors(inputs) if t.requires_grad]
        outputs = [t for t in tensors(call(*inputs)) if t.requires_grad]
        return torch.autograd.grad(outputs, wanted, [t.detach() for t in outputs])

    return run


def _libraries(op: str) -> dict[str, Callable[..., Any]]:
    """Calls of other projects that do the same work (or the part of it that they offer), where installed."""
    found: dict[str, Callable[..., Any]] = {}
    if op == "joint_attention" and find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda q, k, v, scale: flash_attn_func(q, k, v, softmax_scale=scale)
    if op == "norm_modulate" and find_spec("liger_kernel"):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        # Liger's affine LayerNorm shares one weight and bias: the first image's modulation, the same traffic.
        found["liger"] = lambda x, shift, scale: LigerLayerNormFunction.apply(x, 1 + scale[0, 1], shift[0, 1], 1e-6)
    if op == "norm_modulate" and find_spec("quack"):
        from quack import layernorm

        found["quack"] = lambda x, shift, scale: layernorm(
            x.flatten(0, 1), (1 + scale[0, 1]).float(), shift[0, 1].float(), 1e-6
        )
    return found


# Libraries whose result differs by construction (one modulation for all images), so it is not compared.
UNCOMPARED = {"liger", "quack"}


def cases(s: Sizes) -> list[Case]:
    """All cases at one setting of the sizes."""
    length, head_dim = s.latent + s.image, s.width // s.heads
    p = 3 * s.patch**2
    item = torch.empty((), dtype=s.dtype).element_size()
    u = s.batch * length * s.width * item
    z = s.batch * s.image * p * 4
    factors = s.code_channels // s.bits
    code_tokens = s.batch * s.latent * factors
    parameters = s.weights * s.width * s.width
    found: list[Case] = []

    def randn(device: str, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, device=device, dtype=dtype or s.dtype)
        return x.requires_grad_(grad)

    def add(op: str, shape: str, make: Any, call: Any, read: int, flops: int = 0, *, bound: str = "memory",
            variant: str = "forward", size: int = u) -> None:  # fmt: skip
        libraries, forward = _libraries(op), call
        if variant == "backward":
            call, libraries = with_gradients(call), {k: with_gradients(f) for k, f in libraries.items()}
        found.append(Case(op, variant, shape, make, forward, call, read, flops, bound, libraries, size))

    def modulation(device: str, grad: bool, count: int) -> list[Tensor]:
        return [randn(device, s.batch, 2, s.width, grad=grad) for _ in range(count)]

    for grad in (False, True):
        variant = "backward" if grad else "forward"
        row = f"[{s.batch}, {length}, {s.width}]"
        # Forward: read x, write y. Backward: read dy and x, write dx.
        add("norm_modulate", row,
            lambda dev, grad=grad: (randn(dev, s.batch, length, s.width, grad=grad), *modulation(dev, grad, 2)),
            lambda x, shift, scale: fk.norm_modulate(x, shift, scale, split=s.latent),
            5 * u if grad else 2 * u, variant=variant)  # fmt: skip
        # Forward: read x and branch, write x' and y. Backward: read dx', dy, x', branch, write dx and dbranch.
        add("gate_residual_norm_modulate", row,
            lambda dev, grad=grad: (
                randn(dev, s.batch, length, s.width, grad=grad), randn(dev, s.batch, length, s.width, grad=grad),
                *modulation(dev, grad, 3)),
            lambda x, branch, gate, shift, scale: fk.gate_residual_norm_modulate(
                x, branch, gate, shift, scale, split=s.latent),
            10 * u if grad else 4 * u, variant=variant, size=2 * u)  # fmt: skip
        # Forward: read and write q, k, v. Backward: read dq, dk, dv and q, k, write the gradient of all three.
        rope = torch.rand(length, head_dim // 2) * 6.28
        add("qk_norm_rope", f"[{s.batch}, {length}, 3, {s.heads}, {head_dim}]",
            lambda dev, grad=grad, rope=rope: (
                randn(dev, s.batch, length, 3, s.heads, head_dim, grad=grad),
                randn(dev, 2, head_dim, grad=grad), randn(dev, 2, head_dim, grad=grad),
                (rope.cos().to(dev), rope.sin().to(dev))),
            lambda qkv, a, b, rope: fk.qk_norm_rope(qkv, a, b, rope, split=s.latent),
            14 * u if grad else 6 * u, variant=variant, size=3 * u)  # fmt: skip
        # Two products of L x L x d to a head forward, five more backward.
        add("joint_attention", f"[{s.batch}, {length}, {s.heads}, {head_dim}]",
            lambda dev, grad=grad: (
                *(randn(dev, s.batch, length, s.heads, head_dim, grad=grad) for _ in range(3)), 8 / head_dim),
            fk.joint_attention, 8 * u if grad else 4 * u,
            4 * s.batch * length * length * s.width * (7 if grad else 2) // 2, bound="compute", variant=variant,
            size=3 * u)  # fmt: skip
        add("linear_gelu", f"[{s.batch * length}, {s.width}] x {4 * s.width}",
            lambda dev, grad=grad: (
                randn(dev, s.batch, length, s.width, grad=grad),
                (randn(dev, 4 * s.width, s.width) / s.width**0.5).requires_grad_(grad),
                randn(dev, 4 * s.width, grad=grad)),
            fk.linear_gelu, 5 * u, 2 * s.batch * length * s.width * 4 * s.width * (3 if grad else 1),
            bound="compute", variant=variant)  # fmt: skip
        # Read x, write codes and tokens; backward reads x and dcodes and writes dx. Half-code product: 2 N 2^E FLOPs.
        for bits, channels in ((s.bits, s.code_channels), (14, 56)):
            n = s.batch * s.latent * (channels // bits)
            add("lfq", f"[{s.batch}, {s.latent}, {channels}] E={bits}",
                lambda dev, grad=grad, channels=channels: (
                    randn(dev, s.batch, s.latent, channels).mul_(0.1).requires_grad_(grad),),
                lambda x, bits=bits: fk.lfq(x, bits),
                n * (2 * item * bits + 8) + (n * 3 * item * bits if grad else 0), 2 * n * 2**bits * (3 if grad else 1),
                variant=variant, size=s.batch * s.latent * channels * item)  # fmt: skip

    # Read and write q and k; v is not touched.
    def in_place(qkv: Tensor, a: Tensor, b: Tensor, rope: Any) -> Tensor:
        return fk.qk_norm_rope(qkv, a, b, rope, split=s.latent, inplace=True)

    add("qk_norm_rope", f"[{s.batch}, {length}, 3, {s.heads}, {head_dim}]",
        lambda dev: (randn(dev, s.batch, length, 3, s.heads, head_dim), randn(dev, 2, head_dim),
                     randn(dev, 2, head_dim), (torch.rand(length, head_dim // 2, device=dev),) * 2),
        in_place, 4 * u, variant="in place", size=3 * u)  # fmt: skip
    add("gate_residual", f"[{s.batch}, {length}, {s.width}]",
        lambda dev: (randn(dev, s.batch, length, s.width), randn(dev, s.batch, length, s.width),
                     *modulation(dev, False, 1)),
        lambda x, branch, gate: fk.gate_residual(x, branch, gate, split=s.latent), 3 * u, size=2 * u)  # fmt: skip

    # In fp8 y takes a byte a number and four a row: read x (and branch, and write x'), or u of width 4 D, and write y.
    n, scales = u // item, s.batch * length * 4
    add("norm_modulate_fp8", f"[{s.batch}, {length}, {s.width}]",
        lambda dev: (randn(dev, s.batch, length, s.width), *modulation(dev, False, 2)),
        lambda x, shift, scale: fk.norm_modulate_fp8(x, shift, scale, split=s.latent), u + n + scales)  # fmt: skip
    add("gate_residual_norm_modulate_fp8", f"[{s.batch}, {length}, {s.width}]",
        lambda dev: (randn(dev, s.batch, length, s.width), randn(dev, s.batch, length, s.width),
                     *modulation(dev, False, 3)),
        lambda x, branch, gate, shift, scale: fk.gate_residual_norm_modulate_fp8(
            x, branch, gate, shift, scale, split=s.latent),
        3 * u + n + scales, size=2 * u)  # fmt: skip
    add("gelu_fp8", f"[{s.batch * length}, {4 * s.width}]",
        lambda dev: (randn(dev, s.batch * length, 4 * s.width),), fk.gelu_fp8, 4 * u + 4 * n + scales,
        size=4 * u)  # fmt: skip

    # Read 8 bytes a token, write E bits; and back.
    packed = s.batch * s.latent * factors * s.bits // 8
    add("pack_tokens", f"[{s.batch}, {s.latent * factors}] E={s.bits}",
        lambda dev: (torch.randint(0, 2**s.bits, (s.batch, s.latent * factors), device=dev),),
        lambda t: fk.pack_tokens(t, s.bits), code_tokens * 8 + packed, size=code_tokens * 8)  # fmt: skip
    add("unpack_tokens", f"[{s.batch}, {s.latent * factors}] E={s.bits}",
        lambda dev: (torch.randint(0, 256, (s.batch, (s.latent * factors * s.bits + 7) // 8), device=dev,
                                   dtype=torch.uint8),),
        lambda t: fk.unpack_tokens(t, s.bits, s.latent * factors), code_tokens * 8 + packed,
        size=packed)  # fmt: skip

    # Read z (fp32), v and v_null, write z' (fp32) and its copy.
    add("euler_step", f"[{s.batch}, {s.image}, {p}] guided",
        lambda dev: (randn(dev, s.batch, s.image, p, dtype=torch.float32), randn(dev, s.batch, s.image, p),
                     randn(dev, s.batch, s.image, p)),
        lambda z, v, null: fk.euler_step(z, v, null, dt=0.04, w=1.5), 2 * z + 3 * z * item // 4,
        size=2 * z)  # fmt: skip

    # Read h (and h_null) and z, write z' and x; the two projections are 4 D P FLOPs a token.
    rows = s.batch * s.image * s.width * item
    for guided in (False, True):
        add("step_boundary", f"[{s.batch}, {s.image}, {s.width}] P={p}{' guided' if guided else ''}",
            lambda dev, guided=guided: (
                randn(dev, s.batch, s.image, s.width), randn(dev, 1, s.width), randn(dev, 1, s.width),
                randn(dev, p, s.width) / s.width**0.5, randn(dev, p),
                randn(dev, s.batch, s.image, p, dtype=torch.float32),
                randn(dev, s.width, p) / p**0.5, randn(dev, s.width),
                randn(dev, s.batch, s.image, s.width) if guided else None),
            lambda *a: fk.step_boundary(*a[:8], dt=0.04, h_null=a[8], w=1.5),
            rows * (3 if guided else 2) + 2 * z,
            s.batch * s.image * 2 * s.width * p * (3 if guided else 2),
            variant="guided" if guided else "forward", size=rows * (2 if guided else 1))  # fmt: skip

    # fp32 weights. Adam: read w, g, m, v, write w, m, v; hold: read and write w again; average: read and write a.
    def weights(dev: str) -> list[Tensor]:
        return [torch.randn(s.width, s.width, device=dev) for _ in range(s.weights)]

    # Large steps and a quick average: a kernel that changes nothing must not pass for right.
    def adam(w: Any, g: Any, m: Any, v: Any, norms: Any, averages: Any) -> None:
        fk.adam_hold_ema_(w, g, m, v, step=100, lr=0.1, norms=norms, averages=averages, decay=0.5)

    def adam_inputs(dev: str) -> Inputs:
        w = weights(dev)
        return w, weights(dev), weights(dev), [t.square() for t in weights(dev)], fk.weight_norms(w), weights(dev)

    label = f"{s.weights} x [{s.width}, {s.width}]"
    add("adam_hold_ema", label, adam_inputs, adam, parameters * 4 * 11, variant="adam, hold, average",
        size=parameters * 20)  # fmt: skip
    add("hold_norms", label, lambda dev: (weights(dev), [torch.ones((), device=dev)] * s.weights),
        lambda w, norms: fk.hold_norms_(w, norms), parameters * 4 * 3, variant="in place",
        size=parameters * 4)  # fmt: skip
    add("ema", label, lambda dev: (weights(dev), weights(dev)), lambda a, w: fk.ema_(a, w, 0.5),
        parameters * 4 * 3, variant="in place", size=parameters * 8)  # fmt: skip
    return found
