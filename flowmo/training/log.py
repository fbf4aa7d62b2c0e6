"""Where a run's numbers go: JSON lines, TensorBoard, wandb when asked for, and the progress bar."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flowmo.config import Config, ConfigError, to_yaml
from flowmo.files import atomic_write


class RunLog:
    """Appends to RUN/metrics.jsonl and RUN/tensorboard (and wandb); shows a progress bar where a terminal is.

    On resuming, lines of steps after the checkpoint are dropped, so that every step stands there once.

    Args:
        shown: numbers that every printed line has besides the loss.

    Raises:
        ConfigError: trainer.wandb asks for wandb, which is not installed.
    """

    def __init__(self, run: Path, total: int, step: int, config: Config, shown: Sequence[str] = ()) -> None:
        self._wandb = _start_wandb(run, config)
        self.shown = shown
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            atomic_write(self.path, lambda name: Path(name).write_text("".join(f"{line}\n" for line in lines)))
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step, **{k: float(f"{v:.7g}") for k, v in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.scalars(step, values)
        line = "".join(f"{k} {values[k]:.4f}, " for k in self.shown) + f"{values['images_per_second']:.1f} images/s"
        if self.bar.disable:
            print(f"step {step}: loss {values['loss']:.4f}, {line}", flush=True)
        else:
            self.bar.set_postfix_str(line)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers into TensorBoard and wandb alone."""
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, picture: Any) -> None:
        """A PIL image into TensorBoard."""
        import numpy as np

        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        self._board.add_image(name, pixels, step)

    def note(self, text: str) -> None:
        """A line that stays above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()


def _start_wandb(run: Path, config: Config) -> Any:
    """A wandb run in RUN/wandb that continues under the run folder's name; None where it is not asked for."""
    mode = config.trainer.wandb
    if mode == "none":
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"trainer.wandb={mode}: wandb is not installed; pip install flowmo[wandb], or trainer.wandb=none"
        )
    import wandb
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    return wandb.init(dir=str(run), name=run.name, id=run.name, resume="allow", mode=mode, config=settings)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill
