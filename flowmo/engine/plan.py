"""What decode plan and encode plan share: a function over static buffers, run as it is or as one CUDA graph."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flowmo.engine.weights import TransformerWeights

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo

log = logging.getLogger("flowmo.engine")


class Execution(NamedTuple):
    """How a plan computes. Row-scaled fp8 and some attention backends change the result beyond rounding."""

    dtype: torch.dtype
    graph: bool = True
    fp8: bool = False  # qkv and both MLP layers; attention's projection, input and output layers stay in dtype
    attention: str = "auto"
    overlap: bool = False  # latent rows on a second stream, beside the image rows


class Plan(ABC):
    """Base of the plans; subclasses build static buffers in `_build` and compute in `_run`, which must be capturable:
    no host synchronization, no upload of numbers, inputs from the static buffers alone.

    The plan follows the model's weights: a call after they changed (optimizer step, `load_state_dict`) prepares them
    again. A smaller batch than the plan's runs padded. Calls of one plan are ordered even from several streams; threads
    take turns.

    Attributes:
        batch: pictures of a call, at most.
        device, dtype: where and in which precision the transformer runs.
        captured: whether calls replay a CUDA graph.
        builds: how often the weights were prepared.
    """

    part: str  # "decoder" or "encoder"

    def __init__(self, model: FlowMo, batch: int, execution: Execution) -> None:
        dtype, graph, fp8, self.attention, overlap = execution
        if batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1 picture")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype}: expected torch.float32, torch.bfloat16 or torch.float16")
        self._model = weakref.ref(model)
        self._lock = model.engine.lock
        self.config = model.config
        self.batch, self.dtype, self.fp8 = batch, dtype, fp8
        self.device = model.device
        check_fp8(fp8, self.device, dtype)
        self.graph = graph and self.device.type == "cuda"
        self.overlap = overlap and self.device.type == "cuda"
        self.builds = 0
        self._calls = 0
        self._prepare(model)

    def describe(self) -> str:
        """One line for commands to print."""
        how = "one CUDA graph" if self.captured else "CUDA graph at the next call" if self.graph else "eager"
        precision = str(self.dtype).removeprefix("torch.") + (" with fp8 linear layers" if self.fp8 else "")
        streams = " on two streams" if self.overlap else ""
        words = f"batch {self.batch}, {precision}, attention {self.attention}, {how}{streams} on {self.device}"
        return f"{self.part} plan: {words}"

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def refresh(self) -> None:
        """Prepare the weights again if they changed since they were prepared.

        Raises:
            RuntimeError: the model moved to another device.
        """
        model = self._model()
        if model is None:  # nobody can change the weights any more
            return
        if model.device != self.device:
            raise RuntimeError(
                f"this plan runs on {self.device}, but the model is now on {model.device}: make a new plan"
            )
        with self._lock:
            if model.engine.weights(model, self.part, self.dtype, self.fp8) is not self._weights:
                self._prepare(model)

    def capture(self) -> None:
        """Record the CUDA graph now; without effect where there is none to record."""
        if not self.graph or self.captured or torch.cuda.is_current_stream_capturing():
            return
        try:
            self._record()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self.graph = False
            reason = str(error).splitlines()[0]
            warnings.warn(f"{self.part} plan: no CUDA graph, running eagerly ({reason})", stacklevel=3)

    def run(self, *inputs: Tensor) -> Tensor:
        """The plan on checked inputs of at most `batch` pictures, with the weights as last prepared."""
        with self._lock:
            return self._run_alone(*inputs)

    def _run_alone(self, *inputs: Tensor) -> Tensor:
        n = inputs[0].shape[0]
        if self._calls and not self.captured:  # a first call is not worth a capture: there may be no second
            self.capture()
        self._calls += 1
        # Inside a capture of the caller's this plan becomes part of that graph: no graph of its own, no outside event.
        on_card = self.device.type == "cuda"
        nested = on_card and torch.cuda.is_current_stream_capturing()
        if on_card and not nested:
            torch.cuda.current_stream(self.device).wait_event(self._done)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for buffer, given in zip(self._inputs(), inputs):
                buffer[:n].copy_(given)
                if n < self.batch:
                    buffer[n:].copy_(given[-1:].expand(self.batch - n, *given.shape[1:]))
            if self._graph is None or nested:
                out = self._run()[:n]
            else:
                self._graph.replay()
                out = self._output[:n].clone()
        if on_card and not nested:
            self._done.record(torch.cuda.current_stream(self.device))
        return out

    def _prepare(self, model: FlowMo) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)
        self._calls = 0
        if self.device.type == "cuda":
            self._done = torch.cuda.Event()
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._weights: TransformerWeights = model.engine.weights(model, self.part, self.dtype, self.fp8)
            self._build(model)
        self.builds += 1
        log.info("%s%s", self.describe(), "" if self.builds == 1 else " (prepared again: the weights changed)")

    def _record(self) -> None:
        with torch.cuda.device(self.device), torch.no_grad(), torch.autocast("cuda", enabled=False):
            stream = capture_stream(self.device, threading.get_ident())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, makes workspaces and attention plans
                self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin memory for a data loader, may go on meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = self._run()
            self._graph, self._output = graph, output
        log.info("%s", self.describe())

    @abstractmethod
    def _build(self, model: FlowMo) -> None:
        """Static buffers and tables for the prepared weights."""

    @abstractmethod
    def _inputs(self) -> tuple[Tensor, ...]:
        """Buffers that a call's inputs are copied into, in order, images first axis."""

    @abstractmethod
    def _run(self) -> Tensor:
        """The result for what is in the buffers, images first axis."""


@functools.cache
def capture_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One stream for all captures of a thread: cuBLAS keeps a workspace of 32 MB for every stream it has ever seen."""
    return torch.cuda.Stream(device)


def check_fp8(fp8: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where fp8 linear layers cannot run; on a CPU they run in the reference arithmetic."""
    if not fp8 or device.type == "cpu":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = device if device.type != "cuda" else f"{device} of {torch.cuda.get_device_capability(device)}"
        raise ValueError(
            f"fp8=True: expected a CUDA device of compute capability 8.9 or newer, got {found}; use fp8=False "
            "(on a CPU, fp8=True runs slowly, to measure its error)"
        )
    if dtype == torch.float32:
        raise ValueError(
            "fp8=True: expected dtype torch.bfloat16 or torch.float16 on CUDA, since fp32 for what stays out of fp8 "
            "takes more time than fp8 saves; got float32"
        )
