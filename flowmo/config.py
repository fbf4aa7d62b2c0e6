"""Configuration: typed dataclasses, `key=value` overrides on the tables of presets, and "did you mean"."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flowmo.errors import ConfigError
from flowmo.generator_config import GeneratorConfig
from flowmo.presets import PRESETS, STAGES, UNREAD

QUANTIZERS = ("lfq", "fsq", "kl", "none")
MAX_FSQ_VOCABULARY = 2**20  # its tokens are counted one by one


@dataclass
class ModelConfig:
    """Sizes of a FlowMo model (paper, Table 1 of the supplement).

    Width counts muP units: hidden = 16 * heads * width, so head_dim = 16 * width and, at the published 12 heads,
    hidden = 192 * width. Image side and patch in pixels; `latent_tokens` x `latent_channels` is the code;
    `entropy_bits` the bits of one token (one group of channels) of lookup-free quantization, `fsq_levels` the levels
    of each channel of one token of finite scalar quantization. The paper does not say its levels: the default makes
    tokens of 9 bits, so that with 6 latent channels the code has FlowMo-Lo's tokens and bits.
    """

    image_size: int = 256
    patch: int = 4
    heads: int = 12
    encoder_width: int = 4
    decoder_width: int = 6
    encoder_depth: int = 8
    decoder_depth: int = 16
    latent_tokens: int = 256
    latent_channels: int = 18
    entropy_bits: int = 9
    # lfq (bits) | fsq (levels) | kl (Gaussian latents) | none (continuous: LayerNorm as the encoder's last layer)
    quantizer: str = "lfq"
    fsq_levels: list[int] = field(default_factory=lambda: [8, 8, 8])

    @property
    def encoder_hidden(self) -> int:
        return 16 * self.heads * self.encoder_width

    @property
    def decoder_hidden(self) -> int:
        return 16 * self.heads * self.decoder_width

    @property
    def grid(self) -> int:
        """Image tokens per side."""
        return self.image_size // self.patch

    @property
    def discrete(self) -> bool:
        """Whether the code has integer tokens."""
        return self.quantizer in ("lfq", "fsq")

    @property
    def token_channels(self) -> int:
        """Latent channels that make one token."""
        return len(self.fsq_levels) if self.quantizer == "fsq" else self.entropy_bits

    @property
    def tokens(self) -> int:
        """Integer tokens of a picture; 0 of a continuous code."""
        return self.latent_tokens * self.latent_channels // self.token_channels if self.discrete else 0

    @property
    def vocabulary(self) -> int | None:
        """Values that a token can take: 2^entropy_bits, or the product of the levels; None of a continuous code."""
        if self.quantizer == "fsq":
            return math.prod(self.fsq_levels)
        return 2**self.entropy_bits if self.discrete else None

    @property
    def token_bits(self) -> int:
        """Bits that a token takes in files: the least that hold its vocabulary; 0 of a continuous code."""
        return 0 if self.vocabulary is None else (self.vocabulary - 1).bit_length()

    @property
    def bits_per_pixel(self) -> float | None:
        """Tokens x log2(vocabulary) / pixels; None of a continuous code."""
        if self.vocabulary is None:
            return None
        return self.tokens * math.log2(self.vocabulary) / self.image_size**2

    def describe_code(self) -> str:
        """The code in words, for logs."""
        if self.vocabulary is None:
            return f"{self.latent_tokens} x {self.latent_channels} real numbers ({self.quantizer})"
        levels = f" (levels {' x '.join(map(str, self.fsq_levels))})" if self.quantizer == "fsq" else ""
        bits = math.log2(self.vocabulary)
        return f"{self.tokens} tokens of {bits:.4g} bits{levels}, {self.bits_per_pixel:.4f} bits per pixel"

    def check(self) -> None:
        """Raises ConfigError where the sizes do not fit together."""
        for name in ("encoder_width", "decoder_width"):
            width = getattr(self, name)
            if width < 2 or width % 2:
                raise ConfigError(
                    f"model.{name}={width}: the rotary axes (8, 28, 28) x width / 4 need an even width of at least 2"
                )
        if self.image_size % self.patch:
            raise ConfigError(f"model.image_size={self.image_size} is no multiple of model.patch={self.patch}")
        if self.quantizer not in QUANTIZERS:
            raise ConfigError(
                f"model.quantizer={self.quantizer!r}: expected one of {', '.join(QUANTIZERS)}"
                f"{_nearest(self.quantizer, QUANTIZERS)}"
            )
        for name in (
            "heads",
            "encoder_depth",
            "decoder_depth",
            "latent_tokens",
            "latent_channels",
            "entropy_bits",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)}: expected at least 1")
        if self.quantizer == "lfq" and self.latent_channels % self.entropy_bits:
            raise ConfigError(
                f"model.latent_channels={self.latent_channels} must be a multiple of "
                f"model.entropy_bits={self.entropy_bits}: every token takes that many channels"
            )
        if self.quantizer == "fsq":
            self._check_levels()

    def _check_levels(self) -> None:
        levels = self.fsq_levels
        if not levels or not all(2 <= n <= 256 for n in levels) or math.prod(levels) > MAX_FSQ_VOCABULARY:
            raise ConfigError(
                f"model.fsq_levels={levels}: expected numbers from 2 to 256 whose product, the vocabulary, is at most "
                f"{MAX_FSQ_VOCABULARY:,}; for example [8,8,8]"
            )
        if self.latent_channels % len(levels):
            raise ConfigError(
                f"model.latent_channels={self.latent_channels} must be a multiple of the {len(levels)} numbers of "
                f"model.fsq_levels={levels}: every token takes that many channels"
            )


@dataclass
class LossConfig:
    """L_flow + perceptual L_perc + entropy L_ent + commitment L_commit (paper, eq. 9), the last two for LFQ alone."""

    perceptual: str = "lpips"  # lpips | random | none
    perceptual_weights: str | None = None  # file of the VGG-16 trunk
    perceptual_heads: str | None = None  # file of the LPIPS linear heads; null: those that torchmetrics ships
    perceptual_weight: float = 0.1
    entropy: float = 0.0025
    commitment: float = 0.000625
    # Of quantizer kl: weight of KL(N(mean, variance) || N(0, 1)), nats, mean over the latent's numbers. The paper has
    # no such model; weak, as in latent diffusion, so that the code stays bounded and smooth but keeps its details.
    kl: float = 1e-4
    condition_dropout: float = 0.1
    # Of continuous codes: probability with which a sample's code is noised in training, c' = (1 - s) c + s e with e
    # standard normal and s uniform from 0 to the picture's own noise level t ("noise sync"; DiTo takes 0.1).
    noise_sync: float = 0.0
    codebook_entropy: str = "rank"  # rank (as released: of each process's micro-batch) | world (of all processes')


@dataclass
class NoiseConfig:
    """The law of the noise level t: sigmoid(mean + std * normal), uniform on [0, 1] with probability `tail`."""

    # thick_logit_normal | logit_normal | uniform | one: t = 1, where the flow loss is the mean squared error of a
    # decoder that gives the picture in one step
    law: str = "thick_logit_normal"
    mean: float = 0.0
    std: float = 1.0
    tail: float = 0.1


@dataclass
class OptimConfig:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: str = "constant"  # constant | cosine (to zero over trainer.steps or trainer.minutes)
    warmup: int = 0  # steps
    hold_norms: str = "matrix"  # matrix | channel | none: keep block weights at the norm of step 0
    ema_decay: float = 0.9999
    ema_every: int = 10
    freeze_encoder_at: int | None = 200_000
    # null: as released, one rate for all weights. A width (4): true muP with that width as the base, under which the
    # rate of hidden matrices and the readout fall as the model grows wider.
    mup_base_width: int | None = None


@dataclass
class DataConfig:
    # A folder of images, "samples", a tar archive (also a tar of tars), or a folder or pattern of tar shards.
    path: str | None = None
    tokens: str | None = None  # of stage maskgit: the token cache that flowmo.tokenize made
    index: str | None = None  # JSON index of the archive; null: its headers are read at the start
    batch: int = 128  # images per optimizer step, over all micro-batches and processes
    workers: int = 8  # processes that decode, to each training process
    max_failed: float = 0.05  # share of the pictures read that may be undecodable before training stops
    flip: bool = False
    # Of the built-in photographs: shorter sides to resize to, and the part of the width that crops may lie in.
    scales: list[int] | None = None
    columns: tuple[float, float] = (0.0, 1.0)


@dataclass
class SamplerConfig:
    """The guided Euler sampler (paper, section 3.4 and supplement B)."""

    steps: int = 25
    rho: float = 4.0
    guidance: float = 1.5
    guidance_interval: tuple[float, float] | None = (0.17, 1.02)  # EDM noise-to-signal ratios


@dataclass
class PosttrainConfig:
    """Stage 1B: L_flow + weight * L_sample, the sample being a chain of random steps (paper, section 3.3)."""

    weight: float = 0.01
    steps: int = 8  # of the chain
    resnet: str = "resnet50"  # resnet50 | random | none
    resnet_weights: str | None = None  # file of the ResNet-50


@dataclass
class DistillConfig:
    """Few-step decoding: a student of the guided sampler of `sampler.*`, which decodes without guidance.

    The perceptual terms, against the original, are those of `posttrain.resnet` and `loss.perceptual`.
    """

    steps: list[int] = field(default_factory=lambda: [1, 2, 4])  # numbers of steps that the student learns to take
    rho: float = 1.0  # spacing of its times ((n - i) / n)^rho
    # Share of the target that the original has, the teacher's picture having the rest: one for all, or of each steps.
    original: list[float] = field(default_factory=lambda: [0.0])

    def check(self, most: int) -> None:
        """Raises ConfigError where a value is out of range; `most` steps are the teacher's."""
        if not self.steps or len(set(self.steps)) < len(self.steps) or not all(1 <= n <= most for n in self.steps):
            raise ConfigError(
                f"distill.steps={self.steps}: expected different numbers from 1 to sampler.steps={most}, those of the "
                "teacher, for example [1,2,4]"
            )
        if self.rho <= 0:
            raise ConfigError(f"distill.rho={self.rho}: expected a positive number; 1 spaces the steps evenly")
        if len(self.original) not in (1, len(self.steps)) or not all(0 <= a <= 1 for a in self.original):
            raise ConfigError(
                f"distill.original={self.original}: expected a share from 0 to 1, or one for each of "
                f"distill.steps={self.steps}"
            )


