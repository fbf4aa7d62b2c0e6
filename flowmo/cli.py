"""What all commands share: errors of one paragraph, a traceback on request, help with defaults, progress."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

import flowmo_kernels
from flowmo.one_voice import one_voice, rank_and_world

# Errors whose message is written for the user. Anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError)


class _Misuse(Exception):
    """What argparse would print about a command line before it ends the process."""


def run(command: Callable[[list[str]], int | None]) -> None:
    """Run a command with the arguments of the process and exit with its code; `--debug` keeps tracebacks.

    Of several processes that torchrun started, one says an error that all have, and each its own.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.captureWarnings(True)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    format_before, misuse_before = warnings.formatwarning, argparse.ArgumentParser.error
    if not debug:  # where a warning comes from says nothing to who reads a command's output
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}"
    rank, world = rank_and_world()
    if world > 1:
        argparse.ArgumentParser.error = _misused  # type: ignore[method-assign, assignment]
    try:
        code = command([a for a in arguments if a != "--debug"])
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    except _Misuse as error:
        with one_voice(str(error)) as whose:
            if whose is not None:
                print(f"{error}{whose}", file=sys.stderr, flush=True)
        sys.exit(2)
    except EXPECTED as error:
        with one_voice(f"{type(error).__name__}: {error}") as whose:
            if whose is not None:
                said = f"error{whose}: {error}\n(--debug shows where)"
                if debug:
                    said = (f"error{whose}:\n" if whose else "") + traceback.format_exc().rstrip()
                print(said, file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        warnings.formatwarning = format_before
        argparse.ArgumentParser.error = misuse_before  # type: ignore[method-assign]
    sys.exit(code or 0)


def _misused(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise _Misuse(f"{parser.format_usage()}{parser.prog}: error: {message}")


class Help(argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every option that has one and does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, default = action.help, action.default
        none = default is None or default is False or default in ("", argparse.SUPPRESS)
        if said is None or none or "default" in said:
            return said
        text = ",".join(map(str, default)) if isinstance(default, list) else str(default).replace("%", "%%")
        return f"{said} (default: {text})"


class Progress:
    """A bar where standard error is a terminal, and elsewhere, as in the logs of a cluster, a line at every tenth.

    Args:
        total: pictures. whose: words behind the count, for one of several processes. shown: False for silence.
    """

    def __init__(self, total: int, whose: str = "", shown: bool = True) -> None:
        self.total, self.whose, self.shown, self.done = total, whose, shown, 0
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="picture", disable=not (shown and self.terminal))

    def update(self, n: int) -> None:
        before, self.done = self.done, min(self.done + n, self.total)
        self.bar.update(self.done - before)
        if self.shown and not self.terminal and 10 * self.done // self.total > 10 * before // self.total:
            print(f"{self.done} of {self.total} pictures{self.whose}", flush=True)

    def close(self) -> None:
        self.bar.close()


def kernels() -> str:
    """`flowmo_kernels.describe()`, in few words on a machine without a card where nothing else was asked for."""
    said = flowmo_kernels.describe()
    return "kernels: plain PyTorch, no CUDA card" if said.startswith("kernels: auto on CPU; no triton") else said


def at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """Raises ValueError for the first of some options that was given and is smaller."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def output_folder(path: Path) -> None:
    """Check that results can be written into a folder, there already or not, before any work is done for them.

    Raises:
        OSError: a file has that name, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"--out {path}: a file of that name is there; name a folder")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {path}: nothing can be written into {nearest}; name another folder")
