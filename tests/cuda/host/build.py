"""Compiles kernel sources with the C++ compiler, the sanitizers and the host executor, once per state of them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOST = Path(__file__).resolve().parent
ROOT = HOST.parents[2]
CSRC = ROOT / "csrc"
CACHE = Path(os.environ.get("FLOWMO_HOST_CACHE", ROOT / ".cache" / "cuda-host"))
FLAGS = [
    "-O1", "-g1", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
    "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-Wno-class-memaccess", "-DFLOWMO_HOST_EXECUTOR",
]  # fmt: skip


def compiler() -> str | None:
    """g++ (or $CXX), or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_includes() -> list[str]:
    """Where CUDA's own bf16 and fp16 headers lie; empty without a toolkit (the executor brings its own types then)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(2, str(Path(nvcc).resolve().parents[1]))
    for home in filter(None, homes):
        if (Path(home) / "include" / "cuda_bf16.h").is_file():
            return [f"{home}/include"]
    return []


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:24]


def _compile(source: Path, key: str, flags: list[str]) -> Path:
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler() or "g++", *flags, "-x", "c++", "-c", str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the host executor does not compile {source.name}:\n{done.stderr}")
        fresh.replace(target)
    return target


def build(sources: list[Path], launchers: Path, *, own_half_types: bool = False) -> Path:
    """An executable that serves the launchers of the header `launchers`, implemented by `sources`.

    Object files are kept in .cache/cuda-host under a hash of everything they depend on.

    Args:
        sources: .cu files.
        launchers: header that defines FLOWMO_LAUNCHERS.
        own_half_types: use the executor's own bf16 and fp16 even where CUDA's headers are.

    Raises:
        RuntimeError: a source does not compile; the message is the compiler's.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    includes = [str(HOST), str(CSRC), *([] if own_half_types else cuda_includes())]
    flags = [*FLAGS, *(f"-I{folder}" for folder in includes), f'-DLAUNCHERS_HEADER="{launchers}"']
    if own_half_types:
        flags.append("-DFLOWMO_OWN_HALF_TYPES")
    version = subprocess.run([compiler() or "g++", "--version"], capture_output=True).stdout
    headers = sorted([*CSRC.glob("*.cuh"), *CSRC.glob("*.h"), *HOST.glob("*.h"), launchers])
    shared = [version, "\n".join(flags).encode(), *(file.read_bytes() for file in headers)]
    files = [*sources, HOST / "runner.cpp", HOST / "executor.cpp"]
    keys = [_digest(*shared, file.read_bytes()) for file in files]
    target = CACHE / f"runner-{_digest(*(key.encode() for key in keys))}"
    with open(CACHE / "lock", "w") as lock:  # several test processes may want the same executable
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            cores = len(os.sched_getaffinity(0))
            largest_first = sorted(range(len(files)), key=lambda i: -files[i].stat().st_size)
            with ThreadPoolExecutor(cores) as pool:
                objects = list(pool.map(lambda i: _compile(files[i], keys[i], flags), largest_first))
            fresh = target.with_suffix(".tmp")
            command = [compiler() or "g++", *FLAGS, *map(str, objects), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the host executor does not link:\n{done.stderr}")
            fresh.replace(target)
    return target