@dataclass
class HeldoutConfig:
    """Held-out pictures, measured as training goes; a run that no longer gets better stops."""

    # A folder or archive of images or "samples", for stage maskgit a token cache; null: "samples" where data.path is.
    path: str | None = None
    images: int = 64
    every: int = 0  # steps; 0 never
    patience: int = 5  # measurements in a row without a new best before training stops; 0 never stops
    # perceptual: the stage's own distance | psnr | rfid: Frechet distance of Inception features, the published choice |
    # teacher: of distill, PSNR to the teacher's pictures | masked: of maskgit, the cross-entropy at masked tokens
    metric: str = "perceptual"
    inception_weights: str | None = None  # file, for rfid


@dataclass
class TrainerConfig:
    steps: int = 1_300_000
    minutes: float | None = None  # stop, and anneal a cosine schedule, by this much training time as well
    accumulate: int = 1  # micro-batches per step of each process
    parallel: str = "ddp"  # of several processes: ddp (each has all weights) | fsdp (each has a share of them)
    precision: str = "auto"  # auto | fp32 | bf16 (autocast) | bf16_matmul (CPU: fp32 with bf16 matrix products)
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    threads: int | None = None
    seed: int = 0
    compile: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 50
    sample_every: int = 5_000
    sample_images: int = 8
    save_every: int = 5_000
    keep: int = 3
    keep_every: int = 50_000
    max_skipped: int = 10  # steps in a row with a loss or gradient that is not finite before training stops
    profile: int = 0  # 1: a trace of three steps in RUN/profile
    wandb: str = "none"  # none | offline | online


