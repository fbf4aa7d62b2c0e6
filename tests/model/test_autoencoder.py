"""The user's calls: what goes in, what comes out, and what is said when it does not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.layers import patchify, rope_tables, unpatchify
from flowmo.sampling import guided_steps, random_times, time_grid
from tests.model import golden


@pytest.fixture(scope="module")
def model() -> FlowMo:
    torch.manual_seed(0)
    model = FlowMo("tiny").eval()
    for parameter in model.decoder.parameters():  # gates start at zero, where the code would not matter
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("lo", 945_374_085), ("hi", 945_520_081), ("small", 517_117_861)],
)
def test_parameter_counts_of_the_paper(preset, parameters):
    with torch.device("meta"):
        model = FlowMo(preset)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_bits_per_pixel_of_the_paper():
    assert model_config("lo").bits_per_pixel == pytest.approx(0.0703, abs=5e-5)
    assert model_config("hi").bits_per_pixel == pytest.approx(0.219, abs=5e-4)
    assert (model_config("lo").tokens, model_config("hi").tokens) == (512, 1024)


def test_tokens_round_trip_and_bit_order(model, images):
    codes = model.encode(images)
    tokens = model.tokenize(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 32)
    assert set(codes.unique().tolist()) <= {-1.0, 1.0}
    # The order in words: bit k of token t * 2 + g is channel 2 k + g of latent token t.
    bits = codes.numpy() > 0
    for b, t, g in ((0, 0, 0), (1, 5, 1), (2, 15, 0)):
        assert int(tokens[b, 2 * t + g]) == sum(int(bits[b, t, 2 * k + g]) << k for k in range(9))
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.detokenize(tokens, noise=noise, steps=3), model.decode(codes, noise=noise, steps=3))


def test_same_seed_same_picture(model, images):
    codes = model.encode(images)

    def picture(seed: int) -> torch.Tensor:
        return model.decode(codes, steps=2, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(picture(3), picture(3))
    assert not torch.equal(picture(3), picture(4))
    out = picture(3)
    assert out.shape == images.shape and out.dtype == torch.float32 and out.abs().max() <= 1


def test_the_code_and_the_guidance_change_the_picture(model, images):
    codes = model.encode(images)
    noise = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    plain = model.decode(codes, noise=noise, guidance=1.0)
    assert not torch.equal(plain, model.decode(-codes, noise=noise, guidance=1.0))
    assert not torch.equal(plain, model.decode(codes, noise=noise, guidance=3.0))


def test_empty_batch(model):
    empty = torch.zeros(0, 3, 32, 32)
    assert model.tokenize(empty).shape == (0, 32)
    assert model.reconstruct(empty).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, ["uint8", "x / 127.5 - 1"]),
        (np.zeros((1, 3, 32, 32)), TypeError, ["ndarray"]),
        (torch.zeros(3, 32, 32), ValueError, ["[B, 3, 32, 32]", "[3, 32, 32]"]),
        (torch.zeros(1, 32, 32, 3), ValueError, ["[1, 32, 32, 3]"]),
        (torch.zeros(1, 3, 64, 64), ValueError, ["64", "resize_shorter"]),
        (torch.full((1, 3, 32, 32), 255.0), ValueError, ["255", "[-1, 1]"]),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, ["nan"]),
    ],
)
def test_images_that_do_not_fit(model, images, error, words):
    with pytest.raises(error) as caught:
        model.tokenize(images)
    for word in ["images", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (torch.zeros(1, 32), TypeError, ["integer", "float32"]),
        (torch.zeros(1, 31, dtype=torch.long), ValueError, ["[B, 32]", "[1, 31]"]),
        (torch.full((1, 32), 512), ValueError, ["[0, 512)", "512"]),
        (torch.full((1, 32), -1), ValueError, ["-1"]),
    ],
)
def test_tokens_that_do_not_fit(model, tokens, error, words):
    with pytest.raises(error) as caught:
        model.detokenize(tokens)
    for word in ["tokens", *words]:
        assert word in str(caught.value)


def test_codes_noise_and_options_that_do_not_fit(model):
    codes = torch.ones(1, 16, 18)
    for call, word in (
        (lambda: model.decode(codes.long()), "detokenize"),
        (lambda: model.decode(codes[:, :8]), "[B, 16, 18]"),
        (lambda: model.decode(codes, noise=torch.zeros(2, 3, 32, 32)), "[1, 3, 32, 32]"),
        (lambda: model.decode(codes, steps=0), "steps"),
        (lambda: model.decode(codes, rho=0.0), "rho"),
        (lambda: model.decode(codes, guidance=math.nan), "guidance=nan: expected a finite number"),
        (lambda: model.decode(codes, guidance_interval=(2.0, 1.0)), "guidance_interval"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert word in str(caught.value)


def test_continuous_model_has_codes_and_no_tokens(images):
    model = FlowMo(model_config("tiny", quantizer="none", latent_channels=16)).eval()
    codes = model.encode(images)
    # LayerNorm without affine: every latent token has mean 0 and variance 1.
    torch.testing.assert_close(codes.mean(-1), torch.zeros(3, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.var(-1, unbiased=False), torch.ones(3, 16), atol=1e-3, rtol=0)
    assert model.decode(codes, steps=1).shape == images.shape
    with pytest.raises(ValueError, match="continuous"):
        model.tokenize(images)
    with pytest.raises(ValueError, match="continuous"):
        model.detokenize(torch.zeros(1, 32, dtype=torch.long))


def test_fresh_blocks_are_the_identity_by_their_gates_alone():
    """Gate rows of the modulation start at zero; shift and scale rows as PyTorch starts a linear layer."""
    block = FlowMo("tiny").decoder.double_blocks[0]
    for modulation in (block.img_mod, block.txt_mod):
        for tensor in (modulation.lin.weight, modulation.lin.bias):
            zero = (tensor.detach() == 0).reshape(6, -1)
            assert zero[[2, 5]].all() and not zero[[0, 1, 3, 4]].any()


def test_patch_vectors_run_row_column_channel():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    tokens = patchify(images, 4)
    assert tokens.shape == (2, 4, 48)
    # Token 1 is the patch at row 0, column 1; entry (row 2, column 3, channel 1) stands at (2 * 4 + 3) * 3 + 1.
    assert tokens[1, 1, (2 * 4 + 3) * 3 + 1] == images[1, 1, 2, 4 + 3]
    assert torch.equal(unpatchify(tokens, 4, 8), images)


def test_rope_positions():
    cos, sin = rope_tables(latent_tokens=3, grid=4, head_dim=64)
    assert cos.shape == (3 + 16, 32) and cos.dtype == torch.float32
    # Pairs: 4 of the latent axis, 14 of rows, 14 of columns; first frequency of each axis is 1.
    latent, image = 2, 3 + 4 * 1 + 3  # latent token 2; image token of row 1, column 3
    for pair, position in ((0, 2), (4, 2), (18, 2)):
        assert float(sin[latent, pair]) == pytest.approx(np.sin(position), abs=1e-7)
    for pair, position in ((0, 0), (4, 1), (18, 3)):
        assert float(cos[image, pair]) == pytest.approx(np.cos(position), abs=1e-7)
    # Second column frequency of 14: 10000^(-2/28).
    assert float(sin[image, 19]) == pytest.approx(np.sin(3 * 10_000 ** (-2 / 28)), abs=1e-7)


def test_rope_tables_stay_fp32_and_follow_the_device():
    model = FlowMo("tiny").bfloat16()
    assert model.decoder.rope_cos.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.decoder.rope_cos, FlowMo("tiny").decoder.rope_cos)


def test_published_sampler_has_25_steps_of_which_6_are_guided():
    times = time_grid(25)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 26
    guided = guided_steps(times, 1.5, (0.17, 1.02))
    assert sum(guided) == 6
    assert [25 - i for i, g in enumerate(guided) if g] == [21, 20, 19, 18, 17, 16]
    assert guided_steps(times, 1.5, None) == [True] * 25
    assert guided_steps(times, 1.0, None) == [False] * 25


def test_random_times_of_stage_1b():
    times = random_times(64, 8, torch.Generator().manual_seed(0))
    assert times.shape == (64, 9)
    assert torch.equal(times[:, 0], torch.ones(64)) and torch.equal(times[:, -1], torch.zeros(64))
    assert bool((times.diff(dim=1) < 0).all())


def test_unread_parameters_are_exactly_those_without_gradient(images):
    model = FlowMo("tiny")
    golden.fill(model.named_parameters())  # gates start at zero and would hide what stands behind them
    quantized = model.quantize(model.latent(images))
    velocity = model.velocity(patchify(images, 4), torch.rand(3), model.condition(quantized.codes))
    (velocity.square().mean() + quantized.commitment).backward()
    unread = {id(p) for part in (model.encoder, model.decoder) for p in part.unread_parameters()}
    for name, parameter in model.named_parameters():
        if name == "encoder.txt_in.weight":  # read, but the encoder's latent input is all zeros
            continue
        without = parameter.grad is None or not parameter.grad.any()
        assert without == (id(parameter) in unread), name


def test_gradient_checkpointing_gives_the_same_gradients(images):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = FlowMo("tiny")
        model.decoder.gradient_checkpointing = model.encoder.gradient_checkpointing = checkpointing
        quantized = model.quantize(model.latent(images))
        model.velocity(patchify(images, 4), torch.full((3,), 0.5), model.condition(quantized.codes)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
