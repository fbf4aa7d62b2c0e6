"""One Euler step of the sampler on patch tokens, with classifier-free guidance.

    velocity = v_null + w (v - v_null)      (v alone without v_null)
    z'       = z - dt * velocity,            dt = t_i - t_{i+1} > 0
    second result: z' rounded to v's dtype, the input of the next patch embedding

The state stays in fp32 over the whole chain; the velocity may come in bf16 or fp16.
Source: paper, section 3.3 and equation 5, with the sign of the released implementation (v = noise - data).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import chosen
from ._library import register
from ._rows import Signature, signature_of
from ._triton import cast, cdiv, jit, tl


def _check(z: Tensor, v: Tensor, v_null: Tensor | None) -> None:
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z is {z.dtype}; expected the fp32 state of the sampler (call z.float() once at the start)")
    if not v.is_floating_point() or v.shape != z.shape:
        raise ValueError(f"v is {v.dtype} {tuple(v.shape)}; expected floating point of z's shape {tuple(z.shape)}")
    if v_null is not None and (v_null.shape != v.shape or v_null.dtype != v.dtype):
        raise ValueError(
            f"v_null is {v_null.dtype} {tuple(v_null.shape)}; expected v's {v.dtype} {tuple(v.shape)}"
        )


def euler_step_ref(
    z: Tensor, v: Tensor, v_null: Tensor | None = None, *, dt: float, w: float = 1.0
) -> tuple[Tensor, Tensor]:
    velocity = v.to(z.dtype)
    if v_null is not None:
        null = v_null.to(z.dtype)
        velocity = null + w * (velocity - null)
    z_next = z - dt * velocity
    return z_next, z_next.to(v.dtype, copy=True)


@jit
def euler_step_kernel(
    p_z, p_v, p_null, p_next, p_copy, dt, w, total, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):
    i_block = tl.program_id(0).to(tl.int64)
    o_z = i_block * BLOCK + tl.arange(0, BLOCK)
    m_z = o_z < total
    b_v = tl.load(p_v + o_z, mask=m_z, other=0.0).to(tl.float32)
    if GUIDED:
        b_null = tl.load(p_null + o_z, mask=m_z, other=0.0).to(tl.float32)
        b_v = b_null + w * (b_v - b_null)
    b_next = tl.load(p_z + o_z, mask=m_z, other=0.0) - dt * b_v
    tl.store(p_next + o_z, b_next, mask=m_z)
    tl.store(p_copy + o_z, cast(b_next, p_copy.dtype.element_ty), mask=m_z)


@jit
def euler_step_backward_kernel(
    p_dnext, p_dcopy, p_dz, p_dv, p_dnull, dt, w, total,
    HAS_NEXT: tl.constexpr, HAS_COPY: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = dz' + dcopy; dv = -dt w dz; dv_null = -dt (1 - w) dz (w = 1 without guidance)."""
    i_block = tl.program_id(0).to(tl.int64)
    o_z = i_block * BLOCK + tl.arange(0, BLOCK)
    m_z = o_z < total
    b_dz = tl.zeros((BLOCK,), tl.float32)
    if HAS_NEXT:
        b_dz += tl.load(p_dnext + o_z, mask=m_z, other=0.0)
    if HAS_COPY:
        b_dz += tl.load(p_dcopy + o_z, mask=m_z, other=0.0).to(tl.float32)
    tl.store(p_dz + o_z, b_dz, mask=m_z)
    b_dv = -dt * b_dz
    if GUIDED:
        tl.store(p_dnull + o_z, cast((1.0 - w) * b_dv, p_dnull.dtype.element_ty), mask=m_z)
        b_dv = w * b_dv
    tl.store(p_dv + o_z, cast(b_dv, p_dv.dtype.element_ty), mask=m_z)


# Eight elements to a thread of four warps: 16-byte accesses of bf16, 32 bytes of fp32.
BLOCK = 1024


def _forward(
    z: Tensor, v: Tensor, v_null: Tensor | None, dt: float, w: float, impl: str
) -> tuple[Tensor, Tensor]:
    z, v = z.contiguous(), v.contiguous()
    v_null = None if v_null is None else v_null.contiguous()
    if impl == "cuda":
        from . import _cuda

        return _cuda.euler_step(z, v, v_null, dt, w)
    z_next, copy = _forward_fake(z, v, v_null, dt, w, impl)
    if z.numel():
        euler_step_kernel[(cdiv(z.numel(), BLOCK),)](
            z, v, v_null, z_next, copy, dt, w, z.numel(), GUIDED=v_null is not None, BLOCK=BLOCK, num_warps=4
        )
    return z_next, copy


