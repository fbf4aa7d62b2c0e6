"""Stage 2 in the training loop: a token cache as data, the generator as model (paper, section 4.3).

The paper gives learning rate 1e-4, batch 128 and 300 epochs; the rest is TiTok's published recipe.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError
from flowmo.data import make_grid
from flowmo.data.tokens import TokenBatches, TokenCache, TokenCacheError, layout_of
from flowmo.generator.loss import generator_loss
from flowmo.generator.network import Generator
from flowmo.generator.optim import AdamWEMA, learning_rate
from flowmo.generator.sampler import sample_tokens
from flowmo.generator_config import MaskLossConfig, NetworkConfig
from flowmo.training import checkpoint
from flowmo.training.distributed import Processes
from flowmo.training.stage import Batches, Measure, Stage

logger = logging.getLogger("flowmo")

GRID_COLUMNS = 4  # pictures of one class in a sample grid
HELDOUT_BATCH = 64


class MaskGIT(Stage):
    """Masked prediction of the tokens in `data.tokens`, given the class.

    Calling it with (tokens int64 [B, N], labels int64 [B]) gives its losses.

    Raises:
        FileNotFoundError, TokenCacheError: no token cache, an unfinished one, or one of other sizes than the network's
            or another tokenizer than `generator.tokenizer`.
    """

    name = "maskgit"
    shown = ("masked", "accuracy")
    model: Generator

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.check(config)
        assert config.data.tokens is not None
        self.cache = TokenCache.open(config.data.tokens)
        self.drawing = TokenGrid(config, self.cache, device) if config.generator.tokenizer else None
        self.model = build_generator(self.cache, config.generator.network).to(device)
        self.model.gradient_checkpointing = config.trainer.gradient_checkpointing
        self.trained = dict(self.model.named_parameters())
        self.loss = torch.compile(generator_loss) if config.trainer.compile else generator_loss

    @classmethod
    def check(cls, config: Config) -> None:
        if config.data.tokens is None:
            raise ConfigError(
                "data.tokens is not set: name a token cache; make one with python -m flowmo.tokenize DATA --checkpoint "
                "C --out TOKENS"
            )
        if config.trainer.parallel == "fsdp":
            raise ConfigError("trainer.parallel=fsdp: stage maskgit trains with ddp, every process has all weights")

    def start_from(self, path: str) -> None:
        """Take the averaged weights of a run, a generator's folder or a training checkpoint.

        Raises:
            ConfigError: a generator of other sizes. TokenCacheError: of other tokens or classes than the cache's.
            FileNotFoundError, CheckpointError, DamagedCheckpoint: as reading them raises.
        """
        if checkpoint.is_checkpoint(Path(path)):
            saved = checkpoint.read(path)
            weights = {**saved["model"], **saved["optimizer"]["average"]}
            tokens, here = saved["data"].get("tokens"), self.cache.header.layout
            if tokens is not None and list(tokens) != [here.tokenizer, here.tokens, here.bits, here.grouping]:
                raise TokenCacheError(
                    f"init={path} was trained with tokens {tokens}, and {self.cache.folder} holds "
                    f"{[here.tokenizer, here.tokens, here.bits, here.grouping]} (tokenizer, number, bits, grouping)"
                )
        else:
            model = Generator.from_pretrained(path)
            check_tokens(model, self.cache)
            weights = model.state_dict()
        shapes = {k: list(w.shape) for k, w in weights.items()}
        if shapes != {k: list(w.shape) for k, w in self.model.state_dict().items()}:
            raise ConfigError(
                f"init={path} holds another model than generator.network asks for; give the sizes it was trained with"
            )
        self.model.load_state_dict(weights)

    def empty_model(self) -> Generator:
        return Generator(self.model.config, self.model.layout, self.model.class_names)

    def batches(self, processes: Processes) -> TokenBatches:
        c = self.config
        batch = c.data.batch // (c.trainer.accumulate * processes.world)
        return TokenBatches(
            self.cache, batch, c.trainer.seed, rank=processes.rank, world=processes.world, device=self.device
        )

    def optimizer(self) -> AdamWEMA:
        return AdamWEMA(self.trained, self.config.generator.optim)

    def learning_rate(self, step: int, progress: float) -> float:
        t = self.config.trainer
        return learning_rate(self.config.generator.optim, step, t.steps, progress if t.minutes else 0.0)

    def forward(self, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        return self.loss(self.model, *batch, self.config.generator.loss, generator)

    def clip_(self, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.config.generator.optim.clip, norm)

    @property
    def sequence(self) -> int:
        return self.model.config.tokens + 1

    def describe_model(self) -> str:
        n = self.model.config
        return f"{n.tokens} tokens of {n.bits} bits, {n.classes} classes"

    def describe(self) -> str:
        loss = self.config.generator.loss
        tokenizer = self.config.generator.tokenizer or "none, so no sample grids (generator.tokenizer=)"
        return (
            f"label smoothing {loss.label_smoothing:g}, weight {loss.unmasked_weight:g} of known tokens, "
            f"{loss.class_dropout:g} of the classes dropped, tokenizer {tokenizer}"
        )

    def step_flops(self) -> float:
        return 3 * self.config.data.batch * forward_flops(self.model.config)

    def samples(self, data: Batches) -> list[int]:
        """Classes, spread evenly over all that there are."""
        rows = max(1, self.config.trainer.sample_images // GRID_COLUMNS)
        classes = len(self.cache.header.classes) or self.model.config.classes
        return [i * classes // min(rows, classes) for i in range(min(rows, classes))]

    def grid(self, model: Generator, samples: list[int]) -> Image.Image | None:
        """A row of drawn pictures for each of some classes."""
        return self.drawing(model, samples) if self.drawing else None

    def measure(self) -> Measure | None:
        h = self.config.heldout
        if h.path is None:
            logger.info("heldout.path is not set: nothing is measured; name a token cache of held-out pictures")
            return None
        if h.metric != "masked":
            raise ConfigError(f"heldout.metric={h.metric}: stage maskgit measures masked alone")
        cache = TokenCache.open(h.path, self.cache.header.layout)
        check_tokens(self.model, cache)
        return MaskedTokens(cache, h.images, self.config.trainer.seed)


class TokenGrid:
    """Draws pictures of classes with the configured samplers, always with the same noise.

    Raises:
        TokenCacheError: the tokenizer is not the one that made the cache.
    """

    def __init__(self, config: Config, cache: TokenCache, device: torch.device) -> None:
        self.config, self.layout, self.classes = config, cache.header.layout, cache.header.classes
        # in fp32: the fingerprint is of these weights
        self.tokenizer = FlowMo.from_pretrained(str(config.generator.tokenizer), dtype=torch.float32)
        wrong = layout_of(self.tokenizer, self.layout.grouping).differences(self.layout)
        if wrong:
            raise TokenCacheError(
                f"generator.tokenizer={config.generator.tokenizer} did not make the tokens in {cache.folder} "
                f"(tokenizer and cache: {'; '.join(wrong)}); name the one that did"
            )
        self.tokenizer.to(device)

    def __call__(self, model: Generator, classes: list[int]) -> Image.Image:
        c = self.config
        noise = torch.Generator(model.device).manual_seed(c.trainer.seed)
        labels = torch.tensor(classes).repeat_interleave(GRID_COLUMNS)
        tokens = sample_tokens(model, labels, c.generator.sampler, generator=noise)
        s = c.sampler
        pictures = self.tokenizer.decode(
            self.layout.decode(tokens),
            steps=s.steps,
            rho=s.rho,
            guidance=s.guidance,
            guidance_interval=s.guidance_interval,
            generator=torch.Generator().manual_seed(c.trainer.seed),
        )
        names = [self.classes[i] if i < len(self.classes) else str(i) for i in classes]
        return make_grid(list(pictures.cpu().split(GRID_COLUMNS)), names)


class MaskedTokens:
    """How well masked tokens of a cache are predicted: "masked", their cross-entropy in nats, and "accuracy".

    The first view of the first `count` pictures, under masks that depend on the seed alone; no class is dropped.

    Raises:
        TokenCacheError: pictures without a class.
    """

    def __init__(self, cache: TokenCache, count: int, seed: int) -> None:
        pictures = cache.done()[:count]
        self.tokens, self.labels = cache.read(pictures, pictures * 0)
        if without := int((self.labels < 0).sum()):
            raise TokenCacheError(
                f"heldout.path={cache.folder}: {without} pictures have no class; the generator is measured with the "
                "classes it is trained with, one folder of pictures to a class"
            )
        self.seed = seed

    def __call__(self, model: Generator) -> dict[str, float]:
        plain = MaskLossConfig(label_smoothing=0.0, unmasked_weight=0.0, class_dropout=0.0)
        noise = torch.Generator(model.device).manual_seed(self.seed)
        sums, masked = {"masked": 0.0, "accuracy": 0.0}, 0.0
        for tokens, labels in zip(self.tokens.split(HELDOUT_BATCH), self.labels.split(HELDOUT_BATCH)):
            losses = generator_loss(model, tokens.to(model.device), labels.to(model.device), plain, noise)
            count = float(losses["ratio"]) * tokens.numel()
            masked += count
            for key in sums:
                sums[key] += count * float(losses[key])
        return {key: value / masked for key, value in sums.items()}


def forward_flops(network: NetworkConfig) -> float:
    """Floating-point operations of one forward pass for one picture; norms and embeddings are not counted."""
    n, length, d = network, network.tokens + 1, network.hidden
    block = (8.0 + 4.0 * n.mlp_ratio) * length * d**2 + 4.0 * length**2 * d
    merges = n.depth // 2 * 4.0 * length * d**2
    return (n.depth + 1) * block + merges + 2.0 * n.tokens * d * n.codes


def build_generator(cache: TokenCache, network: NetworkConfig) -> Generator:
    """A fresh generator for the tokens of a cache; it remembers their layout and the names of the classes.

    Raises:
        TokenCacheError: the sizes are not those of the cache.
    """
    with torch.device("meta"):
        check_tokens(Generator(network), cache)
    return Generator(network, cache.header.layout, cache.header.classes)


def check_tokens(model: Generator, cache: TokenCache) -> None:
    """Raises TokenCacheError where a cache holds other tokens than a generator has learned or was made for."""
    n, layout = model.config, cache.header.layout
    wrong = model.layout.differences(layout) if model.layout else []
    if (n.tokens, n.bits) != (layout.tokens, layout.bits):
        wrong.append(f"size: {n.tokens} tokens of {n.bits} bits and {layout.tokens} of {layout.bits}")
    if n.codes != layout.vocabulary:
        wrong.append(f"values of a token: {n.codes} and {layout.vocabulary}")
    classes = max(len(cache.header.classes), int(cache.labels.max()) + 1)
    if classes > n.classes:
        wrong.append(f"classes: {n.classes} and {classes}")
    if model.class_names and model.class_names != cache.header.classes:
        wrong.append("class names")
    if wrong:
        values = f" generator.network.vocabulary={layout.vocabulary}" if layout.levels else ""
        raise TokenCacheError(
            f"{cache.folder}: not the tokens of this generator (generator and cache: {'; '.join(wrong)}); give "
            f"generator.network.tokens={layout.tokens} generator.network.bits={layout.bits}{values} and enough classes "
            "to a new one, or tokenize the data with the tokenizer that this one was trained with"
        )
