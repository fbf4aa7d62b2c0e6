"""Configuration of Stage 2, the keys `generator.*`: sizes, loss, optimizer and how tokens are drawn.

It lies beside `flowmo.config`, which holds it: the package `flowmo.generator` imports that in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowmo.errors import ConfigError


@dataclass
class NetworkConfig:
    """Sizes of a generator; the defaults are the paper's, 397,178,368 parameters.

    `tokens` of `bits` bits make a picture. Those of finite scalar quantization may take fewer values than 2^bits, which
    `vocabulary` then says, so that no other is ever drawn; null is all of them. `depth` counts the blocks with a
    partner across the U, the mid block comes on top.
    """

    tokens: int = 512
    bits: int = 9
    vocabulary: int | None = None
    classes: int = 1000
    hidden: int = 1024
    depth: int = 28
    heads: int = 16
    mlp_ratio: int = 4

    @property
    def codes(self) -> int:
        """Values of a token."""
        return 2**self.bits if self.vocabulary is None else self.vocabulary

    @property
    def mask_id(self) -> int:
        """Id of a token that is not known; the codes are 0 .. codes - 1."""
        return self.codes

    @property
    def null_class(self) -> int:
        """Label of no class, as guidance and class dropout use it; the classes are 0 .. classes - 1."""
        return self.classes

    def check(self) -> None:
        """Raises ConfigError where the sizes do not fit together."""
        for name in ("tokens", "bits", "classes", "hidden", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"generator.network.{name}={getattr(self, name)}: expected at least 1")
        if self.bits > 16:
            raise ConfigError(f"generator.network.bits={self.bits}: one output per code, so at most 16 bits to a token")
        if not 2 ** (self.bits - 1) < self.codes <= 2**self.bits:
            raise ConfigError(
                f"generator.network.vocabulary={self.vocabulary}: tokens of generator.network.bits={self.bits} have "
                f"more than {2 ** (self.bits - 1)} and at most {2**self.bits} values"
            )
        if self.depth % 2:
            raise ConfigError(
                f"generator.network.depth={self.depth}: expected an even number, half of it on each side of the U"
            )
        if self.hidden % self.heads:
            raise ConfigError(
                f"generator.network.hidden={self.hidden} is no multiple of generator.network.heads={self.heads}"
            )


@dataclass
class MaskLossConfig:
    """Cross-entropy over masked and, with less weight, known tokens."""

    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1  # of the loss at tokens that are not masked; 0 leaves them out
    class_dropout: float = 0.1  # part of the labels replaced by the null class


@dataclass
class GeneratorOptimConfig:
    """AdamW. The average's horizon is that of TiTok's 0.999 at its sixteen times larger batch."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.96)
    eps: float = 1e-8
    weight_decay: float = 0.03  # not of norms, biases, embeddings and positions
    clip: float = 1.0  # of the gradient's norm
    schedule: str = "cosine"  # cosine (to lr_end over the run) | constant
    warmup: int = 10_000  # steps
    lr_end: float = 1e-5
    ema_decay: float = 0.9999