@dataclass
class Config:
    preset: str = "lo"
    stage: str = "pretrain"  # pretrain (1A) | posttrain (1B) | distill (few steps) | maskgit (2)
    run: str = "runs/${preset}"
    init: str | None = None  # run, model folder or released checkpoint whose (averaged) weights training starts from
    init_part: str = "all"  # what init gives: all | encoder (a decoder that starts anew)
    checkpoint: str = "full"  # what chains (posttrain, distill) recompute: full | save10 (no matrix product) | none
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    posttrain: PosttrainConfig = field(default_factory=PosttrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


def model_config(preset: str, **overrides: Any) -> ModelConfig:
    """The model sizes of a preset, with any field replaced.

    Raises:
        ConfigError: unknown preset or field, or sizes that do not fit together.
    """
    if PRESETS.get(preset, {}).get("stage") == "maskgit":
        raise ConfigError(f"preset {preset!r} is a generator of Stage 2, and no FlowMo model; flowmo.generator has it")
    return parse([preset, *(f"model.{k}={v}" for k, v in overrides.items())]).model


def parse(arguments: list[str]) -> Config:
    """`[preset] key=value ...` to a checked Config; without a preset, the quickstart.

    Raises:
        ConfigError: unknown preset, misspelt key (with the nearest right one), or a value of the wrong type.
    """
    arguments = list(arguments)
    preset = arguments.pop(0) if arguments and "=" not in arguments[0] else "quickstart"
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}{_nearest(preset, PRESETS)}")
    usual = PRESETS[preset].get("stage", "pretrain")
    stage = next((a.partition("=")[2] for a in reversed(arguments) if a.startswith("stage=")), usual)
    if stage not in STAGES:
        raise ConfigError(f"stage={stage!r}: expected one of {', '.join(STAGES)}{_nearest(stage, STAGES)}")
    if (stage == "maskgit") != (usual == "maskgit"):
        names = [k for k, v in PRESETS.items() if (v.get("stage") == "maskgit") == (stage == "maskgit")]
        raise ConfigError(f"preset {preset} has no stage={stage}; the presets of that stage are {', '.join(names)}")
    tree = OmegaConf.structured(Config)
    try:
        tree = OmegaConf.merge(tree, {"preset": preset}, PRESETS[preset])
        for key in ("", preset):
            tree = OmegaConf.merge(tree, STAGES[stage].get(key, {}))
        for argument in arguments:
            key, equals, _ = argument.partition("=")
            if not equals:
                raise ConfigError(f"{argument!r}: expected key=value, for example trainer.steps=1000")
            read = [k for k in known_keys() if not k.startswith(UNREAD[stage])]
            if key not in known_keys():
                raise ConfigError(f"unknown key {key!r}{_nearest(key, read) or _nearest(key, known_keys())}")
            if key not in read:
                hint = "; its data are data.tokens" if key.startswith("data.") else _nearest(f"generator.{key}", read)
                raise ConfigError(f"stage={stage} does not read {key}{hint if stage == 'maskgit' else ''}")
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([argument]))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(arguments)}: {str(error).splitlines()[0]}") from error
    config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError where a value is outside what the code knows."""
    config.model.check()
    config.generator.check()
    for key, allowed in (
        ("checkpoint", ("full", "save10", "none")),
        ("loss.perceptual", ("lpips", "random", "none")),
        ("loss.codebook_entropy", ("rank", "world")),
        ("posttrain.resnet", ("resnet50", "random", "none")),
        ("heldout.metric", ("perceptual", "psnr", "rfid", "masked", "teacher")),
        ("trainer.wandb", ("none", "offline", "online")),
        ("noise.law", ("thick_logit_normal", "logit_normal", "uniform", "one")),
        ("init_part", ("all", "encoder")),
        ("optim.schedule", ("constant", "cosine")),
        ("optim.hold_norms", ("matrix", "channel", "none")),
        ("trainer.parallel", ("ddp", "fsdp")),
        ("trainer.precision", ("auto", "fp32", "bf16", "bf16_matmul")),
    ):
        value = _value(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value!r}: expected one of {', '.join(allowed)}{_nearest(value, allowed)}")
    if config.data.batch % config.trainer.accumulate:
        raise ConfigError(
            f"data.batch={config.data.batch} is no multiple of trainer.accumulate={config.trainer.accumulate}"
        )
    for key in (
        *("data.batch", "posttrain.steps", "sampler.steps", "heldout.images"),
        *(f"trainer.{k}" for k in ("accumulate", "steps", "log_every", "sample_every", "save_every", "max_skipped")),
    ):
        if _value(config, key) < 1:
            raise ConfigError(f"{key}={_value(config, key)}: expected at least 1")
    for key in ("optim.lr", "generator.optim.lr"):
        if not 0 < _value(config, key) < math.inf:
            raise ConfigError(f"{key}={_value(config, key)}: expected a positive number")
    if not 0 <= config.data.max_failed <= 1:
        raise ConfigError(f"data.max_failed={config.data.max_failed}: expected a share from 0 to 1")
    for key in ("loss.condition_dropout", "loss.noise_sync"):
        if not 0 <= _value(config, key) <= 1:
            raise ConfigError(f"{key}={_value(config, key)}: expected a probability from 0 to 1")
    if config.loss.noise_sync and config.model.discrete:
        raise ConfigError(
            f"loss.noise_sync={config.loss.noise_sync} is for continuous codes, and model.quantizer="
            f"{config.model.quantizer} makes tokens; set loss.noise_sync=0, or model.quantizer to none or kl"
        )
    if config.init_part != "all" and (config.stage != "pretrain" or config.init is None):
        raise ConfigError(
            f"init_part={config.init_part} is for stage=pretrain with init=, a run or model that gives its encoder"
        )
    if config.stage == "distill":
        config.distill.check(config.sampler.steps)
        if config.init is None:
            raise ConfigError("stage=distill needs init=: a run, model folder or released checkpoint, the teacher")
    if config.stage == "posttrain" and config.init is None:
        raise ConfigError("stage=posttrain needs init=: a pre-training run, a model folder or a released checkpoint")
    if config.heldout.metric == "rfid" and config.heldout.every and config.heldout.inception_weights is None:
        raise ConfigError("heldout.metric=rfid needs heldout.inception_weights=PATH; or take perceptual or psnr")
    distance = config.stage != "pretrain" or config.loss.perceptual != "none"
    if config.heldout.metric == "perceptual" and config.heldout.every and not distance:
        raise ConfigError(
            "heldout.metric=perceptual has no distance with loss.perceptual=none; set heldout.metric=psnr"
        )


def _value(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, loadable again by :func:`from_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(text: str, source: str = "the saved configuration") -> Config:
    """Inverse of :func:`to_yaml`.

    Raises:
        ConfigError: no YAML, or settings that this version does not know.
    """
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
        return OmegaConf.to_object(tree)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as error:
        said = " ".join(str(error).split("\n    full_key")[0].split())
        raise ConfigError(f"{source} cannot be read: {said}; is it damaged, or of another version?") from error


def known_keys(node: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key that may stand left of an equals sign."""
    keys: list[str] = []
    instance = node() if isinstance(node, type) else node
    for f in fields(instance):
        value = getattr(instance, f.name)
        keys += known_keys(value, f"{prefix}{f.name}.") if is_dataclass(value) else [f"{prefix}{f.name}"]
    return keys


def _nearest(word: str, options: Any) -> str:
    """', did you mean X?' when something is close; a bare last part (steps=3) finds its full key."""
    options = list(options)
    same = [o for o in options if o.rpartition(".")[2] == word]  # steps=3 for trainer.steps=3
    if same:
        return f"; did you mean {', '.join(same[:-1])}{' or ' if same[1:] else ''}{same[-1]}?"
    close = difflib.get_close_matches(str(word), options, n=1, cutoff=0.6)
    if not close:
        tails = {o.rsplit(".", 1)[-1]: o for o in reversed(options)}
        close = [tails[m] for m in difflib.get_close_matches(str(word).rsplit(".", 1)[-1], list(tails), 1, 0.6)]
    return f"; did you mean {close[0]}?" if close else ""
