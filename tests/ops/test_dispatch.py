from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import flowmo_kernels
from flowmo_kernels import KernelUnavailableError, _dispatch, _library, chosen, describe, use
from flowmo_kernels._triton import HAS_TRITON, INTERPRETED, cast, jit, tl

from .oracle import random

PACKAGE = Path(flowmo_kernels.__file__).parent
CPU = torch.zeros(1)
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA card")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds this package."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLOWMO_KERNELS")}
    variables |= {"PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def test_kernels_never_import_the_model() -> None:
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            assert name.partition(".")[0] not in ("flowmo", "bench", "tests"), f"{path.name} imports {name}"


def test_imports_without_triton() -> None:
    done = python("""
import importlib.util, sys
from importlib.machinery import PathFinder
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] == "triton" else find(name, *a)
sys.meta_path.insert(0, Blocker())
import torch, flowmo_kernels as fk
assert "triton" not in sys.modules
x = torch.randn(1, 3, 8, requires_grad=True)
fk.norm_modulate(x).sum().backward()
fk.joint_attention(x[None], x[None], x[None], 1.0)
print(fk.describe())
try:
    fk.use("triton").__enter__()
except fk.KernelUnavailableError as error:
    print(error)
""")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton was asked for, but the package triton is not installed" in done.stdout


def test_cpu_tensors_take_the_reference() -> None:
    for op in _dispatch.OPS:
        for implementation in ("auto", "ref"):
            with use(implementation):
                assert chosen(op, CPU) == "ref"


@pytest.mark.skipif(not INTERPRETED, reason="says what happens where Triton is interpreted")
def test_interpreted_triton_must_be_asked_for() -> None:
    with use("triton"):
        for op, implementations in _dispatch.OPS.items():
            assert chosen(op, CPU) == ("triton" if "triton" in implementations else "ref")
        with use(norm_modulate="ref"):
            assert chosen("norm_modulate", CPU) == "ref" and chosen("gate_residual", CPU) == "triton"
        assert chosen("norm_modulate", CPU) == "triton"
        with use("auto"):
            assert chosen("norm_modulate", CPU) == "ref"
    assert chosen("norm_modulate", CPU) == "ref"


def small_calls() -> dict[str, Callable[[], Any]]:
    """A call of every op that has kernels, with whatever of it makes one run; gives what it made or changed."""
    fk = flowmo_kernels
    x, w, z = random(1, 4, 32), random(12, 32), random(1, 4, 12)
    qkv, gains, turn = random(1, 4, 3, 2, 16), random(2, 16), (torch.ones(4, 8), torch.zeros(4, 8))
    tokens, norms = torch.arange(5)[None], fk.weight_norms([3 * w])

    def changed(update: Callable[..., None], **options: Any) -> list[Tensor]:
        tensors = [[random(12, 32, seed=i).abs()] for i in range(4 if options else 1)]
        update(*tensors, **options)
        return [t for (t,) in tensors]

    def slopes() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, w, w[:, 0])]
        return torch.autograd.grad(fk.linear_gelu(*leaves).sum(), leaves)

    return {
        "norm_modulate": lambda: fk.norm_modulate(x),
        "gate_residual": lambda: fk.gate_residual(x, x.flip(2)),
        "gate_residual_norm_modulate": lambda: fk.gate_residual_norm_modulate(x, x.flip(2)),
        "qk_norm_rope": lambda: fk.qk_norm_rope(qkv, gains, gains, turn),
        "joint_attention": lambda: fk.joint_attention(*qkv.unbind(2), 0.5),
        "linear_gelu": slopes,
        "norm_modulate_fp8": lambda: fk.norm_modulate_fp8(x),
        "gate_residual_norm_modulate_fp8": lambda: fk.gate_residual_norm_modulate_fp8(x, x.flip(2)),
        "gelu_fp8": lambda: fk.gelu_fp8(x),
        "attention_fp8": lambda: fk.attention_quantized(*qkv.unbind(2), 0.5),
        "lfq": lambda: fk.lfq(x, 8),
        "pack_tokens": lambda: fk.pack_tokens(tokens, 9),
        "unpack_tokens": lambda: fk.unpack_tokens(fk.pack_tokens(tokens, 9), 9, 5),
        "euler_step": lambda: fk.euler_step(z, z.flip(2), dt=0.1),
        "step_boundary": lambda: fk.step_boundary(x, x[:, 0], x[:, 1], w, w[:, 0], z, w.T, w[0], dt=0.1),
        "hold_norms": lambda: changed(lambda v: fk.hold_norms_(v, norms)),
        "ema": lambda: changed(lambda v: fk.ema_(v, [w], 0.75)),
        "adam_hold_ema": lambda: changed(fk.adam_hold_ema_, step=2, lr=0.1),
    }


