"""What the model benches run, as data: tasks with their FLOP and byte formulas, and who can run them.

Symbols: B images, T latent + N image = L tokens, D width, S = L D numbers of a row tensor, F forward passes a picture.
FLOPs count multiply and add as two and only what a picture needs. Bytes are those of the memory-bound passes of a
forward pass, 12 row tensors a block: residual + norm + modulate twice (4 each), query-key norm and rotation (4).
Both are of the exact bf16 pass whatever the provider does, so that rows compare, and so is the roofline: a plan in fp8
may pass 100 % of it. That one moves 17 row tensors a block: its norms write half (2 x 3.5), and GELU is a pass of 6.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import published
from flowmo import FlowMo, ModelConfig, model_config
from flowmo.config import LossConfig, NoiseConfig, OptimConfig, PosttrainConfig
from flowmo.engine import Schedule, StepCache
from flowmo.layers import patchify
from flowmo.perceptual.resnet import random_resnet_distance
from flowmo.training.optim import AdamHoldEMA, is_held
from flowmo.training.posttrain import posttrain_loss
from flowmo.training.pretrain import pretrain_loss
from flowmo.transformer import Residual
from flowmo_kernels import KernelUnavailableError, use

TASKS = ("block", "forward", "decode", "encode", "train", "posttrain")
PROVIDERS = (
    "published",
    "published+bf16",
    "eager",
    "compile",
    "triton",
    "cuda",
    "plan",
    "plan+graph",
    "plan+graph+overlap",
    "plan+graph+attention-triton",
    "plan+graph+tail6",
    "plan+graph+tail10",
    "plan+graph+cache",
    "plan+graph+fp8",
    "plan+graph+attention8",
    "plan+graph+fp8+attention8",
    "plan+graph+fp8+tail6",
)
# Words of a plan's name and what they stand for: options that change the picture, whose PSNR then stands beside the
# time, and our own attention, which rounds in another order than the library's.
CHANGES: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "tail6": lambda c: {"tail_merge": 6},
    "tail10": lambda c: {"tail_merge": 10},
    "cache": lambda c: {"cache": StepCache((13, 15, 17, 19, 21, 22, 23, 24), max(1, c.decoder_depth // 4))},
    "fp8": lambda c: {"fp8": True},
    "attention8": lambda c: {"attention": "fp8"},
    "attention-triton": lambda c: {"attention": "triton"},
}
CHAIN = 8  # velocities of the chain in Stage 1B

Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """Useful work of one call."""

    matmul_flops: float
    memory_bytes: float
    forwards: float

    def of(self, forwards: float) -> Work:
        """The same for another number of forward passes."""
        part = forwards / self.forwards
        return Work(part * self.matmul_flops, part * self.memory_bytes, forwards)

    def roofline_ms(self, copy_bytes_per_s: float, flops_per_s: float) -> float:
        """Products at the measured product rate, then the memory-bound passes at the measured copy rate."""
        return 1e3 * (self.matmul_flops / flops_per_s + self.memory_bytes / copy_bytes_per_s)


def block_work(length: int, width: int, item: int) -> tuple[float, float]:
    """FLOPs and bytes of one block for one image: linear layers 24 L D^2, attention 4 L^2 D."""
    return 24.0 * length * width**2 + 4.0 * length**2 * width, 12.0 * length * width * item


def work(task: str, c: ModelConfig, batch: int, item: int) -> Work:
    """Work of one call on `batch` images, `item` bytes a number."""
    length = c.latent_tokens + c.grid**2
    decoder, encoder = (block_work(length, w, item) for w in (c.decoder_hidden, c.encoder_hidden))
    if task == "block":
        return Work(batch * decoder[0], batch * decoder[1], 0)
    if task == "encode":
        return Work(batch * c.encoder_depth * encoder[0], batch * c.encoder_depth * encoder[1], 1)
    if task == "train":  # backward twice the products; its bytes have no closed form here and are left out
        flops = c.decoder_depth * decoder[0] + c.encoder_depth * encoder[0]
        return Work(3 * batch * flops, 0.0, 1)
    if task == "posttrain":  # the flow term and the chain; the frozen encoder runs forward alone
        flops = 3 * (1 + CHAIN) * c.decoder_depth * decoder[0] + c.encoder_depth * encoder[0]
        return Work(batch * flops, 0.0, 1 + CHAIN)
    forwards = Schedule().forwards if task == "decode" else 1
    passes = batch * forwards * c.decoder_depth
    return Work(passes * decoder[0], passes * decoder[1], forwards)


def config(name: str) -> ModelConfig:
    return model_config(name)


@dataclass
class Setting:
    """A model with inputs of one batch; gates are random, as zero gates would make every block the identity."""

    model: FlowMo
    codes: Tensor  # [B, T, C]
    noise: Tensor  # [B, 3, S, S] fp32
    images: Tensor  # [B, 3, S, S] fp32

    @classmethod
    def make(cls, c: ModelConfig, batch: int, device: str, seed: int = 0) -> Setting:
        torch.manual_seed(seed)
        with torch.device(device):
            model = FlowMo(c).eval()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "_mod.lin" in name:
                        p.normal_(0, 0.02)
            codes = torch.randint(0, 2, (batch, c.latent_tokens, c.latent_channels)) * 2.0 - 1
            noise = torch.randn(batch, 3, c.image_size, c.image_size)
            images = torch.rand(batch, 3, c.image_size, c.image_size) * 2 - 1
        return cls(model, codes, noise, images)


@contextlib.contextmanager
def mixed(device: str) -> Iterator[None]:
    """bf16 autocast on a card, as published; fp32 elsewhere."""
    with torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext():
        yield


def provide(provider: str, task: str, s: Setting, device: str) -> Call | None:
    """The task's call by a provider, or None where the provider has nothing to say about it.

    Raises:
        KernelUnavailableError, ValueError: the provider cannot run on this machine; the message says why.
    """
    half = torch.bfloat16 if device == "cuda" else torch.float32
    if provider.startswith("published"):
        return _published(provider, task, s, device, half)
    if provider.startswith("plan"):
        return _plan(provider, task, s, half)
    if task in ("train", "posttrain"):
        return _train(provider, task, s, device)
    implementation = provider if provider in ("triton", "cuda") else "ref"
    with use(implementation):  # raises here what this machine cannot run
        pass
    s.model.to(half)
    call = _modules(task, s, half)
    if provider == "compile":
        inner = torch.compile(call, dynamic=False) if task in ("block", "forward") else _compiled_model(task, s)
        call = inner

    def run() -> Any:
        with use(implementation), torch.no_grad():
            return call()

    return run


def _modules(task: str, s: Setting, dtype: torch.dtype) -> Call:
    """The task by the modules, call by call."""
    m = s.model
    if task == "decode":
        return lambda: m.decode(s.codes, noise=s.noise, plan=False)
    if task == "encode":
        return lambda: m.encode(s.images, plan=False)
    x = patchify(s.noise, m.config.patch).to(dtype)
    condition = m.condition(s.codes.to(dtype))
    t = torch.full((len(x),), 0.3, device=x.device)
    if task == "forward":
        return lambda: m.velocity(x, t, condition)
    d = m.decoder
    with torch.no_grad():
        img, txt = Residual(d.img_in(x)), Residual(d.txt_in(condition))
        activated = torch.randn(len(x), m.config.decoder_hidden, device=x.device, dtype=dtype)
    return lambda: d.double_blocks[0](img, txt, activated, (d.rope_cos, d.rope_sin))


def _compiled_model(task: str, s: Setting) -> Call:
    """The task with its transformer compiled."""
    part = "decoder" if task == "decode" else "encoder"
    getattr(s.model, part).compile(dynamic=False)
    return _modules(task, s, s.model.dtype)


def _published(provider: str, task: str, s: Setting, device: str, half: torch.dtype) -> Call | None:
    m = s.model
    if provider == "published+bf16":
        if device != "cuda" or task in ("train", "posttrain"):
            return None
        m.to(half)
    optimize: Callable[[Any], Any] = torch.compile if device == "cuda" else lambda f: f
    if task in ("train", "posttrain"):
        trained = _trained(m, task)
        if task == "train":
            loss = published.loss_of(m, optimize)
        else:
            loss = published.posttrain_loss_of(m, optimize, random_resnet_distance().to(device), CHAIN)
        optimizer = published.Optimizer(trained, [k for k in trained if is_held(k)])

        def step() -> None:
            with mixed(device):
                loss(s.images).backward()
            optimizer.step()

        return step
    if task == "encode":
        encode = optimize(published.encode_of(m))

        def call() -> Any:
            return encode(s.images)
    elif task == "block":
        c, d = m.config, m.decoder
        one = optimize(published.block)
        img = torch.randn(len(s.noise), c.grid**2, c.decoder_hidden, device=device, dtype=half)
        txt = torch.randn(len(s.noise), c.latent_tokens, c.decoder_hidden, device=device, dtype=half)
        vec = torch.randn(len(s.noise), c.decoder_hidden, device=device, dtype=half)
        head_dim = c.decoder_hidden // c.heads
        tables = published.rotary_tables(len(s.noise), c.latent_tokens, c.grid, head_dim, s.noise.device)

        def call() -> Any:
            return one(d.double_blocks[0], img, txt, vec, tables)
    else:
        velocity = optimize(published.velocity_of(m))
        condition, t = m.condition(s.codes), torch.full((len(s.noise),), 0.3, device=device)

        def call() -> Any:
            if task == "decode":
                return published.decode(m, velocity, s.codes, s.noise)
            return velocity(s.noise, t, condition)

    def run() -> Any:
        with torch.no_grad(), mixed(device):
            return call()

    return run


def provider_name(text: str) -> str:
    """`text`, if it is one of PROVIDERS or a plan with any of its words; for argparse, which names what raises."""
    first, *words = text.split("+")
    if text in PROVIDERS or (first == "plan" and set(words) <= {"graph", "overlap", *CHANGES}):
        return text
    known = ", ".join(["graph", "overlap", *CHANGES])
    raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(PROVIDERS)}, or plan and words of {known}")


def changes(provider: str, c: ModelConfig) -> dict[str, Any]:
    """Options of `FlowMo.decode_plan` by which a plan's picture is not the exact one."""
    found: dict[str, Any] = {}
    for word in provider.split("+"):
        found |= CHANGES[word](c) if word in CHANGES and provider.startswith("plan") else {}
    return found


