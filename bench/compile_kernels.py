"""Compile every Triton kernel ahead of time, on a machine with or without a card, and report what each one costs.

    python bench/compile_kernels.py                 sm_80, sm_90 and sm_100
    python bench/compile_kernels.py --arch 90       one architecture (what CI runs)
    python bench/compile_kernels.py --only lfq      op modules whose name contains "lfq"
    python bench/compile_kernels.py --cuda          the CUDA kernels instead (bench/compile_cuda.py)

The shapes are the real ones: every op module lists its own in `aot_signatures()`. Registers, shared memory, stack
and spills are what the assembler put into the binary. A spill that is not in `ALLOWED_SPILLS` fails the run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kernels are decorated at import: compiling needs the compiler, whatever the shell was set up for.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

ARCHITECTURES = (80, 90, 100)

# (kernel, label, architecture): why this spill is right. Empty: nothing spills.
ALLOWED_SPILLS: dict[tuple[str, str, int], str] = {}

# Number types that older architectures do not have: the first that has them.
NEEDS = {"fp8e4nv": 89}


@dataclass
class Report:
    module: str
    kernel: str
    label: str
    arch: int
    warps: int
    registers: int
    shared: int  # bytes of static and dynamic shared memory
    stack: int  # bytes to a thread
    spills: int  # bytes stored and loaded to a thread
    seconds: float


def op_modules(only: str = "") -> list[str]:
    """Modules of flowmo_kernels that list kernels to compile."""
    import flowmo_kernels

    found = []
    for info in pkgutil.iter_modules(flowmo_kernels.__path__):
        if only in info.name and info.name not in ("_ext", "_cuda"):
            module = importlib.import_module(f"flowmo_kernels.{info.name}")
            signatures = getattr(module, "aot_signatures", None)
            if signatures is not None and signatures.__module__ == module.__name__:
                found.append(info.name)
    return found


def assemble(ptx: str, arch: int) -> tuple[int, int, int, int]:
    """Registers, static shared memory, stack and spill bytes of one kernel, from the assembler's own report."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        words = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(source)]
        done = subprocess.run([*words, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")

    def number(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        return int(found.group(1)) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack frame"), spills


def compile_one(job: tuple[str, int, int]) -> Report:
    """Compile signature number `index` of a module for one architecture."""
    name, index, arch = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constexprs, warps, stages, label = importlib.import_module(
        f"flowmo_kernels.{name}"
    ).aot_signatures()[index]
    # What Triton specializes on at run time: memory from PyTorch's allocator is aligned to 16 bytes, and a size or
    # stride that the op module marks ("i32:16") is a multiple of 16 at the real shapes.
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    start = time.perf_counter()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    registers, static, stack, spills = assemble(built.asm["ptx"], arch)
    seconds = time.perf_counter() - start
    shared = max(static, built.metadata.shared)
    return Report(name, kernel.__name__, label, arch, warps, registers, shared, stack, spills, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; may be repeated; default all three")
    parser.add_argument("--only", default="", help="op modules whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels instead of the Triton ones")
    options = parser.parse_args(arguments)
    architectures = options.arch or list(ARCHITECTURES)
    if options.cuda:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        return int(importlib.import_module("compile_cuda").main(architectures) or 0)

    jobs = []
    for name in op_modules(options.only):
        for index, signature in enumerate(importlib.import_module(f"flowmo_kernels.{name}").aot_signatures()):
            types = {kind.lstrip("*") for kind in signature[1].values()}
            least, why = max(((NEEDS[t], t) for t in types & set(NEEDS)), default=(0, ""))
            jobs += [(name, index, arch) for arch in architectures if arch >= least]
            for arch in architectures:
                if arch < least:
                    print(f"{signature[-1]} needs {why} of sm_{least}: not compiled for sm_{arch}")
    if not jobs:
        print(f"no op module with kernels matches {options.only!r}")
        return 2

    print(f"{'kernel':32} {'case':46} {'sm':>4} warps  regs  shared stack spill     s")
    failures = []
    with tempfile.TemporaryDirectory() as cache:
        # A warm cache would hide a kernel that no longer compiles.
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs) as pool:
            for job, future in [(job, pool.submit(compile_one, job)) for job in jobs]:
                try:
                    r = future.result()
                except Exception as error:
                    failures.append(f"{job[0]}, signature {job[1]}, sm_{job[2]}: {error}")
                    continue
                print(
                    f"{r.kernel:32} {r.label:46} {r.arch:4} {r.warps:5} {r.registers:5} {r.shared:7} {r.stack:5} "
                    f"{r.spills:5} {r.seconds:5.1f}",
                    flush=True,
                )
                reason = ALLOWED_SPILLS.get((r.kernel, r.label, r.arch))
                if r.spills and reason is None:
                    failures.append(f"{r.kernel} ({r.label}) spills {r.spills} bytes to a thread on sm_{r.arch}")
                elif r.spills:
                    print(f"    spill allowed: {reason}")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(jobs) - len(failures)} of {len(jobs)} compiled without unlisted spills")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
