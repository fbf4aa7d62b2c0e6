"""Model benches: one block, one forward pass, decode, encode and a training step, by every provider, as CSV rows.

    python -m bench.model --tasks decode forward --batch 1 8 32 --out bench/results/model.csv
    python -m bench.model                           # on a CPU: the quickstart's sizes in fp32, no claim about a card
    python -m bench.model --tasks decode --paired 20 --providers eager plan    # in turns: load on the machine hits both

Providers: published (autocast over fp32 weights, one compiled call a velocity), published+bf16 (its weights kept in
bf16), eager and compile (our modules), triton and cuda (our kernels under our modules), and the plan: eager, as one
graph, and with its opt-ins, whose PSNR to the exact picture stands beside their time. Whole calls are timed, launches
and allocations included, since that is what differs.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.model_cases import (
    PROVIDERS,
    TASKS,
    KernelUnavailableError,
    Setting,
    changes,
    config,
    provide,
    provider_name,
    work,
)
from bench.timing import ROOT, Peaks, Timing, environment, measure_peaks, percentiles
from flowmo.engine import psnr_to_exact

FIELDS = [
    "task", "model", "batch", "provider", "dtype", "status", "ms_min", "ms_p20", "ms_p50", "ms_p80", "images_per_s",
    "forwards", "tflop_per_s", "gb_per_s", "percent_of_roofline", "speedup_published", "speedup_published_bf16",
    "psnr_to_exact", "peak_gib", "peak_copy_gb_per_s", "peak_matmul_tflop_per_s", "card", "driver", "torch", "cuda",
    "triton", "commit", "load", "note",
]  # fmt: skip


Row = dict[str, Any]
Call = Callable[[], Any]


def timed(call: Call, device: str) -> float:
    """Milliseconds of one call, launches included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_calls(call: Call, seconds: float, device: str) -> Timing:
    """Milliseconds a call: after warm-up calls, at least five (three of calls of over two seconds), about `seconds`."""
    warm = [timed(call, device) for _ in range(2 if device == "cuda" else 1)]
    long = warm[-1] > 2000
    if device == "cuda" and not long:
        call()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while len(samples) < (3 if long else 5) or (time.perf_counter() < until and len(samples) < 200):
        samples.append(timed(call, device))
    return percentiles(samples, False)


def time_in_turns(calls: Sequence[Call], rounds: int, device: str) -> list[Timing]:
    """Milliseconds of each call, one of each in every round, after a round that does not count."""
    rounds_ms = [[timed(call, device) for call in calls] for _ in range(rounds + 1)][1:]
    return [percentiles(list(samples), False) for samples in zip(*rounds_ms)]


