"""Joint attention over latent and image tokens: o = softmax(scale * q k^T) v, every token attending to all.

The scale is the caller's: 8 / d under muP, not 1 / sqrt(d) (as in the released code).  q, k and v are views of one
buffer, [B, L, H, d] with contiguous channels; no backend gets a copy of them, and o is written as [B, L, H * d].

Legend: B images, L tokens (keys), Lq tokens whose output is wanted (queries), H heads, d channels of a head.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._dispatch import KernelUnavailableError, asked, constant_result, why_no_triton
from ._library import wants_grad
from .attention_quantized import FORMATS, attention_quantized
from .attention_triton import MAX_HEAD_DIM, aot_signatures, attention_triton
from .fp8 import why_no_fp8

__all__ = ["BACKENDS", "aot_signatures", "attention_backend", "joint_attention", "joint_attention_ref", "why_not"]

BACKENDS = ("auto", "fa3", "fa2", "xformers", "cudnn", "flash", "efficient", "math", "sdpa", "triton", *FORMATS)

_PACKAGES = {
    name: find_spec(name) is not None for name in ("flash_attn_interface", "flash_attn", "xformers")
}
_HAS_CUDNN = torch.backends.cudnn.is_available()  # asked here since torch.compile cannot trace the question
_HALF = (torch.float16, torch.bfloat16)
_SDP = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_failed: set[str] = set()  # backends that `auto` took once, and that then could not compute here


def readable(x: Tensor) -> Tensor:
    """x where libraries can read it: their kernels take 16 bytes at a time without asking whether rows start there.

    A row at another place ends in a misaligned access, which ends the process's use of the card.  Views of the joint
    buffers of a model are aligned and come back as they are.
    """
    if torch.compiler.is_compiling() or not x.is_cuda:  # a compiler sees to it by itself, and cannot trace the question
        return x
    return x if is_aligned(x) else x.contiguous()


def is_aligned(x: Tensor) -> bool:
    """Whether the last axis is contiguous and every row of it starts on 16 bytes (storages do)."""
    step = 16 // x.element_size()
    starts = [x.storage_offset(), *(s for n, s in zip(x.shape[:-1], x.stride()) if n > 1)]
    return (x.shape[-1] <= 1 or x.stride(-1) == 1) and all(start % step == 0 for start in starts)


def joint_attention_ref(
    q: Tensor,  # [B, Lq, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
) -> Tensor:  # [B, Lq, H, d], contiguous
    """`joint_attention` in plain PyTorch."""
    return _sdpa(q, k, v, scale).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o in the order that PyTorch writes it; its CUDA kernels write it in q's."""
    q, k, v = (readable(t) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return o.transpose(1, 2)


@constant_result
def _capability(index: int | None) -> int:
    """Major compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)[0]


def why_not(backend: str, q: Tensor) -> str | None:
    """The reason why `backend` cannot take these tensors on this machine, or None when it can."""
    d = q.shape[-1]
    if backend == "triton":
        if not q.is_cuda and why_no_triton() is None and torch.cuda.is_available():
            return "the tensors are on the CPU"
        if d > MAX_HEAD_DIM or q.dtype not in (*_HALF, torch.float32):
            return f"it takes fp32, bf16 and fp16 heads of at most {MAX_HEAD_DIM} channels, not {q.dtype} of {d}"
        return why_no_triton()
    if backend in FORMATS:
        if d > MAX_HEAD_DIM:
            return f"it takes heads of at most {MAX_HEAD_DIM} channels, not {d}"
        return why_no_fp8(q.device) if q.is_cuda and asked("attention_fp8") != "ref" else None
    if backend in ("sdpa", "math"):
        return None
    if backend == "flash" and not q.is_cuda:
        return None
    packages = {"fa3": "flash_attn_interface", "fa2": "flash_attn", "xformers": "xformers"}
    if backend in packages and not _PACKAGES[packages[backend]]:
        return f"the package {packages[backend]} is not installed"
    if not q.is_cuda:
        return "it runs on CUDA devices only, and the tensors are on the CPU"
    major = _capability(q.device.index)
    if q.numel() == 0:
        return "the batch is empty"
    if backend == "efficient":
        return None if q.dtype in (*_HALF, torch.float32) else f"it does not take {q.dtype}"
    if q.dtype not in _HALF and not (backend == "xformers" and q.dtype == torch.float32):
        return f"it takes bf16 and fp16, not {q.dtype}"
    if d % 8 or d > 256:
        return f"it takes heads of at most 256 channels in multiples of 8, not {d}"
    if backend == "fa3" and major != 9:
        return f"FlashAttention-3 needs compute capability 9 (Hopper); this device has {major}"
    if backend == "cudnn" and not (_HAS_CUDNN and major >= 8):
        return "it needs cuDNN and compute capability 8 or newer"
    if backend in ("fa2", "flash") and major < 8:
        return f"FlashAttention-2 needs compute capability 8 or newer; this device has {major}"
    return None


def _automatic(q: Tensor, keys: int, gradient: bool) -> str:
    """The backend `auto` takes: by device generation, what is installed, dtype, shape, and need of a gradient."""
    if not q.is_cuda:
        return "sdpa"
    if q.numel() == 0:
        return "math"
    major = _capability(q.device.index)
    order = ["fa3", "cudnn", "fa2"] if major == 9 else ["cudnn", "fa2"] if major > 9 else ["fa2"]
    order += ["flash", "xformers", "efficient"]
    deterministic = torch.are_deterministic_algorithms_enabled()
    if gradient and deterministic:
        # The others add up the query gradient with atomics.
        order = ["fa2", "flash"]
    elif deterministic or keys == 1:
        # PyTorch refuses cuDNN then, forward passes included.
        order = [backend for backend in order if backend != "cudnn"]
    for backend in order:
        if backend not in _failed and why_not(backend, q) is None:
            return backend
    return "math"


def attention_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> str:
    """Name of the backend that `joint_attention` runs for these tensors; "sdpa" is PyTorch's own choice.

    Raises:
        ValueError: no such backend.
        KernelUnavailableError: the backend was named and cannot run here; the message says why.
    """
    if backend not in BACKENDS:
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no attention backend is called {backend!r}{hint} (there are {', '.join(BACKENDS)})")
    if backend == "auto":
        choice = asked("joint_attention")
        if choice == "triton" and why_not("triton", q) is None:
            return "triton"
        return "sdpa" if choice == "ref" else _automatic(q, k.shape[1], wants_grad(q, k, v))
    reason = why_not(backend, q)
    if reason is not None:
        raise KernelUnavailableError(f"attention backend {backend!r} was asked for, but {reason}")
    return backend


def joint_attention(
    q: Tensor,  # [B, Lq, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    scale: float,
    *,
    backend: str = "auto",
    logit_bound: float | None = None,
    contiguous: bool = True,
) -> Tensor:  # [B, Lq, H, d]
    """softmax(scale * q k^T) v for every image and head.

    Args:
        q: [B, Lq, H, d]; Lq = L, or fewer queries where only some tokens' outputs are read (the last block).
        k, v: [B, L, H, d]; one dtype, contiguous channels; views such as ``qkv.unbind(2)`` are taken as they are.
        scale: factor of the logits, positive; 8 / d in FlowMo.
        backend: "auto" chooses by device, installed packages, dtype, shape and need of a gradient, and where cuDNN
            fails it goes on without, with a warning; or "fa3", "fa2", "xformers", "cudnn", "flash", "efficient",
            "math", "sdpa" (PyTorch chooses) or "triton" (the kernels of this package; not part of "auto").  "fp8"
            and "int8" round to 8 bits (`attention_quantized`): never part of "auto", without a gradient, and on a CPU
            the reference arithmetic.  `attention_backend` tells which one runs.
        logit_bound: a number no |scale * q k| exceeds, if one is known: after query-key RMSNorm with gains g_q, g_k
            and scale 8 / d it is 8 * max|g_q| * max|g_k|.  "triton" drops the running maximum where it is small, and
            without a gradient may then split the last rows over the keys (`attention_waves`).
        contiguous: whether o must be; else it comes as the backend writes it, which saves a copy where the tokens of
            several images lie side by side (most write o in the order of q).

    Returns:
        o [B, Lq, H, d], contiguous, so that ``o.flatten(2)`` is a view, or as `contiguous` says.

    Raises:
        ValueError: shapes or dtypes differ, scale is not positive, or no such backend.
        KernelUnavailableError: the backend was named and cannot run here; the message says why.
    """
    fits = q.dim() == 4 and k.shape == v.shape and q.shape[:1] + q.shape[2:] == k.shape[:1] + k.shape[2:]
    if not fits or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{n} {tuple(t.shape)} {t.dtype}" for n, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{shapes}; expected q [B, Lq, H, d], k and v [B, L, H, d] and one dtype")
    if not scale > 0:
        raise ValueError(f"scale = {scale}; expected a positive factor such as 8 / {q.shape[-1]}")
    name = attention_backend(q, k, v, backend=backend)
    try:
        o = _run(name, q, k, v, scale, logit_bound)
    except RuntimeError as error:
        # cuDNN compiles its kernels in the first call, and on some machines lacks what it needs for that.
        refused = any(words in str(error) for words in ("cuDNN", "CUDNN", "No available kernel"))
        if backend != "auto" or name != "cudnn" or not refused:
            raise
        _failed.add(name)
        reason = str(error).splitlines()[0]
        warnings.warn(f"cuDNN attention fails here, another backend is taken from now on ({reason})", stacklevel=2)
        return joint_attention(q, k, v, scale, logit_bound=logit_bound, contiguous=contiguous)
    return o.contiguous() if contiguous else o


def _run(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, logit_bound: float | None) -> Tensor:
    """o in whatever order the backend writes it."""
    if name == "triton":
        return attention_triton(q, k, v, scale, logit_bound)
    if name in FORMATS:
        return attention_quantized(q, k, v, scale, format=name)
    if name in ("fa3", "fa2", "xformers"):
        q, k, v = (readable(t) for t in (q, k, v))
    if name == "fa3":
        from flash_attn_interface import flash_attn_func as flash_attention_3

        o = flash_attention_3(q, k, v, softmax_scale=scale)
        return o[0] if isinstance(o, tuple) else o
    if name == "fa2":
        from flash_attn import flash_attn_func as flash_attention_2

        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attention_2(q, k, v, softmax_scale=scale, deterministic=deterministic)
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale)
    with contextlib.nullcontext() if name == "sdpa" else sdpa_kernel(_SDP[name]):
        return _sdpa(q, k, v, scale)
