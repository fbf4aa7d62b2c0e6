"""Plans with fp8 linear layers, against the modules with the same layers rounded here, in other words."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo import FlowMo, model_config
from flowmo.engine import psnr_to_exact
from flowmo.engine.plan import check_fp8
from flowmo_kernels import use
from flowmo_kernels._triton import INTERPRETED
from tests.engine.conftest import HI, LO, ONE_BLOCK, inputs, make

# fp32 sums in another order move a few numbers across a rounding threshold, by up to 2^-3 of them; what follows is then
# rounded anew in part. That stays below an eighth of the whole error, while a layer less in fp8 is three fifths of it.
SAME = 0.25


def rounded(x: Tensor) -> Tensor:
    """Rows as e4m3, the largest number of each at 448, and back."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def rounded_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    w = rounded(layer.weight.detach())
    return lambda x: F.linear(rounded(x), w, layer.bias)


def rounded_copy(model: FlowMo) -> FlowMo:
    """The model whose qkv and MLP layers take rounded rows and weights."""
    model = copy.deepcopy(model)
    for block in (*model.encoder.double_blocks, *model.decoder.double_blocks):
        for stream in ("txt", "img"):
            attention, mlp = getattr(block, f"{stream}_attn"), getattr(block, f"{stream}_mlp")
            attention.qkv.forward = rounded_linear(attention.qkv)
            fc1, fc2 = rounded_linear(mlp[0]), rounded_linear(mlp[2])
            mlp.forward = lambda x, fc1=fc1, fc2=fc2: fc2(F.gelu(fc1(x), approximate="tanh"))
    return model


def without_blocks(model: FlowMo) -> FlowMo:
    """The decoder's blocks add nothing: their gates are zero."""
    model = copy.deepcopy(model)
    for block in model.decoder.double_blocks:
        for modulation in (block.txt_mod, block.img_mod):
            for vectors in (modulation.lin.weight.data, modulation.lin.bias.data):
                vectors.unflatten(0, (6, -1))[2::3] = 0
    return model


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    "options", [{"steps": 6}, {"steps": 5, "guidance": 1.0}, {"steps": 3, "solver": "heun", "guidance_interval": None}]
)
@pytest.mark.parametrize("config", [LO, HI, ONE_BLOCK], ids=["lo", "hi", "one block"])
def test_decode_plan_is_the_modules_with_rounded_rows(config, options):
    model = make(config)
    codes, noise = inputs(model, 3)
    exact, expected, without = (
        m.decode(codes, noise=noise, plan=False, **options) for m in (model, rounded_copy(model), without_blocks(model))
    )
    pictures = model.decode_plan(4, fp8=True, **options)(codes, noise)  # runs padded
    error = rms(expected - exact)
    assert rms(pictures - expected) <= SAME * error
    # Both factors of a product move by at most 2^-4; of sums, what the blocks add to the picture, it is less.
    assert 0 < error <= 2**-3 * rms(exact - without)


def test_encode_plan_is_the_modules_with_rounded_rows():
    model = make(model_config("tiny", quantizer="none"))
    images = inputs(model, 3)[1].clamp(-1, 1)
    exact, expected = (m.encode(images, plan=False) for m in (model, rounded_copy(model)))
    assert 0 < rms(model.encode_plan(3, fp8=True)(images) - expected) <= SAME * rms(expected - exact)


def test_which_layers(lo):
    first, last = lo.decode_plan(1, fp8=True)._weights.blocks
    low = {
        (stream, name)
        for stream in ("txt", "img")
        for name, layer in getattr(first, stream)._asdict().items()
        if layer.w.dtype == torch.float8_e4m3fn
    }
    assert low == {(stream, name) for stream in ("txt", "img") for name in ("qkv", "fc1", "fc2")}
    # Of the dead stream's last block keys and values are left.
    assert last.txt.qkv.w.dtype == torch.float8_e4m3fn and last.txt[1:] == (None,) * 3
    assert last.txt.qkv.w.shape[0] * 3 == last.img.qkv.w.shape[0] * 2


def test_in_bf16(lo):
    codes, noise = inputs(lo, 2)
    psnr = psnr_to_exact(lo, codes, noise, dtype=torch.bfloat16, fp8=True)
    # 52.7 dB here, by the roundings of the tests above. Without any attention there are 34.
    assert ((psnr > 50) & torch.isfinite(psnr)).all()


def test_by_triton():
    """The kernels, interpreted, read the plan's views as the references do."""
    if not INTERPRETED:
        pytest.skip("Triton is not interpreted here; tests/engine/test_graph.py runs the kernels on a card")
    model = make(model_config("tiny", image_size=8, latent_tokens=3))
    codes, noise = inputs(model, 3)
    plan = model.decode_plan(3, fp8=True, steps=1, guidance=1.0)
    expected = plan(codes, noise)
    with use("triton"):
        pictures = plan(codes, noise)
    error = rms(expected - model.decode(codes, noise=noise, steps=1, guidance=1.0))
    assert 0 < rms(pictures - expected) <= SAME * error


def test_where_it_cannot_run(lo, monkeypatch):
    cuda, capability = torch.device("cuda:0"), [(8, 6)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    with pytest.raises(ValueError, match=r"compute capability 8.9 or newer, got cuda:0 of \(8, 6\); use fp8=False"):
        check_fp8(True, cuda, torch.bfloat16)
    check_fp8(False, cuda, torch.bfloat16)
    capability[0] = (8, 9)
    for dtype in (torch.bfloat16, torch.float16):
        check_fp8(True, cuda, dtype)
    with pytest.raises(ValueError, match=r"expected dtype torch\.bfloat16 or torch\.float16 on CUDA"):
        check_fp8(True, cuda, torch.float32)
    with pytest.raises(ValueError, match="got meta"):
        check_fp8(True, torch.device("meta"), torch.bfloat16)
    assert "with fp8 linear layers" in lo.decode_plan(1, fp8=True).describe()
