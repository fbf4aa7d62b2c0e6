"""The first questions to a card: attention by backend, head size and layout, and matrix products by shape and kind.

    python -m bench.first --out bench/results/first.csv [--only attention]

Attention: 96 channels are the decoder's, 64 the encoder's; equal times at 96 and 128 mean that a backend pads. "image"
are views of a [B, L, 3, H, d] buffer as in training, "sequence" of a [L, B, 3, H, d] buffer as in the engine: a slower
one is copied. Matrix products: the four shapes of a block with D = 1152 in bf16 with bias, with the GELU in the
epilogue, and in row-scaled fp8, whose GELU is a pass of its own that rounds for the next product.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import ROOT, environment, measure_peaks, rotations, time_on_card
from flowmo_kernels import gelu_fp8, joint_attention, linear_fp8, linear_gelu, quantize_rows
from flowmo_kernels.attention import why_not

BACKENDS = ("cudnn", "flash", "efficient", "fa3", "fa2", "triton", "fp8", "int8")
DEVICE = "cuda"
LENGTH, HEADS, WIDTH = 4352, 12, 1152
SHAPES = {"qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, 4 * WIDTH), "fc2": (4 * WIDTH, WIDTH)}

Make = Callable[[], tuple[Any, ...]]


class Probe(NamedTuple):
    """One measurement."""

    kind: str  # "attention", "attention backward" or "linear"
    name: str  # backend, or layer and kind of product
    shape: str
    make: Make  # inputs of one call
    call: Callable[..., Any]
    flops: float
    size: int  # bytes of one set of inputs


def attention_inputs(batch: int, d: int, layout: str, gradient: bool) -> tuple[Tensor, ...]:
    """q, k, v [B, L, H, d] as views of one buffer; q and k of unit RMS, as the query-key norm leaves them."""
    first = (batch, LENGTH) if layout == "image" else (LENGTH, batch)
    buffer = torch.randn(*first, 3, HEADS, d, device=DEVICE)
    buffer[:, :, :2] *= buffer[:, :, :2].square().mean(-1, keepdim=True).rsqrt()
    joint = buffer.bfloat16() if layout == "image" else buffer.bfloat16().transpose(0, 1)
    return tuple(t.detach().requires_grad_(gradient) for t in joint.unbind(2))


def attention_probes(batches: tuple[int, ...]) -> Iterator[Probe]:
    probe = torch.zeros(1, 8, 1, 96, dtype=torch.bfloat16, device=DEVICE)
    for batch in batches:
        for d in (96, 128, 64):
            flops = 4.0 * batch * HEADS * LENGTH**2 * d
            size = 6 * batch * LENGTH * HEADS * d
            for backend in (b for b in BACKENDS if why_not(b, probe) is None):
                options = {"backend": backend, "logit_bound": 8.0}

                def forward(q: Tensor, k: Tensor, v: Tensor, d: int = d, options: dict[str, Any] = options) -> Tensor:
                    return joint_attention(q, k, v, 8 / d, **options)

                def backward(q: Tensor, k: Tensor, v: Tensor, run: Callable[..., Tensor] = forward) -> Any:
                    o = run(q, k, v)
                    return torch.autograd.grad(o, (q, k, v), o.detach())

                for layout in ("image", "sequence") if d == 96 else ("image",):

                    def make(b: int = batch, d: int = d, layout: str = layout, grad: bool = False) -> Any:
                        return attention_inputs(b, d, layout, grad)

                    shape = f"B={batch} d={d} {layout}"
                    yield Probe("attention", backend, shape, make, forward, flops, size)
                    if layout == "image" and batch == 8 and backend not in ("fp8", "int8"):
                        yield Probe(
                            "attention with backward", backend, shape, lambda m=make: m(grad=True), backward,
                            3.5 * flops, size,
                        )  # fmt: skip


def linear_probes(rows: tuple[int, ...]) -> Iterator[Probe]:
    for m in rows:
        for layer, (d, f) in SHAPES.items():
            flops, shape = 2.0 * m * d * f, f"{m} x {d} x {f}"

            def bf16(m: int = m, d: int = d, f: int = f) -> tuple[Tensor, ...]:
                x, w = torch.randn(m, d, device=DEVICE), torch.randn(f, d, device=DEVICE) / d**0.5
                return x.bfloat16(), w.bfloat16(), torch.randn(f, device=DEVICE).bfloat16()

            def fp8(make: Make = bf16) -> tuple[Tensor, ...]:
                x, w, b = make()
                return *quantize_rows(x), *quantize_rows(w), b

            def fp8_gelu(*inputs: Tensor) -> tuple[Tensor, Tensor]:
                return gelu_fp8(linear_fp8(*inputs))

            size = 2 * m * d
            yield Probe("linear", f"{layer} bf16", shape, bf16, lambda x, w, b: torch.addmm(b, x, w.t()), flops, size)
            if layer == "fc1":
                yield Probe("linear", "fc1 bf16 and GELU", shape, bf16, linear_gelu, flops, size)
            if torch.cuda.get_device_capability() >= (8, 9):
                yield Probe("linear", f"{layer} fp8", shape, fp8, linear_fp8, flops, size // 2)
                if layer == "fc1":
                    yield Probe("linear", "fc1 fp8 and GELU", shape, fp8, fp8_gelu, flops, size // 2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "first.csv")
    parser.add_argument("--only", default="", help="probes whose kind and name contain this")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 1, 32])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/first.py asks a CUDA card and there is none")
        return 2
    peaks, common = measure_peaks(), environment()
    print(f"copy {peaks.copy / 1e12:.2f} TB/s, matrix product {peaks.matmul / 1e12:.0f} TFLOP/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fields = ["kind", "name", "shape", "status", "ms_p20", "ms_p50", "ms_p80", "tflop_per_s", "percent_of_peak"]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *common])
        writer.writeheader()
        first, *others = options.batch  # matrix products before the other batches: time may run out
        linear = linear_probes((256, *(4096 * b for b in options.batch)))
        for p in (*attention_probes((first,)), *linear, *attention_probes(tuple(others))):
            if options.only not in f"{p.kind} {p.name}":
                continue
            row = {"kind": p.kind, "name": p.name, "shape": p.shape, "status": "ok"}
            try:
                t = time_on_card(p.call, [p.make() for _ in range(rotations(p.size))], 20)
                rate = p.flops / t.p50 / 1e9
                row |= {"ms_p20": f"{t.p20:.4f}", "ms_p50": f"{t.p50:.4f}", "ms_p80": f"{t.p80:.4f}"}
                row |= {"tflop_per_s": f"{rate:.1f}", "percent_of_peak": f"{1e14 * rate / peaks.matmul:.1f}"}
            except Exception as error:  # several libraries, each with errors of its own
                row["status"] = f"failed: {(str(error) or repr(error)).splitlines()[0][:120]}"
            writer.writerow(row | common)
            file.flush()
            print(f"{p.kind:24} {p.name:20} {p.shape:24} {row['status'][:40]} {row.get('ms_p50', ''):>9} ms "
                  f"{row.get('tflop_per_s', ''):>7} TFLOP/s")  # fmt: skip
            torch.cuda.empty_cache()
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
