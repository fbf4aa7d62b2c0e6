"""Masks, loss, optimizer and schedule; what a cache and a generator say about each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowmo.config import ConfigError, parse
from flowmo.data.tokens import TokenCache, TokenCacheError, TokenHeader, TokenLayout
from flowmo.generator import Generator, NetworkConfig, generator_loss, stage
from flowmo.generator.loss import random_masks
from flowmo.generator.optim import AdamWEMA, decays, ema_decay, learning_rate
from flowmo.generator.stage import MaskedTokens, build_generator, check_tokens, forward_flops
from flowmo.generator_config import GeneratorOptimConfig, MaskLossConfig

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


def test_the_compiled_loss_is_one_graph_with_the_same_gradients():
    """After the random draws: PyTorch cannot trace a torch.Generator."""
    torch.manual_seed(0)
    model = Generator(NETWORK)
    tokens, labels = torch.randint(0, 16, (4, 16)), torch.arange(4) % NETWORK.classes
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gradients = []
    for loss in (generator_loss, torch.compile(generator_loss, backend="aot_eager")):
        model.zero_grad()
        loss(model, tokens, labels, MaskLossConfig(), torch.Generator().manual_seed(0))["total"].backward()
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_decays():
    model = Generator(NETWORK)
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    plain = {name for name, _ in model.named_parameters()} - decayed
    assert {"embedding.weight", "position_embedding", "norm.scale", "head.bias"} <= plain
    parts = ("qkv", "proj", "fc1", "fc2")
    blocks = ["in_blocks.0", "mid_block", "out_blocks.0"]
    assert decayed == {f"{b}.{p}.weight" for b in blocks for p in parts} | {"head.weight", "out_blocks.0.skip.weight"}


def test_the_optimizer_is_adamw_and_keeps_the_average():
    """Against torch.optim.AdamW: both do the same handful of fp32 operations on every number, in another order."""
    torch.manual_seed(0)
    named = {"a.weight": nn.Parameter(torch.randn(8, 8)), "norm.scale": nn.Parameter(torch.randn(8))}
    config = GeneratorOptimConfig(weight_decay=0.3)
    ours = AdamWEMA(named, config)
    theirs = {k: nn.Parameter(p.detach().clone()) for k, p in named.items()}
    groups = [{"params": [theirs["a.weight"]], "weight_decay": 0.3}, {"params": [theirs["norm.scale"]]}]
    adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=0.0)
    average = {k: p.detach().clone() for k, p in named.items()}
    for step in range(5):
        lr = 0.02 * (step + 1)
        for key, p in named.items():
            p.grad = torch.randn_like(p)
            theirs[key].grad = p.grad.clone()
        ours.step(lr)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        for key, p in theirs.items():
            average[key].lerp_(p.detach(), 1 - (1 + step) / (10 + step))
    for key, p in named.items():
        # weights of size 1 after five steps, each with a few roundings of 2^-24
        torch.testing.assert_close(p, theirs[key], rtol=0, atol=3e-6)
        torch.testing.assert_close(ours.average[key], average[key], rtol=0, atol=3e-6)
        assert p.grad is None


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


class Known(Table):
    """A guess at every place that is always the same, whatever is masked."""

    def __init__(self) -> None:
        super().__init__(1)
        self.logits.data = 3 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.device, self.calls = torch.device("cpu"), []

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((ids, labels))
        return self.logits.expand(len(ids), -1, -1)


@torch.no_grad()
def test_held_out_tokens_are_measured_where_they_are_masked(tmp_path, monkeypatch):
    """The mean over all masked places of the first pictures, in batches of another size each, with their classes."""
    monkeypatch.setattr(stage, "HELDOUT_BATCH", 2)
    header = TokenHeader(TokenLayout(16, 4, 4), 5, 1, "center", 32, "float32", [])
    cache = TokenCache.create(tmp_path, header, [3, 1, 4, 1, 5])
    cache.write(range(5), rows(5)[0][:, None])
    model, measure = Known(), MaskedTokens(cache, 3, seed=1)
    found = measure(model)
    assert [labels.tolist() for _, labels in model.calls] == [[3, 1], [4]]
    masked = torch.cat([ids for ids, _ in model.calls]) == NETWORK.mask_id
    tokens, logits = rows(5)[0][:3], model.logits.detach().expand(3, -1, -1)
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(3, 16)
    assert len(set(masked.sum(1).tolist())) > 1
    assert found["masked"] == pytest.approx(float(entropy[masked].mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == tokens)[masked].float().mean()), rel=1e-5)
    assert measure(model) == found != MaskedTokens(cache, 3, seed=2)(model)


def test_the_recommended_recipe():
    config = parse(["maskgit", "data.tokens=tokens", "generator.sampler.steps=8"])
    optim = config.generator.optim
    assert (config.generator.sampler.steps, config.stage, config.run) == (8, "maskgit", "runs/maskgit")
    assert (optim.lr, config.data.batch, tuple(optim.betas)) == (1e-4, 128, (0.9, 0.96))
    assert config.trainer.steps == 300 * 1_281_167 // 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["maskgit", "generator.loss.class_dropout=1.5"], r"class_dropout=1\.5"),
        (["maskgit", "generator.optim.schedule=linear"], "cosine or constant"),
        (["maskgit", "generator.optim.clip=0"], "clip"),
        (["maskgit", "generator.network.depth=3"], "even number"),
        (["maskgit", "optim.lr=1"], r"does not read optim\.lr; did you mean generator\.optim\.lr\?"),
        (["maskgit", "data.path=photos"], r"does not read data\.path; its data are data\.tokens"),
        (["lo", "data.tokens=tokens"], r"stage=pretrain does not read data\.tokens"),
        (["lo", "stage=maskgit"], "preset lo has no stage=maskgit; the presets of that stage are maskgit"),
        (["maskgit", "stage=posttrain"], "preset maskgit has no stage=posttrain"),
    ],
)
def test_settings_that_cannot_be(arguments, words):
    with pytest.raises(ConfigError, match=words):
        parse(arguments)


def test_operations_are_those_that_pytorch_counts():
    network = NetworkConfig(tokens=64, bits=5, classes=3, hidden=64, depth=4, heads=2)
    model = Generator(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    attention = 4.0 * 65**2 * 64 * 5  # the CPU's fused attention is not counted
    assert forward_flops(network) == counter.get_total_flops() + attention
