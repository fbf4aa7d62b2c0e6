"""Stage 1A: its noise law, its loss, its optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.config import LossConfig, NoiseConfig, OptimConfig
from flowmo.layers import patchify, unpatchify
from flowmo.perceptual import load_perceptual
from flowmo.training.optim import AdamHoldEMA, is_held, learning_rate
from flowmo.training.pretrain import draw_code_noise, flow_loss, pretrain_loss, sample_noise_levels
from tests.model import golden

N = 200_000


def law(name: str, **options: float) -> torch.Tensor:
    return sample_noise_levels(N, NoiseConfig(law=name, **options), torch.Generator().manual_seed(0))


def test_noise_laws_by_their_quantiles():
    # Four standard errors of a probability estimated from N draws.
    error = 4 * 0.5 / math.sqrt(N)
    for t in (0.02, 0.3, 0.5, 0.9, 0.99):
        normal = 0.5 * (1 + math.erf(math.log(t / (1 - t)) / math.sqrt(2)))
        shifted = 0.5 * (1 + math.erf((math.log(t / (1 - t)) - 1.5) / (0.5 * math.sqrt(2))))
        for sample, expected in (
            (law("uniform"), t),
            (law("logit_normal"), normal),
            (law("thick_logit_normal", tail=0.1), 0.9 * normal + 0.1 * t),
            (law("logit_normal", mean=1.5, std=0.5), shifted),
        ):
            assert float((sample < t).float().mean()) == pytest.approx(expected, abs=error)


@pytest.fixture
def model() -> FlowMo:
    model = FlowMo("tiny")
    golden.fill(model.named_parameters())
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def losses(model, images, seed=0, **options):
    perceptual = options.pop("perceptual", None)
    frozen = options.pop("frozen_encoder", False)
    return pretrain_loss(
        model,
        images,
        LossConfig(**options),
        NoiseConfig(),
        perceptual,
        torch.Generator().manual_seed(seed),
        frozen_encoder=frozen,
    )


def test_total_is_the_weighted_sum(model, images):
    network = load_perceptual("random")
    out = losses(model, images, perceptual=network, entropy=0.5, commitment=0.25, perceptual_weight=2.0)
    expected = (
        out["flow"]
        + 0.5 * (out["entropy_per_sample"] - out["entropy_codebook"])
        + 0.25 * out["commitment"]
        + 2.0 * out["perceptual"]
    )
    torch.testing.assert_close(out["total"], expected)
    assert out["perceptual"] > 0


def test_flow_loss_is_zero_for_the_true_velocity(images):
    data = patchify(images, 4)
    noise = torch.randn_like(data)
    assert flow_loss(noise - data, data, noise) == 0
    torch.testing.assert_close(flow_loss(torch.zeros_like(data), data, noise), (noise - data).square().mean())


def test_condition_dropout_zeroes_code_and_flag(model, images, monkeypatch):
    seen = []
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, c: (seen.append(c), velocity(x, t, c))[1])
    kept = []
    for seed in range(100):
        losses(model, images, seed=seed, condition_dropout=0.25)
        kept.append(seen[-1].abs().sum((1, 2)) > 0)
        flag = seen[-1][..., -1]
        assert torch.equal(flag, kept[-1][:, None].float().expand_as(flag))
    # 400 independent draws: four standard errors.
    assert float(torch.stack(kept).float().mean()) == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / 400))


def test_noise_sync_is_never_noisier_than_the_picture():
    n = 20_000
    config = model_config("tiny", quantizer="none", latent_channels=4)
    t = torch.rand(n, generator=torch.Generator().manual_seed(0))
    drawn = draw_code_noise(config, t, LossConfig(noise_sync=0.25), torch.Generator().manual_seed(1))
    assert drawn.draw is None and drawn.noise.shape == (n, 16, 4)
    assert bool((drawn.level <= t).all()) and bool((drawn.level >= 0).all())
    chosen = drawn.level > 0
    assert float(chosen.float().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / n))
    share = (drawn.level / t)[chosen]  # uniform on [0, 1]: mean 1/2 and deviation sqrt(1/12)
    assert float(share.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / len(share)))
    assert float(share.square().mean()) == pytest.approx(1 / 3, abs=4 * math.sqrt(4 / 45 / len(share)))
    assert float(drawn.noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * drawn.noise.numel()))
    none = draw_code_noise(config, t, LossConfig(), torch.Generator().manual_seed(1))
    assert none == (None, None, None)


def test_noise_sync_mixes_code_and_noise(images, monkeypatch):
    model = FlowMo(model_config("tiny", quantizer="none", latent_channels=16))
    golden.fill(model.named_parameters())
    seen = []
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, c: (seen.append((t, c[..., :-1])), velocity(x, t, c))[1])
    losses(model, images, condition_dropout=0.0, noise_sync=1.0)
    (t, mixed), codes = seen[0], model.encode(images, plan=False)
    # (1 - s) c + s e, c of mean square one over the channels and e independent of it: least squares for s in
    # mixed - c = s (e - c) has an error of the order of 1 / sqrt(16 x 16)
    s = 1 - (mixed * codes).mean((1, 2)) / codes.square().mean((1, 2))
    assert bool((s < t + 5 / 16).all())
    rest = (mixed - (1 - s[:, None, None]) * codes).std((1, 2))
    torch.testing.assert_close(rest, s, rtol=0.25, atol=0.02)


def test_noise_sync_reaches_the_decoder_alone(images):
    model = FlowMo(model_config("tiny", quantizer="none", latent_channels=16))
    golden.fill(model.named_parameters())
    clean, noisy = losses(model, images), losses(model, images, noise_sync=1.0)
    assert clean["flow"] != noisy["flow"] and set(noisy) == {"total", "flow"}
    noisy["total"].backward()
    assert model.encoder.img_in.weight.grad is not None


def test_codes_of_kl_are_draws_in_training_alone(images, monkeypatch):
    model = FlowMo(model_config("tiny", quantizer="kl"))
    golden.fill(model.named_parameters())
    seen = []
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, t, c: (seen.append(c[..., :-1]), velocity(x, t, c))[1])
    losses(model, images, condition_dropout=0.0)
    mean, log_variance = model.latent(images).detach().chunk(2, -1)
    deviations = (seen[0].detach() - mean) / (0.5 * log_variance).exp()
    # standard normal: five standard errors of its mean and of its deviation
    assert abs(float(deviations.mean())) < 5 / deviations.numel() ** 0.5
    assert abs(float(deviations.std()) - 1) < 5 / (2 * deviations.numel()) ** 0.5
    torch.testing.assert_close(model.encode(images, plan=False), mean)


@pytest.mark.parametrize(("quantizer", "terms"), [("fsq", set()), ("kl", {"kl"}), ("none", set())])
def test_other_quantizers_report_their_own_terms(images, quantizer, terms):
    model = FlowMo(model_config("tiny", quantizer=quantizer))
    golden.fill(model.named_parameters())
    out = losses(model, images, kl=0.5)
    assert set(out) == {"total", "flow", *terms}
    torch.testing.assert_close(out["total"], out["flow"] + 0.5 * out.get("kl", 0.0))
    again, other = losses(model, images, kl=0.5), losses(model, images, seed=1, kl=0.5)
    assert again["flow"] == out["flow"] != other["flow"]
    out["total"].backward()
    assert bool((model.encoder.final_layer_txt.linear.weight.grad.abs().sum(1) > 0).all())  # the variances' rows too


def test_flow_loss_at_t_one_is_the_error_of_one_step(model, images):
    assert torch.equal(law("one"), torch.ones(N))
    out = pretrain_loss(
        model, images, LossConfig(condition_dropout=0.0), NoiseConfig(law="one"), None, torch.Generator().manual_seed(3)
    )
    z = torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(3))  # the loss's own: t = 1 draws nothing
    noise = unpatchify(z, 4, 32)
    pictures = model.decode(model.encode(images), steps=1, guidance=1.0, noise=noise, plan=False)
    v = model.velocity(z, torch.ones(4), model.condition(model.encode(images, plan=False)))
    torch.testing.assert_close(pictures, unpatchify(z - v, 4, 32).clamp(-1, 1))
    torch.testing.assert_close(out["flow"], (unpatchify(z - v, 4, 32) - images).square().mean())


def test_frozen_encoder_gets_no_gradient(model, images):
    losses(model, images, frozen_encoder=True)["total"].backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.decoder.img_in.weight.grad is not None
    losses(model, images)["total"].backward()
    assert model.encoder.img_in.weight.grad is not None


def test_perceptual_distance_is_that_of_the_denoised_picture(model, images, monkeypatch):
    """At every noise level the true velocity, z - data = (x_t - data) / t, leads back to it; none leaves x_t."""
    data, seen, levels, factors = patchify(images, 4), [], [], [1.0, 0.0]

    def velocity(x, t, condition):
        levels.append(t)
        return factors[len(levels) - 1] * (x - data) / t[:, None, None]

    def perceptual(given, denoised):
        assert given is images
        seen.append(denoised)
        return denoised.new_full((4,), 3.0)

    monkeypatch.setattr(model, "velocity", velocity)
    for _ in factors:
        out = losses(model, images, perceptual=perceptual, entropy=0.0, commitment=0.0, perceptual_weight=2.0)
    assert bool(((levels[0] > 0.01) & (levels[0] < 1)).all()), "levels at which there is something to see"
    # Three roundings of numbers of a few units, the quotient's times t again.
    torch.testing.assert_close(seen[0], images, rtol=0, atol=8 * 2**-24 * 4)
    mixed = (patchify(seen[1], 4) - data) / levels[0][:, None, None] + data  # z where x_t = t z + (1 - t) data
    error = 5 / math.sqrt(mixed.numel())
    assert abs(float(mixed.mean())) < error and abs(float(mixed.std()) - 1) < error
    assert out["total"].item() == pytest.approx(out["flow"].item() + 6)


def test_code_counts_are_those_of_all_tokens_seen(model, images):
    counts = torch.zeros(2**model.config.entropy_bits, dtype=torch.int64)
    for _ in range(2):
        pretrain_loss(model, images, LossConfig(), NoiseConfig(), code_counts=counts)
    tokens = model.quantize(model.latent(images)).tokens
    assert torch.equal(counts, 2 * torch.bincount(tokens.flatten(), minlength=len(counts)))


def test_perceptual_gradient_reaches_the_decoder(model, images):
    losses(model, images, perceptual=load_perceptual("random"), perceptual_weight=1000.0)["total"].backward()
    with_perceptual = model.decoder.img_in.weight.grad.clone()
    model.zero_grad()
    losses(model, images)["total"].backward()
    assert not torch.allclose(with_perceptual, model.decoder.img_in.weight.grad, rtol=0.1)


def test_compiled_loss_has_the_same_gradients(model, images):
    """All but the random draws is one graph: PyTorch cannot trace a torch.Generator."""
    results = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for loss in (pretrain_loss, torch.compile(pretrain_loss, backend="aot_eager")):
        model.zero_grad()
        counts = torch.zeros(512, dtype=torch.int64)
        random = torch.Generator().manual_seed(0)
        loss(model, images, LossConfig(), NoiseConfig(), None, random, code_counts=counts)["total"].backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append({**gradients, "counts": counts})
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("hold", ["matrix", "channel", "none"])
def test_norms_of_block_weights_are_held(model, images, hold):
    named = dict(model.decoder.named_parameters(prefix="decoder"))
    optimizer = AdamHoldEMA(named, OptimConfig(hold_norms=hold))
    dims = (1,) if hold == "channel" else None
    key, free = "decoder.double_blocks.0.img_attn.qkv.weight", "decoder.img_in.weight"
    assert is_held(key) and not is_held(free) and not is_held("decoder.double_blocks.0.img_attn.qkv.bias")
    before = {k: named[k].detach().clone() for k in (key, free)}

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x, dim=dims)

    for _ in range(3):
        losses(model, images)["total"].backward()
        optimizer.step(0.05)
    for k in (key, free):
        held = torch.allclose(norm(named[k].detach()), norm(before[k]), rtol=1e-5)
        assert held == (hold != "none" and k == key)
        assert not torch.allclose(named[k], before[k], atol=1e-3)


def test_average_follows_its_decay(model):
    named = {"w": torch.nn.Parameter(torch.zeros(3))}
    optimizer = AdamHoldEMA(named, OptimConfig(ema_decay=0.9, ema_every=2))
    path = []
    for _ in range(4):
        named["w"].grad = -torch.ones(3)
        optimizer.step(0.1)
        path.append(named["w"].detach().clone())
    # Every second step a = 0.9^2 a + (1 - 0.9^2) w.
    expected = 0.81 * (0.19 * path[1]) + 0.19 * path[3]
    torch.testing.assert_close(optimizer.average["w"], expected)


def test_parameters_without_gradient_keep_their_moments():
    named = {k: torch.nn.Parameter(torch.ones(2)) for k in "ab"}
    optimizer = AdamHoldEMA(named, OptimConfig(ema_decay=0.5, ema_every=1))
    for p in named.values():
        p.grad = torch.ones(2)
    optimizer.step(0.1)
    moments, average = optimizer.exp_avg["a"].clone(), optimizer.average["a"].clone()
    frozen = named["a"].detach().clone()
    named["b"].grad = torch.ones(2)
    optimizer.step(0.1)
    assert torch.equal(optimizer.exp_avg["a"], moments) and torch.equal(named["a"], frozen)
    assert not torch.equal(named["b"], frozen)
    # Its average goes on towards it.
    torch.testing.assert_close(optimizer.average["a"], 0.5 * average + 0.5 * frozen, rtol=1e-6, atol=0)
    assert not torch.equal(average, frozen)


def test_norms_that_processes_hold_together_are_those_of_one(model):
    """The way of sharded matrices, which sums squares over processes, here of one process; with steps not taken."""
    torch.manual_seed(0)
    weights = {k: p.detach().clone() for k, p in model.decoder.named_parameters(prefix="decoder")}
    weights["decoder.double_blocks.0.img_mlp.0.weight"].zero_()  # has no norm to hold
    ends = []
    for joint in (False, True):
        named = {k: torch.nn.Parameter(w.clone()) for k, w in weights.items()}
        optimizer = AdamHoldEMA(named, OptimConfig(ema_decay=0.5, ema_every=2))
        optimizer.joint = joint
        for step, finite in enumerate((True, False, True, True)):
            generator = torch.Generator().manual_seed(step)
            for p in named.values():
                noise = torch.randn(p.shape, generator=generator)
                p.grad = noise if finite else torch.full_like(noise, math.nan)
            before = {k: p.detach().clone() for k, p in named.items()}
            optimizer.step(0.01, torch.tensor(0.0 if finite else 1.0))
            assert finite != all(torch.equal(p, before[k]) for k, p in named.items())
        averages = {f"{k} average": a for k, a in optimizer.average.items()}
        ends.append({k: p.detach().clone() for k, p in named.items()} | averages)
    optimizer = AdamHoldEMA(named, OptimConfig())
    key = "decoder.double_blocks.0.img_attn.qkv.weight"
    with torch.no_grad():
        named[key].zero_()
    optimizer._hold_jointly([key], None)
    assert (named[key] == 0).all(), "a weight that has become zero stays finite"
    for key, want in ends[0].items():
        # Norms of up to 49,152 numbers, summed in another order: 8 roundings in halves, three steps and the product.
        torch.testing.assert_close(ends[1][key], want, rtol=3e-6, atol=1e-7)


def test_adam_matches_torch():
    torch.manual_seed(0)
    ours = {"w": torch.nn.Parameter(torch.randn(5, 3))}
    theirs = torch.nn.Parameter(ours["w"].detach().clone())
    optimizer = AdamHoldEMA(ours, OptimConfig(hold_norms="none"))
    reference = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        g = torch.randn(5, 3)
        ours["w"].grad, theirs.grad = g.clone(), g.clone()
        optimizer.step(1e-2)
        reference.step()
    torch.testing.assert_close(ours["w"], theirs, rtol=1e-6, atol=1e-7)


def test_learning_rates():
    assert learning_rate(OptimConfig(lr=1.0), 10**6, 0.9) == 1.0
    warm = OptimConfig(lr=1.0, warmup=10)
    assert [learning_rate(warm, s, 0.0) for s in (0, 4, 9, 20)] == [0.1, 0.5, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 5, 0.0) == 1.0
    assert learning_rate(cosine, 5, 0.5) == pytest.approx(0.5)
    assert learning_rate(cosine, 5, 1.0) == pytest.approx(0.0)
