"""Masks, loss, optimizer groups, schedule; and a generator that learns sixteen rows by heart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from flowmo.config import ConfigError
from flowmo.data.tokens import TokenBatches, TokenCache, TokenCacheError, TokenHeader, TokenLayout
from flowmo.generator import (
    Generator,
    GeneratorConfig,
    NetworkConfig,
    TokenSamplerConfig,
    fit,
    generator_loss,
    sample_tokens,
)
from flowmo.generator.stage import (
    GeneratorOptimConfig,
    MaskLossConfig,
    build_generator,
    build_optimizer,
    check_tokens,
    ema_decay,
    learning_rate,
    random_masks,
)

NETWORK = NetworkConfig(tokens=16, bits=4, classes=16, hidden=64, depth=2, heads=2)


class Table(nn.Module):
    """Stands for a generator: its logits are a parameter, and it remembers what it was given."""

    def __init__(self, batch: int, config: NetworkConfig = NETWORK) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Parameter(torch.zeros(batch, config.tokens, config.codes))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.ids, self.labels = ids, labels
        return self.logits


def rows(batch: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    return torch.randint(0, 16, (batch, 16), generator=source), torch.arange(batch) % 16


def test_masks_have_exactly_the_drawn_count():
    source = torch.Generator().manual_seed(0)
    masks = random_masks(4000, 512, source)
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    expected = [max(1, round(512 * 2 / math.pi * math.acos(float(x)))) for x in u]
    # one value in thousands may lie within fp32 rounding of a half
    assert sum(int(m) != e for m, e in zip(masks.sum(1), expected)) <= 2
    assert masks.sum(1).min() >= 1


def test_mean_mask_ratio():
    ratio = random_masks(40_000, 64, torch.Generator().manual_seed(0)).float().mean()
    # 2 / pi; the ratio's standard deviation is 0.31, so 0.005 is three standard errors of 40,000 draws
    assert abs(float(ratio) - 2 / math.pi) < 0.005


def test_masks_fall_on_every_place_alike():
    hits = random_masks(20_000, 16, torch.Generator().manual_seed(1)).float().mean(0)
    assert (hits - hits.mean()).abs().max() < 5 * 0.5 / 20_000**0.5  # five standard errors, at most


def test_at_least_one_token_is_masked(monkeypatch):
    monkeypatch.setattr(torch, "arccos", lambda u: torch.zeros_like(u))
    assert (random_masks(9, 16).sum(1) == 1).all()


@pytest.mark.parametrize("weight", [0.1, 0.0, 1.0])
def test_gradient_at_known_tokens_is_scaled(weight):
    tokens, labels = rows(64)
    model = Table(64)
    config = MaskLossConfig(unmasked_weight=weight)
    generator_loss(model, tokens, labels, config, torch.Generator().manual_seed(0))["total"].backward()
    norms = model.logits.grad.norm(dim=-1)  # at equal logits, the same for every target
    masked = model.ids == NETWORK.mask_id
    assert masked.any() and not masked.all()
    assert torch.equal(model.ids[~masked], tokens[~masked])
    top = float(norms[masked].mean())
    torch.testing.assert_close(norms, torch.where(masked, top, weight * top), rtol=1e-5, atol=1e-9)


def test_loss_of_a_uniform_guess_and_its_floor():
    network = NetworkConfig(tokens=16, bits=9, classes=16, hidden=8, depth=2, heads=1)
    tokens = torch.randint(0, 512, (8, 16), generator=torch.Generator().manual_seed(0))
    model = Table(8, network)
    losses = generator_loss(model, tokens, torch.arange(8), MaskLossConfig())
    # the weighted mean of equal numbers, whatever the masks
    assert losses["total"].item() == pytest.approx(math.log(512), abs=1e-4)
    assert float(losses["masked"]) == pytest.approx(math.log(512), abs=1e-4)
    best = torch.full((8, 16, 512), math.log(0.1 / 512)).scatter(-1, tokens[..., None], math.log(0.9 + 0.1 / 512))
    with torch.no_grad():
        model.logits.copy_(best)
    losses = generator_loss(model, tokens, torch.arange(8), MaskLossConfig())
    assert losses["total"].item() == pytest.approx(0.947, abs=5e-4)  # the entropy of the smoothed target
    assert float(losses["accuracy"]) == 1.0


def test_loss_is_the_weighted_mean_over_the_whole_batch():
    tokens, labels = rows(32)
    model = Table(32)
    with torch.no_grad():
        model.logits.normal_(generator=torch.Generator().manual_seed(3))
    total = generator_loss(model, tokens, labels, MaskLossConfig(), torch.Generator().manual_seed(4))["total"]
    numerator = denominator = 0.0
    log_p = model.logits.detach().double().log_softmax(-1)
    for b in range(32):
        for n in range(16):
            weight = 1.0 if model.ids[b, n] == NETWORK.mask_id else 0.1
            target = 0.9 * log_p[b, n, tokens[b, n]] + 0.1 * log_p[b, n].mean()
            numerator, denominator = numerator - weight * float(target), denominator + weight
    assert total.item() == pytest.approx(numerator / denominator, rel=1e-5)


def test_classes_are_dropped():
    tokens, _ = rows(1)
    n = 20_000
    model = Table(1)
    model.forward = lambda ids, labels: (setattr(model, "labels", labels), model.logits.expand(n, -1, -1))[1]
    labels = torch.full((n,), 3)
    generator_loss(model, tokens.expand(n, -1), labels, MaskLossConfig(), torch.Generator().manual_seed(0))
    dropped = (model.labels == NETWORK.null_class).float().mean()
    assert abs(float(dropped) - 0.1) < 5 * (0.09 / n) ** 0.5  # five standard errors
    assert set(model.labels.tolist()) == {3, NETWORK.null_class}


def test_what_decays():
    model = Generator(NETWORK)
    groups = build_optimizer(model, GeneratorOptimConfig()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    plain = {names[id(p)] for p in groups[1]["params"]}
    assert groups[0]["weight_decay"] == 0.03 and groups[1]["weight_decay"] == 0.0
    assert groups[0]["betas"] == (0.9, 0.96) and not decayed & plain and len(decayed | plain) == len(names)
    assert {"embedding.weight", "position_embedding", "norm.scale", "head.bias"} <= plain
    parts = ("qkv", "proj", "fc1", "fc2")
    blocks = ["in_blocks.0", "mid_block", "out_blocks.0"]
    assert decayed == {f"{b}.{p}.weight" for b in blocks for p in parts} | {"head.weight", "out_blocks.0.skip.weight"}


def test_learning_rate_and_average():
    config = GeneratorOptimConfig()
    rates = [learning_rate(config, s, 110_000) for s in (0, 4_999, 9_999, 10_000, 60_000, 110_000)]
    assert rates == pytest.approx([1e-8, 5e-5, 1e-4, 1e-4, 5.5e-5, 1e-5])
    assert learning_rate(GeneratorOptimConfig(schedule="constant"), 100_000, 110_000) == 1e-4
    assert [ema_decay(config, s) for s in (0, 90)] == [0.1, 0.91]
    assert ema_decay(config, 10**6) == 0.9999


def test_a_generator_for_a_cache_and_one_for_another(tmp_path):
    layout = TokenLayout(16, 4, 4, tokenizer="a" * 64)
    cache = TokenCache.create(tmp_path, TokenHeader(layout, 1, 1, "center", 32, "float32", ["x", "y"]), [0])
    model = build_generator(cache, NETWORK)
    assert model.layout == layout and model.class_names == ["x", "y"] and model.head.weight.device.type == "cpu"
    for sizes, word in (
        ({"tokens": 8}, "8 tokens of 4 bits and 16 of 4"),
        ({"bits": 5}, "16 tokens of 5 bits and 16 of 4"),
        ({"classes": 1}, "classes: 1 and 2"),
    ):
        with pytest.raises(TokenCacheError, match=word):
            build_generator(cache, replace(NETWORK, **sizes))
    check_tokens(model, cache)
    cache.labels[0] = 16
    with pytest.raises(TokenCacheError, match="classes: 16 and 17"):
        check_tokens(model, cache)
    cache.labels[0] = 0
    model.layout = replace(layout, tokenizer="b" * 64)
    with pytest.raises(TokenCacheError, match="tokenizer: bbbbbbbbbbbb and aaaaaaaaaaaa"):
        check_tokens(model, cache)
    model.layout = replace(layout, grouping="contiguous")
    with pytest.raises(TokenCacheError, match="grouping"):
        check_tokens(model, cache)
    model.layout, model.class_names = layout, ["y", "x"]
    with pytest.raises(TokenCacheError, match="class names"):
        check_tokens(model, cache)


def test_the_configuration_works_with_omegaconf():
    tree = OmegaConf.merge(OmegaConf.structured(GeneratorConfig), OmegaConf.from_dotlist(["sampler.steps=8"]))
    config = OmegaConf.to_object(tree)
    assert isinstance(config, GeneratorConfig) and config.sampler.steps == 8
    config.check()
    # the recommended recipe
    assert (config.optim.lr, config.batch, tuple(config.optim.betas)) == (1e-4, 128, (0.9, 0.96))
    assert config.steps == 300 * 1_281_167 // 128


def test_options_out_of_range():
    config = GeneratorConfig(network=NETWORK)
    config.loss.class_dropout = 1.5
    with pytest.raises(ConfigError, match=r"class_dropout=1\.5"):
        config.check()
    config = GeneratorConfig(optim=GeneratorOptimConfig(schedule="linear"))
    with pytest.raises(ConfigError, match="linear"):
        config.check()


def test_a_loss_that_is_not_finite_ends_training():
    model = Generator(NETWORK)
    with torch.no_grad():
        model.head.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"lower optim\.lr"):
        fit(model, iter([rows(4)]), GeneratorConfig(network=NETWORK, steps=1))


def test_sixteen_rows_are_learned_by_heart(tmp_path):
    """Over 99 % of half-masked rows are completed rightly, and every row comes back when its class is asked for."""
    tokens, labels = rows(16)
    header = TokenHeader(TokenLayout(16, 4, 4), 16, 1, "center", 32, "float32", [str(i) for i in range(16)])
    cache = TokenCache.create(tmp_path / "tokens", header, labels.tolist())
    cache.write(list(range(16)), tokens[:, None])
    torch.manual_seed(0)
    model = Generator(NETWORK, header.layout)
    config = GeneratorConfig(
        network=NETWORK, batch=32, steps=250, optim=GeneratorOptimConfig(lr=3e-3, warmup=20, ema_decay=0.98)
    )
    seen: list[tuple[int, float]] = []
    average = fit(
        model, TokenBatches(TokenCache.open(tmp_path / "tokens"), 32), config,
        report=lambda step, means: seen.append((step, means["total"])), report_every=50,
    )  # fmt: skip
    assert [step for step, _ in seen] == [50, 100, 150, 200, 250] and seen[-1][1] < seen[0][1]
    assert any(not torch.equal(average[k], p) for k, p in model.named_parameters())
    model.load_state_dict(average)

    masked = torch.rand(64, 16, 16, generator=torch.Generator().manual_seed(1)).argsort(-1) < 8
    with torch.no_grad():
        ids = tokens.expand(64, -1, -1).masked_fill(masked, NETWORK.mask_id)
        guesses = model(ids.flatten(0, 1), labels.repeat(64)).argmax(-1).view_as(ids)
    right = (guesses == tokens)[masked].float().mean()
    assert float(right) > 0.99

    config = TokenSamplerConfig(steps=8, randomize_temperature=1.0)
    drawn = sample_tokens(model, labels, config, generator=torch.Generator().manual_seed(0))
    assert (drawn == tokens).float().mean() > 0.99
    nearest = (drawn[:, None] == tokens[None]).sum(-1).argmax(1)
    assert torch.equal(nearest, labels)
