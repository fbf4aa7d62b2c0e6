"""Tokens from a class: iterative unmasking with guidance (paper, section 4.3; MaskGIT, with TiTok's choices).

Step i of S, r = (i + 1) / S, tau = randomize_temperature (1 - r): logits of every position, guided and divided by the
annealed softmax temperature; a draw for every unknown position; of the draws, the m_i with the least confidence are
masked again. m_i is known beforehand, so nothing in the loop waits for the device and the whole of it is one graph.

Shapes: B pictures, N tokens of a picture, V codes.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowmo.engine.plan import capture_stream
from flowmo.generator.network import Generator
from flowmo.generator_config import NetworkConfig, TokenSamplerConfig

log = logging.getLogger("flowmo.generator")

Logits = Callable[[Tensor, Tensor], Tensor]  # ids [B, N], labels [B] -> [B, N, V]


def mask_counts(tokens: int, steps: int, schedule: str = "arccos") -> list[int]:
    """Tokens still masked after each step; at least one is revealed a step while more than one is masked."""
    if schedule == "proportional":
        weights = [math.acos(1.0 - done(i, steps, "span")) for i in range(steps)]
        revealed = itertools.accumulate(max(1, round(tokens * w / (sum(weights) or 1.0))) for w in weights)
        targets = [tokens - n for n in revealed]
    else:
        parts = [done(i, steps, "end") for i in range(steps)]
        arccos = schedule == "arccos"
        shares = [2 / math.pi * math.acos(r) if arccos else math.cos(math.pi / 2 * r) for r in parts]
        targets = [math.floor(tokens * share) for share in shares]
    counts, masked = [], tokens
    for target in targets[:-1]:
        masked = max(1, min(target, masked - 1))
        counts.append(masked)
    return [*counts, 0]


def done(step: int, steps: int, at: str) -> float:
    """Part of the steps that is done at the start or the end of step 0 .. steps - 1, or, of "span", from 0 to 1."""
    if at == "span":
        return step / max(1, steps - 1)
    return (step + (at == "end")) / steps


def guidance_scales(config: TokenSamplerConfig) -> list[float]:
    """s_i of l_c + s_i (l_c - l_u) for every step, whichever form the guidance is given in."""
    shift = config.guidance if config.guidance_form == "shift" else config.guidance - 1.0
    scales = []
    for i in range(config.steps):
        part = done(i, config.steps, config.guidance_at)
        if config.guidance_decay == "constant":
            scales.append(shift)
        elif config.guidance_decay == "linear":
            scales.append(shift * part)
        else:
            scales.append(shift * (1 - math.cos(math.pi * part**config.guidance_power)) / 2)
    return scales


def gumbel_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise of the shape of x, in fp32: bf16 uniforms would cap it near 5.5 and make ties."""
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    limits = torch.finfo(torch.float32)
    return -torch.log(-torch.log(uniform.clamp_(limits.tiny, 1.0 - limits.eps / 2)))


def guided_logits(
    logits: Logits,
    ids: Tensor,  # [B, N] int64
    labels: Tensor,  # [B] int64
    null_class: int,
    scale: float,
) -> Tensor:  # [B, N, V] fp32
    """l_c + scale (l_c - l_u), both from one batch of 2 B; l_c alone where the scale is exactly 0."""
    if scale == 0.0:
        return logits(ids, labels).float()
    nulls = torch.full_like(labels, null_class)
    both = logits(torch.cat([ids, ids]), torch.cat([labels, nulls])).float()
    with_class, without = both.chunk(2)
    return with_class + scale * (with_class - without)


