"""Which solver needs how many forward passes: PSNR of its pictures to the converged ones, and to the originals.

    python -m bench.solvers --checkpoint runs/quickstart [--out bench/results/solvers.csv]

The converged pictures are Heun's with many steps from the same codes and noise. Codes come from crops of the built-in
held-out photographs. Euler with 25 steps is the paper's sampler; its tail-merged forms stand in the same table.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import ROOT, environment
from flowmo import FlowMo
from flowmo.data import center_crop, heldout_photographs, resize_shorter, to_tensor
from flowmo.engine import Schedule
from flowmo.metrics import psnr
from flowmo.pretrained import shipped_weights
from flowmo.solvers import SOLVERS
from flowmo.tiles import split_tiles

STEPS = (2, 4, 6, 8, 12, 16, 25, 50)
TAILS = (6, 10, 14)
FIELDS = ["solver", "steps", "tail_merge", "rho", "guidance", "forwards", "psnr_to_converged", "psnr_to_original"]


def schedules(guidance: float, rho: float, steps: Sequence[int] = STEPS) -> Iterator[Schedule]:
    for solver in SOLVERS:
        for n in steps:
            yield Schedule(n, rho, guidance, solver=solver)
    for tail in TAILS:
        yield Schedule(25, rho, guidance, tail_merge=tail)


@torch.no_grad()
def table(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1]
    todo: Sequence[Schedule],
    converged_steps: int,
) -> list[dict[str, Any]]:
    """A row for every schedule, in order of forward passes."""
    images = images.to(model.device)
    codes = model.encode(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    def decode(s: Schedule) -> Tensor:
        return model.decode(codes, noise=noise, **s._asdict())

    rows = []
    converged: dict[tuple[float, float], Tensor] = {}
    for s in sorted(todo, key=lambda s: s.forwards):
        key = s.rho, s.guidance
        if key not in converged:
            converged[key] = decode(Schedule(converged_steps, s.rho, s.guidance, solver="heun"))
        pictures = decode(s)
        rows.append(
            {
                "solver": s.solver, "steps": s.steps, "tail_merge": s.tail_merge or "", "rho": s.rho,
                "guidance": s.guidance, "forwards": s.forwards,
                "psnr_to_converged": f"{float(psnr(pictures, converged[key]).mean()):.2f}",
                "psnr_to_original": f"{float(psnr(pictures, images).mean()):.2f}",
            }
        )  # fmt: skip
    return rows


def crops(model: FlowMo, side: int) -> Tensor:
    """The held-out photographs at `side` pixels, in tiles of the model's size."""
    pictures = [to_tensor(center_crop(resize_shorter(p, side), side)) for p in heldout_photographs().values()]
    return split_tiles(torch.stack(pictures), model.config.image_size)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="model folder, run or released .pth; default: the shipped weights")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "solvers.csv")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 1.0])
    parser.add_argument("--rho", type=float, default=4.0)
    parser.add_argument("--side", type=int, default=64, help="of the photographs, in pixels; cut into tiles")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--converged", type=int, default=200, help="Heun steps of the reference")
    options = parser.parse_args(arguments)
    path = options.checkpoint or shipped_weights("quickstart")
    if path is None:
        parser.error("this copy of flowmo ships no weights; name a trained model with --checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FlowMo.from_pretrained(path, device=device)
    size = model.config.image_size
    images = crops(model, max(options.side // size, 1) * size)
    todo = [s for g in options.guidance for s in schedules(g, options.rho, options.steps)]
    print(f"{path}: {len(images)} pictures of {size} x {size}, converged is Heun with {options.converged} steps")
    rows = table(model, images, todo, options.converged)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *environment()])
        writer.writeheader()
        writer.writerows(row | environment() for row in rows)
    for guidance in options.guidance:
        print(f"\nguidance {guidance}, rho {options.rho}: PSNR in dB")
        print(f"{'forwards':>9} {'solver':7} {'steps':>6} {'tail':>5} {'to converged':>13} {'to original':>12}")
        for r in rows:
            if r["guidance"] == guidance:
                print(f"{r['forwards']:>9} {r['solver']:7} {r['steps']:>6} {r['tail_merge']:>5} "
                      f"{r['psnr_to_converged']:>13} {r['psnr_to_original']:>12}")  # fmt: skip
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