@dataclass
class TokenSamplerConfig:
    """How tokens are drawn; the defaults are the paper's words, and TiTok's settings where it is silent.

    Attributes:
        steps: S.
        guidance: s. "shift" form: l_c + s (l_c - l_u); "interpolate": l_u + s (l_c - l_u), which is shift by s - 1.
        guidance_decay: how the shift grows over the steps: "constant"; "linear", f; "cosine",
            (1 - cos(pi f^p)) / 2 with p = guidance_power, f being the part of the steps that is done:
        guidance_at: "start" of step i, f = i / S; "end" of it, (i + 1) / S; "span", i / (S - 1), from 0 to 1.
        schedule: part that stays masked after step i: "arccos", (2 / pi) arccos(r), or "cosine", cos(pi r / 2);
            "proportional" reveals numbers of tokens that are to each other as arccos(1 - i / (S - 1)), i > 0.
        softmax_annealing: divide the logits by 0.5 + 0.8 (1 - r).
        softmax_temperature: divide the logits by this as well.
        randomize_temperature: R, of the Gumbel noise tau = R (1 - f). The paper does not name it.
        temperature_at: as guidance_at; at the "end", tau is 0 in the last step and the tokens are drawn greedily.
        draw: "annealed" draws a token at temperature tau; "categorical" at temperature 1.
        confidence: "logit", the drawn token's logit, or "log_prob", its log-probability.
        confidence_noise: R of the noise that is added to the confidence; null: randomize_temperature; 0: none.

    Of the published samplers, TiTok and MUSE draw annealed and rank by logit, MaskGIT, MaskBit and Halton-MaskGIT draw
    categorical and rank by log_prob; Halton-MaskGIT takes "span" and "proportional", MaskGen guidance_at "end".
    """

    steps: int = 64
    guidance: float = 1.5
    guidance_form: str = "shift"  # shift | interpolate
    guidance_decay: str = "constant"  # constant | linear | cosine
    guidance_power: float = 3.0
    guidance_at: str = "start"  # start | end | span
    schedule: str = "arccos"  # arccos | cosine | proportional
    softmax_annealing: bool = True
    softmax_temperature: float = 1.0
    randomize_temperature: float = 2.8
    temperature_at: str = "end"  # start | end | span
    draw: str = "annealed"  # annealed | categorical
    confidence: str = "logit"  # logit | log_prob
    confidence_noise: float | None = None

    def check(self) -> None:
        """Raises ConfigError where a value is outside what the sampler knows."""
        for name, allowed in (
            ("guidance_form", ("shift", "interpolate")),
            ("guidance_decay", ("constant", "linear", "cosine")),
            ("guidance_at", ("start", "end", "span")),
            ("temperature_at", ("start", "end", "span")),
            ("schedule", ("arccos", "cosine", "proportional")),
            ("draw", ("annealed", "categorical")),
            ("confidence", ("logit", "log_prob")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"sampler.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps}: expected at least 1")
        if self.randomize_temperature < 0 or self.guidance_power <= 0:
            raise ConfigError(
                f"sampler.randomize_temperature={self.randomize_temperature}, guidance_power={self.guidance_power}: "
                "expected a temperature of at least 0 and a positive power"
            )
        if self.softmax_temperature <= 0 or (self.confidence_noise or 0.0) < 0:
            raise ConfigError(
                f"sampler.softmax_temperature={self.softmax_temperature}, confidence_noise={self.confidence_noise}: "
                "expected a positive temperature and noise of at least 0"
            )


@dataclass
class GeneratorConfig:
    """Everything that Stage 2 is told beyond the data and the trainer; the defaults are for FlowMo-Lo on ImageNet."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: MaskLossConfig = field(default_factory=MaskLossConfig)
    optim: GeneratorOptimConfig = field(default_factory=GeneratorOptimConfig)
    sampler: TokenSamplerConfig = field(default_factory=TokenSamplerConfig)
    tokenizer: str | None = None  # released .pth, model folder or run that decodes the sample grids; null: no grids

    def check(self) -> None:
        """Raises ConfigError where a value is outside what the code knows."""
        self.network.check()
        self.sampler.check()
        if self.optim.schedule not in ("cosine", "constant"):
            raise ConfigError(f"generator.optim.schedule={self.optim.schedule!r}: expected cosine or constant")
        for name, value in (
            ("label_smoothing", self.loss.label_smoothing),
            ("unmasked_weight", self.loss.unmasked_weight),
            ("class_dropout", self.loss.class_dropout),
        ):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"generator.loss.{name}={value}: expected a number from 0 to 1")
        if not self.optim.clip > 0.0:
            raise ConfigError(f"generator.optim.clip={self.optim.clip}: expected a norm above 0; .inf never clips")
