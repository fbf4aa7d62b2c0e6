"""Around the loop of one process: signals, the profiler, memory, and how long the rest will take."""

from __future__ import annotations

import contextlib
import resource
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals(ask: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `ask` instead of ending the process."""
    before: dict[int, Callable[..., Any] | int | None] = {}
    try:
        for number in STOPPING:
            before[number] = signal.signal(number, lambda number, frame: ask())
    except ValueError:  # not the main thread: whoever runs us handles the signals
        pass
    try:
        yield
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)


@contextlib.contextmanager
def profiler(folder: Path | None) -> Iterator[Callable[[], object]]:
    """Yields what to call after every step; FOLDER/trace.json and operators.txt of three steps after three of warm-up.

    Without a folder nothing is recorded.
    """
    if folder is None:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / "trace.json"))
        sort = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
        (folder / "operators.txt").write_text(profile.key_averages().table(sort_by=sort, row_limit=40) + "\n")

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GiB: allocated on the card, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def length_note(step_seconds: Sequence[float], steps: int, seconds: float | None) -> str:
    """What a run still takes, by the median of the steps measured (the first ones compile kernels and fill caches).

    Args:
        step_seconds: of single steps. steps: still to do. seconds: until `trainer.minutes` ends the run, or None.
    """
    per_step = statistics.median(step_seconds)
    left = per_step * steps if seconds is None else min(per_step * steps, seconds)
    return (
        f"{per_step:.3f} s a step (median of {len(step_seconds)}): {left / 86_400:.2f} days to go, "
        "without the time of samples and checkpoints"
    )
