"""Training checkpoints: one file that holds all of a run's state, and the newest one that can be read."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from flowmo.files import atomic_write

logger = logging.getLogger("flowmo")


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*.pt") if re.fullmatch(r"step_\d{8}", p.stem))


def save(run: Path, step: int, state: dict[str, Any], keep: int, keep_every: int) -> Path:
    """Write the state of `step` atomically, then delete all but the last `keep` and every `keep_every`-th step."""
    path = path_of(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda name: torch.save(state, name))
    for old in list_checkpoints(run)[:-keep]:
        if int(old.stem[5:]) % keep_every:
            old.unlink()
    return path


def load_newest(run: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of a run; None where there is none.

    A damaged one is named in a warning and the one before it is taken.

    Raises:
        RuntimeError: there are checkpoints and none can be read.
    """
    paths = list_checkpoints(run)
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s cannot be read (%s); trying the checkpoint before it", path, reason)
    if paths:
        raise RuntimeError(
            f"{run}: none of its {len(paths)} checkpoints can be read; move the folder away to start anew, "
            "or restore one"
        )
    return None
