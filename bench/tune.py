"""Sweep launch sizes on a card, offline; the library itself never tunes.

    python bench/tune.py --out bench/results/tune.csv [--only lfq] [--repeats 20]

For every sweep the plain function (or constant) that decides launch sizes is replaced by each candidate in turn, the
result is checked against the reference, and the case is timed like in bench/ops.py. The table ends with the fastest
candidate beside the present choice; a better one is then written into the op file by hand, with the row as evidence.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

from bench.cases import CARD, Case, cases  # noqa: E402
from bench.ops import AGREEMENT, disagreement, under  # noqa: E402
from bench.timing import environment, rotations, time_on_card  # noqa: E402
from flowmo_kernels import joint_attention  # noqa: E402


@dataclass(frozen=True)
class Sweep:
    """What to replace in which module, by what, and the case that is timed."""

    module: str  # of flowmo_kernels
    attribute: str  # a launch function, or a constant
    case: str  # start of the case's name and shape
    candidates: list[dict[str, Any]]  # fields to change in the launch function's result, or {"value": constant}


def grid(**fields: list[Any]) -> list[dict[str, Any]]:
    """All combinations."""
    return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


def attention_case(batch: int, d: int) -> Case:
    """The engine's attention at the published length: logits known to be small, no gradient."""
    shape = batch, 4352, 12, d

    def make(device: str) -> tuple[Any, ...]:
        return *(torch.randn(3, *shape, device=device).bfloat16().unbind(0)), 8 / d

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return joint_attention(q, k, v, scale, logit_bound=60.0)

    size, flops = 6 * math.prod(shape), 4 * math.prod(shape) * 4352
    name = str(list(shape))
    return Case("joint_attention", "bounded", name, make, call, call, 4 * size // 3, flops, "compute", {}, size)


ATTENTION = {f"{case.name} {case.shape}": case for case in (attention_case(b, d) for d in (96, 64) for b in (1, 8))}
# A tile's sides are powers of two, so 192 rows are not to be had. Of 96 channels in 128 x 64 tiles a Hopper processor
# holds one program of 8 warps, two with at most 128 registers or with 4 warps.
ATTENTION_TILES = [
    dict(zip(("m", "n", "warps", "stages", "registers"), tile))
    for tile in [
        (128, 64, 8, 3, None), (128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (128, 64, 4, 3, None),
        (128, 32, 8, 4, None), (128, 128, 8, 2, None), (128, 128, 8, 3, None), (256, 64, 8, 2, None),
        (64, 64, 4, 3, None), (64, 64, 4, 2, None), (64, 128, 4, 2, None),
    ]
]  # fmt: skip

SWEEPS = [
    Sweep("norm_residual_triton", "row_launch", "norm_modulate/forward",
          grid(rows=[1, 2, 4], iters=[1, 2, 4], num_warps=[1, 2, 4, 8])),
    Sweep("norm_residual_triton", "row_launch", "norm_modulate/backward",
          grid(rows=[1, 2], iters=[8, 16, 32, 64], num_warps=[2, 4, 8])),
    Sweep("norm_residual_triton", "row_launch", "gate_residual_norm_modulate/forward",
          grid(rows=[1, 2, 4], iters=[1, 2, 4], num_warps=[1, 2, 4, 8])),
    Sweep("norm_residual_triton", "row_launch", "gate_residual_norm_modulate/backward",
          grid(rows=[1, 2], iters=[8, 16, 32, 64], num_warps=[2, 4, 8])),
    Sweep("gelu_fp8", "row_launch", "gelu_fp8/forward", grid(iters=[1, 2, 4, 8], num_warps=[4, 8, 16])),
    Sweep("qk_norm_rope", "_launch", "qk_norm_rope/in place",
          grid(rows=[4, 8, 16, 32], iters=[1, 2], num_warps=[2, 4, 8])),
    Sweep("qk_norm_rope", "_launch", "qk_norm_rope/backward",
          grid(rows=[4, 8, 16], iters=[1, 2, 4, 8], num_warps=[2, 4, 8])),
    Sweep("lfq", "forward_launch", "lfq/forward", grid(block_n=[16, 32, 64], block_j=[16, 32], warps=[2, 4, 8])),
    Sweep("lfq", "forward_launch", "lfq/forward [8, 256, 56]",
          grid(block_n=[16, 32], block_i=[32, 64, 128], block_j=[64, 128], warps=[4, 8])),
    Sweep("lfq", "SPLITS", "lfq/forward [8, 256, 56]", grid(value=[64, 128, 256])),
    Sweep("lfq", "backward_launch", "lfq/backward [8, 256, 56]",
          grid(block_n=[16, 32], block_i=[32, 64], block_j=[32, 64], warps=[4, 8])),
    Sweep("euler_step", "BLOCK", "euler_step", grid(value=[512, 1024, 2048, 4096])),
    Sweep("pack_tokens", "BLOCK", "pack_tokens", grid(value=[128, 256, 512])),
    Sweep("step_boundary", "boundary_launch", "step_boundary/forward",
          grid(block_m=[16, 32, 64], block_d=[32, 64, 128], block_x=[64, 128], warps=[4, 8])),
    Sweep("step_boundary", "boundary_launch", "step_boundary/guided",
          grid(block_m=[16, 32, 64], block_d=[32, 64, 128], block_x=[64, 128], warps=[4, 8])),
    Sweep("optim", "CHUNK", "adam_hold_ema", grid(value=[4096, 8192, 16384, 32768, 65536])),
    Sweep("optim", "BLOCK", "adam_hold_ema", grid(value=[512, 1024, 2048])),
    *(Sweep("attention_triton", "blocks", case, ATTENTION_TILES) for case in ATTENTION),
    # 408 and 3264 tiles on 132 processors; parts = 1 splits nothing.
    *(Sweep("attention_triton", "waves", f"joint_attention/bounded [1, 4352, 12, {d}]",
            grid(whole=[396], parts=[1, 2, 4, 7, 10, 14, 23])) for d in (96, 64)),
    *(Sweep("attention_triton", "waves", f"joint_attention/bounded [8, 4352, 12, {d}]",
            grid(whole=[3168], parts=[1, 2, 4, 8])) for d in (96, 64)),
]  # fmt: skip


@contextmanager
def replaced(sweep: Sweep, candidate: dict[str, Any] | None) -> Iterator[None]:
    """The module with the candidate's launch sizes, or as it is for None."""
    module = import_module(f"flowmo_kernels.{sweep.module}")
    present = getattr(module, sweep.attribute)
    new: Any = present
    if candidate is not None:
        new = candidate["value"] if "value" in candidate else lambda *a, **k: present(*a, **k)._replace(**candidate)
    with mock.patch.object(module, sweep.attribute, new):
        yield


def case_of(sweep: Sweep, all_cases: list[Case]) -> Case:
    every = [*ATTENTION.values(), *all_cases]
    return next(case for case in every if f"{case.name} {case.shape}".startswith(sweep.case))


def measure(case: Case, call: Callable[..., Any], repeats: int) -> tuple[str, float]:
    """Status and milliseconds."""
    try:
        if disagreement(case, call, "cuda") > AGREEMENT:
            return "wrong", float("inf")
        timing = time_on_card(call, [case.make("cuda") for _ in range(rotations(case.size))], repeats)
    except Exception as error:  # a candidate may ask for more shared memory than there is, in several libraries' words
        return f"failed: {str(error).splitlines()[0][:100]}", float("inf")
    return "ok", timing.p50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tune.csv")
    parser.add_argument("--only", default="", help="sweeps whose module or case contains this")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/tune.py sweeps launch sizes on a CUDA card and there is none")
        return 2
    all_cases, common = cases(CARD), environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fields = ["module", "attribute", "case", "candidate", "status", "ms_p50", *common]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for sweep in SWEEPS:
            if options.only not in f"{sweep.module} {sweep.case}":
                continue
            case = case_of(sweep, all_cases)
            call = under(case.op, "triton", case.call)
            results = []
            for candidate in [None, *sweep.candidates]:
                with replaced(sweep, candidate):
                    status, ms = measure(case, call, options.repeats)
                label = "present" if candidate is None else " ".join(f"{k}={v}" for k, v in candidate.items())
                results.append((ms, label))
                writer.writerow(
                    {"module": sweep.module, "attribute": sweep.attribute, "case": f"{case.name} {case.shape}",
                     "candidate": label, "status": status, "ms_p50": f"{ms:.4f}"} | common
                )  # fmt: skip
                file.flush()
                torch.cuda.empty_cache()
            best, present = min(results), results[0]
            print(f"{case.name} {case.shape}: present {present[0]:.4f} ms, best {best[0]:.4f} ms ({best[1]})")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
