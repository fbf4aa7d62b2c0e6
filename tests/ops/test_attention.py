from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowmo_kernels import KernelUnavailableError, attention_backend, joint_attention, joint_attention_ref, use
from flowmo_kernels import attention as module
from flowmo_kernels._heads import check_reach

from .oracle import compare, compiles, judge, random, sliced

triton_module = import_module("flowmo_kernels.attention_triton")
backward_module = import_module("flowmo_kernels.attention_backward")
Shape = tuple[int, int, int, int]
DTYPES = [torch.float32, torch.bfloat16]
# B, L, H, d: one token, tails in every tile, 64 + 32 channels, whole tiles, no image
SHAPES = [(1, 1, 1, 2), (2, 19, 2, 12), (1, 50, 1, 96), (1, 64, 1, 64), (0, 4, 2, 8)]
REAL = [(1, 4352, 12, 96), (1, 4352, 12, 64), (1, 4351, 2, 96)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 and 16 rows, so that short sequences take several of them."""
    forward, backward = triton_module.blocks, backward_module.blocks
    monkeypatch.setattr(triton_module, "blocks", lambda *a: forward(*a)._replace(m=32, n=16, warps=4, stages=1))
    tiles = {"dkdv": (16, 32, 4, 1), "dq": (32, 16, 4, 1)}
    monkeypatch.setattr(backward_module, "blocks", lambda *a: backward(*a)._replace(**tiles))


def make(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v as views of one buffer, q and k of unit RMS in each head as the query-key norm leaves them."""
    b, length, h, d = shape
    qkv = random(b, length, 3, h, d, device=device)
    qkv[:, :, :2] *= qkv[:, :, :2].square().mean(-1, keepdim=True).rsqrt()
    return list(sliced(qkv.to(dtype), margin=2).unbind(2))


def run(shape: Shape, dtype: torch.dtype, bound: float | None, device: str = "cpu") -> None:
    scale = 8 / shape[3]
    judge(
        lambda *a: joint_attention(*a, scale, backend="triton", logit_bound=bound),
        lambda *a: joint_attention_ref(*a, scale),
        make(shape, dtype, device),
        "auto",
        terms=shape[1] + shape[3],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [None, 8.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_tiles")
def test_triton_against_oracle(shape: Shape, bound: float | None, dtype: torch.dtype, device: str) -> None:
    run(shape, dtype, bound, device)


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [None, 8.0])
@pytest.mark.parametrize("shape", REAL)
def test_triton_real_shapes(shape: Shape, bound: float | None) -> None:
    run(shape, torch.bfloat16, bound, "cuda")


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 70), st.integers(1, 2), st.integers(1, 100), st.data())
def test_triton_random_shapes(b: int, length: int, h: int, d: int, data: st.DataObject) -> None:
    bound, dtype = data.draw(st.sampled_from([None, 8.0])), data.draw(st.sampled_from(DTYPES))
    run((b, length, h, d), dtype, bound, "cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [slice(0, 7), slice(11, None)])
@pytest.mark.usefixtures("small_tiles")
def test_fewer_queries_than_keys(queries: slice, dtype: torch.dtype, device: str) -> None:
    """The last block reads the output of one stream only."""
    judge(
        lambda q, k, v: joint_attention(q[:, queries], k, v, 8 / 24, backend="triton"),
        lambda q, k, v: joint_attention_ref(q[:, queries], k, v, 8 / 24),
        make((2, 45, 2, 24), dtype, device),
        "auto",
        terms=70,
    )


@pytest.mark.usefixtures("small_tiles")
def test_large_logits(device: str) -> None:
    """Logits of hundreds need the running maximum; a bound that large is therefore not acted upon."""
    q, k, v = make((1, 40, 1, 16), torch.float32, device)
    q = q * 40
    outputs = [joint_attention(q, k, v, 0.5, backend="triton", logit_bound=b) for b in (None, 320.0)]
    oracle = joint_attention_ref(q.double(), k.double(), v.double(), 0.5)
    compare("large logits", outputs[0], joint_attention_ref(q, k, v, 0.5), oracle, 2.0, terms=64)
    assert torch.equal(*outputs)
    assert not triton_module.is_bounded(8.0, torch.float16)


@pytest.mark.usefixtures("small_tiles")
def test_logits_far_below_zero(device: str) -> None:
    """Keys beyond the end have a logit of zero there, so far above those that count that its exponential overflows."""
    near = 5 + 0.02 * random(1, 19, 1, 16, device=device)
    leaves = [t.requires_grad_() for t in (near, -near.flip(1), random(1, 19, 1, 16, device=device, seed=1))]
    o = joint_attention(*leaves, 0.5, backend="triton")
    exact = joint_attention_ref(*(t.detach().double() for t in leaves), 0.5)
    # Logits of about -200 are known to four roundings of them, and so are the weights relatively.
    assert ((o - exact).abs() <= 4 * 2**-24 * 200 * leaves[2].abs().max()).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.square().sum(), leaves))


