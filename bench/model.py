"""Model benches: one block, one forward pass, decode, encode and a training step, by every provider, as CSV rows.

    python -m bench.model --tasks decode forward --batch 1 8 32 --out bench/results/model.csv
    python -m bench.model                           # on a CPU: the quickstart's sizes in fp32, no claim about a card

Providers: published (autocast over fp32 weights, one compiled call a velocity), published+bf16 (its weights kept in
bf16), eager and compile (our modules), triton and cuda (our kernels under our modules), and the plan: eager, as one
graph, and with its opt-ins, whose PSNR to the exact picture stands beside their time. Whole calls are timed, launches
and allocations included, since that is what differs.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.model_cases import CHANGED, PROVIDERS, TASKS, KernelUnavailableError, Setting, config, provide, work
from bench.timing import ROOT, Peaks, Timing, environment, measure_peaks, percentiles
from flowmo.engine import psnr_to_exact

FIELDS = [
    "task", "model", "batch", "provider", "dtype", "status", "ms_p20", "ms_p50", "ms_p80", "images_per_s", "forwards",
    "tflop_per_s", "gb_per_s", "percent_of_roofline", "speedup_published", "speedup_published_bf16", "psnr_to_exact",
    "peak_gib", "peak_copy_gb_per_s", "peak_matmul_tflop_per_s", "card", "driver", "torch", "cuda", "triton", "commit",
]  # fmt: skip


def time_calls(call: Any, seconds: float, device: str) -> Timing:
    """Milliseconds a call: after three warm-up calls, at least five and for about `seconds`."""
    for _ in range(3 if device == "cuda" else 1):
        call()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while len(samples) < 5 or (time.perf_counter() < until and len(samples) < 200):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - start))
    return percentiles(samples, False)


def measure(
    task: str, name: str, batch: int, provider: str, device: str, seconds: float, peaks: Peaks | None
) -> dict[str, Any] | None:
    """A row of results, or None where the provider has nothing to say about the task."""
    c = config(name)
    row: dict[str, Any] = {"task": task, "model": name, "batch": batch, "provider": provider}
    row["dtype"] = "bf16" if device == "cuda" else "fp32"
    setting = Setting.make(c, batch, device)
    torch.compiler.reset()
    try:
        call = provide(provider, task, setting, device)
        if call is None:
            return None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        t = time_calls(call, seconds, device)
    except KernelUnavailableError as error:
        return row | {"status": f"not here: {str(error)[:100]}"}
    except Exception as error:  # the compilers' errors have no common base, and the other providers go on
        return row | {"status": f"failed: {(str(error) or repr(error)).splitlines()[0][:120]}"}
    done = work(task, c, batch, 2 if device == "cuda" else 4)
    row |= {"status": "ok", "ms_p20": f"{t.p20:.3f}", "ms_p50": f"{t.p50:.3f}", "ms_p80": f"{t.p80:.3f}"}
    row |= {"images_per_s": f"{1e3 * batch / t.p50:.2f}", "forwards": done.forwards}
    row["tflop_per_s"] = f"{done.matmul_flops / t.p50 / 1e9:.2f}"
    row["gb_per_s"] = f"{done.memory_bytes / t.p50 / 1e6:.1f}" if done.memory_bytes else ""
    if peaks is not None:
        row["percent_of_roofline"] = f"{100 * done.roofline_ms(peaks.copy, peaks.matmul) / t.p50:.1f}"
        row["peak_gib"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    if provider in CHANGED and task == "decode":
        option: dict[str, Any] = {"fp8": True} if "fp8" in provider else {"tail_merge": int(provider.split("tail")[1])}
        psnr = psnr_to_exact(setting.model, setting.codes, setting.noise, **option)
        row["psnr_to_exact"] = f"{float(psnr.mean()):.1f}"
    return row


def speedups(rows: list[dict[str, Any]]) -> None:
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
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=None)
    parser.add_argument("--model", default="lo" if on_card else "quickstart", help="name of a preset")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8] if on_card else [1])
    parser.add_argument("--seconds", type=float, default=3.0 if on_card else 1.0, help="time for a row, about")
    options = parser.parse_args(arguments)
    device = "cuda" if on_card else "cpu"
    # On a CPU torch.compile costs more time than it could save here, and there are no kernels to compare.
    providers = options.providers or (PROVIDERS if on_card else ("published", "eager", "plan"))
    peaks = measure_peaks() if on_card else None
    common = environment()
    if peaks is not None:
        common["peak_copy_gb_per_s"] = f"{peaks.copy / 1e9:.0f}"
        common["peak_matmul_tflop_per_s"] = f"{peaks.matmul / 1e12:.0f}"
    else:
        print(f"no CUDA card: {options.model} in fp32 on {torch.get_num_threads()} CPU threads, nothing is compiled; "
              "these numbers show that the benches work and say nothing about a card")  # fmt: skip
    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        for batch in options.batch:
            print(f"{task}, {options.model}, batch {batch}")
            for provider in providers:
                row = measure(task, options.model, batch, provider, device, options.seconds, peaks)
                gc.collect()
                if on_card:
                    torch.cuda.empty_cache()
                if row is None:
                    continue
                rows.append(row | common)
                speedups(rows)
                with options.out.open("w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    writer.writeheader()
                    writer.writerows(rows)
                last = rows[-1]
                print(f"    {provider:18} {last['status'][:40]:8} {last.get('ms_p50', ''):>10} ms "
                      f"{last.get('images_per_s', ''):>9} images/s {last.get('tflop_per_s', ''):>7} TFLOP/s "
                      f"{last.get('percent_of_roofline', ''):>5} % of roofline "
                      f"x{last.get('speedup_published', ''):5} {last.get('psnr_to_exact', '')}")  # fmt: skip
    print(f"wrote {options.out}")
    return 1 if any(r["status"].startswith("failed") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