def _forward_fake(
    z: Tensor, v: Tensor, v_null: Tensor | None, dt: float, w: float, impl: str
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), v.new_empty(v.shape)


def _backward(
    dnext: Tensor | None, dcopy: Tensor | None, v: Tensor, guided: bool, dt: float, w: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "cuda":
        from . import _cuda

        return _cuda.euler_step_backward(dnext, dcopy, v, guided, dt, w)
    dz, dv, dnull = _backward_fake(dnext, dcopy, v, guided, dt, w, impl)
    if v.numel():
        euler_step_backward_kernel[(cdiv(v.numel(), BLOCK),)](
            None if dnext is None else dnext.contiguous(), None if dcopy is None else dcopy.contiguous(),
            dz, dv, dnull, dt, w, v.numel(),
            HAS_NEXT=dnext is not None, HAS_COPY=dcopy is not None, GUIDED=guided, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dz, dv, dnull


def _backward_fake(
    dnext: Tensor | None, dcopy: Tensor | None, v: Tensor, guided: bool, dt: float, w: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    dz = v.new_empty(v.shape, dtype=torch.float32)
    return dz, v.new_empty(v.shape), v.new_empty(v.shape if guided else (0,))


euler_step_op = register(
    "euler_step(Tensor z, Tensor v, Tensor? v_null, float dt, float w, str impl) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
euler_step_backward_op = register(
    "euler_step_backward(Tensor? dnext, Tensor? dcopy, Tensor v, bool guided, float dt, float w, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _EulerStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, v, v_null, dt: float, w: float, impl: str):  # type: ignore[no-untyped-def]
        # v is kept for its shape and dtype alone; its values are never read again.
        ctx.save_for_backward(v)
        ctx.arguments = v_null is not None, dt, w, impl
        ctx.set_materialize_grads(False)
        return euler_step_op(z, v, v_null, dt, w, impl)

    @staticmethod
    def backward(ctx, dnext, dcopy):  # type: ignore[no-untyped-def]
        (v,) = ctx.saved_tensors
        guided = ctx.arguments[0]
        dz, dv, dnull = euler_step_backward_op(dnext, dcopy, v, *ctx.arguments)
        return dz, dv, dnull if guided else None, None, None, None


def euler_step(
    z: Tensor,  # [B, N, P]
    v: Tensor,  # [B, N, P]
    v_null: Tensor | None = None,  # [B, N, P]
    *,
    dt: float,
    w: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Take one guided Euler step.

    Args:
        z: [B, N, P] fp32, the state as patch tokens (any shape will do, as long as all agree).
        v: z's shape, fp32, bf16 or fp16, the conditional velocity.
        v_null: as v, the velocity at the null condition, or None for an unguided step.
        dt: t_i - t_{i+1}.
        w: guidance weight; used only with v_null.

    Returns:
        (z', z' rounded to v's dtype), both of z's shape; differentiable in z, v and v_null.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(z, v, v_null)
    impl = chosen("euler_step", z)
    if impl == "ref" or z.dtype != torch.float32:
        return euler_step_ref(z, v, v_null, dt=dt, w=w)
    z_next, copy = _EulerStep.apply(z, v, v_null, float(dt), float(w), impl)
    return z_next, copy


def aot_signatures() -> list[Signature]:
    """bf16 velocities and an fp32 state, for compilation without a card."""
    types = {f"p_{name}": "*fp32" for name in ("z", "next", "dnext", "dz")}
    types |= {f"p_{name}": "*bf16" for name in ("v", "null", "copy", "dcopy", "dv", "dnull")}
    types |= {"dt": "fp32", "w": "fp32", "total": "i32:16"}
    signatures: list[Signature] = []
    for guided in (False, True):
        label = "guided" if guided else "plain"
        forward: dict[str, object] = {"GUIDED": guided, "BLOCK": BLOCK}
        backward: dict[str, object] = {"HAS_NEXT": True, "HAS_COPY": True, **forward}
        for kernel, constexprs in ((euler_step_kernel, forward), (euler_step_backward_kernel, backward)):
            signatures.append((kernel, signature_of(kernel, types, constexprs), constexprs, 4, 3, label))
    return signatures