@pytest.mark.usefixtures("small_tiles")
def test_triton_gradient_with_strides(device: str) -> None:
    """An upstream gradient of one number, with stride 0 along every axis."""
    qkv = torch.stack(make((1, 20, 2, 16), torch.float32, device), 2)
    grads = []
    for backend in ("triton", "sdpa"):
        leaf = qkv.detach().requires_grad_()
        y = joint_attention(*leaf.unbind(2), 0.5, backend=backend)
        grads.append(torch.autograd.grad(y.sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=2**-23 * 36**0.5 * grads[1].abs().max().item())


def test_output_layout(device: str) -> None:
    q, k, v = make((2, 5, 3, 8), torch.float32, device)
    for backend in ("auto", "math", "sdpa", "triton"):
        o = joint_attention(q, k, v, 1.0, backend=backend)
        assert o.is_contiguous() and o.shape == q.shape


@pytest.mark.usefixtures("small_tiles")
def test_sequence_major_views_in_and_out(device: str) -> None:
    """As the engine calls it: no copy of o where the backend can write it in q's order; the gradient is the same."""
    images = make((2, 40, 2, 16), torch.float32, device)
    rows = [t.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in images]
    upstream = random(2, 40, 2, 16, device=device, seed=5)
    expected = joint_attention(*rows, 0.5, backend="sdpa")
    gradient = torch.autograd.grad(expected, rows, upstream)
    for backend in ("triton", "sdpa", "math"):
        o = joint_attention(*rows, 0.5, backend=backend, contiguous=False)
        torch.testing.assert_close(o, expected, rtol=0, atol=2**-23 * 56**0.5 * expected.abs().max().item())
        for got, want in zip(torch.autograd.grad(o, rows, upstream), gradient):
            torch.testing.assert_close(got, want, rtol=0, atol=2**-23 * 56**0.5 * want.abs().max().item())
        if backend == "triton":
            assert o.transpose(0, 1).is_contiguous()
        assert joint_attention(*rows, 0.5, backend=backend).is_contiguous()


def backends_here() -> list[str]:
    probe = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    sixteen = [b for b in module.BACKENDS if b not in module.FORMATS]
    return [b for b in sixteen if b == "auto" or module.why_not(b, probe) is None]


@pytest.mark.parametrize("backend", backends_here())
def test_every_backend_computes_the_same(backend: str, device: str) -> None:
    shape = (1, 33, 2, 64)
    judge(
        lambda *a: joint_attention(*a, 8 / 64, backend=backend),
        lambda *a: joint_attention_ref(*a, 8 / 64),
        make(shape, torch.bfloat16, device),
        "auto",
        terms=100,
    )


@pytest.mark.parametrize("backend", backends_here())
def test_every_backend_reads_the_views_of_the_engine(backend: str, device: str) -> None:
    """Images lie closer than tokens, and the last block asks for fewer queries: no library may mistake the strides."""
    buffer = random(70, 3, 3, 2, 96, device=device)
    buffer[:, :, :2] *= buffer[:, :, :2].square().mean(-1, keepdim=True).rsqrt()
    q, k, v = buffer.bfloat16().transpose(0, 1).unbind(2)
    for queries in (q, q[:, 6:], q[:, :6]):
        wide = [t.double().contiguous() for t in (queries, k, v)]
        exact, weight = (joint_attention_ref(*wide[:2], x, 8 / 96) for x in (wide[2], wide[2].abs()))
        o = joint_attention(queries, k, v, 8 / 96, backend=backend, contiguous=False)
        # Half a unit of bf16 for each p and for o, twice that for what libraries do to exponentials.
        assert o.shape == queries.shape and ((o.double() - exact).abs() <= 2**-7 * weight).all()


def test_says_which_backend_runs() -> None:
    q, k, v = make((1, 4, 1, 8), torch.float32)
    assert attention_backend(q, k, v) == "sdpa"
    assert attention_backend(q, k, v, backend="math") == "math"
    with use("ref"):
        assert attention_backend(q, k, v) == "sdpa"
    if not torch.cuda.is_available():
        with use(joint_attention="triton"):
            assert attention_backend(q, k, v) == "triton"


@pytest.mark.parametrize(
    ("major", "packages", "deterministic", "gradient", "keys", "chosen"),
    [
        (9, {"flash_attn_interface", "flash_attn"}, False, True, 64, "fa3"),
        (9, {"flash_attn"}, False, True, 64, "cudnn"),
        (9, {"flash_attn_interface", "flash_attn"}, True, True, 64, "fa2"),
        (9, {"flash_attn_interface"}, True, True, 64, "flash"),
        (9, set(), True, False, 64, "flash"),
        (9, set(), False, False, 1, "flash"),
        (10, {"flash_attn_interface"}, False, False, 64, "cudnn"),
        (8, {"flash_attn_interface", "flash_attn"}, False, False, 64, "fa2"),
        (8, {"xformers"}, False, False, 64, "flash"),
        (7, {"flash_attn", "xformers"}, False, False, 64, "xformers"),
        (7, set(), False, True, 64, "efficient"),
        (7, set(), True, True, 64, "math"),
    ],
)
def test_automatic_choice_by_generation_and_packages(
    monkeypatch: pytest.MonkeyPatch, major: int, packages: set[str], deterministic: bool, gradient: bool, keys: int,
    chosen: str,
) -> None:  # fmt: skip
    """Of the query-gradient, only FlashAttention-2 adds up without atomics; cuDNN is refused for a single key."""
    monkeypatch.setattr(module, "_capability", lambda index: major)
    monkeypatch.setattr(module, "_PACKAGES", {name: name in packages for name in module._PACKAGES})
    monkeypatch.setattr(module, "_HAS_CUDNN", True)
    torch.use_deterministic_algorithms(deterministic)  # the fixture of these tests turns it off again
    q: Any = SimpleNamespace(
        is_cuda=True, shape=(1, 64, 2, 64), dtype=torch.bfloat16, device=torch.device("cuda:0"), numel=lambda: 8192
    )
    assert module._automatic(q, keys, gradient) == chosen
    monkeypatch.setattr(module, "_failed", {chosen} - {"math"})
    assert module._automatic(q, keys, gradient) != chosen or chosen == "math"
    q.numel = lambda: 0
    assert module._automatic(q, keys, gradient) == "math"


def test_automatic_choice_goes_on_without_cudnn_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines where cuDNN finds no compiler for its kernels; a card that is out of memory is another thing."""
    run, message = module._run, "cuDNN Frontend error: no execution plans support the graph"

    def failing(name: str, *rest: object) -> Tensor:
        if name == "cudnn":
            raise RuntimeError(message)
        return run(name, *rest)

    monkeypatch.setattr(module, "_run", failing)
    monkeypatch.setattr(module, "_failed", set())
    monkeypatch.setattr(module, "_automatic", lambda *_: "sdpa" if "cudnn" in module._failed else "cudnn")
    q, k, v = (random(1, 4, 2, 8, dtype=torch.float32, device="cpu", seed=i) for i in range(3))
    with pytest.warns(UserWarning, match="another backend is taken from now on .*no execution plans"):
        assert torch.equal(joint_attention(q, k, v, 1.0), joint_attention_ref(q, k, v, 1.0))
    joint_attention(q, k, v, 1.0)  # without another try
    module._failed.clear()
    message = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        joint_attention(q, k, v, 1.0)
    assert not module._failed


@pytest.mark.gpu
def test_automatic_choice_on_a_card() -> None:
    half = make((1, 64, 2, 64), torch.bfloat16, "cuda")
    single = make((1, 64, 2, 64), torch.float32, "cuda")
    assert attention_backend(*half) in ("fa3", "cudnn", "fa2", "flash")
    assert attention_backend(*single) in ("efficient", "xformers")
    assert attention_backend(*make((1, 64, 2, 12), torch.float64, "cuda")) == "math"
    leaves = [t.detach().requires_grad_() for t in half]
    assert attention_backend(*leaves) in ("fa2", "flash")  # deterministic algorithms are asked for in these tests


@pytest.mark.gpu
def test_automatic_choice_where_cudnn_is_refused() -> None:
    """PyTorch refuses it for a single key, and where deterministic algorithms are an order rather than a wish."""
    one = make((1, 1, 2, 64), torch.bfloat16, "cuda")
    assert attention_backend(*one) != "cudnn" and joint_attention(*one, 0.5).isfinite().all()
    torch.use_deterministic_algorithms(True)  # the fixture of these tests turns it off again
    half = make((1, 64, 2, 64), torch.bfloat16, "cuda")
    assert attention_backend(*half) != "cudnn" and joint_attention(*half, 0.5).isfinite().all()


def test_rows_that_libraries_can_read(device: str) -> None:
    """A joint buffer's views start on 16 bytes; slices of channels and narrow heads do not: copied on a card."""
    buffer = torch.zeros(2, 7, 3, 2, 24, dtype=torch.bfloat16, device=device)
    for view in (*buffer.unbind(2), buffer[:, 3:, 1], buffer.transpose(0, 1)[:, :, 0]):
        assert module.is_aligned(view) and module.readable(view) is view
    narrow = torch.zeros(2, 7, 3, 2, 12, dtype=torch.bfloat16, device=device)
    for view in (buffer[:, :, 0, :, 1:17], buffer[:, :, 0, :, ::2], narrow[:, :, 0]):
        assert not module.is_aligned(view)
        assert module.readable(view).is_contiguous() == (device == "cuda")
    assert module.is_aligned(buffer.float()[..., 4:]) and not module.is_aligned(buffer.float()[..., 2:])


def test_missing_backends_are_errors_with_a_reason(device: str) -> None:
    q, k, v = make((1, 4, 1, 8), torch.float32)
    for backend, reason in (("cudnn", "CUDA devices only"), ("efficient", "CUDA devices only")):
        with pytest.raises(KernelUnavailableError, match=reason):
            joint_attention(q, k, v, 1.0, backend=backend)
    for backend, package in (("fa3", "flash_attn_interface"), ("fa2", "flash_attn"), ("xformers", "xformers")):
        if not module._PACKAGES[package]:
            with pytest.raises(KernelUnavailableError, match=f"{package} is not installed"):
                joint_attention(q, k, v, 1.0, backend=backend)
    with pytest.raises(KernelUnavailableError, match="at most 128 channels"):
        joint_attention(*make((1, 4, 1, 130), torch.float32, device), 1.0, backend="triton")


def test_bad_input() -> None:
    q, k, v = make((1, 4, 1, 8), torch.float32)
    with pytest.raises(ValueError, match="did you mean 'flash'"):
        joint_attention(q, k, v, 1.0, backend="flahs")
    with pytest.raises(ValueError, match=r"expected q \[B, Lq, H, d\], k and v \[B, L, H, d\] and one dtype"):
        joint_attention(q, k[:, :2], v, 1.0)
    with pytest.raises(ValueError, match="and one dtype"):
        joint_attention(q, k.bfloat16(), v, 1.0)
    with pytest.raises(ValueError, match="scale = 0"):
        joint_attention(q, k, v, 0.0)


@pytest.mark.parametrize(("stride", "fits"), [(2**30, False), (2**30 - 1, True)])
def test_rows_out_of_reach_of_32_bits_are_refused(stride: int, fits: bool) -> None:
    x = torch.empty(0).new_empty_strided((1, 2, 1, 64), (64, stride, 64, 1), device="meta")
    near = torch.empty(1, 3, 1, 64, device="meta")
    if fits:
        check_reach(near, x, near)
    else:
        with pytest.raises(ValueError, match=r"2 tokens span over 2\^31 elements"):
            check_reach(near, x, near)


def test_library_ops(device: str) -> None:
    q, k, v = make((1, 5, 2, 16), torch.float32, device)
    ops = torch.ops.flowmo_kernels
    torch.library.opcheck(ops.attention_triton.default, (q, k, v, 0.5, False))
    torch.library.opcheck(ops.attention_triton_inference.default, (q, k, v, 0.5, True))
    o, lse = ops.attention_triton(q, k, v, 0.5, False)
    torch.library.opcheck(ops.attention_triton_backward.default, (o.clone(), q, k, v, o, lse, 0.5))


@pytest.mark.parametrize("backend", ["auto", "math", "triton"])
def test_compiles(backend: str, device: str) -> None:
    inputs = [t.contiguous() for t in make((1, 5, 2, 16), torch.float32, device)]  # rows on 16 bytes, for libraries
    compiles(lambda *a: joint_attention(*a, 0.5, backend=backend, logit_bound=8.0), inputs, "auto")


@pytest.mark.gpu
def test_triton_same_bits_every_time() -> None:
    leaves = [t.detach().requires_grad_() for t in make(REAL[0], torch.bfloat16, "cuda")]
    runs = []
    for _ in range(2):
        y = joint_attention(*leaves, 8 / 96, backend="triton", logit_bound=8.0)
        runs.append(torch.autograd.grad(y.square().sum(), leaves))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
