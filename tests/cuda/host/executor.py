"""Runs launches on the CPU: a launcher for `flowmo_kernels._ext.launching_with`, backed by the runner's process."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo_kernels._ext import Argument, Pointers


class Schedule(NamedTuple):
    """An order of blocks and threads, and the byte that shared memory is filled with beforehand."""

    order: int = 0  # 0 natural, 1 reversed, 2 shuffled by the seed
    seed: int = 0
    fill: int = 0xFF


# A kernel that leans on an order or on what shared memory holds gives different bits under one of these.
SCHEDULES = (Schedule(0, 0, 0xFF), Schedule(1, 0, 0x3E), Schedule(2, 1, 0x00))


class HostExecutorError(AssertionError):
    """The sanitizers or the executor stopped a kernel; the message is their report."""


class HostLaunchError(AssertionError):
    """A launcher answered with an error code."""


class _Buffer(NamedTuple):
    start: int
    end: int


def _extent(t: Tensor) -> _Buffer:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return _Buffer(t.data_ptr(), t.data_ptr() + elements * t.element_size())


def _merged(extents: list[_Buffer]) -> list[_Buffer]:
    """One buffer per connected stretch of memory: views that overlap must go on sharing."""
    merged: list[_Buffer] = []
    for extent in sorted(extents):
        if merged and extent.start < merged[-1].end:
            merged[-1] = _Buffer(merged[-1].start, max(merged[-1].end, extent.end))
        else:
            merged.append(extent)
    return merged


class HostExecutor:
    """A process that runs launches one after another; it is started again after a report.

    Args:
        executable: from `build`.
    """

    def __init__(self, executable: Path) -> None:
        self.executable = executable
        self.schedule = Schedule()
        self._process: subprocess.Popen[bytes] | None = None
        self._report = tempfile.TemporaryFile()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._report.seek(0)
            self._report.truncate()
            # Nothing else may come before AddressSanitizer in the process.
            kept = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "LD_LIBRARY_PATH")}
            environment = {**kept, "ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1"}
            self._process = subprocess.Popen(
                [self.executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._report, env=environment
            )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            self._process.wait()
            self._process = None
        self._report.close()

    def __call__(self, op: str, arguments: tuple[Argument, ...]) -> None:
        """Launch `op`; tensors in the arguments are changed in place as the kernels change them.

        Raises:
            HostExecutorError: a sanitizer or the executor stopped the kernel.
            HostLaunchError: the launcher answered with an error code.
        """
        tensors: list[Tensor] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
            elif isinstance(argument, Pointers):
                tensors += [argument.table, *(t for t in argument.tensors if t is not None)]
        for t in tensors:
            if t.device.type != "cpu":
                raise TypeError(f"{op}: the host executor takes CPU tensors, not {t.device}")
        buffers = _merged([_extent(t) for t in tensors if t.numel()])

        def place(t: Tensor) -> tuple[int, int]:
            for i, buffer in enumerate(buffers):
                if buffer.start <= t.data_ptr() < buffer.end:
                    return i, t.data_ptr() - buffer.start
            raise AssertionError("every tensor has a buffer")

        relocations: list[tuple[int, int, int, int]] = []
        words: list[bytes] = []
        for argument in arguments:
            if isinstance(argument, Pointers):
                table = place(argument.table)
                for i, t in enumerate(argument.tensors):
                    if t is not None and t.numel():
                        relocations.append((table[0], table[1] + 8 * i, *place(t)))
                argument = argument.table
            if isinstance(argument, Tensor) and argument.numel():
                words.append(struct.pack("<IqQ", 2, *place(argument)))
            elif isinstance(argument, float):
                words.append(struct.pack("<IdQ", 1, argument, 0))
            else:
                value = 0 if argument is None or isinstance(argument, Tensor) else int(argument)
                words.append(struct.pack("<IqQ", 0, value, 0))
        name = op.encode()
        request = [struct.pack("<I", len(name)), name, struct.pack("<IQI", *self.schedule)]
        request.append(struct.pack("<I", len(buffers)))
        for start, end in buffers:
            request += [struct.pack("<QQ", end - start, start % 16), ctypes.string_at(start, end - start)]
        request.append(struct.pack("<I", len(relocations)))
        request += [struct.pack("<QQQQ", *relocation) for relocation in relocations]
        request += [struct.pack("<I", len(words)), *words]
        self._exchange(op, b"".join(request), buffers)

    def _exchange(self, op: str, request: bytes, buffers: list[_Buffer]) -> None:
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        answer = process.stdout.read(4)
        contents = [process.stdout.read(end - start) for start, end in buffers]
        if len(answer) < 4 or any(len(c) != end - start for c, (start, end) in zip(contents, buffers)):
            process.wait()
            self._report.seek(0)
            report = self._report.read().decode(errors="replace")
            self._process = None
            raise HostExecutorError(f"{op}: {report or f'the runner ended with {process.returncode}'}")
        code = struct.unpack("<i", answer)[0]
        if code:
            raise HostLaunchError(f"{op}: the launcher answered {code}")
        for (start, _), content in zip(buffers, contents):
            ctypes.memmove(start, content, len(content))

    def run_all(self, body: Callable[[], tuple[Tensor, ...]], schedules: tuple[Schedule, ...] = SCHEDULES) -> list[
        tuple[Tensor, ...]
    ]:  # fmt: skip
        """The results of `body` under each schedule."""
        results = []
        for self.schedule in schedules:
            results.append(body())
        self.schedule = Schedule()
        return results


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.dim() else same_bits(
        a[None], b[None]
    )
