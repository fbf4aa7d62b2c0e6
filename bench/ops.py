"""Op benches on a card: every case of bench/cases.py by every provider, as CSV rows.

    python bench/ops.py --out bench/results/ops.csv [--only lfq] [--skip compile] [--repeats 30]

Providers: ref (eager PyTorch), compile (torch.compile of ref), triton, cuda, and other projects' kernels where they
are installed. A provider whose result does not agree with the reference is reported as wrong and not timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

from bench.cases import CARD, UNCOMPARED, Case, cases, tensors, with_gradients  # noqa: E402
from bench.timing import Peaks, environment, measure_peaks, rotations, time_on_card  # noqa: E402
from flowmo_kernels import KernelUnavailableError, use  # noqa: E402
from flowmo_kernels._dispatch import OPS  # noqa: E402
from flowmo_kernels.fp8 import why_no_fp8  # noqa: E402

# A bf16 result may differ from the reference by a rounding of each output and by the order of sums: relative error
# of the whole tensor, 4 units of 2^-8. It catches wrong formulas; the tests judge precision.
AGREEMENT = 4 * 2**-8


def under(op: str, implementation: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        with use(**{op: implementation}):
            return call(*inputs)

    return run


def providers(case: Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and call of everything that can run the case here."""
    yield "ref", under(case.op, "ref", case.call)
    compiled = torch.compile(case.forward, dynamic=False)
    yield "compile", under(case.op, "ref", with_gradients(compiled) if case.variant == "backward" else compiled)
    for implementation in OPS[case.op]:
        reason = why_no_fp8(torch.device("cuda")) if case.op.endswith("fp8") else None
        if reason is not None:
            print(f"    no {implementation}: {reason}")
            continue
        try:
            with use(**{case.op: implementation}):
                pass
        except KernelUnavailableError as error:
            print(f"    no {implementation}: {error}")
            continue
        yield implementation, under(case.op, implementation, case.call)
    yield from case.libraries.items()


def results_of(call: Callable[..., Any], inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Outputs, and the inputs after the call (which in-place ops have changed)."""
    outputs = tensors(call(*inputs))
    return [t.detach().float().clone() for t in (*outputs, *tensors(inputs)) if t.is_floating_point()]


def disagreement(case: Case, call: Callable[..., Any], device: str) -> float:
    """Largest relative error of a tensor against the reference on the same random inputs."""
    worst = 0.0
    results = []
    for run in (under(case.op, "ref", case.call), call):
        torch.manual_seed(0)
        results.append(results_of(run, case.make(device)))
    for want, got in zip(*results):
        if want.shape != got.shape or not torch.isfinite(got).all():
            return float("inf")
        if want.numel():
            worst = max(worst, ((got - want).norm() / want.norm().clamp_min(1e-20)).item())
    return worst


def extra_memory(call: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """Bytes that a call holds at its height beside its inputs, its results included."""
    call(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*inputs)
    return torch.cuda.max_memory_allocated() - before


def row_of(case: Case, provider: str, call: Callable[..., Any], peaks: Peaks, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "pass": case.variant, "shape": case.shape, "provider": provider}
    if provider != "ref" and provider not in UNCOMPARED:
        error = disagreement(case, call, "cuda")
        row["error"] = f"{error:.2e}"
        if error > AGREEMENT:
            return row | {"status": "wrong"}
    inputs = [case.make("cuda") for _ in range(rotations(case.size))]
    row["extra_mb"] = f"{extra_memory(call, inputs[0]) / 1e6:.1f}"
    t = time_on_card(call, inputs, repeats)
    seconds = t.p50 * 1e-3
    reached = case.bytes / seconds / peaks.copy if case.bound == "memory" else case.flops / seconds / peaks.matmul
    return row | {
        "status": "ok", "ms_p20": f"{t.p20:.4f}", "ms_p50": f"{t.p50:.4f}", "ms_p80": f"{t.p80:.4f}",
        "gb_per_s": f"{case.bytes / seconds / 1e9:.0f}", "tflop_per_s": f"{case.flops / seconds / 1e12:.1f}",
        "bound": case.bound, "percent_of_peak": f"{100 * reached:.1f}", "captured": int(t.captured),
    }  # fmt: skip


FIELDS = [
    "op", "pass", "shape", "provider", "status", "error", "ms_p20", "ms_p50", "ms_p80", "gb_per_s", "tflop_per_s",
    "bound", "percent_of_peak", "extra_mb", "captured", "peak_copy_gb_per_s", "peak_matmul_tflop_per_s", "card",
    "driver", "torch", "cuda", "triton", "commit",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ops.csv")
    parser.add_argument("--only", default="", help="cases whose name contains this: lfq, norm_modulate/backward")
    parser.add_argument("--skip", nargs="*", default=[], help="providers to leave out, such as compile")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/ops.py times kernels on a CUDA card and there is none; `pytest bench/` runs small sizes on a CPU")
        return 2
    peaks = measure_peaks()
    common = {
        "peak_copy_gb_per_s": f"{peaks.copy / 1e9:.0f}", "peak_matmul_tflop_per_s": f"{peaks.matmul / 1e12:.0f}",
        **environment(),
    }  # fmt: skip
    print(f"{common['card']}: copy {peaks.copy / 1e12:.2f} TB/s, matrix product {peaks.matmul / 1e12:.0f} TFLOP/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for case in cases(CARD):
            if options.only not in case.name:
                continue
            print(f"{case.name} {case.shape}")
            for provider, call in providers(case):
                if provider in options.skip:
                    continue
                try:
                    row = row_of(case, provider, call, peaks, options.repeats)
                except Exception as error:  # Triton's and the compilers' errors have no common base
                    row = {"op": case.op, "pass": case.variant, "shape": case.shape, "provider": provider}
                    row |= {"status": f"failed: {(str(error) or repr(error)).splitlines()[0][:120]}"}
                wrong += row["status"] != "ok" and provider in ("triton", "cuda")
                writer.writerow(row | common)
                file.flush()
                print(f"    {provider:12} {row['status']:8} {row.get('ms_p50', ''):>9} ms "
                      f"{row.get('percent_of_peak', ''):>6} % of {case.bound} peak")  # fmt: skip
                torch.cuda.empty_cache()
    print(f"wrote {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
