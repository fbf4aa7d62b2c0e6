"""What the CUDA compiler says of every kernel: registers, shared memory, stack and spills, per architecture.

    python bench/compile_cuda.py                    sm_80, sm_90a, sm_100, as far as the found nvcc knows them
    python bench/compile_cuda.py --archs sm_90a

No card is needed. Ends with 1 when a kernel spills registers, or keeps a stack, and is not listed with a reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("sm_80", "sm_90a", "sm_100")
# Kernels that may spill or keep a stack, by a piece of their name, with the reason. None does.
ALLOWED: dict[str, str] = {}


class Kernel(NamedTuple):
    """One line of the report; bytes per thread, shared memory in bytes per block (static only)."""

    arch: str
    file: str
    name: str
    registers: int
    shared: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """The compiler: in CUDA_HOME, in PATH, or in its usual folder."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


def normalized(arch: str | int) -> str:
    """"sm_90a" for any of 90, "90", "sm90", "sm_90", "sm_90a": the extension is built for Hopper's own instructions."""
    number = str(arch).removeprefix("sm_").removeprefix("sm").rstrip("af")
    if not number.isdigit():
        raise SystemExit(f"{arch!r} is no architecture; expected for example sm_90a")
    return "sm_90a" if number == "90" else f"sm_{number}"


def short(name: str) -> str:
    """A demangled kernel name without its argument types and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|flowmo::|^void ", "", name)
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\((?:bool|int)\)", "", name[:end]).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def demangled(names: list[str]) -> list[str]:
    """Readable names, where the tool for it is there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    return subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split("\n")


def parse(text: str, file: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.S,
    )
    found = list(pattern.finditer(text))
    kernels = []
    for m, name in zip(found, demangled([m["name"] for m in found])):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        spills = int(m["stores"]) + int(m["loads"])
        kernels.append(Kernel(m["arch"], file, short(name), int(m["registers"]), int(shared[1]) if shared else 0,
                              int(m["stack"]), spills))  # fmt: skip
    return kernels


def compile_file(compiler: str, file: Path, arch: str) -> list[Kernel]:
    """Compile one file for one architecture with the flags of the extension, and read the report.

    Raises:
        SystemExit: it does not compile; the message is the compiler's.
    """
    code = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-O3", "-std=c++17", "-lineinfo", code, "-Xptxas", "-v", "-c", str(file), "-o"]
        done = subprocess.run([*command, f"{folder}/out.o"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{file.name} for {arch} does not compile:\n{done.stderr}")
    return parse(done.stderr + done.stdout, file.name)


def main(archs: Sequence[str | int] = ARCHS) -> int:
    """Compile every file of csrc for every architecture, print the table, return 1 on an unlisted spill or stack."""
    compiler = nvcc()
    if compiler is None:
        print("no nvcc found (CUDA_HOME, PATH, /usr/local/cuda): nothing to report")
        return 1
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [normalized(a) for a in archs]
    for arch in (a for a in wanted if a.rstrip("af") not in known):
        print(f"{arch}: not known to this nvcc, left out")
    jobs = [(file, arch) for arch in wanted if arch.rstrip("af") in known for file in sorted(CSRC.glob("*.cu"))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        reports = list(pool.map(lambda job: compile_file(compiler, *job), jobs))
    kernels = sorted(kernel for report in reports for kernel in report)
    print(f"{'arch':8}{'file':20}{'kernel':44}{'registers':>10}{'shared':>8}{'stack':>7}{'spills':>8}")
    bad = []
    for k in kernels:
        reason = next((text for piece, text in ALLOWED.items() if piece in k.name), None)
        fault = bool(k.stack or k.spills)
        if fault and reason is None:
            bad.append(k)
        note = f"  {reason or 'NOT LISTED'}" if fault else ""
        print(f"{k.arch:8}{k.file:20}{k.name:44}{k.registers:>10}{k.shared:>8}{k.stack:>7}{k.spills:>8}{note}")
    print(f"{len(kernels)} kernels, {len(bad)} with a stack or spills that are not listed")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="for example sm_90a")
    sys.exit(main(parser.parse_args().archs))
