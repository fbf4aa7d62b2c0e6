"""The folder of a run: whose it is, and what a command that resumes it may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowmo.config import Config, ConfigError, from_yaml, to_yaml
from flowmo.files import atomic_write
from flowmo.generator_config import TokenSamplerConfig
from flowmo.training import checkpoint

# The sampler that makes pictures to look at; in stage distill the teacher's, which must stay.
TEACHER_KEYS = tuple(f"sampler.{k}" for k in ("steps", "rho", "guidance", "guidance_interval"))

# What may differ between a run's saved configuration and the command that resumes it.
FREE_KEYS = (
    *(f"trainer.{k}" for k in ("steps", "minutes", "log_every", "sample_every", "sample_images", "save_every")),
    *(f"trainer.{k}" for k in ("keep", "keep_every", "device", "threads", "compile", "gradient_checkpointing")),
    *(f"trainer.{k}" for k in ("accumulate", "parallel", "max_skipped", "profile", "wandb")),
    *TEACHER_KEYS,
    *("data.workers", "data.max_failed", "data.index", "checkpoint", "heldout.patience", "run"),
    *(f"generator.sampler.{f.name}" for f in fields(TokenSamplerConfig)),
    "generator.tokenizer",
)

# Published files, which another machine has elsewhere: whatever is read is compared with the published digest.
WEIGHT_FILES = (
    "loss.perceptual_weights",
    "loss.perceptual_heads",
    "posttrain.resnet_weights",
    "heldout.inception_weights",
)


def check(run: Path, config: Config) -> None:
    """Whether a command may train in a folder.

    Raises:
        ConfigError: the folder holds checkpoints of another configuration.
    """
    path = run / "config.yaml"
    if not path.exists() or not checkpoint.list_checkpoints(run):
        return
    mine, saved = _flat(config), _flat(from_yaml(path.read_text(), str(path)))
    free = [k for k in FREE_KEYS if not (config.stage == "distill" and k in TEACHER_KEYS)]
    # "random" stands for another network, whose numbers do not compare
    free += [k for k in WEIGHT_FILES if "random" not in (mine[k], saved.get(k))]
    changed = [k for k in mine if k not in free and mine[k] != saved.get(k)]
    if changed:
        pairs = ", ".join(f"{k}={saved.get(k)} there and {mine[k]} here" for k in changed[:4])
        raise ConfigError(f"run={run} holds another run ({pairs}); name another run= or repeat its settings")


def claim(run: Path, config: Config) -> None:
    """Make the folder and write its config.yaml."""
    run.mkdir(parents=True, exist_ok=True)
    atomic_write(run / "config.yaml", lambda name: Path(name).write_text(to_yaml(config)))


def _flat(config: Config) -> dict[str, Any]:
    """Dotted keys to values, as YAML reads them back."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(OmegaConf.to_container(OmegaConf.create(to_yaml(config))), ""))
