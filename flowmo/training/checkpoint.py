"""Training checkpoints: one file that holds all of a run's state, and the newest one that is whole.

A checkpoint is what `torch.save` writes (`torch.load(path, weights_only=True)` reads it), followed by the SHA-256 of
all bytes before. It is written under a temporary name, flushed to the disk, and only then given its own: whenever the
writer dies, a file of that name is complete or not there. Sharded training writes a folder instead, in the format of
`torch.distributed.checkpoint`, with the rest of the state and the checksums of its files in a file `state.pt`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from flowmo.files import atomic_write
from flowmo.training import sharding
from flowmo.training.distributed import barrier, from_first

logger = logging.getLogger("flowmo")

_MARK = b"\nflowmo-sha256:"
_TRAILER = len(_MARK) + 64
_REST = "state.pt"  # of a sharded checkpoint


class DamagedCheckpoint(ValueError):
    """A checkpoint file that is cut short, altered, or no checkpoint."""


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}.pt"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, files and folders, oldest first."""
    found = (p for p in (run / "checkpoints").glob("step_*") if p.suffix == ".pt" or p.is_dir())
    return sorted((p for p in found if re.fullmatch(r"step_\d{8}", p.stem)), key=lambda p: p.stem)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a training checkpoint by its form: a .pt file, or a folder with shards."""
    return (path.suffix == ".pt" and path.is_file()) or (path / _REST).is_file()


class _DigestingFile:
    """Passes bytes on, sums them up, and remembers the system's own error: torch.save reports another."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


def write(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state and its checksum into a file; raises OSError when the system refuses."""
    with open(path, "wb") as file:
        digesting = _DigestingFile(file)
        try:
            torch.save(state, digesting)  # type: ignore[arg-type]
        except RuntimeError:
            if digesting.error is not None:
                raise digesting.error from None
            raise
        file.write(_MARK + digesting.digest.hexdigest().encode())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state in a checkpoint, file or folder, whole and on the CPU, after its checksum agreed.

    Raises:
        DamagedCheckpoint: cut short, altered, or nothing that :func:`write` wrote.
    """
    path = Path(path)
    if path.is_dir():
        rest = read_rest(path)
        return sharding.unflatten(sharding.read_shards(path), rest)
    digest = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        left = size - _TRAILER
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
        trailer = file.read()
    if trailer[: len(_MARK)] == _MARK:
        if trailer[len(_MARK) :] != digest.hexdigest().encode():
            raise DamagedCheckpoint(f"{path}: its bytes do not agree with its checksum")
    elif b"flowmo" in trailer or not _is_zip(path):
        raise DamagedCheckpoint(f"{path}: cut short, or no checkpoint")
    else:
        logger.warning("%s has no checksum at its end: written by an early version, or cut short", path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpoint(f"{path}: {reason}") from error
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: holds a {type(state).__name__}, no training state")
    return state


def read_rest(folder: Path) -> dict[str, Any]:
    """All of a sharded checkpoint but its tensors, after the checksums of all files agreed."""
    try:
        rest = read(folder / _REST)
        found = sharding.digests(folder)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}: {error}") from error
    wrong = sorted(name for name, digest in rest["files"].items() if found.get(name) != digest)
    if wrong:
        raise DamagedCheckpoint(f"{folder}: {', '.join(wrong)} missing or not agreeing with the checksums")
    return rest


def _is_zip(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def save(run: Path, step: int, state: dict[str, Any], keep: int, keep_every: int) -> Path:
    """Write the state of `step` atomically, then delete all but the last `keep` and every `keep_every`-th step.

    Raises:
        OSError: the disk is full or refuses; the checkpoints that were there are whole.
    """
    path = path_of(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [p for p in list_checkpoints(run) if p != path]
    try:
        atomic_write(path, lambda name: write(state, name))
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, _full(path, before, error)) from error
    _delete_old(run, keep, keep_every)
    return path


def save_sharded(run: Path, step: int, state: dict[str, Any], keep: int, keep_every: int, first: bool) -> Path:
    """:func:`save` of sharded tensors: every process writes its own into one folder. All processes call it.

    Raises:
        OSError: in all processes, as :func:`save`, where one of them cannot write its part.
    """
    path = path_of(run, step).with_suffix("")
    partial = path.with_name(f".{path.name}.partial")
    before = [p for p in list_checkpoints(run) if p != path]
    if first and partial.exists():
        shutil.rmtree(partial)
    barrier()
    tensors, rest = sharding.flatten(state)
    try:
        sharding.save_shards(tensors, partial)
    except OSError as error:
        raise OSError(error.errno, _full(path, before, error)) from error
    refused: OSError | None = None
    if first:
        try:
            write({**rest, "files": sharding.digests(partial)}, partial / _REST)
            with open(partial / _REST, "rb") as file:
                os.fsync(file.fileno())
            _sync_folder(partial)
            if path.exists():
                _delete(path)
            os.replace(partial, path)
            _sync_folder(path.parent)
        except OSError as error:
            refused = error
    refused = from_first(refused)
    if refused is not None:
        raise OSError(refused.errno, _full(path, before, refused)) from refused
    if first:
        _delete_old(run, keep, keep_every)
    return path


def _delete_old(run: Path, keep: int, keep_every: int) -> None:
    for old in list_checkpoints(run)[:-keep]:
        if int(old.stem[5:]) % keep_every:
            _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir():
        # first out of sight: a folder half deleted must not look like a checkpoint
        hidden = path.with_name(f".{path.name}.deleted")
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink()


def _full(path: Path, before: list[Path], error: OSError) -> str:
    free = shutil.disk_usage(path.parent).free / 2**30
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror or error)
    whole = f"{before[-1].name} before it is whole" if before else "there is none before it"
    return (
        f"{path} cannot be saved: {why} ({free:.2f} GiB free there); {whole}. Free some space (trainer.keep=1 keeps "
        "fewer checkpoints) and give the same command again: it goes on from the newest whole one"
    )


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries, so that the new name survives a power cut as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Where the newest whole checkpoint of a run is, and its state; None where there are no checkpoints.

    Of a folder of shards, the state comes without its tensors.

    A damaged one is named in a warning and the one before it is taken. Half-written temporary files, which a killed
    writer leaves, are deleted.

    Raises:
        RuntimeError: there are checkpoints and none is whole.
    """
    for scrap in (run / "checkpoints").glob(".step_*"):
        logger.warning("%s is left over from a writer that was killed: deleted", scrap)
        if scrap.is_dir():
            shutil.rmtree(scrap)
        else:
            scrap.unlink(missing_ok=True)
    paths = list_checkpoints(run)
    for path in reversed(paths):
        try:
            return path, read(path) if path.is_file() else read_rest(path)
        except (DamagedCheckpoint, OSError) as error:
            logger.warning("DAMAGED CHECKPOINT, going back to the one before it: %s", error)
    if paths:
        raise RuntimeError(
            f"{run}: none of its {len(paths)} checkpoints can be read; move the folder away to start anew, "
            "or restore one"
        )
    return None


def random_states() -> dict[str, Any]:
    """The global random states of Python, NumPy and PyTorch, as :func:`set_random_states` takes them."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, spare = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.array(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), spare],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_states(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, spare = state["python"]
    random.setstate((version, tuple(internal), spare))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of the source tree that runs, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
