"""Where the time of a decode goes, by component, from the profiler.

    python -m bench.components --providers published plan [--out bench/results/components.csv]

On a card the components are sums of kernel times, on a CPU of the time inside PyTorch's operators.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.model_cases import TASKS, Call, Setting, config, provide, provider_name
from bench.timing import ROOT, environment

# Component and the parts of names that tell it, the first that fits.
COMPONENTS = (
    ("attention", ("sdpa", "flash", "fmha", "attention", "softmax")),
    ("query-key norm and rotation", ("qk_norm",)),
    ("norm, modulation, residual", ("norm", "gate_residual", "addcmul")),
    ("sampler", ("step_boundary", "euler")),
    ("GELU", ("gelu",)),
    ("linear layers", ("gemm", "addmm", "::mm", "::bmm", "cutlass", "nvjet", "cublas", "scaled_mm", "splitk")),
    ("copies and joins", ("copy", "cat", "memcpy", "memset", "clone")),
)


def component(name: str) -> str:
    lower = name.lower()
    return next((c for c, words in COMPONENTS if any(w in lower for w in words)), "other")


def times_of(calls: Sequence[Call], device: str) -> list[dict[str, float]]:
    """Milliseconds a call by component, largest first; the calls take turns, so that load hits all of them alike."""
    # Kernels repeat themselves, and reading the events of a decode takes longer than the decode.
    activity, rounds = (ProfilerActivity.CUDA, 2) if device == "cuda" else (ProfilerActivity.CPU, 5)
    sums: list[dict[str, float]] = [defaultdict(float) for _ in calls]
    for call in calls:
        for _ in range(2):
            call()
    for _ in range(rounds):
        for call, found in zip(calls, sums):
            with profile(activities=[activity]) as recorded:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            for event in recorded.key_averages():
                if device == "cuda" and event.device_type != torch.autograd.DeviceType.CUDA:
                    continue
                us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
                if us > 0:
                    found[component(event.key)] += us / 1e3 / rounds
    return [dict(sorted(found.items(), key=lambda item: -item[1])) for found in sums]


def main(arguments: list[str] | None = None) -> int:
    on_card = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "components.csv")
    parser.add_argument("--task", choices=TASKS, default="decode")
    parser.add_argument("--providers", nargs="+", type=provider_name, default=["published", "plan"])
    parser.add_argument("--model", default="lo" if on_card else "quickstart", help="name of a preset")
    parser.add_argument("--batch", type=int, default=8 if on_card else 1)
    parser.add_argument("--note", default="", help="kept with every row: what else the machine did, for example")
    options = parser.parse_args(arguments)
    device = "cuda" if on_card else "cpu"
    fields = ["task", "model", "batch", "provider", "component", "ms", "percent"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = environment() | {"note": options.note}
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *common])
        writer.writeheader()
        # A card is alone with us: there the rows of one provider are written before the next is compiled.
        for group in [[p] for p in options.providers] if on_card else [options.providers]:
            calls: dict[str, Call] = {}
            for provider in group:
                setting = Setting.make(config(options.model), options.batch, device)
                call = provide(provider, options.task, setting, device)
                if call is None:
                    print(f"{provider} has no {options.task}")
                else:
                    calls[provider] = call
            for provider, times in zip(calls, times_of(list(calls.values()), device)):
                total = sum(times.values())
                what = f"{options.task} by {provider}, {options.model}, batch {options.batch}"
                print(f"{what} on {device}: {total:.1f} ms")
                for name, ms in times.items():
                    row = {"task": options.task, "model": options.model, "batch": options.batch, "provider": provider}
                    row |= {"component": name, "ms": f"{ms:.3f}", "percent": f"{100 * ms / total:.1f}"}
                    writer.writerow(row | common)
                    print(f"    {name:30} {ms:10.2f} ms {100 * ms / total:5.1f} %")
            file.flush()
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
