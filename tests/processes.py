"""Tests that launch processes: a rendezvous that nobody can take, and all that the processes printed if one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]


def environment(**more: str) -> dict[str, str]:
    """Variables for a process that imports this checkout: one thread, kernels compiled as usual, stacks on a crash."""
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    return {**settings, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **more}


def run(
    command: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None,
    code: int = 0, timeout: float = 240,
) -> str:  # fmt: skip
    """Run a command to its end and return what it printed, errors included.

    Raises:
        AssertionError: it exits with another code, or not in time; with everything that it printed.
    """
    return _finish([_start([str(c) for c in command], cwd, env or environment())], (code,), timeout)[0]


def together(code: str, *given: str, exit_codes: tuple[int, int] = (0, 0), timeout: float = 240) -> list[str]:
    """Run a script in two processes that find each other as torchrun's do; what each printed.

    This process holds the rendezvous, as torchrun's agent does: its port is bound by whoever chose it, before
    anyone is told, and stays so until the last has left. A port that is probed, closed and handed on can be taken
    meanwhile by any other connection of the machine; the first process then fails to bind it, and the second waits
    for five minutes. The processes connect over loopback, whatever the machine's own name resolves to.

    Raises:
        AssertionError: one exits with another code than its own, or not in time; with everything that both printed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    settings = environment(
        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True"
    )
    if Path("/sys/class/net/lo").exists():
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    started = [
        _start([sys.executable, "-c", code, *given], None, {**settings, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    return _finish(started, exit_codes, timeout)


_Started = tuple["subprocess.Popen[bytes]", Path]


def _start(command: list[str], cwd: Path | None, env: Mapping[str, str]) -> _Started:
    handle, name = tempfile.mkstemp(prefix="output-")
    with os.fdopen(handle, "wb") as output:  # a file: a pipe that nobody reads would block the process
        return subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=output, stderr=subprocess.STDOUT), Path(name)


def _finish(started: list[_Started], expected: tuple[int, ...], timeout: float) -> list[str]:
    deadline = time.monotonic() + timeout
    processes = [process for process, _ in started]
    try:
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            if any(p.returncode not in (None, code) for p, code in zip(processes, expected)):
                deadline = min(deadline, time.monotonic() + 10)  # the others would wait for it
            time.sleep(0.02)
        codes = tuple(p.poll() for p in processes)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
        printed = [path.read_text(errors="replace") for _, path in started]
        for _, path in started:
            path.unlink()
    if codes != expected:
        found = [
            f"process {i} " + ("did not end and was killed" if c is None else f"exited with {c}") + f":\n{text}"
            for i, (c, text) in enumerate(zip(codes, printed))
        ]
        raise AssertionError(f"expected exit codes {expected}\n" + "\n".join(found))
    return printed
