"""Where the CUDA kernels run in these tests: on the host executor, and on a card where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowmo_kernels import _ext
from tests.cuda.host import build
from tests.cuda.host.executor import SCHEDULES, HostExecutor, same_bits

CSRC = build.CSRC


@pytest.fixture(scope="session")
def executor() -> Iterator[HostExecutor]:
    """The executor with every kernel of csrc."""
    if build.compiler() is None:
        pytest.skip("the host executor needs a C++ compiler (g++), and there is none")
    running = HostExecutor(build.build(sorted(CSRC.glob("*.cu")), CSRC / "launchers.h"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def examples() -> Iterator[HostExecutor]:
    """The executor with the small kernels of host/examples.cu, right ones and broken ones."""
    if build.compiler() is None:
        pytest.skip("the host executor needs a C++ compiler (g++), and there is none")
    host = Path(build.HOST)
    running = HostExecutor(build.build([host / "examples.cu"], host / "examples.h", own_half_types=True))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the largest integer), so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


Body = Callable[..., tuple[Tensor, ...]]


class Machine:
    """Calls a function of `flowmo_kernels._cuda` with CPU tensors, wherever its kernels run."""

    def __init__(self, executor: HostExecutor | None) -> None:
        self.executor = executor

    def __call__(self, body: Body, *tensors: Tensor | None, schedules: int | None = None) -> tuple[Tensor, ...]:
        """body(*tensors), each result on the CPU; on the host under every schedule, which must agree bit for bit.

        Args:
            body: called anew with copies of the tensors for each schedule.
            tensors: on the CPU; strides, alignment and surroundings in their storage are kept.
            schedules: only the first so many, for large cases.
        """
        if self.executor is None:
            outputs = body(*(None if t is None else _on_card(t) for t in tensors))
            torch.cuda.synchronize()
            return tuple(t.cpu() for t in outputs)
        with _ext.launching_with(self.executor):
            first, *others = self.executor.run_all(
                lambda: body(*(None if t is None else _copied(t) for t in tensors)), SCHEDULES[:schedules]
            )
        for schedule, other in enumerate(others, 1):
            for i, (a, b) in enumerate(zip(first, other)):
                assert same_bits(a, b), f"result {i} differs under schedule {schedule}: a race or uninitialised memory"
        return first


def _rebuilt(t: Tensor, storage: Tensor) -> Tensor:
    return torch.as_strided(storage, t.shape, t.stride(), t.storage_offset())


def _whole(t: Tensor) -> Tensor:
    """The storage behind a view, as one flat tensor of its type."""
    count = t.untyped_storage().nbytes() // t.element_size()
    return torch.as_strided(t, (count,), (1,), 0)


def _copied(t: Tensor) -> Tensor:
    """A copy with the same strides and the same distance to 16 bytes, surroundings included."""
    return _rebuilt(t, _whole(t).clone())


def _on_card(t: Tensor) -> Tensor:
    return _rebuilt(t, _whole(t).cuda())


@pytest.fixture(params=["host", pytest.param("card", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "host":
        return Machine(request.getfixturevalue("executor"))
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    if (reason := _ext.missing()) is not None:
        pytest.skip(reason)
    return Machine(None)


@contextlib.contextmanager
def expect_report(kind: type[Exception], *words: str) -> Iterator[None]:
    """The block must fail with a report that holds all the words."""
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in the report:\n{caught.value}"
