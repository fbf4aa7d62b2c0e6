"""Optimizer updates over whole lists of weights: Adam, the hold of weight norms, the exponential average.

    Adam    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
            w = w - lr / (1 - b1^s) * m / (sqrt(v / (1 - b2^s)) + eps)          at step s = 1, 2, ...
    hold    w = w * |w_0| / |w|          the Frobenius norm at step 0, of the matrix or of each row
    EMA     a = d a + (1 - d) w          d = decay^k when it runs every k steps

The kernels see all weights of a call as one list of chunks, through a table of pointers. The norm of a whole weight
needs a second pass over it; the norm of a row does not, since a program deals with whole rows.

A norm of zero, at step 0 or now, leaves its weights as they are: a row that starts at zero (the gates) must be
able to leave it. Everything is fp32 and in place. A `found_inf` that is not zero on the device leaves everything as it
is, whatever the gradients hold: whether a step is taken is decided there, and the host does not wait to know.
Source: paper, supplement (Adam, EMA); Karras et al., Analyzing and Improving the Training Dynamics of Diffusion
Models (the hold, after every optimizer step).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ._dispatch import chosen
from ._library import register
from ._optim_ref import adam_hold_ema_ref_, ema_ref_, hold_norms_ref_, weight_norms
from ._rows import Signature, signature_of
from ._triton import jit, tl

__all__ = ["adam_hold_ema_", "adam_hold_ema_ref_", "ema_", "ema_ref_", "hold_norms_", "hold_norms_ref_", "weight_norms"]


def _check(name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(tensors) != len(weights):
        raise ValueError(f"{name} has {len(tensors)} tensors for {len(weights)} weights; expected one to a weight")
    for i, (tensor, weight) in enumerate(zip(tensors, weights)):
        if tensor.shape != weight.shape or tensor.dtype != torch.float32 or tensor.device != weight.device:
            raise ValueError(
                f"{name}[{i}] is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected fp32 "
                f"{tuple(weight.shape)} on {weight.device}, like its weight"
            )


def _check_flag(found_inf: Tensor | None, weights: Sequence[Tensor]) -> None:
    if found_inf is None or not weights:
        return
    if found_inf.numel() != 1 or found_inf.dtype != torch.float32 or found_inf.device != weights[0].device:
        raise ValueError(
            f"found_inf is {found_inf.dtype} {tuple(found_inf.shape)} on {found_inf.device}; expected one fp32 number "
            f"on {weights[0].device}, the weights' device"
        )


def _check_norms(norms: Sequence[Tensor | None], weights: Sequence[Tensor], per_channel: bool) -> None:
    if len(norms) != len(weights):
        raise ValueError(f"norms has {len(norms)} entries for {len(weights)} weights; expected one to a weight")
    for i, (norm, weight) in enumerate(zip(norms, weights)):
        shape = weight.shape[:1] if per_channel else torch.Size()
        if norm is not None and (norm.shape != shape or norm.dtype != torch.float32):
            raise ValueError(
                f"norms[{i}] is {norm.dtype} {tuple(norm.shape)}; expected fp32 {tuple(shape)} as weight_norms "
                f"gives it for per_channel={per_channel}"
            )


@jit
def _pointer(p_table, i_tensor, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Entry of the pointer table: weight, grad, first and second moment, average, norm."""
    p_tensor = tl.load(p_table + i_tensor * 6 + COLUMN).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(p_tensor, 16) if ALIGNED else p_tensor


@jit
def _hold_scale(b_square, p_norm):
    b_norm = tl.load(p_norm)
    b_now = tl.sqrt_rn(b_square)
    return tl.where((b_now > 0) & (b_norm > 0), b_norm / tl.where(b_now > 0, b_now, 1.0), 1.0)


@jit
def _average(p_average, o_w, m_w, b_w, ema_weight):
    b_average = tl.load(p_average + o_w, mask=m_w, other=0.0)
    tl.store(p_average + o_w, b_average + ema_weight * (b_w - b_average), mask=m_w)


