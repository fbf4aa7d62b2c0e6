"""Device and arithmetic of a training run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmo.config import ConfigError
from flowmo.training.distributed import Processes


def resolve_device(name: str) -> torch.device:
    """auto: the first CUDA device, or the CPU.

    Raises:
        ConfigError: a word that is no device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name}: this PyTorch sees no CUDA device; use cpu, or auto, which takes what is there"
        )
    return device


def take_device(name: str, processes: Processes) -> torch.device:
    """A process's own device, made the current one: streams and events that name no device are of that.

    Of several processes on a machine each takes the CUDA device of its local rank, unless the name has a number.

    Raises:
        ConfigError: as :func:`resolve_device`.
    """
    device = resolve_device(name)
    if device.type == "cuda":
        if device.index is None and processes.world > 1:
            device = torch.device("cuda", processes.local_rank)
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """auto: bf16 autocast on CUDA; on the CPU bf16 matrix products where they measure faster, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16"
    a, w = torch.randn(1024, 256), torch.randn(1024, 256)

    def seconds(precision: str) -> float:
        with matmul_precision(precision):
            times = []
            for _ in range(7):
                start = time.perf_counter()
                torch.nn.functional.linear(a, w)
                times.append(time.perf_counter() - start)
        return min(times)

    return "bf16_matmul" if 1.3 * seconds("medium") < seconds("highest") else "fp32"


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def fast_math(precision: str, device: torch.device, length: int) -> Iterator[None]:
    """The arithmetic of a training step: bf16 autocast, bf16 matrix products under fp32 tensors, or plain fp32.

    Under autocast each learning weight is cast once in the whole block, backward passes included, unless the cache is
    cleared in between: they run in this thread, whose cast weights those parts find that are computed again (gradient
    checkpointing).
    """
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16), torch.autograd.set_multithreading_enabled(False):
            yield
    elif precision == "bf16_matmul":
        # PyTorch's fused CPU attention is slower with bf16 products than plain matrix products are (4x at the
        # quickstart's sizes); for long sequences it is still taken, for its memory.
        attention = sdpa_kernel(SDPBackend.MATH) if length <= 1024 else contextlib.nullcontext()
        with matmul_precision("medium"), attention:
            yield
    else:
        yield
