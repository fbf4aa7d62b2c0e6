"""The host executor itself: right kernels run, and kernels broken on purpose are caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .conftest import expect_report
from .host.executor import HostExecutor, HostExecutorError, HostLaunchError, Schedule, same_bits

READS_BEYOND, WRITES_BEYOND, NO_BARRIER, READS_UNWRITTEN, SHARED_BEYOND, MISALIGNED = range(1, 7)
ORDERS = [Schedule(0, 0, 0xFF), Schedule(1, 0, 0xFF), *(Schedule(2, seed, 0xFF) for seed in range(3))]
FILLS = [Schedule(0, 0, 0xFF), Schedule(0, 0, 0x3E)]


def reverse(executor: HostExecutor, fault: int) -> Tensor:
    x, out = torch.arange(64.0), torch.full((64,), math.nan)
    executor("reverse", (out, x, 64, fault))
    return out


def all_equal(results: list[tuple[Tensor, ...]]) -> bool:
    return all(same_bits(a[0], results[0][0]) for a in results)


def test_a_right_kernel_runs_alike_in_every_order(examples: HostExecutor) -> None:
    results = examples.run_all(lambda: (reverse(examples, 0),), (*ORDERS, *FILLS))
    assert torch.equal(results[0][0], torch.arange(63.0, -1.0, -1.0))
    assert all_equal(results)


def test_reading_beyond_a_buffer_is_caught(examples: HostExecutor) -> None:
    with expect_report(HostExecutorError, "heap-buffer-overflow", "READ of size 4", "examples.cu"):
        reverse(examples, READS_BEYOND)


def test_writing_beyond_a_buffer_is_caught(examples: HostExecutor) -> None:
    with expect_report(HostExecutorError, "heap-buffer-overflow", "WRITE of size 4"):
        reverse(examples, WRITES_BEYOND)


def test_leaving_dynamic_shared_memory_is_caught(examples: HostExecutor) -> None:
    with expect_report(HostExecutorError, "heap-buffer-overflow", "reverse_kernel"):
        reverse(examples, SHARED_BEYOND)


def test_a_missing_barrier_shows_in_another_order(examples: HostExecutor) -> None:
    assert not all_equal(examples.run_all(lambda: (reverse(examples, NO_BARRIER),), tuple(ORDERS)))


def test_a_missing_barrier_shows_in_the_orders_of_the_kernel_tests(examples: HostExecutor) -> None:
    assert not all_equal(examples.run_all(lambda: (reverse(examples, NO_BARRIER),)))


def test_reading_shared_memory_never_written_shows_under_another_fill(examples: HostExecutor) -> None:
    results = examples.run_all(lambda: (reverse(examples, READS_UNWRITTEN),), tuple(FILLS))
    assert not all_equal(results)
    assert results[0][0].isnan().any(), "the first fill is NaN, so that a result built on it shows"


def test_a_misaligned_vector_access_is_caught(examples: HostExecutor) -> None:
    with expect_report(HostExecutorError, "misaligned address"):
        reverse(examples, MISALIGNED)


@pytest.mark.parametrize(("fault", "words"), [
    (1, "already returned"), (2, "__syncthreads"), (3, "different collectives"), (4, "leaves out the calling lane"),
])  # fmt: skip
def test_bad_meetings_are_caught(examples: HostExecutor, fault: int, words: str) -> None:
    with expect_report(HostExecutorError, words):
        examples("meet_badly", (torch.zeros(32), fault))


def test_it_goes_on_after_a_report(examples: HostExecutor) -> None:
    out = torch.zeros(32)
    examples("meet_badly", (out, 0))
    assert torch.equal(out, torch.arange(32.0).view(-1, 2).flip(1).flatten())


def test_shuffles_shared_memory_and_atomics(examples: HostExecutor) -> None:
    x, out = torch.arange(100.0), torch.zeros(101)
    examples("sum_block", (out, x, 100))
    assert out[:100].eq(4950).all() and out[100] == 128


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["threads", "grid", "shared memory"])
def test_refused_launches_give_an_error_code(examples: HostExecutor, kind: int) -> None:
    with pytest.raises(HostLaunchError, match=r"answered (1|9)"):
        examples("refused", (kind,))


@pytest.mark.parametrize(("kind", "dtype"), [(1, torch.bfloat16), (2, torch.float16)], ids=["bf16", "fp16"])
def test_own_half_types_round_as_torch(examples: HostExecutor, kind: int, dtype: torch.dtype) -> None:
    """Every exponent, ties, subnormals, overflow and NaN (the examples are built without CUDA's headers)."""
    patterns = torch.arange(0, 1 << 32, 99991, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 1 << 16, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = ties[ties.isfinite()]
    halfway = (ties.double() + torch.nextafter(ties.to(dtype), torch.full_like(ties, 1e9).to(dtype)).double()) / 2
    x = torch.cat([patterns.view(torch.float32), ties, halfway.float()])
    out = torch.empty_like(x)
    examples("through_half", (out, x, x.numel(), kind))
    torch.testing.assert_close(out, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_arguments_are_counted(examples: HostExecutor) -> None:
    with expect_report(HostExecutorError, "sum_block takes 3 arguments"):
        examples("sum_block", (torch.zeros(3),))


def test_only_memory_of_tensors_is_handed_over(examples: HostExecutor) -> None:
    """Two views of one buffer stay one buffer; what lies between the elements of a view survives."""
    big = torch.arange(200.0)
    examples("reverse", (big[64:128], big[0:64], 64, 0))
    assert torch.equal(big[64:128], torch.arange(63.0, -1.0, -1.0))
    assert torch.equal(big[:64], torch.arange(64.0)) and torch.equal(big[128:], torch.arange(128.0, 200.0))