@pytest.mark.skipif(not INTERPRETED or _dispatch.why_no_triton() is not None, reason="of interpreted kernels")
def test_what_is_chosen_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing implementations says nothing where one runs in the place of the other, or with other arguments."""
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []

    def count(executor: Any, *arguments: Any, **keywords: Any) -> None:
        launched.append(executor.fn.__name__)
        launch(executor, *arguments, **keywords)

    launch = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", count)
    calls = small_calls()
    assert set(calls) == {op for op, implementations in _dispatch.OPS.items() if implementations}
    for op, call in calls.items():
        made = {}
        for choice in ("ref", "auto", "triton"):
            launched.clear()
            with use(choice):
                made[choice] = tree_leaves(call())
            assert bool(launched) == (choice == "triton"), f"{op}, {choice}: {launched}"
        for got, want in zip(made["triton"], made["ref"], strict=True):
            # Sums of at most 32 numbers of a few units; 8 bits on either side of a tie.
            ties = 2**-3 if op.endswith("fp8") else 0
            off = (got.float() - want.float()).abs()
            assert (off <= 1e-4 + ties * want.float().abs()).all(), op


def test_context_is_left_on_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), use("ref"):
        raise RuntimeError("inside")
    assert "kernels: auto" in describe()


def test_cuda_tensors_take_triton_then_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    x: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(_dispatch, "_has_cuda", lambda: True)
    for has_triton, order in ((True, ("triton", "cuda")), (False, ("cuda",))):
        monkeypatch.setattr(_dispatch, "HAS_TRITON", has_triton)
        for op, implementations in _dispatch.OPS.items():
            there = [impl for impl in order if impl in implementations]
            assert chosen(op, x) == (there[0] if there and op not in _dispatch.NOT_IN_AUTO else "ref")
    with use("ref"):
        assert chosen("norm_modulate", x) == "ref"
    monkeypatch.setattr(_dispatch, "_check", lambda *choices: None)  # as if all could run here
    with use("triton", lfq="cuda"):
        assert [chosen(op, x) for op in ("joint_attention", "lfq", "linear_fp8")] == ["triton", "cuda", "ref"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_cpu_tensors_beside_a_card_take_the_reference() -> None:
    with use("triton"):
        assert chosen("norm_modulate", CPU) == "ref"


@no_card
def test_missing_implementations_are_errors_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelUnavailableError, match="cuda was asked for, but "), use("cuda"):
        pass
    with pytest.raises(KernelUnavailableError, match="lfq: cuda was asked for, but "), use(lfq="cuda"):
        pass
    with pytest.raises(KernelUnavailableError, match="linear_gelu has no cuda implementation"), use(linear_gelu="cuda"):
        pass
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(KernelUnavailableError, match="no CUDA device, and TRITON_INTERPRET=1 was not"), use("triton"):
        pass


@pytest.mark.skipif(not INTERPRETED, reason="of interpreted kernels")
@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.0+x", "2.5.2", True)],
)
def test_interpreter_that_numpy_has_left_behind(
    monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, works: bool
) -> None:
    monkeypatch.setattr(_dispatch, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr("numpy.__version__", numpy)
    why = _dispatch.why_no_interpreter()
    assert why is None if works else why is not None and triton in why and "numpy<2.4" in why


def test_ops_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, so that must be the one of the first tensor, in a list too."""
    current = [0]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_library, "Tensor", SimpleNamespace)
    first, second = (SimpleNamespace(device=torch.device("cuda", i)) for i in (0, 1))
    run = _library.on_device_of_inputs(lambda *args: current[0])
    assert [run(first, 3), run(None, second, first), run([], [second], "triton"), current[0]] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "python3-dev.*FLOWMO_KERNELS=ref"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "gcc.*python3-dev.*FLOWMO_KERNELS=ref"),
        (RuntimeError("CUDA error: an illegal memory access"), "illegal memory access$"),
    ],
)
def test_a_machine_without_a_compiler_is_told_what_triton_needs(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_library, "Tensor", SimpleNamespace)
    with pytest.raises(RuntimeError, match=told) as raised:
        _library.on_device_of_inputs(fails)(SimpleNamespace(device=torch.device("cuda", 0)))
    assert isinstance(raised.value, KernelUnavailableError) == ("python3-dev" in told)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA cards")
