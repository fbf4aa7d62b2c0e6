"""Time a call on a card without launch cost and cache-cold, or on a CPU by the clock.

On a card the call is captured into one CUDA graph that runs it once on each of several input sets, together larger
than the second-level cache, so every call finds its inputs in memory and no call waits for a launch. Replays are
timed with CUDA events.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds to one call."""

    p20: float
    p50: float
    p80: float
    least: float
    captured: bool  # inside a CUDA graph


def percentiles(samples: list[float], captured: bool) -> Timing:
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return Timing(at(0.2), at(0.5), at(0.8), ordered[0], captured)


def rotations(size: int) -> int:
    """Input sets that together exceed twice the second-level cache; at least 2, at most 64, at most 16 GB."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return int(max(2, min(64, 2 * cache // max(size, 1) + 1, 16 * 2**30 // max(size, 1))))


def time_on_card(call: Callable[..., Any], inputs: list[tuple[Any, ...]], repeats: int = 30) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for args in inputs:
                call(*args)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def all_inputs() -> None:
        for args in inputs:
            call(*args)

    graph = torch.cuda.CUDAGraph()
    replay: Callable[[], Any] = graph.replay
    captured = True
    try:
        with torch.cuda.graph(graph, stream=stream):
            all_inputs()
    except RuntimeError as error:
        print(f"    not captured ({str(error).splitlines()[0][:90]}): launch cost is included")
        torch.cuda.synchronize()
        replay, captured = all_inputs, False
    samples = []
    for _ in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(inputs))
    return percentiles(samples[5:], captured)


def time_on_cpu(call: Callable[..., Any], inputs: list[tuple[Any, ...]], repeats: int = 5) -> Timing:
    call(*inputs[0])
    samples = []
    for i in range(repeats):
        start = time.perf_counter()
        call(*inputs[i % len(inputs)])
        samples.append(1e3 * (time.perf_counter() - start))
    return percentiles(samples, False)


@dataclass(frozen=True)
class Peaks:
    """What this card reaches in this run; the yardstick of every percentage."""

    copy: float  # bytes/s read plus written, 1 GiB copied
    matmul: float  # FLOP/s, bf16 8192^3 on random data


def measure_peaks() -> Peaks:
    size = 2**29
    pairs = [(torch.randn(size // 2, device="cuda").bfloat16(), torch.empty(size // 2, device="cuda").bfloat16())]
    pairs = [*pairs, (pairs[0][0].clone(), pairs[0][1].clone())]
    copy = time_on_card(lambda a, b: b.copy_(a), pairs)
    n = 8192
    matrices = [tuple(torch.randn(n, n, device="cuda").bfloat16() for _ in range(2)) for _ in range(2)]
    product = time_on_card(torch.mm, matrices, repeats=20)
    return Peaks(2 * size / (copy.p50 * 1e-3), 2 * n**3 / (product.p50 * 1e-3))


def _output(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The processor by its own name, and how much of it PyTorch uses."""
    name = next((line for line in _output("lscpu").splitlines() if line.startswith("Model name")), ":unknown CPU")
    threads = torch.get_num_threads()
    return f"CPU: {name.partition(':')[2].strip()}, {threads} thread{'s' if threads > 1 else ''}"


def environment() -> dict[str, str]:
    """What a row of results carries: card or processor, driver, versions, commit (FLOWMO_COMMIT without a history)."""
    triton_version = "none"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        pass
    dirty = "+" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton_version,
        "commit": os.environ.get("FLOWMO_COMMIT") or _output("git", "rev-parse", "--short", "HEAD") + dirty,
    }
