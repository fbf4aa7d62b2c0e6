"""The sampler: exact counts, guidance, noise, and what must never change."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flowmo.config import ConfigError
from flowmo.generator import Generator, NetworkConfig, SamplerPlan, TokenSamplerConfig, sample_tokens
from flowmo.generator.sampler import guidance_scales, guided_logits, gumbel_like, mask_counts, unmask

# Tokens revealed at each of 64 steps of 512 tokens, of the arccos schedule; counted from the published sampler.
REVEALED = [
    6, 5, 5, 5, 5, 5, 5, 5, 5, 6, 5, 5, 5, 5, 6, 5, 5, 5, 6, 5, 5, 6, 5, 6, 5, 6, 5, 6, 6, 6, 5, 6,
    6, 6, 6, 6, 6, 7, 6, 7, 6, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 10, 10, 11, 11, 13, 14, 15, 19, 24, 57,
]  # fmt: skip
NETWORK = NetworkConfig(tokens=24, bits=4, classes=3, hidden=32, depth=2, heads=2)


def network(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    model = Generator(NETWORK)
    with torch.no_grad():
        model.head.weight.mul_(20)  # logits that differ by more than the noise
    return model


def test_tokens_revealed_at_each_step():
    counts = [512, *mask_counts(512, 64)]
    assert [a - b for a, b in itertools.pairwise(counts)] == REVEALED and sum(REVEALED) == 512


@pytest.mark.parametrize("schedule", ["arccos", "cosine", "proportional"])
@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1, 4), (7, 7), (32, 64), (512, 8), (256, 255)])
def test_every_schedule_ends_with_nothing_masked(schedule, tokens, steps):
    counts = [tokens, *mask_counts(tokens, steps, schedule)]
    assert len(counts) == steps + 1 and counts[-1] == 0
    for before, after in itertools.pairwise(counts):
        assert 0 <= after < before or before == after == 1


def test_cosine_counts():
    counts = [512, *mask_counts(512, 64, "cosine")]
    revealed = [a - b for a, b in itertools.pairwise(counts)]
    assert revealed[:6] == [1] * 6 and revealed[-1] == 12 and max(revealed) in (12, 13)


@pytest.mark.parametrize("draw", ["annealed", "categorical"])
@pytest.mark.parametrize("confidence", ["logit", "log_prob"])
def test_known_tokens_stay_and_counts_are_exact(draw, confidence):
    trace: list[Tensor] = []
    config = TokenSamplerConfig(steps=9, draw=draw, confidence=confidence)
    out = sample_tokens(
        network(), torch.tensor([0, 1, 2, 1]), config, generator=torch.Generator().manual_seed(0), trace=trace
    )
    assert out.shape == (4, 24) and out.dtype == torch.int64 and 0 <= out.min() and out.max() < 16
    known = torch.zeros(4, 24, dtype=torch.bool)
    values = torch.zeros(4, 24, dtype=torch.int64)
    for ids, count in zip(trace, mask_counts(24, 9)):
        assert ((ids == NETWORK.mask_id).sum(1) == count).all()
        assert torch.equal(ids[known], values[known])
        known, values = ids != NETWORK.mask_id, ids
    assert torch.equal(trace[-1], out)


@pytest.mark.parametrize("temperature", [0.0, 2.8])
def test_counts_are_exact_where_all_logits_tie(temperature):
    trace: list[Tensor] = []
    config = TokenSamplerConfig(steps=6, randomize_temperature=temperature)
    unmask(lambda ids, y: torch.zeros(*ids.shape, 16), NETWORK, torch.zeros(5, dtype=torch.int64), config, trace=trace)
    for ids, count in zip(trace, mask_counts(24, 6)):
        assert ((ids == NETWORK.mask_id).sum(1) == count).all()


def test_the_most_confident_draws_are_kept():
    """Without noise: position n prefers code n % 16 by n, so the largest n are revealed first."""
    preference = torch.zeros(24, 16)
    preference[torch.arange(24), torch.arange(24) % 16] = torch.arange(24) + 1.0
    trace: list[Tensor] = []
    config = TokenSamplerConfig(steps=6, randomize_temperature=0.0, guidance=0.0)
    unmask(lambda ids, y: preference.expand(len(y), -1, -1), NETWORK, torch.tensor([0]), config, trace=trace)
    for ids, count in zip(trace, mask_counts(24, 6)):
        assert (ids[0, :count] == NETWORK.mask_id).all()
        assert torch.equal(ids[0, count:], torch.arange(count, 24) % 16)


def test_guidance_zero_is_the_conditional_model_alone():
    calls = []

    def logits(ids: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.tolist())
        return torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(len(calls)))

    ids, labels = torch.full((2, 24), 16), torch.tensor([1, 2])
    plain = guided_logits(logits, ids, labels, 3, 0.0)
    assert calls == [[1, 2]] and plain.shape == (2, 24, 16)
    guided_logits(logits, ids, labels, 3, 1.5)
    assert calls[1] == [1, 2, 3, 3]


def test_guidance_with_equal_passes_is_the_conditional_model():
    logits = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    same = guided_logits(lambda ids, y: logits.repeat(2, 1, 1), torch.full((2, 24), 16), torch.tensor([0, 1]), 3, 1.5)
    assert torch.equal(same, logits)


def test_one_doubled_batch_equals_two_passes():
    model, labels = network(), torch.tensor([0, 2])
    ids = torch.randint(0, 17, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_class, without = model(ids, labels), model(ids, torch.full((2,), 3))
        guided = guided_logits(model, ids, labels, 3, 1.5)
        interpolated = without + 2.5 * (with_class - without)
    assert (with_class - without).abs().max() > 1e-3  # or the test says nothing
    expected = with_class + 1.5 * (with_class - without)
    # fp32 matrix products of another batch size round otherwise: 1e-6 of logits of order 1, times 1 + 2 * 1.5
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(guided, interpolated, rtol=1e-5, atol=2e-5)


def test_guidance_forms_and_decays():
    def scales(**options) -> list[float]:
        return guidance_scales(TokenSamplerConfig(steps=4, **options))

    assert scales() == [1.5] * 4
    assert scales(guidance=2.5, guidance_form="interpolate") == [1.5] * 4
    assert scales(guidance=1.0, guidance_form="interpolate") == [0.0] * 4
    assert scales(guidance=4.0, guidance_decay="linear") == [0.0, 1.0, 2.0, 3.0]
    cosine = [(1 - math.cos(math.pi * (i / 4) ** 3)) / 2 for i in range(4)]
    # interpolation that starts at weight 1, the plain conditional model: w = 1 + (s - 1) (1 - cos(pi (i / S)^3)) / 2
    assert scales(guidance=6.9, guidance_form="interpolate", guidance_decay="cosine") == pytest.approx(
        [(1 + 5.9 * c) - 1 for c in cosine]
    )


def test_where_in_a_step_the_decays_count():
    def scales(at: str) -> list[float]:
        return guidance_scales(TokenSamplerConfig(steps=4, guidance=4.0, guidance_decay="linear", guidance_at=at))

    assert scales("start") == [0.0, 1.0, 2.0, 3.0]
    assert scales("end") == [1.0, 2.0, 3.0, 4.0]
    assert scales("span") == pytest.approx([0.0, 4 / 3, 8 / 3, 4.0])
    assert guidance_scales(TokenSamplerConfig(steps=1, guidance_decay="linear", guidance_at="span")) == [0.0]


def test_proportional_counts():
    """Reveals numbers in proportion to arccos of 1 .. 0 in equal steps, each rounded and at least one."""
    counts = [1024, *mask_counts(1024, 32, "proportional")]
    revealed = [a - b for a, b in itertools.pairwise(counts)]
    weights = [math.acos(1 - i / 31) for i in range(32)]
    assert revealed[:-1] == [max(1, round(1024 * w / sum(weights))) for w in weights][:-1]
    assert sum(revealed) == 1024 and abs(revealed[-1] - 1024 * weights[-1] / sum(weights)) < 16  # 31 roundings


def noise_and_scores(monkeypatch, **options) -> tuple[list[float], list[float]]:
    """Of every step, the factor of the draws' noise and that of the confidences', with noise of ones."""
    seen: list[Tensor] = []

    def ones(x: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.ones_like(x)
        seen.append(noise)
        return noise

    factors: tuple[list[float], list[float]] = ([], [])
    real = torch.Tensor.__rmul__

    def watched(self: Tensor, other: float) -> Tensor:
        if any(self is s for s in seen):
            factors[0 if self.ndim == 3 else 1].append(other)
        return real(self, other)

    monkeypatch.setattr("flowmo.generator.sampler.gumbel_like", ones)
    monkeypatch.setattr(torch.Tensor, "__rmul__", watched)
    config = TokenSamplerConfig(steps=4, guidance=0.0, **options)
    unmask(lambda ids, y: torch.zeros(*ids.shape, 16), NETWORK, torch.tensor([0]), config)
    return factors


@pytest.mark.parametrize(
    ("options", "draws", "confidences"),
    [
        ({"randomize_temperature": 4.0}, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ({"randomize_temperature": 4.0, "temperature_at": "start"}, [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0]),
        ({"randomize_temperature": 3.0, "temperature_at": "span"}, [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ({"randomize_temperature": 4.0, "confidence_noise": 0.0}, [3.0, 2.0, 1.0], [0.0, 0.0, 0.0]),
        ({"draw": "categorical", "confidence_noise": 8.0}, [1.0] * 4, [6.0, 4.0, 2.0]),
    ],
)
def test_temperatures_of_draws_and_confidences(monkeypatch, options, draws, confidences):
    found = noise_and_scores(monkeypatch, **options)
    assert found[0] == pytest.approx(draws) and found[1] == pytest.approx(confidences)


def test_softmax_temperature_divides_the_logits():
    """Tokens drawn categorically: a temperature of 2 draws from the softmax of half the logits."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    network = NetworkConfig(tokens=1, bits=2, classes=1, hidden=8, depth=2, heads=1)
    options = {"steps": 1, "guidance": 0.0, "draw": "categorical"}
    config = TokenSamplerConfig(softmax_annealing=False, softmax_temperature=2.0, **options)
    n = 40_000
    labels = torch.zeros(n, dtype=torch.int64)
    drawn = unmask(
        lambda ids, y: logits.expand(len(y), 1, -1), network, labels, config, torch.Generator().manual_seed(0)
    )
    shares = torch.bincount(drawn.flatten(), minlength=4) / n
    # five standard errors, at most
    assert (shares - (logits / 2).softmax(0)).abs().max() < 5 * 0.5 / n**0.5


