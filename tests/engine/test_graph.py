"""The plans as CUDA graphs: on a card only, since there is nothing to capture elsewhere."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from flowmo import FlowMo
from flowmo.engine import StepCache, psnr_to_exact
from flowmo_kernels import KernelUnavailableError, use
from tests.engine.conftest import LO, inputs, make

pytestmark = pytest.mark.gpu


CACHE = {"cache": StepCache((1, 5, 11, 13, 24))}


@pytest.fixture
def model() -> FlowMo:
    return make(LO).cuda()


def on_card(model: FlowMo, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    codes, noise = inputs(model, batch, seed)
    return codes.cuda(), noise.cuda()


def same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Pictures of one computation in other orders: up to fp32 sums, or twice bf16's own distance to fp32.

    That is 1.2e-3 on average and 1.4e-2 at most on a CPU; a sampler without any attention is 24e-3 away on average.
    """
    error = (a - b).abs()
    if dtype == torch.float32:
        return bool(error.max() <= 1e-5)
    return bool(error.mean() <= 2.5e-3 and error.max() <= 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0}, {"solver": "ab2", "steps": 9}, {"tail_merge": 6}, CACHE, {"overlap": True}]
)
def test_graph_gives_the_eager_pictures(model, dtype, options):
    graph = model.decode_plan(3, dtype=dtype, **options)
    eager = model.decode_plan(3, dtype=dtype, graph=False, **options)
    assert graph.captured and not eager.captured
    for seed in range(3):  # every replay reads its own inputs
        codes, noise = on_card(model, 3, seed)
        # The same kernels on the same numbers; attention may pick another plan inside a capture: rounding of bf16.
        assert same(graph(codes, noise), eager(codes, noise), dtype)


def test_bf16_is_near_fp32(model):
    """Other libraries' kernels than in fp32; the options that change the picture compare bf16 with bf16."""
    codes, noise = on_card(model, 3)
    exact = model.decode_plan(3, dtype=torch.float32)(codes, noise)
    assert same(model.decode_plan(3, dtype=torch.bfloat16)(codes, noise), exact, torch.bfloat16)


def test_fp32_graph_is_the_plain_sampler(model):
    codes, noise = on_card(model, 2)
    plain = model.decode(codes, noise=noise, plan=False)
    # fp32 matrix products of cuBLAS and of the fused boundary differ in order, and the boundary may round to TF32's
    # eleven bits where the caller allows that; by default it does not.
    assert (model.decode_plan(2, dtype=torch.float32)(codes, noise) - plain).abs().max() <= 1e-3


def test_model_made_on_the_card():
    """Under a default device everything lies there, the rotary tables included, which are computed on the CPU."""
    with torch.device("cuda"):
        model = FlowMo(LO)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    for table, expected in zip(model.decoder.buffers(), FlowMo(LO).decoder.buffers()):
        assert torch.equal(table.cpu(), expected)
    assert model.decode(*(t.cuda() for t in inputs(model, 1)[:1]), steps=1).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", [False, True])
def test_two_streams_give_the_pictures_of_one(model, dtype, graph):
    """The same kernels in another order: a missing join shows as a difference in one of many runs."""
    one = model.decode_plan(2, dtype=dtype, graph=graph)
    two = model.decode_plan(2, dtype=dtype, graph=graph, overlap=True)
    assert two is not one and two.captured == graph
    for seed in range(20):
        codes, noise = on_card(model, 2, seed)
        assert same(two(codes, noise), one(codes, noise), dtype)
    images = on_card(model, 2)[1].clamp(-1, 1)
    codes = [model.encode_plan(2, dtype=torch.float32, graph=graph, overlap=o)(images) for o in (False, True)]
    assert torch.equal(*codes)


