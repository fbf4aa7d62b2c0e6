"""Stage 2 in the training loop: it learns by heart, resumes bit for bit, and two processes train as one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.config import Config, ConfigError, parse
from flowmo.data.tokens import TokenCache, TokenCacheError, TokenHeader, TokenLayout, layout_of
from flowmo.generator import Generator, TokenSamplerConfig, sample_tokens
from flowmo.generator.loss import generator_loss
from flowmo.training import checkpoint
from flowmo.training.loop import Trainer, noise_seed
from flowmo.training.report import report
from tests.processes import together
from tests.training.test_distributed import close, lines, state

TRAIN = "import sys; from flowmo.train import main; main(sys.argv[1:])"
SIZES = {"tokens": 16, "bits": 4, "classes": 16, "hidden": 64, "depth": 2, "heads": 2}


def rows(count: int, bits: int = 4, tokens: int = 16) -> torch.Tensor:
    return torch.randint(0, 2**bits, (count, tokens), generator=torch.Generator().manual_seed(5))


def make_cache(folder: Path, layout: TokenLayout, count: int = 16) -> Path:
    header = TokenHeader(layout, count, 1, "center", 32, "float32", [f"class {i}" for i in range(count)])
    cache = TokenCache.create(folder, header, list(range(count)))
    cache.write(list(range(count)), rows(count, layout.bits, layout.tokens)[:, None])
    return folder


@pytest.fixture
def tokens(tmp_path) -> Path:
    return make_cache(tmp_path / "tokens", TokenLayout(16, 4, 4, tokenizer="a" * 64))


def arguments(run: Path, tokens: Path, steps: int, *more: str) -> list[str]:
    return [
        *("maskgit-quickstart", f"run={run}", f"data.tokens={tokens}", f"trainer.steps={steps}", "trainer.threads=1"),
        *("trainer.precision=fp32", "trainer.log_every=1", "generator.sampler.steps=4"),
        *(f"generator.network.{k}={v}" for k, v in SIZES.items()),
        *more,
    ]


def config(run: Path, tokens: Path, steps: int, *more: str) -> Config:
    return parse(arguments(run, tokens, steps, *more))


def fit_until(trainer: Trainer, step: int) -> None:
    """Train, and stop after a step as SIGTERM stops it."""
    train_step = trainer.train_step

    def stopping():
        out = train_step()
        trainer._stop = trainer.step == step
        return out

    trainer.train_step = stopping  # type: ignore[method-assign]
    trainer.fit()


def test_resume_is_bit_for_bit(tmp_path, tokens):
    """Weights, both moments, average, data order, random states and every number of the log."""
    Trainer(config(tmp_path / "a", tokens, 8)).fit()
    fit_until(Trainer(config(tmp_path / "b", tokens, 8)), 3)
    assert [p.stem for p in checkpoint.list_checkpoints(tmp_path / "b")] == ["step_00000003"]
    torch.manual_seed(99)
    Trainer(config(tmp_path / "b", tokens, 8)).fit()
    a, b = state(tmp_path / "a", 8), state(tmp_path / "b", 8)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {k.split(".")[0] for k in a} == {"model", "exp_avg", "exp_avg_sq", "average"}
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and len(lines(tmp_path / "a")) == 8
    saved = [checkpoint.read(checkpoint.path_of(tmp_path / run, 8)) for run in "ab"]
    assert saved[0]["data"] == saved[1]["data"] and saved[0]["data"]["position"] == 8 * 32
    assert torch.equal(saved[0]["random"]["torch"], saved[1]["random"]["torch"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, tokens):
    more = "generator.optim.eps=1e-2"  # smooth: with the usual one, rounding decides the sign of small gradients
    Trainer(config(tmp_path / "one", tokens, 4, "trainer.accumulate=4", more)).fit()
    two = tmp_path / "two"
    together(TRAIN, *arguments(two, tokens, 4, "trainer.accumulate=2", more))
    close(tmp_path / "one", two, 4)
    assert len(lines(two)) == 4, "one process writes"
    positions = [checkpoint.read(checkpoint.path_of(tmp_path / run, 4))["data"]["position"] for run in ("one", "two")]
    assert positions == [4 * 32, 4 * 32]


def test_a_step_is_the_loss_clipped_and_annealed(tmp_path, tokens):
    trainer = Trainer(config(tmp_path / "run", tokens, 8, "generator.optim.clip=0.01"))
    position = trainer.data.state_dict()
    batch = next(trainer.data)
    trainer.data.load_state_dict(position)
    trainer.generator.manual_seed(noise_seed(0, 0, 0))
    losses = generator_loss(trainer.model, *batch, trainer.config.generator.loss, trainer.generator)
    losses["total"].backward()
    gradients = {k: p.grad.clone() for k, p in trainer.stage.trained.items()}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    trainer.model.zero_grad()
    given: list[tuple[dict[str, torch.Tensor], float]] = []
    trainer.optimizer.step = lambda lr, found_inf: given.append(  # type: ignore[method-assign]
        ({k: p.grad.clone() for k, p in trainer.stage.trained.items()}, lr)
    )
    means = trainer.train_step()
    torch.testing.assert_close(means["total"], losses["total"].detach())
    torch.testing.assert_close(means["gradient_norm"], norm)
    assert norm > 0.01 and given[0][1] == pytest.approx(2e-3 / 20)  # the first of 20 steps of warm-up
    for key, gradient in given[0][0].items():
        torch.testing.assert_close(gradient, gradients[key] * (0.01 / norm), rtol=1e-4, atol=1e-9)


def test_sixteen_rows_are_learned_by_heart(tmp_path, tokens):
    """Over 99 % of half-masked rows are completed rightly, and every row comes back when its class is asked for."""
    heldout = [f"heldout.path={tokens}", "heldout.every=125", "heldout.images=16", "heldout.metric=masked"]
    more = ["trainer.log_every=50", "generator.optim.lr=3e-3", "generator.optim.ema_decay=0.98", *heldout]
    run = tmp_path / "run"
    Trainer(config(run, tokens, 250, *more)).fit()
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [50, 100, 150, 200, 250] and log[-1]["loss"] < log[0]["loss"]
    curve = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    assert [r["step"] for r in curve] == [0, 125, 250] and curve[-1]["best"]
    # smoothed targets make the best prediction 0.9 + 0.1 / 16 sure, which training comes near from either side
    assert abs(curve[-1]["masked"] + math.log(0.9 + 0.1 / 16)) < 0.02
    assert "maskgit-quickstart, maskgit" in report(run)
    # The run is a generator that loads, and holds the averaged weights.
    model = Generator.from_pretrained(run)
    assert model.class_names[3] == "class 3" and model.layout.tokenizer == "a" * 64
    average = checkpoint.read(checkpoint.path_of(run, 250))["optimizer"]["average"]
    assert all(torch.equal(average[k], p) for k, p in model.named_parameters())

    expected, labels = rows(16), torch.arange(16)
    masked = torch.rand(64, 16, 16, generator=torch.Generator().manual_seed(1)).argsort(-1) < 8
    with torch.no_grad():
        ids = expected.expand(64, -1, -1).masked_fill(masked, model.config.mask_id)
        guesses = model(ids.flatten(0, 1), labels.repeat(64)).argmax(-1).view_as(ids)
    assert float((guesses == expected)[masked].float().mean()) > 0.99

    sampler = TokenSamplerConfig(steps=8, randomize_temperature=1.0)
    drawn = sample_tokens(model, labels, sampler, generator=torch.Generator().manual_seed(0))
    assert (drawn == expected).float().mean() > 0.99
    nearest = (drawn[:, None] == expected[None]).sum(-1).argmax(1)
    assert torch.equal(nearest, labels)

    start = Trainer(config(tmp_path / "more", tokens, 1, f"init={run}"))
    assert all(torch.equal(average[k], p) for k, p in start.model.named_parameters())


def test_grids_are_drawn_with_the_tokenizer_that_made_the_tokens(tmp_path):
    torch.manual_seed(0)
    FlowMo("tiny").save_pretrained(tmp_path / "tokenizer")
    tokens = make_cache(tmp_path / "tokens", layout_of(FlowMo.from_pretrained(tmp_path / "tokenizer")), count=6)
    more = ["generator.network.tokens=32", "generator.network.bits=9", "generator.network.classes=6"]
    more += ["trainer.sample_images=8", "sampler.steps=1"]
    run = tmp_path / "run"
    Trainer(config(run, tokens, 1, *more, f"generator.tokenizer={tmp_path / 'tokenizer'}")).fit()
    assert (run / "samples" / "step_00000001.png").stat().st_size > 1000
    Trainer(config(tmp_path / "without", tokens, 1, *more)).fit()
    assert not (tmp_path / "without" / "samples").exists()
    FlowMo("tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(TokenCacheError, match="did not make the tokens"):
        Trainer(config(tmp_path / "wrong", tokens, 1, *more, f"generator.tokenizer={tmp_path / 'other'}"))


def test_tokens_of_fsq_take_only_their_own_values(tmp_path):
    torch.manual_seed(0)
    sizes = {"quantizer": "fsq", "fsq_levels": [3, 3], "latent_channels": 4, "decoder_depth": 1}
    model = FlowMo(model_config("tiny", **sizes)).eval()
    model.save_pretrained(tmp_path / "tokenizer")
    layout = layout_of(model)
    cache = TokenCache.create(tmp_path / "tokens", TokenHeader(layout, 8, 1, "center", 32, "float32", ["x"]), [0] * 8)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = model.tokenize(images)
    cache.write(list(range(8)), expected[:, None])
    assert torch.equal(TokenCache.open(tmp_path / "tokens", layout).read(np.arange(8), np.zeros(8, int))[0], expected)
    more = [f"generator.network.{k}={v}" for k, v in {"tokens": 32, "bits": 4, "classes": 1}.items()]
    more += [f"generator.tokenizer={tmp_path / 'tokenizer'}", "sampler.steps=1", "trainer.sample_images=4"]
    with pytest.raises(TokenCacheError, match=r"values of a token: 16 and 9.*generator\.network\.vocabulary=9"):
        Trainer(config(tmp_path / "run", tmp_path / "tokens", 1, *more))
    trainer = Trainer(config(tmp_path / "run", tmp_path / "tokens", 1, "generator.network.vocabulary=9", *more))
    trainer.fit()  # ends with a grid of pictures, whose tokens are drawn
    assert trainer.model.head.weight.shape[0] == 9 and len(list((tmp_path / "run" / "samples").iterdir())) == 1
    with pytest.raises(ConfigError, match="more than 8 and at most 16 values"):
        config(tmp_path / "run", tmp_path / "tokens", 1, "generator.network.vocabulary=17", *more)


def test_wrong_tokens_are_an_error(tmp_path, tokens):
    with pytest.raises(TokenCacheError, match=r"16 tokens of 5 bits and 16 of 4.*generator\.network\.bits=4"):
        Trainer(config(tmp_path / "a", tokens, 1, "generator.network.bits=5"))
    with pytest.raises(TokenCacheError, match="classes: 3 and 16"):
        Trainer(config(tmp_path / "b", tokens, 1, "generator.network.classes=3"))
    with pytest.raises(FileNotFoundError, match=r"python -m flowmo\.tokenize"):
        Trainer(config(tmp_path / "c", tmp_path / "nothing", 1))
    with pytest.raises(ConfigError, match=r"data\.tokens is not set"):
        Trainer(parse(["maskgit", f"run={tmp_path / 'd'}"]))
    with pytest.raises(ConfigError, match="fsdp"):
        Trainer(config(tmp_path / "e", tokens, 1, "trainer.parallel=fsdp"))
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"], "a run that cannot start leaves nothing behind"
    # A run does not go on with tokens that another tokenizer has put in the same place.
    Trainer(config(tmp_path / "run", tokens, 1)).fit()
    other = make_cache(tmp_path / "others", TokenLayout(16, 4, 4, tokenizer="b" * 64))
    tokens.rename(tmp_path / "gone")
    other.rename(tokens)
    with pytest.raises(ValueError, match="made with tokens="):
        Trainer(config(tmp_path / "run", tokens, 2)).fit()


def test_a_checkpoint_starts_no_run_on_tokens_of_another_tokenizer(tmp_path, tokens):
    path = Trainer(config(tmp_path / "run", tokens, 1)).save()
    other = make_cache(tmp_path / "others", TokenLayout(16, 4, 4, tokenizer="b" * 64))
    Trainer(config(tmp_path / "same", tokens, 1, f"init={path}"))
    with pytest.raises(TokenCacheError, match="was trained with tokens"):
        Trainer(config(tmp_path / "other", other, 1, f"init={path}"))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([-1] * 16, [], "class names"),
        ([*range(15), -1], [f"class {i}" for i in range(16)], "1 pictures have no class"),
        (range(16), [f"kind {i}" for i in range(16)], "class names"),
        (range(20, 36), [f"class {i}" for i in range(36)], "classes: 16 and 36"),
    ],
)
def test_heldout_tokens_are_of_the_same_classes(tmp_path, tokens, labels, names, message):
    """Labels of others would be read as other rows of the table of embeddings, or as none that there is."""
    header = TokenHeader(TokenLayout(16, 4, 4, tokenizer="a" * 64), 16, 1, "center", 32, "float32", names)
    TokenCache.create(tmp_path / "other", header, list(labels)).write(list(range(16)), rows(16)[:, None])
    with pytest.raises(TokenCacheError, match=message):
        Trainer(config(tmp_path / "run", tokens, 1, f"heldout.path={tmp_path / 'other'}", "heldout.every=1"))


def test_gradient_checkpointing_changes_nothing(tmp_path, tokens):
    more = "trainer.gradient_checkpointing=true"
    trainers = [Trainer(config(tmp_path / str(i), tokens, 2, *([more] * i))) for i in range(2)]
    assert [t.model.gradient_checkpointing for t in trainers] == [False, True]
    for trainer in trainers:
        trainer.fit()
    a, b = (t.model.state_dict() for t in trainers)
    assert all(torch.equal(a[k], b[k]) for k in a)