@torch.no_grad()
def sample_tokens(
    model: Generator,
    labels: Tensor,  # [B] int64
    config: TokenSamplerConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:  # [B, N] int64, codes
    """Draw the tokens of one picture per label.

    Args:
        generator: of the noise, on the device of the model; the global state where None.
        trace: a list that receives the ids after every step, the mask id where not known.

    Raises:
        ConfigError, ValueError: options or labels out of range.
    """
    config = config or TokenSamplerConfig()
    config.check()
    check_labels(model, labels)
    return unmask(model, model.config, labels.to(model.device), config, generator, trace)


def unmask(
    logits: Logits,
    network: NetworkConfig,
    labels: Tensor,  # [B] int64
    config: TokenSamplerConfig,
    generator: torch.Generator | None = None,
    trace: list[Tensor] | None = None,
) -> Tensor:  # [B, N] int64
    """The loop of the module's docstring, without checks: no host synchronization, no upload of numbers."""
    c = network
    ids = torch.full((labels.shape[0], c.tokens), c.mask_id, dtype=torch.int64, device=labels.device)
    counts, scales = mask_counts(c.tokens, config.steps, config.schedule), guidance_scales(config)
    for i in range(config.steps):
        left = 1.0 - done(i, config.steps, config.temperature_at)
        tau = config.randomize_temperature * left
        known = ids != c.mask_id
        scores = guided_logits(logits, ids, labels, c.null_class, scales[i])
        temperature = config.softmax_temperature
        if config.softmax_annealing:
            temperature *= 0.5 + 0.8 * (1.0 - (i + 1) / config.steps)
        if temperature != 1.0:
            scores = scores / temperature
        spread = 1.0 if config.draw == "categorical" else tau
        noisy = scores if spread == 0.0 else scores + spread * gumbel_like(scores, generator)
        drawn = torch.where(known, ids, noisy.argmax(dim=-1))
        if counts[i]:
            if config.confidence == "log_prob":
                scores = scores.log_softmax(dim=-1)
            confidence = scores.gather(-1, drawn[..., None]).squeeze(-1)
            spread = tau if config.confidence_noise is None else config.confidence_noise * left
            confidence = confidence + spread * gumbel_like(confidence, generator)
            confidence = confidence.masked_fill(known, math.inf)
            # By rank, not by a threshold: ties would mask more than the schedule says.
            least = confidence.topk(counts[i], dim=-1, largest=False, sorted=False).indices
            ids = drawn.scatter(-1, least, c.mask_id)
        else:
            ids = drawn
        if trace is not None:
            trace.append(ids)
    return ids


def check_labels(model: Generator, labels: Tensor) -> None:
    """Raises ValueError for labels that are no classes of the model (the null class counts as one)."""
    classes = model.config.classes
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [B], got {labels.dtype} {list(labels.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"labels: expected classes 0 to {classes - 1} (or {classes} for none), "
            f"got {int(labels.min())} to {int(labels.max())}"
        )


class SamplerPlan:
    """`sample_tokens` prepared for batches of up to `batch`: on CUDA the whole loop is one graph.

        plan = SamplerPlan(model, 64)
        tokens = plan(labels)

    A smaller batch runs padded. Changes of the weights in place are seen. The noise comes from the plan's own
    generator; the same `seed` gives the same tokens of the same labels. Calls of one plan are ordered even from several
    streams; threads take turns, and without seeds each continues the noise of whoever had the turn before.

    Attributes:
        captured: whether calls replay a CUDA graph.

    Raises:
        ConfigError, ValueError: options or labels out of range.
    """

    def __init__(
        self,
        model: Generator,
        batch: int,
        config: TokenSamplerConfig | None = None,
        *,
        graph: bool = True,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1 picture")
        self.model, self.batch, self.config = model, batch, config or TokenSamplerConfig()
        self.config.check()
        self.device = model.device
        self.generator = torch.Generator(self.device)
        self._labels = torch.full((batch,), model.config.null_class, dtype=torch.int64, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)
        self._lock = threading.RLock()  # labels, noise and result have one buffer each
        self._done = torch.cuda.Event() if self.device.type == "cuda" else None
        if graph and self.device.type == "cuda":
            try:
                self._capture()
            except RuntimeError as error:
                torch.cuda.synchronize(self.device)
                warnings.warn(f"no CUDA graph, running eagerly ({str(error).splitlines()[0]})", stacklevel=2)
        if self._done is not None:  # a first call from another stream finds the buffers ready
            self._done.record(torch.cuda.current_stream(self.device))

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def describe(self) -> str:
        """One line for commands to print."""
        how = "one CUDA graph" if self.captured else "eager"
        return f"token sampler: {self.config.steps} steps, batch {self.batch}, {how} on {self.device}"

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,  # [n] int64, n <= batch
        seed: int | None = None,
    ) -> Tensor:  # [n, N] int64
        """Tokens of one picture per label; without a seed the noise goes on where the last call ended."""
        check_labels(self.model, labels)
        n = labels.shape[0]
        if n > self.batch:
            raise ValueError(f"labels: {n} pictures, but the plan was made for {self.batch}; split them or plan anew")
        with self._lock:
            if self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            if seed is not None:
                self.generator.manual_seed(seed)
            self._labels.fill_(self.model.config.null_class)
            self._labels[:n].copy_(labels)
            if self._graph is None:
                tokens = self._run(self.config)[:n]
            else:
                self._graph.replay()
                tokens = self._output[:n].clone()
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self.device))
        return tokens

    def _run(self, config: TokenSamplerConfig) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return unmask(self.model, self.model.config, self._labels, config, self.generator)

    @torch.no_grad()
    def _capture(self) -> None:
        with torch.cuda.device(self.device):
            stream = capture_stream(self.device, threading.get_ident())
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, makes workspaces and attention plans
                self._run(replace(self.config, steps=min(2, self.config.steps)))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)  # replays draw fresh noise, and a seed set before is obeyed
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._output = self._run(self.config)
            self._graph = graph
        log.info("%s", self.describe())
