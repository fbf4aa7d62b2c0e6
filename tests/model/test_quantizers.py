"""FSQ, KL and continuous codes: what they compute, and that models with them encode, decode, save and load."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowmo import FlowMo, export, model_config
from flowmo.config import ConfigError, LossConfig, ModelConfig
from flowmo.data.tokens import TokenLayout, layout_of
from flowmo.pretrained import CheckpointError, save_released
from flowmo.quantizer import code_tokens, codes_of_latent, fsq_codes, fsq_tokens, quantize, token_codes
from tests.model import golden

LEVELS = [8, 5, 2, 7]


def fsq(levels: list[int] = LEVELS, channels: int = 8) -> ModelConfig:
    return model_config("tiny", quantizer="fsq", fsq_levels=levels, latent_channels=channels)


SMALL = {
    "lfq": {},
    "fsq": {"latent_channels": 6},
    "kl": {"latent_channels": 4},
    "none": {"latent_channels": 16},
}


def tiny(quantizer: str) -> FlowMo:
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", decoder_depth=1, quantizer=quantizer, **SMALL[quantizer])).eval()
    golden.fill(model.named_parameters())
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Finite scalar quantization.


def test_fsq_tokens_are_mixed_radix_numbers_of_levels():
    config = fsq()
    tokens = torch.arange(560).view(-1, 2)  # every value once; two tokens to a latent token
    codes = fsq_codes(tokens, LEVELS, 8)[:, None].flatten(0, 1).view(280, 1, 8)
    digits = np.unravel_index(tokens.numpy(), LEVELS, order="F")  # first level least significant
    for k, (digit, count) in enumerate(zip(digits, LEVELS)):
        expected = (digit - count // 2) / (count // 2)
        np.testing.assert_allclose(codes[:, 0, 2 * k : 2 * k + 2], expected, atol=1e-7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(fsq_tokens(codes.to(dtype), LEVELS), tokens)
    assert torch.equal(token_codes(code_tokens(codes, config), config), codes)
    for bad in (-1, 560):
        with pytest.raises(ValueError, match=r"\[0, 560\)"):
            fsq_codes(torch.tensor([[0, bad]]), LEVELS, 8)


def test_fsq_reaches_every_level_in_order_and_keeps_zero():
    for count in (2, 3, 4, 5, 8, 255, 256):
        latent = torch.linspace(-9, 9, 20_001).view(1, -1, 1)
        out = quantize(latent, fsq([count], 1))
        assert out.tokens is not None and out.tokens.unique().tolist() == list(range(count))
        assert bool((out.tokens[0].diff() >= 0).all())
        assert int(quantize(torch.zeros(1, 1, 1), fsq([count], 1)).tokens) == count // 2  # the code 0
        assert float(out.codes.min()) == -1.0 and float(out.codes.max()) == (count - 1 - count // 2) / (count // 2)


def test_fsq_gradient_is_that_of_the_bound():
    latent = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantize(latent, fsq()).codes.sum().backward()
    x = latent.detach().double()
    expected = torch.empty_like(x)
    for channel in range(8):
        count = LEVELS[channel // 2]
        reach = (count - 1) * 1.001 / 2
        shift = math.atanh((0.5 if count % 2 == 0 else 0.0) / reach)
        expected[..., channel] = reach * (1 - torch.tanh(x[..., channel] + shift) ** 2) / (count // 2)
    # fp32 arithmetic; 1 - tanh^2 cancels where the tangent is near one
    torch.testing.assert_close(latent.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_fsq_in_half_precision_and_under_both_paths(images):
    latent = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        out = quantize(latent.to(dtype), fsq())
        assert out.codes.dtype == dtype
        assert torch.equal(codes_of_latent(latent.to(dtype), fsq()), out.codes)
        assert torch.equal(fsq_tokens(out.codes, LEVELS), out.tokens)
    layout = layout_of(model := tiny("fsq"))
    model.config.fsq_levels = [2, 16, 16]
    assert layout_of(model).tokenizer != layout.tokenizer  # the same weights give other tokens
    model.config.fsq_levels = [8, 8, 8]
    assert (layout.tokens, layout.bits, layout.levels, layout.vocabulary) == (32, 9, (8, 8, 8), 512)
    codes = model.encode(images)
    assert torch.equal(layout.encode(codes), model.tokenize(images))
    contiguous = TokenLayout(32, 9, 6, "contiguous", levels=(8, 8, 8))
    tokens = contiguous.encode(codes)
    assert torch.equal(contiguous.decode(tokens), codes) and not torch.equal(tokens, model.tokenize(images))
    assert torch.equal(tokens[:, 0], fsq_tokens(codes[:, :1, :3], [8, 8, 8])[:, 0])


# Gaussian latents.


def test_kl_is_the_divergence_and_samples_have_mean_and_variance():
    mean = torch.tensor([0.5, -2.0]).expand(1, 50_000, 2)
    log_variance = torch.tensor([0.0, -1.5]).expand(1, 50_000, 2)
    config = model_config("tiny", quantizer="kl", latent_channels=2)
    latent = torch.cat([mean, log_variance], -1)
    out = quantize(latent, config)
    assert torch.equal(out.codes, mean) and out.tokens is None
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(out.kl, expected)
    torch.testing.assert_close(torch.as_tensor(out.loss(LossConfig(kl=3.0))), 3 * expected)
    noise = torch.randn(1, 50_000, 2, generator=torch.Generator().manual_seed(0))
    drawn = quantize(latent, config, noise).codes[0]
    deviation = (0.5 * log_variance[0, 0]).exp()
    # five standard errors of a mean and of a deviation of 50,000 draws
    error = 5 * deviation / 50_000**0.5
    assert bool(((drawn.mean(0) - mean[0, 0]).abs() < error).all())
    assert bool(((drawn.std(0) - deviation).abs() < error / 2**0.5).all())


def test_kl_sample_is_differentiable_in_mean_and_variance():
    latent = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    config = model_config("tiny", quantizer="kl", latent_channels=2)
    noise = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(1))
    quantize(latent, config, noise).codes.sum().backward()
    assert torch.equal(latent.grad[..., :2], torch.ones(1, 3, 2).double())
    expected = 0.5 * noise.double() * (0.5 * latent.detach()[..., 2:]).exp()
    torch.testing.assert_close(latent.grad[..., 2:], expected, rtol=1e-5, atol=1e-6)  # the arithmetic is fp32
    huge = torch.full((1, 1, 4), 1e4)  # a diverged variance stays finite
    assert bool(quantize(huge, config, torch.ones(1, 1, 2)).codes.isfinite().all())


@pytest.mark.parametrize("quantizer", ["fsq", "kl", "none"])  # of lfq tests/training/test_step.py
def test_no_value_is_read_on_the_way(quantizer):
    """What CUDA graphs ask for: the meta device has no values to read."""
    config = model_config("tiny", quantizer=quantizer, **SMALL[quantizer])
    channels = config.latent_channels * (2 if quantizer == "kl" else 1)
    latent = torch.zeros(2, 16, channels, device="meta", requires_grad=True)
    noise = torch.zeros(2, 16, config.latent_channels, device="meta")
    quantize(latent, config, noise).codes.sum().backward()
    assert latent.grad.device.type == codes_of_latent(latent, config).device.type == "meta"


# Models.


@pytest.mark.parametrize("quantizer", SMALL)
def test_encode_decode_save_load(quantizer, images, tmp_path):
    model = tiny(quantizer)
    c = model.config
    codes = model.encode(images)
    assert codes.shape == (2, 16, c.latent_channels)
    torch.testing.assert_close(codes, model.encode(images, plan=False), rtol=0, atol=1e-5)  # fp32, other sums
    assert torch.equal(model.encode(images), codes)  # nothing is drawn
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    picture = model.decode(codes, steps=2, noise=noise)
    model.save_pretrained(tmp_path / "model")
    loaded = FlowMo.from_pretrained(tmp_path / "model")
    assert loaded.config == c and torch.equal(loaded.decode(loaded.encode(images), steps=2, noise=noise), picture)
    if c.discrete:
        tokens = model.tokenize(images)
        assert int(tokens.max()) < c.vocabulary and tokens.shape == (2, c.tokens)
        assert torch.equal(model.detokenize(tokens, steps=2, noise=noise), picture)
        with pytest.raises(ValueError, match=rf"\[0, {c.vocabulary}\)"):
            model.detokenize(torch.full_like(tokens, c.vocabulary))
    else:
        with pytest.raises(ValueError, match=f"quantizer {quantizer}"):
            model.tokenize(images)
        with pytest.raises(ValueError, match="no tokens"):
            layout_of(model)


def test_released_layout_of_other_quantizers(images, tmp_path):
    sizes = {"image_size": 32, "latent_tokens": 16}
    for quantizer, more in (("kl", {}), ("none", {}), ("fsq", {"fsq_levels": [8, 8, 8]})):
        model = tiny(quantizer)
        path = tmp_path / f"{quantizer}.pth"
        save_released(model.state_dict(), path)
        loaded = FlowMo.from_pretrained(path, **sizes, **more)
        assert loaded.config == model.config and torch.equal(loaded.encode(images), model.encode(images))
    with pytest.raises(CheckpointError, match="fsq_levels="):
        FlowMo.from_pretrained(path, **sizes)
    model.save_pretrained(tmp_path / "fsq")
    with pytest.raises(ValueError, match=r"cannot say that the quantizer is fsq.*\.safetensors"):
        export.main([str(tmp_path / "fsq"), str(tmp_path / "export.pth")])
    assert export.main([str(tmp_path / "fsq"), str(tmp_path / "export.safetensors")]) == 0
    assert FlowMo.from_pretrained(tmp_path / "export.safetensors").config == model.config


def test_old_configuration_files_load_unchanged(tmp_path):
    model = tiny("lfq")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    start, end = text.index(',\n  "fsq_levels"'), text.index("]")
    (tmp_path / "config.json").write_text(text[:start] + text[end + 1 :])
    assert FlowMo.from_pretrained(tmp_path).config == model.config


def test_only_the_encoders_last_layer_grows_for_kl():
    with torch.device("meta"):
        counts = {q: sum(p.numel() for p in FlowMo(model_config("small", quantizer=q)).parameters()) for q in SMALL}
    assert counts["lfq"] == counts["none"] == counts["fsq"] == counts["kl"] - 18 * (768 + 1)


def test_sizes_follow_the_quantizer():
    lo, matched = model_config("lo"), model_config("lo", quantizer="fsq", latent_channels=6)
    assert (matched.tokens, matched.vocabulary, matched.bits_per_pixel) == (lo.tokens, 512, lo.bits_per_pixel)
    odd = model_config("lo", quantizer="fsq", fsq_levels=[8, 5, 5, 5], latent_channels=8)
    assert (odd.tokens, odd.vocabulary, odd.token_bits) == (512, 1000, 10)
    assert odd.bits_per_pixel == pytest.approx(512 * math.log2(1000) / 65536)
    assert "512 tokens of 9.966 bits (levels 8 x 5 x 5 x 5)" in odd.describe_code()
    continuous = model_config("continuous")
    assert (continuous.tokens, continuous.vocabulary, continuous.bits_per_pixel) == (0, None, None)
    assert continuous.describe_code() == "256 x 16 real numbers (none)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantizer": "fsqq"}, ["fsqq", "lfq, fsq, kl, none", "did you mean fsq?"]),
        ({"quantizer": "fsq"}, []),
        ({"quantizer": "fsq", "latent_channels": 7}, ["latent_channels=7", "3 numbers"]),
        ({"quantizer": "fsq", "fsq_levels": []}, ["fsq_levels=[]", "from 2 to 256"]),
        ({"quantizer": "fsq", "fsq_levels": [8, 1]}, ["fsq_levels=[8, 1]"]),
        ({"quantizer": "fsq", "fsq_levels": [256, 256, 256]}, ["at most 1,048,576"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, words):
    if not words:
        assert model_config("lo", **options).tokens == 1536  # 18 channels make six tokens of three levels
        return
    with pytest.raises(ConfigError) as caught:
        model_config("lo", **options)
    for word in words:
        assert word in str(caught.value)