def prepare(task: str, name: str, batch: int, provider: str, device: str) -> tuple[Row, Setting, Call | None]:
    """A row to fill in, what the call works on, and the call; None, with no status, for what a provider leaves out."""
    row: Row = {"task": task, "model": name, "batch": batch, "provider": provider}
    row["dtype"] = "bf16" if device == "cuda" else "fp32"
    setting = Setting.make(config(name), batch, device)
    torch.compiler.reset()
    try:
        call = provide(provider, task, setting, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return row, setting, call
    except Exception as error:
        return row | failure(error), setting, None


def failure(error: Exception) -> Row:
    """The compilers' errors have no common base, and the other providers go on."""
    if isinstance(error, KernelUnavailableError):
        return {"status": f"not here: {str(error)[:100]}"}
    return {"status": f"failed: {(str(error) or repr(error)).splitlines()[0][:120]}"}


def filled(row: Row, setting: Setting, t: Timing, device: str, peaks: Peaks | None) -> Row:
    task, batch, c = row["task"], row["batch"], setting.model.config
    done = work(task, c, batch, 2 if device == "cuda" else 4)
    changed = changes(row["provider"], c) if task == "decode" else {}
    if peaks is not None:  # before the pictures to compare with are made, in plans of their own
        row["peak_gib"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    if changed:  # what is left out is not work that was done
        done = done.of(setting.model.decode_plan(batch, graph=False, **changed).forwards)
        # Without a graph: to record one takes another decode, for each of both plans.
        psnr = psnr_to_exact(setting.model, setting.codes, setting.noise, graph=False, **changed)
        row["psnr_to_exact"] = f"{float(psnr.mean()):.1f}"
    row |= {"status": "ok", "ms_min": f"{t.least:.3f}"}
    row |= {"ms_p20": f"{t.p20:.3f}", "ms_p50": f"{t.p50:.3f}", "ms_p80": f"{t.p80:.3f}"}
    row |= {"images_per_s": f"{1e3 * batch / t.p50:.2f}", "forwards": f"{done.forwards:.4g}"}
    row["tflop_per_s"] = f"{done.matmul_flops / t.p50 / 1e9:.2f}"
    row["gb_per_s"] = f"{done.memory_bytes / t.p50 / 1e6:.1f}" if done.memory_bytes else ""
    if peaks is not None:
        row["percent_of_roofline"] = f"{100 * done.roofline_ms(peaks.copy, peaks.matmul) / t.p50:.1f}"
    return row


def measure(
    task: str, name: str, batch: int, provider: str, device: str, seconds: float, peaks: Peaks | None
) -> Row | None:
    """A row of results, or None where the provider has nothing to say about the task."""
    row, setting, call = prepare(task, name, batch, provider, device)
    if call is None:
        return row if "status" in row else None
    try:
        return filled(row, setting, time_calls(call, seconds, device), device, peaks)
    except Exception as error:
        return row | failure(error)


def measure_in_turns(
    task: str, name: str, batch: int, providers: Sequence[str], device: str, rounds: int, peaks: Peaks | None
) -> list[Row]:
    """Rows of several providers that took turns, so that what else runs on the machine hits all of them alike."""
    ready = [prepare(task, name, batch, provider, device) for provider in providers]
    calls = [call for _, _, call in ready if call is not None]
    times = iter(time_in_turns(calls, rounds, device))
    rows = [row if call is None else filled(row, s, next(times), device, peaks) for row, s, call in ready]
    return [row for row in rows if "status" in row]


def speedups(rows: list[Row]) -> None:
    """Fill in the ratios to both baselines of the same task, model and batch."""
    for baseline, column in (("published", "speedup_published"), ("published+bf16", "speedup_published_bf16")):
        times = {
            (r["task"], r["model"], r["batch"]): float(r["ms_p50"])
            for r in rows
            if r["provider"] == baseline and r["status"] == "ok"
        }
        for r in rows:
            base = times.get((r["task"], r["model"], r["batch"]))
            if base is not None and r["status"] == "ok":
                r[column] = f"{base / float(r['ms_p50']):.2f}"


def main(arguments: list[str] | None = None) -> int:
    on_card = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "model.csv")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--providers", nargs="+", type=provider_name, help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--model", default="lo" if on_card else "quickstart", help="name of a preset")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8] if on_card else [1])
    parser.add_argument("--seconds", type=float, default=3.0 if on_card else 1.0, help="time for a row, about")
    parser.add_argument("--paired", type=int, metavar="ROUNDS", help="the providers take turns, so many times")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as PyTorch finds")
    parser.add_argument("--note", default="", help="kept with every row: what else the machine did, for example")
    options = parser.parse_args(arguments)
    device = "cuda" if on_card else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    # On a CPU torch.compile costs more time than it could save here, and there are no kernels to compare.
    providers = options.providers or (PROVIDERS if on_card else ("published", "eager", "plan"))
    peaks = measure_peaks() if on_card else None
    common = environment() | {"note": options.note}
    if peaks is not None:
        common["peak_copy_gb_per_s"] = f"{peaks.copy / 1e9:.0f}"
        common["peak_matmul_tflop_per_s"] = f"{peaks.matmul / 1e12:.0f}"
    else:
        print(f"no CUDA card: {options.model} in fp32 on {torch.get_num_threads()} CPU threads, nothing is compiled; "
              "these numbers show that the benches work and say nothing about a card")  # fmt: skip
    rows: list[Row] = []

    def keep(new: list[Row]) -> None:
        if not on_card:  # a CPU is rarely alone
            common["load"] = f"{os.getloadavg()[0]:.1f} of {os.cpu_count()}"
        rows.extend(row | common for row in new)
        speedups(rows)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        for row in rows[len(rows) - len(new) :]:
            print(f"    {row['provider']:25} {row['status'][:40]:8} {row.get('ms_p50', ''):>10} ms "
                  f"{row.get('images_per_s', ''):>9} images/s {row.get('tflop_per_s', ''):>7} TFLOP/s "
                  f"{row.get('percent_of_roofline', ''):>5} % of roofline "
                  f"x{row.get('speedup_published', ''):5} {row.get('psnr_to_exact', '')}")  # fmt: skip

    options.out.parent.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for batch in options.batch:
            print(f"{task}, {options.model}, batch {batch}")
            if options.paired:
                keep(measure_in_turns(task, options.model, batch, providers, device, options.paired, peaks))
                continue
            for provider in providers:
                row = measure(task, options.model, batch, provider, device, options.seconds, peaks)
                gc.collect()
                if on_card:
                    torch.cuda.empty_cache()
                if row is not None:
                    keep([row])
    print(f"wrote {options.out}")
    return 1 if any(r["status"].startswith("failed") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
