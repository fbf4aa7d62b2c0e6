"""Which solver needs how many forward passes: PSNR of its pictures to the converged ones, and to the originals.

    python -m bench.solvers --checkpoint runs/quickstart [--out bench/results/solvers.csv]

The converged pictures are Heun's with many steps from the same codes and noise. Codes come from crops of the built-in
held-out photographs. Euler with 25 steps is the paper's sampler; what the engine offers besides stands in the same
table, with its PSNR to that sampler's picture: the last steps as one, cached steps (a forward pass of some of the
blocks counts as a part of one), linear layers in fp8, and attention in 8 bits. On a CPU the 8-bit options run in the
reference arithmetic: the error is that of the formats, the time says nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import ROOT, environment
from flowmo import FlowMo
from flowmo.data import center_crop, heldout_photographs, resize_shorter, to_tensor
from flowmo.engine import Schedule, StepCache
from flowmo.metrics import psnr
from flowmo.pretrained import shipped_weights
from flowmo.solvers import SOLVERS
from flowmo.tiles import split_tiles

STEPS = (2, 4, 6, 8, 12, 16, 25, 50)
TAILS = (6, 10, 14)
FIELDS = [
    "solver", "steps", "tail_merge", "cached_steps", "cached_blocks", "fp8", "attention", "rho", "guidance", "forwards",
    "psnr_to_converged", "psnr_to_exact", "psnr_to_original",
]  # fmt: skip
# Of 25 steps; 4 to 9 are the guided ones of the default interval, and the first of them cannot be cached.
CACHED = {
    "every second of the last 12": range(13, 25, 2),
    "every second of the last 16": range(9, 25, 2),
    "every second": range(5, 25, 2),
    "the last 8": range(17, 25),
    "two of three of the last 16": [j for j in range(9, 25) if j % 3],
}


class Way(NamedTuple):
    """One way to decode."""

    schedule: Schedule
    cache: StepCache | None = None
    attention: str = "auto"
    fp8: bool = False

    @property
    def changed(self) -> bool:
        """Whether the engine's options change the picture of this solver and number of steps."""
        return bool(self.schedule.tail_merge or self.cache or self.attention != "auto" or self.fp8)


def ways(guidance: float, rho: float, depth: int, steps: Sequence[int] = STEPS) -> Iterator[Way]:
    for solver in SOLVERS:
        for n in steps:
            yield Way(Schedule(n, rho, guidance, solver=solver))
    paper = Schedule(25, rho, guidance)
    for tail in TAILS:
        yield Way(paper._replace(tail_merge=tail))
    for chosen in CACHED.values():
        for blocks in sorted({max(1, depth // 4), max(1, depth // 2), depth - 1} & set(range(1, depth))):
            yield Way(paper, StepCache(tuple(chosen), blocks))
    for attention in ("fp8", "int8"):
        yield Way(paper, attention=attention)
        yield Way(paper, attention=attention, fp8=True)
    yield Way(paper, fp8=True)
    yield Way(paper._replace(tail_merge=TAILS[0]), fp8=True)


@torch.no_grad()
def table(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1]
    todo: Sequence[Way],
    converged_steps: int,
) -> list[dict[str, Any]]:
    """A row for every way, in order of forward passes."""
    images = images.to(model.device)
    codes = model.encode(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(model.device)

    def decode(way: Way) -> tuple[Tensor, float]:
        options = {**way.schedule._asdict(), "cache": way.cache, "attention": way.attention, "fp8": way.fp8}
        plan = model.decode_plan(len(codes), **options, dtype=model.dtype, graph=False)
        return plan(codes, noise), plan.forwards

    rows = []
    known: dict[Way, Tensor] = {}

    def picture(way: Way) -> Tensor:
        if way not in known:
            known[way] = decode(way)[0]
        return known[way]

    for way in todo:
        s, cache = way.schedule, way.cache
        pictures, forwards = decode(way)
        converged = picture(Way(Schedule(converged_steps, s.rho, s.guidance, solver="heun")))
        exact = picture(Way(s._replace(tail_merge=None))) if way.changed else None
        rows.append(
            {
                "solver": s.solver, "steps": s.steps, "tail_merge": s.tail_merge or "",
                "cached_steps": " ".join(map(str, cache.steps)) if cache else "",
                "cached_blocks": f"{cache.blocks} of {model.config.decoder_depth}" if cache else "",
                "fp8": "1" if way.fp8 else "",
                "attention": "" if way.attention == "auto" else way.attention,
                "rho": s.rho, "guidance": s.guidance, "forwards": f"{forwards:.4g}",
                "psnr_to_converged": f"{float(psnr(pictures, converged).mean()):.2f}",
                "psnr_to_exact": "" if exact is None else f"{float(psnr(pictures, exact).mean()):.2f}",
                "psnr_to_original": f"{float(psnr(pictures, images).mean()):.2f}",
            }
        )  # fmt: skip
    return sorted(rows, key=lambda r: float(r["forwards"]))


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
    depth = model.config.decoder_depth
    todo = [way for g in options.guidance for way in ways(g, options.rho, depth, options.steps)]
    print(f"{path}: {len(images)} pictures of {size} x {size}, converged is Heun with {options.converged} steps")
    rows = table(model, images, todo, options.converged)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *environment()])
        writer.writeheader()
        writer.writerows(row | environment() for row in rows)
    for guidance in options.guidance:
        print(f"\nguidance {guidance}, rho {options.rho}: PSNR in dB")
        print(f"{'forwards':>9} {'solver':7} {'steps':>6} {'to converged':>13} {'to exact':>9} {'to original':>12}")
        for r in rows:
            if r["guidance"] == guidance:
                changed = [f"last {r['tail_merge']} as one"] * bool(r["tail_merge"])
                changed += [f"{r['cached_blocks']} blocks at {r['cached_steps']}"] * bool(r["cached_steps"])
                changed += ["fp8 linear layers"] * bool(r["fp8"])
                changed += [f"{r['attention']} attention"] * bool(r["attention"])
                print(f"{r['forwards']:>9} {r['solver']:7} {r['steps']:>6} {r['psnr_to_converged']:>13} "
                      f"{r['psnr_to_exact']:>9} {r['psnr_to_original']:>12} {', '.join(changed)}")  # fmt: skip
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