def test_pictures_of_earlier_calls_stay(model):
    plan = model.decode_plan(2)
    first_inputs, second_inputs = on_card(model, 2, 0), on_card(model, 2, 1)
    first = plan(*first_inputs)
    kept = first.clone()
    second = plan(*second_inputs)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert torch.equal(plan(*first_inputs), kept)


def test_decode_captures_at_the_second_call(model):
    codes, noise = on_card(model, 2)
    first = model.decode(codes, noise=noise)
    plan = next(iter(model.engine._plans.values()))
    assert not plan.captured
    second = model.decode(codes, noise=noise)
    assert plan.captured
    assert (first - second).abs().max() <= 1e-5
    # A smaller batch takes the captured plan, padded, instead of capturing its own.
    third = model.decode(codes[:1], noise=noise[:1])
    assert model.engine.built == 1
    assert (third - first[:1]).abs().max() <= 1e-5


def test_changed_weights_are_captured_again(model):
    codes, noise = on_card(model, 2)
    plan = model.decode_plan(2, dtype=torch.float32)
    before = plan(codes, noise)
    with torch.no_grad():
        model.decoder.img_in.weight.mul_(1.5)
    after = plan(codes, noise)
    assert (after - before).abs().max() > 1e-2
    assert (after - model.decode(codes, noise=noise, plan=False)).abs().max() <= 1e-3
    assert (plan(codes, noise) - after).abs().max() <= 1e-5 and plan.captured


def test_hundred_decodes_do_not_grow(model):
    codes, noise = on_card(model, 6)

    def decode(times: int) -> int:
        for i in range(times):
            batch = 1 + i % 6
            model.decode(codes[:batch], noise=noise[:batch], steps=1 + i % 2)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = decode(24)
    assert decode(108) <= before


def test_inside_a_capture_of_the_caller(model):
    codes, noise = on_card(model, 1)
    plan = model.decode_plan(1, graph=False, steps=3)
    expected = plan(codes, noise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(codes, noise)
    graph.replay()
    assert same(out, expected, plan.dtype)


def test_encode_inside_a_capture_of_the_caller(model):
    """The range of the pictures cannot be looked at while a graph is recorded."""
    images = on_card(model, 1)[1].clamp(-1, 1)
    expected = model.encode(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_plan, by_modules = model.encode(images), model.encode(images, plan=False)
    graph.replay()
    assert torch.equal(by_plan, expected)
    assert (by_modules != expected).float().mean() < 1e-3  # latents within rounding of zero


def test_no_upload_or_synchronization_in_a_call(model):
    codes, noise = on_card(model, 2)
    plan = model.decode_plan(2, graph=False, steps=5)
    plan(codes, noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(codes, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp8(model):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8 matrix units")
    codes, noise = on_card(model, 2)
    psnr = psnr_to_exact(model, codes, noise, fp8=True)
    # 51.9 to 53.1 dB in the reference arithmetic; pictures without attention have 34.
    assert ((psnr > 50) & torch.isfinite(psnr)).all()


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_attention_in_eight_bits(model, format):
    codes, noise = on_card(model, 2)
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(KernelUnavailableError, match="needs compute capability 8"):
            model.decode_plan(2, attention=format)
        return
    psnr = psnr_to_exact(model, codes, noise, attention=format)
    # 61.6 to 64.1 dB in the reference arithmetic, of which bf16 takes the most.
    assert ((psnr > 56) & torch.isfinite(psnr)).all()
    with use("ref"):  # the same 8-bit numbers by PyTorch, in bf16 as the kernels' plan
        reference = model.decode_plan(2, attention=format, graph=False)(codes, noise)
    assert same(model.decode_plan(2, attention=format)(codes, noise), reference, torch.bfloat16)


def test_encode_plan(model):
    images = on_card(model, 3)[1].clamp(-1, 1)
    codes = model.encode_plan(3, dtype=torch.float32)(images)
    plain = model.encode(images, plan=False)
    # Latents within rounding of zero may fall on either side.
    assert (codes != plain).float().mean() < 1e-3