def _plan(provider: str, task: str, s: Setting, dtype: torch.dtype) -> Call | None:
    words, options = provider.split("+")[1:], changes(provider, s.model.config)
    of_sampler = {"tail_merge", "cache"} & set(options)
    options |= {"dtype": dtype, "graph": "graph" in words, "overlap": "overlap" in words}
    if "graph" in words and s.model.device.type != "cuda":
        return None
    if task == "encode" and not of_sampler:
        encode_plan = s.model.encode_plan(len(s.images), **options)
        return lambda: encode_plan(s.images)
    if task == "forward" and not of_sampler:  # a sampler of one unguided step: input and output layers included
        options |= {"steps": 1, "guidance": 1.0}
    elif task != "decode":
        return None
    plan = s.model.decode_plan(len(s.codes), **options)
    return lambda: plan(s.codes, s.noise)


def _trained(m: FlowMo, task: str) -> dict[str, torch.nn.Parameter]:
    """The parameters a stage trains, of a model in training mode; Stage 1B freezes the encoder."""
    m.train()
    m.encoder.requires_grad_(task == "train")
    unread = {id(p) for part in (m.encoder, m.decoder) for p in part.unread_parameters()}
    return {k: p for k, p in m.named_parameters() if p.requires_grad and id(p) not in unread}


def _train(provider: str, task: str, s: Setting, device: str) -> Call:
    """A whole optimizer step of Stage 1A (without its perceptual term) or 1B, from one batch."""
    implementation = provider if provider in ("triton", "cuda") else "ref"
    with use(implementation):
        pass
    optimizer = AdamHoldEMA(_trained(s.model, task), OptimConfig())
    inner: Callable[..., dict[str, Tensor]] = pretrain_loss if task == "train" else posttrain_loss
    loss = torch.compile(inner) if provider == "compile" else inner
    settings: list[Any] = [LossConfig(perceptual="none"), NoiseConfig()]
    options: dict[str, Any] = {}
    if task == "posttrain":
        settings = [PosttrainConfig(steps=CHAIN, resnet="random"), *settings, random_resnet_distance().to(device)]
        options["memory"] = "save10"  # nothing but products and attention is kept, and none of those computed twice

    def run() -> None:
        with use(implementation), mixed(device):
            loss(s.model, s.images, *settings, **options)["total"].backward()
            optimizer.step(1e-4)

    return run


__all__ = [
    "PROVIDERS", "TASKS", "KernelUnavailableError", "Setting", "Work", "changes", "config", "provide", "provider_name",
    "work",
]  # fmt: skip