def test_second_card() -> None:
    x = random(2, 3, 64, device="cuda:1")
    for implementation in ("triton", "cuda"):
        if (_dispatch.why_no_triton if implementation == "triton" else _dispatch.why_no_cuda)() is None:
            with use(implementation):
                got = flowmo_kernels.norm_modulate(x)
            torch.testing.assert_close(got, flowmo_kernels.norm_modulate_ref(x))


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="did you mean 'norm_modulate'"), use(norm_modulat="ref"):
        pass
    with pytest.raises(ValueError, match="'tritn' is not one of auto, ref, triton, cuda"), use("tritn"):
        pass


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _dispatch.parse("auto, lfq=cuda") == ("auto", {"lfq": "cuda"})
    assert _dispatch.parse("") == ("auto", {})
    code = "import torch, flowmo_kernels as fk; x = torch.zeros(1); print(fk.chosen('lfq', x), fk.chosen('ema', x))"
    done = python(code, FLOWMO_KERNELS="triton,ema=ref", TRITON_INTERPRET="1")
    assert done.stdout.split() == ["triton", "ref"], done.stderr
    # A bad variable is an error at the first use of an op, every time.
    monkeypatch.setattr(_dispatch, "_default", "trition")
    monkeypatch.setattr(_dispatch, "_checked", False)
    for _ in range(2):
        with pytest.raises(ValueError, match="'trition' is not one of auto"):
            chosen("lfq", CPU)


@no_card
def test_description_is_one_line_with_reasons() -> None:
    with use(lfq="ref"):
        text = describe()
    assert "\n" not in text and text.startswith("kernels: auto,lfq=ref on CPU") and "no cuda: " in text


@jit
def _cast_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, cast(tl.load(p_x + o), p_y.dtype.element_ty))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_cast_rounds_to_nearest_even(dtype: torch.dtype, device: str) -> None:
    """Numbers on both sides of ties, ties themselves, subnormals, zeros and NaN, as PyTorch rounds them."""
    if device == "cuda" and dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite() & (codes.abs() < 448)]
    steps = torch.linspace(0, 1, 17)[:, None] * 2.0**-3
    x = torch.cat([(codes * (1 + steps)).flatten(), random(3900), torch.tensor([0.0, -0.0, 2**-9, 2**-10])])
    x = torch.cat([x.clamp(-448, 448), torch.tensor([torch.nan])])
    x = torch.cat([x, torch.zeros(8192 - x.numel())]).to(device)
    y = torch.empty(8192, dtype=dtype, device=device)
    _cast_kernel[(1,)](x, y, N=8192)
    assert torch.allclose(y.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_import_leaves_the_tracer_alone() -> None:
    """torch._dynamo doubles the time of the import; the mark that stands in for its decorator is the decorator's."""
    done = python("import sys, flowmo_kernels; print('torch._dynamo' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr

    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(_dispatch.constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
