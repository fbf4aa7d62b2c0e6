"""Configuration: presets, overrides, and errors that name the nearest right key."""

from __future__ import annotations

import pytest

from flowmo.config import Config, ConfigError, from_yaml, known_keys, parse, to_yaml
from flowmo.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve_and_survive_yaml(preset):
    config = parse([preset])
    assert config.preset == preset
    assert from_yaml(to_yaml(config)) == parse([preset, f"run=runs/{preset}"])


def test_no_arguments_is_the_quickstart():
    assert parse([]).preset == "quickstart"
    assert parse(["trainer.steps=3"]).preset == "quickstart"


def test_defaults_are_the_published_recipe():
    c = parse(["lo"])
    assert (c.optim.lr, tuple(c.optim.betas), c.optim.ema_decay, c.optim.freeze_encoder_at) == (
        1e-4,
        (0.9, 0.95),
        0.9999,
        200_000,
    )
    assert (c.loss.perceptual_weight, c.loss.entropy, c.loss.commitment) == (0.1, 0.0025, 0.000625)
    assert (c.data.batch, c.trainer.steps, parse(["hi"]).trainer.steps) == (128, 1_300_000, 800_000)
    assert (c.sampler.steps, c.sampler.rho, c.sampler.guidance) == (25, 4.0, 1.5)


def test_overrides_are_typed():
    c = parse(["tiny", "trainer.steps=12", "optim.lr=3e-4", "data.path=/x=y", "sampler.guidance_interval=null"])
    assert (c.trainer.steps, c.optim.lr, c.data.path, c.sampler.guidance_interval) == (12, 3e-4, "/x=y", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lo", "trainer.stesp=3"], ["trainer.stesp", "did you mean trainer.steps?"]),
        (["lo", "lr=3"], ["'lr'", "did you mean optim.lr?"]),
        (["low"], ["'low'", "did you mean lo?"]),
        (["lo", "trainer.steps=many"], ["trainer.steps=many"]),
        (["lo", "--steps"], ["--steps", "key=value"]),
        (["lo", "loss.perceptual=lpisp"], ["loss.perceptual", "did you mean lpips?"]),
        (["lo", "model.encoder_width=3"], ["encoder_width=3", "even"]),
        (["lo", "loss.noise_sync=0.1"], ["loss.noise_sync=0.1", "loss.noise_sync=0", "none or kl"]),
        (["continuous", "loss.noise_sync=1.5"], ["loss.noise_sync=1.5", "from 0 to 1"]),
        (["lo", "init_part=encoder"], ["init_part=encoder", "with init="]),
        (["lo", "stage=posttrain", "init=x", "init_part=encoder"], ["init_part=encoder", "stage=pretrain"]),
        (["lo", "model.entropy_bits=7"], ["latent_channels=18", "entropy_bits=7"]),
        (["lo", "model.patch=5"], ["patch=5"]),
        (["lo", "trainer.accumulate=3"], ["data.batch=128", "accumulate=3"]),
        (["lo", "trainer.steps=0"], ["trainer.steps=0", "at least 1"]),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    for word in words:
        assert word in str(caught.value)


def test_every_key_is_known_once():
    keys = known_keys(Config)
    assert len(keys) == len(set(keys)) > 40
    assert "model.latent_channels" in keys and "run" in keys
