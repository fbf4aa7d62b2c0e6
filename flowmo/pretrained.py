"""Model files: released checkpoints, and folders of `config.json` + `model.safetensors`.

A FlowMo state dict carries the released key names as it is, so `model.state_dict()` is also what writes them back.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowmo.config import ModelConfig
from flowmo.engine import Schedule
from flowmo.files import atomic_write, write_tensors
from flowmo.presets import PRESETS
from flowmo.sampling import time_grid

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo

ENTROPY_BITS = {18: 9, 56: 14}  # of the published latent channel counts
RAW, EMA = "model_state_dict", "model_ema_state_dict"
CONFIG = "config"  # of a file in the released layout that is ours: readers of the authors' files look no further
MOST_STEPS = 10_000
SAMPLER = ("steps", "rho", "guidance")  # what a model's files may say of its sampler


class CheckpointError(ValueError):
    """A file that is no usable FlowMo model; the message names the file, what was expected and the way out."""


def load(
    cls: type[FlowMo],
    path: str | os.PathLike[str],
    *,
    ema: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    image_size: int = 256,
    latent_tokens: int = 256,
    entropy_bits: int | None = None,
    fsq_levels: list[int] | None = None,
) -> FlowMo:
    """Load a model in evaluation mode.

    Args:
        path: a released checkpoint (`.pth`), a folder with `config.json` and `model.safetensors`, a training run
            (its `model` folder is taken), one of a run's `checkpoints/step_*`, "quickstart" for the weights that come
            along, or, with the `hub` extra, the name OWNER/NAME of a hub repository.
        ema: of a released checkpoint or one of a run, take the averaged weights (as published evaluations do) or the
            raw ones.
        dtype: cast the weights; None keeps the file's.
        image_size, latent_tokens, entropy_bits, fsq_levels: what a released checkpoint cannot say, unless
            `flowmo.export` wrote it. Everything else is read off its shapes; entropy_bits follows from 18 or 56 latent
            channels, and `fsq_levels` says that the quantizer is fsq.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not a FlowMo model, unsafe pickle, or missing, unexpected and wrongly shaped keys.
    """
    sampler = Schedule()
    if _is_training(Path(path)):
        path = Path(path)
        config, sampler, state = _read_training(path, ema)
    elif (path := _resolve(path)).is_dir():
        config, sampler = read_config(path / "config.json")
        try:
            state = load_file(path / "model.safetensors")
        except (FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(f"{path / 'model.safetensors'}: {error}; save the model again") from error
    elif path.suffix == ".safetensors":
        config, sampler, state = _read_safetensors(path)
    else:
        state, text = _read_released(path, ema)
        if text is None:
            config = infer_config(state, image_size, latent_tokens, entropy_bits, str(path), fsq_levels)
        else:
            try:
                config, sampler = _parse_config(text)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{path}: its {CONFIG!r} is no model configuration: {error}") from error
    with torch.device("meta"):  # no time spent on initial weights that are replaced at once
        model = cls(config)
    check_keys(model.state_dict(), state, str(path))
    model.load_state_dict(state, assign=True)
    model.sampler = sampler
    return model.to(device=device, dtype=dtype).eval().requires_grad_(True)


def save(model: FlowMo, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` (which carries the configuration too), each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file_with_config(model, folder / "model.safetensors")
    atomic_write(folder / "config.json", lambda f: Path(f).write_text(config_text(model)))


def save_file_with_config(model: FlowMo, path: str | os.PathLike[str]) -> None:
    """Write one safetensors file that :func:`load` can read on its own: the configuration is in its metadata."""
    state = {k: v.detach().to("cpu").contiguous() for k, v in model.state_dict().items()}
    write_tensors(path, state, metadata={"config": config_text(model)})


def config_text(model: FlowMo) -> str:
    """The sizes, and the sampler of a decoder that has its own, as JSON."""
    content = asdict(model.config)
    if model.sampler != Schedule():  # a distilled decoder's
        content["sampler"] = {key: getattr(model.sampler, key) for key in SAMPLER}
    return json.dumps(content, indent=2) + "\n"


def save_released(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    ema: Mapping[str, Tensor] | None = None,
    steps: int = 0,
    config: str | None = None,
) -> None:
    """Write a checkpoint in the released layout, for programs that read the authors' files.

    Args:
        config: text of :func:`config_text`, kept beside the weights: the layout itself says neither the picture's size
            nor the number of latent tokens, and :func:`load` would take those of the released models.
    """
    content = {"total_steps": steps, RAW: dict(state), EMA: dict(ema if ema is not None else state)}
    if config is not None:
        content[CONFIG] = config
    atomic_write(Path(path), lambda f: torch.save(content, f))


def infer_config(
    state: Mapping[str, Tensor],
    image_size: int = 256,
    latent_tokens: int = 256,
    entropy_bits: int | None = None,
    source: str = "state dict",
    fsq_levels: list[int] | None = None,
) -> ModelConfig:
    """Read the sizes of a model off the shapes of its weights.

    Raises:
        CheckpointError: a key that tells a size is missing, or the entropy bits cannot be known.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise CheckpointError(
                f"{source}: no FlowMo checkpoint, it has no {key!r}; its keys start {sorted(state)[:4]}"
            )
        return state[key].shape

    def depth(part: str) -> int:
        numbers = [int(m[1]) for k in state if (m := re.match(rf"{part}\.double_blocks\.(\d+)\.", k))]
        return 1 + max(numbers, default=-1)

    head_dims = {
        part: shape(f"{part}.double_blocks.0.img_attn.norm.query_norm.scale")[0] for part in ("encoder", "decoder")
    }
    hidden, patch_dim = shape("encoder.img_in.weight")
    channels = shape("encoder.txt_in.weight")[1]
    quantizer, levels = "lfq", {}
    if shape("encoder.final_layer_txt.linear.weight")[0] == 2 * channels:
        quantizer = "kl"
    elif fsq_levels is not None:
        quantizer, levels = "fsq", {"fsq_levels": fsq_levels}
    elif entropy_bits is None and channels == 16:
        quantizer = "none"
    elif entropy_bits is None and channels not in ENTROPY_BITS:
        raise CheckpointError(
            f"{source}: {channels} latent channels do not tell the bits of a token (18 have 9, 56 have 14, "
            "16 are the continuous model); pass entropy_bits=, or fsq_levels= of a model with quantizer fsq"
        )
    return ModelConfig(
        image_size=image_size,
        patch=round((patch_dim / 3) ** 0.5),
        heads=hidden // head_dims["encoder"],
        encoder_width=head_dims["encoder"] // 16,
        decoder_width=head_dims["decoder"] // 16,
        encoder_depth=depth("encoder"),
        decoder_depth=depth("decoder"),
        latent_tokens=latent_tokens,
        latent_channels=channels,
        entropy_bits=entropy_bits or ENTROPY_BITS.get(channels, 9),
        quantizer=quantizer,
        **levels,
    )