def test_gumbel_noise():
    x = torch.zeros(400_000, dtype=torch.bfloat16)
    noise = gumbel_like(x, torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    # mean: Euler's constant, variance: pi^2 / 6; five standard errors of 4e5 samples (kurtosis 5.4)
    assert abs(float(noise.mean()) - 0.5772) < 5 * 1.2825 / 400_000**0.5
    assert abs(float(noise.var()) - math.pi**2 / 6) < 5 * (math.pi**2 / 6) * ((5.4 - 1) / 400_000) ** 0.5
    assert noise.max() > 10  # a bf16 uniform would end at 5.5
    assert noise.unique().numel() > 0.95 * noise.numel()


def test_gumbel_noise_at_the_ends_of_its_uniform(monkeypatch):
    for value in (0.0, 1.0):
        with monkeypatch.context() as m:
            m.setattr(torch, "rand", lambda *a, value=value, **k: torch.full((3,), value))
            assert gumbel_like(torch.zeros(3), None).isfinite().all()


def test_draws_follow_the_softmax():
    """One token, one step: categorical draws at the annealed temperature 0.5; annealed draws are greedy at the end."""
    wide = NetworkConfig(tokens=1, bits=2, classes=1, hidden=8, depth=2, heads=1)
    scores = torch.tensor([0.3, -0.2, 0.6, 0.0])
    n = 100_000
    labels = torch.zeros(n, dtype=torch.int64)
    source = torch.Generator().manual_seed(0)

    def draw(**options) -> Tensor:
        config = TokenSamplerConfig(steps=1, guidance=0.0, **options)
        drawn = unmask(lambda ids, y: scores.expand(len(y), 1, 4), wide, labels, config, source)
        return drawn.flatten().bincount(minlength=4) / n

    expected = torch.softmax(scores / 0.5, 0)
    # five standard errors of a frequency
    assert ((draw(draw="categorical") - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    unannealed = torch.softmax(scores, 0)
    frequencies = draw(draw="categorical", softmax_annealing=False)
    assert ((frequencies - unannealed).abs() < 5 * (unannealed * (1 - unannealed) / n).sqrt()).all()
    assert draw().tolist() == [0, 0, 1, 0]


def test_annealed_draws_are_categorical_at_the_noise_temperature():
    """Of two steps, the first draws at tau = R / 2, with logits divided by 0.5 + 0.8 / 2."""
    pair = NetworkConfig(tokens=2, bits=2, classes=1, hidden=8, depth=2, heads=1)
    # position 0 is so sure of itself that the first step always keeps it, whatever it has drawn
    scores = torch.stack([torch.tensor([900.3, 899.8, 900.6, 900.0]), torch.zeros(4)])
    n, trace = 100_000, []
    config = TokenSamplerConfig(steps=2, guidance=0.0, randomize_temperature=2.0)
    unmask(
        lambda ids, y: scores.expand(len(y), -1, -1), pair, torch.zeros(n, dtype=torch.int64), config,
        torch.Generator().manual_seed(0), trace,
    )  # fmt: skip
    frequencies = trace[0][:, 0].bincount(minlength=4) / n
    expected = torch.softmax(scores[0].double() / 0.9 / 1.0, 0)
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_the_loop_uses_no_host_values():
    """What makes it one CUDA graph: no number of a tensor is asked for on the way."""

    class Refuses(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
            assert function not in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
            return function(*args, **(kwargs or {}))

    model, labels = network(), torch.tensor([0, 1])
    with Refuses(), torch.no_grad():
        unmask(model, NETWORK, labels, TokenSamplerConfig(steps=5))


def test_plan_repeats_by_seed_and_pads():
    model = network()
    config = TokenSamplerConfig(steps=5)
    plan = SamplerPlan(model, 4, config)
    assert not plan.captured and "eager" in plan.describe()
    labels = torch.tensor([2, 0, 1, 1])
    first, again, other = plan(labels, seed=1), plan(labels, seed=1), plan(labels, seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    direct = sample_tokens(model, labels, config, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, direct)
    assert torch.equal(plan(labels[:2], seed=1), first[:2])  # the noise of a picture is that of its place
    assert not torch.equal(plan(labels), plan(labels))


def test_threads_share_a_plan():
    """A server's threads: the tokens of a call are those of its own labels and seed, as if it had been alone."""
    plan = SamplerPlan(network(), 4, TokenSamplerConfig(steps=6))
    labels = torch.randint(0, 3, (24, 4), generator=torch.Generator().manual_seed(0))

    def work(i: int) -> Tensor:
        return plan(labels[i, : 2 + i % 3], seed=i)

    alone = [work(i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(24)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))

    plan.generator.manual_seed(0)
    in_turn = [plan(labels[0]) for _ in range(8)]
    plan.generator.manual_seed(0)
    with ThreadPoolExecutor(4) as pool:
        unseeded = list(pool.map(lambda _: plan(labels[0]), range(8)))
    # whoever came first: the noise is continued, and none of it is used twice
    assert sorted(t.tolist() for t in unseeded) == sorted(t.tolist() for t in in_turn)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"guidance_form": "shifted"}, "guidance_form"),
        ({"schedule": "linear"}, "arccos"),
        ({"steps": 0}, "steps=0"),
        ({"randomize_temperature": -1.0}, "at least 0"),
        ({"draw": "x"}, "draw"),
        ({"confidence": "x"}, "confidence"),
    ],
)
def test_options_out_of_range(options, word):
    with pytest.raises(ConfigError, match=word):
        sample_tokens(network(), torch.tensor([0]), TokenSamplerConfig(**options))


def test_labels_out_of_range():
    for labels in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match="labels"):
            sample_tokens(network(), labels)
    with pytest.raises(ValueError, match="the plan was made for 1"):
        SamplerPlan(network(), 1)(torch.tensor([0, 1]))


@pytest.mark.gpu
def test_captured_plan():
    model = network().cuda()
    config = TokenSamplerConfig(steps=6)
    plan, eager = SamplerPlan(model, 4, config), SamplerPlan(model, 4, config, graph=False)
    assert plan.captured and not eager.captured
    labels = torch.tensor([2, 0, 1, 1])
    first = plan(labels, seed=1)
    assert torch.equal(first, plan(labels, seed=1)) and not torch.equal(first, plan(labels))
    assert 0 <= first.min() and first.max() < 16
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[5] = 100.0
    assert (plan(labels) == 5).all()  # the graph reads the weights where they are
    assert torch.equal(plan(labels[:2]), eager(labels[:2]))


@pytest.mark.gpu
def test_threads_and_streams_share_a_captured_plan():
    plan = SamplerPlan(network().cuda(), 4, TokenSamplerConfig(steps=6))
    labels = torch.randint(0, 3, (24, 4), generator=torch.Generator().manual_seed(0)).cuda()
    alone = [plan(labels[i], seed=i) for i in range(24)]
    torch.cuda.synchronize()

    def work(i: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            tokens = plan(labels[i], seed=i)
            torch.cuda.current_stream().synchronize()
        return tokens

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(24)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