@jit
def update_chunks_kernel(
    p_table, p_chunks, p_squares, p_found_inf, lr_step, beta1, beta2, scale2, eps, ema_weight,
    ADAM: tl.constexpr, HOLD: tl.constexpr, EMA: tl.constexpr, FLAG: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk: Adam, its sum of squares (HOLD = "whole") or its hold at once (HOLD = "rows"), and the average."""
    if FLAG:
        if tl.load(p_found_inf) != 0:
            return
    i_chunk = tl.program_id(0).to(tl.int64)
    i_tensor = tl.load(p_chunks + i_chunk * 3).to(tl.int64)
    start = tl.load(p_chunks + i_chunk * 3 + 1)
    length = tl.load(p_chunks + i_chunk * 3 + 2)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
        length = tl.multiple_of(length, 4)
    p_w = _pointer(p_table, i_tensor, 0, ALIGNED) + start
    b_square = tl.zeros((BLOCK,), tl.float32)
    for i_w in range(0, length, BLOCK):
        o_w = i_w + tl.arange(0, BLOCK)
        m_w = o_w < length
        b_w = tl.load(p_w + o_w, mask=m_w, other=0.0)
        if ADAM:
            p_g = _pointer(p_table, i_tensor, 1, ALIGNED) + start
            p_m = _pointer(p_table, i_tensor, 2, ALIGNED) + start
            p_v = _pointer(p_table, i_tensor, 3, ALIGNED) + start
            b_g = tl.load(p_g + o_w, mask=m_w, other=0.0)
            b_m = tl.load(p_m + o_w, mask=m_w, other=0.0)
            b_m += (1.0 - beta1) * (b_g - b_m)
            b_v = beta2 * tl.load(p_v + o_w, mask=m_w, other=0.0) + (1.0 - beta2) * b_g * b_g
            tl.store(p_m + o_w, b_m, mask=m_w)
            tl.store(p_v + o_w, b_v, mask=m_w)
            # Beyond the end 0 / eps, which an eps of 0 would make a NaN of, and the norm with it.
            b_w -= tl.where(m_w, lr_step * (b_m / (tl.sqrt_rn(b_v) * scale2 + eps)), 0.0)
            tl.store(p_w + o_w, b_w, mask=m_w)
        if HOLD != "none":
            b_square += b_w * b_w
        elif EMA:
            _average(_pointer(p_table, i_tensor, 4, ALIGNED) + start, o_w, m_w, b_w, ema_weight)
    if HOLD == "whole":
        tl.store(p_squares + i_chunk, tl.sum(b_square, axis=0))
    if HOLD == "rows":
        b_scale = _hold_scale(tl.sum(b_square, axis=0), _pointer(p_table, i_tensor, 5, False) + start // length)
        tl.debug_barrier()
        for i_w in range(0, length, BLOCK):
            o_w = i_w + tl.arange(0, BLOCK)
            m_w = o_w < length
            b_w = tl.load(p_w + o_w, mask=m_w, other=0.0) * b_scale
            tl.store(p_w + o_w, b_w, mask=m_w)
            if EMA:
                _average(_pointer(p_table, i_tensor, 4, ALIGNED) + start, o_w, m_w, b_w, ema_weight)


@jit
def hold_scales_kernel(p_table, p_first, p_squares, p_scales, BLOCK: tl.constexpr):
    """Scale of one weight, from the sums of squares of its chunks in their order."""
    i_tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(p_first + i_tensor)
    last = tl.load(p_first + i_tensor + 1)
    b_square = tl.zeros((BLOCK,), tl.float32)
    for i_chunk in range(first, last, BLOCK):
        o_chunk = i_chunk + tl.arange(0, BLOCK)
        b_square += tl.load(p_squares + o_chunk, mask=o_chunk < last, other=0.0)
    b_scale = _hold_scale(tl.sum(b_square, axis=0), _pointer(p_table, i_tensor, 5, False))
    tl.store(p_scales + i_tensor, b_scale)


@jit
def rescale_chunks_kernel(
    p_table, p_chunks, p_scales, p_found_inf, ema_weight,
    EMA: tl.constexpr, FLAG: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second pass of the hold of whole weights, and the average."""
    if FLAG:
        if tl.load(p_found_inf) != 0:
            return
    i_chunk = tl.program_id(0).to(tl.int64)
    i_tensor = tl.load(p_chunks + i_chunk * 3).to(tl.int64)
    start = tl.load(p_chunks + i_chunk * 3 + 1)
    length = tl.load(p_chunks + i_chunk * 3 + 2)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
        length = tl.multiple_of(length, 4)
    b_scale = tl.load(p_scales + i_tensor)
    p_w = _pointer(p_table, i_tensor, 0, ALIGNED) + start
    for i_w in range(0, length, BLOCK):
        o_w = i_w + tl.arange(0, BLOCK)
        m_w = o_w < length
        b_w = tl.load(p_w + o_w, mask=m_w, other=0.0) * b_scale
        tl.store(p_w + o_w, b_w, mask=m_w)
        if EMA:
            _average(_pointer(p_table, i_tensor, 4, ALIGNED) + start, o_w, m_w, b_w, ema_weight)


# Elements to a program, and at a time; swept by bench/tune.py.
CHUNK = 16384
BLOCK = 1024


@lru_cache(maxsize=16)
def _chunks(
    shapes: tuple[tuple[int, ...], ...], rows: bool, most: int, device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """Chunks [n, 3] (tensor, first element, length), first chunk of each tensor [tensors + 1], all a multiple of 4."""
    chunks, first, aligned = [], [0], True
    for i, shape in enumerate(shapes):
        numel = torch.Size(shape).numel()
        length = max(numel // shape[0], 1) if rows and numel else most
        chunks += [(i, start, min(length, numel - start)) for start in range(0, numel, length)]
        first.append(len(chunks))
        aligned = aligned and length % 4 == 0 and numel % 4 == 0
    table = torch.tensor(chunks, dtype=torch.int32, device="cpu").reshape(-1, 3)
    return table.to(device), torch.tensor(first, dtype=torch.int32, device="cpu").to(device), aligned


@lru_cache(maxsize=16)
def _table(pointers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Pointers [tensors, 6] on the device; kept, so that a captured graph or an unchanged step copies nothing."""
    table = torch.tensor(pointers, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _update(
    weights: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    norms: list[Tensor], averages: list[Tensor], found_inf: Tensor | None, step: int, lr: float, beta1: float,
    beta2: float, eps: float, per_channel: bool, decay: float, impl: str,
) -> None:  # fmt: skip
    if impl == "cuda":
        from . import _cuda

        if exp_avgs:
            _cuda.adam_hold_ema(
                weights, grads, exp_avgs, exp_avg_sqs, norms or None, averages or None, step, lr, beta1, beta2, eps,
                per_channel, decay, found_inf,
            )  # fmt: skip
        elif norms:
            _cuda.hold_norms(weights, norms, per_channel)
        else:
            _cuda.ema(averages, weights, decay, found_inf)
        return
    device = weights[0].device
    hold = "none" if not norms else "rows" if per_channel else "whole"
    shapes = tuple(tuple(w.shape) for w in weights)
    chunks, first, aligned = _chunks(shapes, hold == "rows", CHUNK, device)
    if not len(chunks):
        return
    columns = [
        [t.data_ptr() for t in column] if column else [0] * len(weights)
        for column in (weights, grads, exp_avgs, exp_avg_sqs, averages, norms)
    ]
    aligned = aligned and all(p % 16 == 0 for column in columns[:5] for p in column)
    table = _table(tuple(zip(*columns)), device)
    adam, ema = bool(exp_avgs), bool(averages)
    squares = torch.empty(len(chunks), device=device)
    flag = squares if found_inf is None else found_inf  # an address is wanted, if only to be passed over
    update_chunks_kernel[(len(chunks),)](
        table, chunks, squares, flag, lr / (1.0 - beta1**step), beta1, beta2, (1.0 - beta2**step) ** -0.5, eps,
        1.0 - decay, ADAM=adam, HOLD=hold, EMA=ema, FLAG=found_inf is not None, ALIGNED=aligned, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    if hold == "whole":
        scales = torch.empty(len(weights), device=device)
        hold_scales_kernel[(len(weights),)](table, first, squares, scales, BLOCK=256, num_warps=4)
        rescale_chunks_kernel[(len(chunks),)](
            table, chunks, scales, flag, 1.0 - decay,
            EMA=ema, FLAG=found_inf is not None, ALIGNED=aligned, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def _update_fake(weights: list[Tensor], *_: object) -> None:
    return None


update_weights_op = register(
    "update_weights(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor[] norms, Tensor(d!)[] averages, Tensor? found_inf, int step, float lr, float beta1, float beta2,"
    " float eps, bool per_channel, float decay, str impl) -> ()",
    _update,
    _update_fake,
)


@torch.no_grad()
def _run(
    weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    norms: Sequence[Tensor], averages: Sequence[Tensor], found_inf: Tensor | None, step: int, lr: float,
    betas: tuple[float, float], eps: float, per_channel: bool, decay: float, impl: str,
) -> None:  # fmt: skip
    """The kernels, on lists that are empty where a part of the update is not wanted."""
    if not weights:
        return
    changed = [*weights, *exp_avgs, *exp_avg_sqs, *averages]
    for tensor in changed:
        if not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is to be updated in place; the "
                f"kernels need contiguous memory (use .contiguous(), or FLOWMO_KERNELS=ref)"
            )
    update_weights_op(
        list(weights), [g.contiguous() for g in grads], list(exp_avgs), list(exp_avg_sqs),
        [n.contiguous() for n in norms], list(averages), found_inf, step, lr, *betas, eps, per_channel, decay, impl,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        # Autograd must notice that saved weights have changed, as it does after any in-place operation.
        torch.autograd.graph.increment_version(changed)


def hold_norms_(weights: Sequence[Tensor], norms: Sequence[Tensor], *, per_channel: bool = False) -> None:
    """Rescale each weight to the norm it had at step 0, in place.

    Args:
        weights: fp32 tensors of any shape (rows first with per_channel).
        norms: what `weight_norms(weights, per_channel=per_channel)` gave at step 0.
        per_channel: hold the norm of every row (output channel) rather than of the whole weight.

    Raises:
        ValueError: lists of different lengths, or norms of another shape or dtype.
    """
    _check("weights", weights, weights)
    _check_norms(norms, weights, per_channel)
    impl = chosen("hold_norms", weights[0]) if weights else "ref"
    if impl == "ref":
        hold_norms_ref_(weights, norms, per_channel=per_channel)
    else:
        _run(weights, [], [], [], norms, [], None, 1, 0.0, (0.0, 0.0), 0.0, per_channel, 1.0, impl)


def ema_(
    averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, *, found_inf: Tensor | None = None
) -> None:
    """a = decay a + (1 - decay) w, in place.

    Args:
        averages: fp32 tensors, changed in place.
        weights: fp32 tensors of the same shapes.
        decay: of this update; 0.9999 ** 10 when the average is updated every 10 steps at a decay of 0.9999.
        found_inf: as in `adam_hold_ema_`.

    Raises:
        ValueError: tensors that do not pair up, or a decay outside [0, 1].
    """
    _check_flag(found_inf, weights)
    _check("averages", averages, weights)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}; expected a number from 0 to 1, such as 0.9999 ** 10")
    impl = chosen("ema", weights[0]) if weights else "ref"
    if impl == "ref":
        ema_ref_(averages, weights, decay, found_inf)
    else:
        _run(weights, [], [], [], [], averages, found_inf, 1, 0.0, (0.0, 0.0), 0.0, False, decay, impl)


def adam_hold_ema_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    norms: Sequence[Tensor | None] | None = None,
    per_channel: bool = False,
    averages: Sequence[Tensor] | None = None,
    decay: float = 1.0,
    found_inf: Tensor | None = None,
) -> None:
    """One Adam step, then the hold of norms, then the average, over all weights, in place.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: fp32 tensors, one of each to a weight. Grads are only read.
        step: 1 at the first update (bias correction).
        lr, betas, eps: Adam's.
        norms: per weight its norm at step 0 (from `weight_norms`), or None where the weight is free; None: all free.
        per_channel: as in `hold_norms_`.
        averages: the exponential averages, or None on the steps without an update.
        decay: of this update of the averages (decay ** k when it runs every k steps).
        found_inf: one fp32 number on the device of the weights; where it is not zero, nothing changes, even if
            gradients are not finite (as in PyTorch's fused optimizers). None: the step is taken.

    Raises:
        ValueError: tensors that do not pair up, or a step below 1.
    """
    _check_flag(found_inf, weights)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check(name, tensors, weights)
    _check("weights", weights, weights)
    if norms is not None:
        _check_norms(norms, weights, per_channel)
    if averages is not None:
        _check("averages", averages, weights)
    if step < 1:
        raise ValueError(f"step is {step}; expected 1 at the first update")
    impl = chosen("adam_hold_ema", weights[0]) if weights else "ref"
    if impl == "ref":
        adam_hold_ema_ref_(
            weights, grads, exp_avgs, exp_avg_sqs, step=step, lr=lr, betas=betas, eps=eps,
            norms=norms, per_channel=per_channel, averages=averages, decay=decay, found_inf=found_inf,
        )  # fmt: skip
        return
    given = [None] * len(weights) if norms is None else norms
    for wanted in (True, False):
        group = [i for i, norm in enumerate(given) if (norm is not None) == wanted]
        _run(
            [weights[i] for i in group], [grads[i] for i in group], [exp_avgs[i] for i in group],
            [exp_avg_sqs[i] for i in group], [n for n in given if n is not None] if wanted else [],
            [] if averages is None else [averages[i] for i in group], found_inf, step, lr, betas, eps, per_channel,
            decay, impl,
        )  # fmt: skip


def aot_signatures() -> list[Signature]:
    """The three forms of the update, for compilation without a card."""
    types = {"p_table": "*i64", "p_chunks": "*i32", "p_first": "*i32", "p_squares": "*fp32", "p_scales": "*fp32"}
    types["p_found_inf"] = "*fp32"
    types |= {name: "fp32" for name in ("lr_step", "beta1", "beta2", "scale2", "eps", "ema_weight")}
    signatures: list[Signature] = []

    def add(kernel: object, constexprs: dict[str, object], label: str) -> None:
        signatures.append((kernel, signature_of(kernel, types, constexprs), constexprs, 4, 3, label))

    flags: dict[str, object] = {"ALIGNED": True, "BLOCK": BLOCK}
    for hold in ("none", "whole", "rows"):
        options = {"ADAM": True, "HOLD": hold, "EMA": True, "FLAG": True, **flags}
        add(update_chunks_kernel, options, f"adam hold={hold} ema")
    add(update_chunks_kernel, {"ADAM": False, "HOLD": "none", "EMA": True, "FLAG": True, **flags}, "ema")
    add(update_chunks_kernel, {"ADAM": False, "HOLD": "whole", "EMA": False, "FLAG": False, **flags}, "hold=whole")
    add(update_chunks_kernel, {"ADAM": False, "HOLD": "rows", "EMA": False, "FLAG": False, **flags}, "hold=rows")
    add(hold_scales_kernel, {"BLOCK": 256}, "")
    add(rescale_chunks_kernel, {"EMA": True, "FLAG": True, **flags}, "ema")
    return signatures