def check_keys(expected: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError that names every kind of mismatch between a model's keys and a file's."""
    problems = []
    for what, keys in (
        ("missing", expected.keys() - state.keys()),
        ("unexpected", state.keys() - expected.keys()),
    ):
        if keys:
            problems.append(f"{len(keys)} {what}: {_some(sorted(keys))}")
    wrong = [
        f"{k} is {list(state[k].shape)}, expected {list(expected[k].shape)}"
        for k in sorted(expected.keys() & state.keys())
        if state[k].shape != expected[k].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of the wrong shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the model. " + ". ".join(problems))


def shipped_weights(name: str) -> Path | None:
    """The file of the weights that come with the package, or None where this copy has none of that name."""
    path = Path(__file__).parent / "assets" / f"{name}.safetensors"
    return path if path.is_file() else None


def read_config(path: Path) -> tuple[ModelConfig, Schedule]:
    """Sizes and the sampler of a model folder's `config.json`.

    Raises:
        CheckpointError: no such file, or one that says something else.
    """
    try:
        return _parse_config(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no model configuration: {error}") from error


def _parse_config(text: str) -> tuple[ModelConfig, Schedule]:
    """Raises ValueError (of which ConfigError and JSON's error are kinds) or TypeError."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object of sizes, found a {type(content).__name__}")
    own = content.pop("sampler", {})
    config = ModelConfig(**content)
    config.check()
    if not isinstance(own, dict) or not own.keys() <= set(SAMPLER):
        raise ValueError(f"sampler: expected {', '.join(SAMPLER)}, found {own}")
    sampler = Schedule(**own)
    if isinstance(sampler.steps, bool) or not isinstance(sampler.steps, int) or sampler.steps > MOST_STEPS:
        raise ValueError(f"sampler: steps={sampler.steps!r}: expected a whole number from 1 to {MOST_STEPS}")
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in (sampler.rho, sampler.guidance)):
        raise ValueError(f"sampler: rho={sampler.rho!r}, guidance={sampler.guidance!r}: expected numbers")
    time_grid(sampler.steps, sampler.rho)  # raises where they are out of range
    return config, sampler


def _resolve(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if found.is_dir():
        for folder in (found, found / "model"):
            if (folder / "config.json").is_file():
                return folder
        raise CheckpointError(
            f"{found}: no config.json here or in its folder 'model'; expected a folder of save_pretrained or a run"
        )
    if found.exists():
        return found
    shipped = shipped_weights(path) if isinstance(path, str) and path.isidentifier() else None
    if shipped is not None:
        return shipped
    if isinstance(path, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not found.suffix:
        try:
            from huggingface_hub import snapshot_download
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"{path}: no such file or folder; to load it from a hub, install the extra: pip install flowmo[hub]"
            ) from error
        return Path(snapshot_download(path, allow_patterns=["config.json", "model.safetensors"]))
    hint = f"; the weights of preset {path} do not come along, name their file" if path in PRESETS else ""
    raise FileNotFoundError(
        f"{path}: no such file or folder; expected a released .pth file, a model folder or a run{hint}"
    )


def weights_file(path: str | os.PathLike[str]) -> Path | None:
    """The one file that :func:`load` takes the weights from, or None where they are in shards; raises as it does."""
    if _is_training(Path(path)):
        return Path(path) if Path(path).is_file() else None
    found = _resolve(path)
    return found / "model.safetensors" if found.is_dir() else found


def _is_training(path: Path) -> bool:
    """Whether a path is a checkpoint of a run: a file `step_*.pt`, or a folder `step_*` that is no model folder."""
    if path.is_dir():
        return re.fullmatch(r"step_\d+", path.name) is not None and not (path / "config.json").is_file()
    return re.fullmatch(r"step_\d+\.pt", path.name) is not None and path.is_file()


def _read_training(path: Path, ema: bool) -> tuple[ModelConfig, Schedule, dict[str, Tensor]]:
    """Of a training checkpoint, a file or a folder of shards; raises CheckpointError where it is a generator's."""
    from flowmo.config import from_yaml
    from flowmo.training import checkpoint  # late: training is built on models
    from flowmo.training.distill import schedules

    saved = checkpoint.read(path)
    if not {"config", "model", "optimizer"} <= saved.keys():
        found = ", ".join(sorted(map(str, saved))[:6])
        raise CheckpointError(
            f"{path}: by its name a checkpoint of a run, but it holds {found}; give a released checkpoint another name"
        )
    config = from_yaml(saved["config"])
    if config.stage == "maskgit":
        raise CheckpointError(f"{path}: a checkpoint of a generator (stage maskgit), where a tokenizer was expected")
    state = {**saved["model"], **(saved["optimizer"]["average"] if ema else {})}
    return config.model, max(schedules(config.distill)) if config.stage == "distill" else Schedule(), state


def _read_released(path: Path, ema: bool) -> tuple[dict[str, Tensor], str | None]:
    """The weights, and the configuration where the file has one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read safely ({reason}); expected a file of torch.save that holds "
            "tensors only"
        ) from error
    key = EMA if ema else RAW
    if not isinstance(content, Mapping) or key not in content:
        found = sorted(map(str, content))[:6] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected a released checkpoint with {key!r}, found {found}")
    text = content.get(CONFIG)
    return dict(content[key]), text if isinstance(text, str) else None


def _read_safetensors(path: Path) -> tuple[ModelConfig, Schedule, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}; expected a safetensors file") from error
    if "config" not in metadata:
        raise CheckpointError(f"{path}: no model configuration in its metadata; load its folder, with config.json")
    try:
        return *_parse_config(metadata["config"]), state
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no model configuration in its metadata: {error}") from error


def _some(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")
