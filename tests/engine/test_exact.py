"""The plans against the modules run one after the other, and against the released implementation's numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from flowmo import model_config
from flowmo.engine import Schedule, psnr_to_exact
from flowmo.engine.weights import TransformerWeights
from flowmo_kernels import KernelUnavailableError, qk_norm_rope
from tests.engine.conftest import HI, LO, ONE_BLOCK, inputs, make
from tests.model import golden as golden_file

# fp32 sums of at most a few hundred terms in another order, through 25 steps of a contracting flow.
EXACT = 1e-5

INTERVAL = (0.17, 1.02)


@pytest.mark.parametrize(
    ("batch", "steps", "rho", "guidance", "interval"),
    [
        (1, 25, 4.0, 1.5, INTERVAL),
        (3, 25, 4.0, 1.5, INTERVAL),
        (2, 50, 4.0, 1.5, INTERVAL),
        (3, 10, 1.0, 1.5, INTERVAL),
        (2, 7, 4.0, 1.0, INTERVAL),
        (3, 6, 1.0, 1.5, None),
        (2, 1, 4.0, 3.0, None),
        (1, 1, 4.0, 1.5, INTERVAL),
        (5, 2, 1.0, 0.0, None),
    ],
)
@pytest.mark.parametrize("config", [LO, HI, ONE_BLOCK], ids=["lo", "hi", "one block"])
def test_fp32_plan_is_the_plain_sampler(config, batch, steps, rho, guidance, interval):
    model = make(config)
    codes, noise = inputs(model, batch)
    options = {"steps": steps, "rho": rho, "guidance": guidance, "guidance_interval": interval, "noise": noise}
    plain, planned = model.decode(codes, plan=False, **options), model.decode(codes, **options)
    assert (plain.abs() < 1).float().mean() > 0.25, "clipping would hide differences"
    assert (planned - plain).abs().max() <= EXACT
    assert planned.dtype == torch.float32


def test_golden_sample():
    golden = golden_file.load()
    model = golden_file.model(golden)
    z = torch.from_numpy(golden["z"])
    codes = torch.from_numpy(golden["quantized"])
    expected = torch.from_numpy(np.asarray(golden["sample"]).clip(-1, 1))
    planned = model.decode(codes, noise=z)
    # 2e-4 is the project's bound to the released implementation, 1e-5 the plan's to ours.
    assert (planned - expected).norm() < 2e-4 * expected.norm()
    assert (planned - model.decode(codes, noise=z, plan=False)).abs().max() <= EXACT
    assert torch.equal(model.encode(torch.from_numpy(golden["x"])), codes)


@pytest.mark.parametrize("solver", ["heun", "ab2", "dpm"])
@pytest.mark.parametrize("tail_merge", [None, 3])
def test_other_solvers_in_a_plan(lo, solver, tail_merge):
    codes, noise = inputs(lo, 3)
    options = {"steps": 9, "solver": solver, "tail_merge": tail_merge, "noise": noise}
    plain = lo.decode(codes, plan=False, **options)
    for _ in range(2):  # a plan's solver forgets the last run
        assert (lo.decode(codes, **options) - plain).abs().max() <= EXACT


def test_bf16_plan_is_at_least_as_near_to_fp32_as_plain_bf16():
    model = make(LO)
    half = copy.deepcopy(model).bfloat16()
    planned = plain = 0.0
    for seed in range(4):
        codes, noise = inputs(model, 4, seed)
        exact = model.decode(codes, noise=noise, plan=False)
        plan = model.decode_plan(4, dtype=torch.bfloat16)
        planned += float((plan(codes, noise) - exact).square().mean())
        plain += float((half.decode(codes, noise=noise, plan=False) - exact).square().mean())
    assert 0 < planned <= plain


@pytest.mark.parametrize(
    "config", [LO, HI, ONE_BLOCK, *(model_config("tiny", quantizer=q) for q in ("none", "kl", "fsq"))]
)
def test_encode_plan_gives_the_codes_of_the_modules(config):
    model = make(config)
    for batch in (1, 3):
        images = inputs(model, batch)[1].clamp(-1, 1)
        codes, plain = model.encode(images), model.encode(images, plan=False)
        if config.quantizer == "lfq":
            assert torch.equal(codes, plain)
        else:
            assert (codes - plain).abs().max() <= EXACT
    assert model.encode(images[:0]).shape == (0, config.latent_tokens, config.latent_channels)


def test_encode_plan_in_bf16_keeps_nearly_all_bits():
    model = make(LO)
    images = inputs(model, 4)[1].clamp(-1, 1)
    codes = model.encode_plan(4, dtype=torch.bfloat16)(images)
    half = copy.deepcopy(model).bfloat16().encode(images, plan=False)
    exact = model.encode(images)
    assert codes.dtype == torch.bfloat16
    # Bits flip where the latent is within bf16's rounding of zero; no more of them than without the engine, within
    # three standard deviations of such a count.
    flips, plain_flips = int((codes != exact).sum()), int((half != exact).sum())
    assert flips <= plain_flips + 3 * max(1, plain_flips) ** 0.5


def test_smaller_batches_run_padded(lo):
    plan = lo.decode_plan(4)
    codes, noise = inputs(lo, 3)
    assert (plan(codes, noise) - lo.decode(codes, noise=noise, plan=False)).abs().max() <= EXACT
    assert plan(codes[:1], noise[:1]).shape[0] == 1
    images = noise.clamp(-1, 1)
    assert torch.equal(lo.encode_plan(4)(images), lo.encode(images, plan=False))


def test_tail_merge_takes_the_last_steps_as_one(lo):
    schedule = Schedule(tail_merge=6)
    assert Schedule().forwards == 31 and schedule.forwards == 26 and Schedule(tail_merge=10).forwards == 22
    assert schedule.times[-2:] == [(6 / 25) ** 4, 0.0] and len(schedule.times) == 21
    assert Schedule(tail_merge=1).times == Schedule().times
    codes, noise = inputs(lo, 2)
    few, many = (psnr_to_exact(lo, codes, noise, tail_merge=k) for k in (10, 4))
    assert (many > few).all() and torch.isfinite(few).all()
    assert torch.isinf(psnr_to_exact(lo, codes, noise, tail_merge=1)).all()


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_attention_in_eight_bits_is_an_option(lo, format):
    codes, noise = inputs(lo, 3)
    psnr = psnr_to_exact(lo, codes, noise, attention=format)
    # A few per cent of every attention output (tests/ops/test_attention_quantized.py): 66 dB here, 34 without any.
    assert ((psnr > 60) & torch.isfinite(psnr)).all()
    images = noise.clamp(-1, 1)
    flips = (lo.encode_plan(3, attention=format)(images) != lo.encode(images)).float().mean()
    assert flips < 0.05
    assert lo.decode_plan(3).attention == "auto"


def test_logit_bound_is_reached_and_not_exceeded(lo):
    """Attention leaves out the running maximum on its word. Rows that are one vector's multiples reach it."""
    norms = lo.decoder.double_blocks[0].txt_attn.norm, lo.decoder.double_blocks[0].img_attn.norm
    with torch.no_grad():
        for norm, q_gain, k_gain in zip(norms, (0.5, -3.0), (2.0, 0.25)):
            norm.query_norm.scale.fill_(q_gain)
            norm.key_norm.scale.fill_(k_gain)
    block = TransformerWeights(lo.decoder, torch.float32).blocks[0]
    d = block.q_scale.shape[1]
    qkv = torch.full((1, 2, 3, 1, d), 0.7)
    rope = torch.ones(2, d // 2), torch.zeros(2, d // 2)  # no turn
    q, k, _ = qk_norm_rope(qkv, block.q_scale, block.k_scale, rope, split=1).unbind(2)
    largest = 8 / d * torch.einsum("blhd,bmhd->blm", q, k).abs().max()
    # Roundings of the norms and of the sum, and eps inside the norms: 1e-6 of a mean square of 0.49.
    assert block.logit_bound * (1 - 1e-5) <= largest <= block.logit_bound * (1 + 1e-6)


def test_autocast_decides_the_precision(lo):
    codes, noise = inputs(lo, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lo.decode(codes, noise=noise)
    assert torch.equal(mixed, lo.decode_plan(2, dtype=torch.bfloat16)(codes, noise))
    assert mixed.dtype == torch.float32


def test_generator_and_noise_mean_what_they_did(lo):
    codes, _ = inputs(lo, 2)
    first, again, plain = (
        lo.decode(codes, steps=3, generator=torch.Generator().manual_seed(5), plan=p) for p in (True, True, False)
    )
    assert torch.equal(first, again)
    assert (first - plain).abs().max() <= EXACT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"solver": "huen"}, "did you mean 'heun'"),
        ({"tail_merge": 0}, "tail_merge=0"),
        ({"tail_merge": 26}, "tail_merge=26"),
        ({"steps": 0}, "steps=0"),
        ({"rho": -1.0}, "rho=-1.0"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"batch": 0}, "batch=0"),
        ({"attention": "cuddn"}, "did you mean 'cudnn'"),
    ],
)
def test_options_out_of_range_are_named(lo, options, text):
    with pytest.raises(ValueError, match=text):
        lo.decode_plan(**{"batch": 2, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the backend may exist")
def test_attention_backends_are_passed_on_and_missing_ones_named(lo):
    with pytest.raises(KernelUnavailableError, match="'cudnn' was asked for, but"):
        lo.decode_plan(1, attention="cudnn")
    codes, noise = inputs(lo, 2)
    assert torch.isfinite(psnr_to_exact(lo, codes, noise, attention="math")).all()  # other sums, other rounding


def test_inputs_that_do_not_fit_are_named(lo):
    plan = lo.decode_plan(2, steps=1)
    codes, noise = inputs(lo, 3)
    with pytest.raises(ValueError, match="codes: expected shape"):
        plan(codes, noise)
    with pytest.raises(ValueError, match="noise: expected shape"):
        plan(codes[:2], noise)
    with pytest.raises(ValueError, match="images: expected shape"):
        lo.encode_plan(2)(noise)
    with pytest.raises(ValueError, match="codes: expected shape"):
        plan(codes[:0], noise[:0])
    with pytest.raises(ValueError, match="images: expected shape"):
        lo.encode_plan(2)(noise[:0])
    with pytest.raises(TypeError, match="images: expected a float tensor"):
        lo.encode_plan(3)(noise.to(torch.uint8))
