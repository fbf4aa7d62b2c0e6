"""Stage 1B's memory modes: what a training step of each keeps in memory at most, and how long it takes.

    python -m bench.memory_modes --set model.image_size=128 --out bench/results/memory-modes-cpu.csv     # minutes
    python -m bench.memory_modes --model lo --batch 4              # on a card: bf16, the published micro-batch

Loss and gradients of one micro-batch, with an untrained ResNet-50 (which costs what the published one does), random
weights and pictures. Every mode runs in a process of its own. `peak_gib` is what the step adds to weights and
gradients: on a card what PyTorch allocated at most, on a CPU what the process held at most (resident set).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.timing import ROOT, environment, percentiles
from flowmo import FlowMo
from flowmo.config import LossConfig, NoiseConfig, PosttrainConfig, parse
from flowmo.perceptual.resnet import ResNet50, ResNetDistance
from flowmo.training.posttrain import posttrain_loss

MODES = ("none", "save10", "full")
FIELDS = [
    "model", "batch", "chain", "checkpoint", "dtype", "step_ms_p50", "step_ms_min", "steps", "peak_gib",
    "held_gib", "card", "driver", "torch", "cuda", "triton", "commit", "note",
]  # fmt: skip


def measure(model: list[str], batch: int, chain: int, mode: str, steps: int) -> dict[str, Any]:
    """Times and peak of `steps` steps in this process; on a card after one that warms up."""
    from bench.model import timed

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    flowmo = FlowMo(parse(model).model).to(device)
    flowmo.encoder.requires_grad_(False).eval()
    for parameter in flowmo.decoder.unread_parameters():
        parameter.requires_grad_(False)
    resnet = ResNetDistance(ResNet50()).to(device)
    size = flowmo.config.image_size
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    config = PosttrainConfig(steps=chain)
    for parameter in flowmo.decoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def step() -> None:
        low = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
        with low:
            losses = posttrain_loss(flowmo, images, config, LossConfig(), NoiseConfig(), resnet, None, mode)
            losses["total"].backward()

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**30
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = pages * resource.getpagesize() / 2**30
    warm = int(device == "cuda")
    samples = [timed(step, device) for _ in range(warm + steps)][warm:]
    top = torch.cuda.max_memory_allocated() / 2**30
    if device == "cpu":
        top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = percentiles(samples, False)
    return {
        "model": " ".join(model), "batch": batch, "chain": chain, "checkpoint": mode,
        "dtype": "bf16" if device == "cuda" else "fp32", "step_ms_p50": f"{times.p50:.0f}",
        "step_ms_min": f"{times.least:.0f}", "steps": steps, "peak_gib": f"{top - held:.2f}", "held_gib": f"{held:.2f}",
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a preset (default small)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over the preset's")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a micro-batch (default 1)")
    parser.add_argument("--chain", type=int, default=8, help="steps of the chain (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="training steps to time (default 3)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    parser.add_argument("--note", default="", help="what the reader must know, such as other load on the machine")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory-modes.csv")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.in_process:
        model = [options.model, *options.set]
        print(json.dumps(measure(model, options.batch, options.chain, options.modes[0], options.steps)))
        return 0
    shared = {**environment(), "note": options.note}
    rows = []
    for mode in options.modes:
        words = [sys.executable, "-m", "bench.memory_modes", "--in-process", "--modes", mode]
        for name in ("model", "batch", "chain", "steps", "threads"):
            words += [f"--{name}", str(getattr(options, name))]
        words += ["--set", *options.set]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            print(f"{mode} failed ({done.returncode}; -9: killed for memory):\n{done.stderr}", file=sys.stderr)
            return 1
        rows.append(json.loads(done.stdout.splitlines()[-1]) | shared)
        print(f"checkpoint={mode}: {rows[-1]['step_ms_p50']} ms a step, {rows[-1]['peak_gib']} GiB", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
