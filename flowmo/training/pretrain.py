"""Stage 1A, mode-matching pre-training (paper, section 3.2): its noise law, its loss and its stage object."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, LossConfig, ModelConfig, NoiseConfig
from flowmo.layers import patchify, unpatchify
from flowmo.perceptual import load_perceptual
from flowmo.tracing import untraced
from flowmo.training.autoencoder import AutoencoderStage
from flowmo.training.distributed import gather_rows


def sample_noise_levels(
    batch: int,
    law: NoiseConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:  # [batch] in [0, 1], fp32
    """Noise levels t: logit-normal with thick tails, plain logit-normal, or uniform.

    The thick-tailed law is sigmoid(mean + std n) for standard normal n, replaced by a uniform number with
    probability `tail` (supplement A; the released implementation takes 0.1). The law "one" is t = 1 throughout.
    """
    if law.law == "one":
        return torch.ones(batch, device=device)
    uniform = torch.rand(batch, generator=generator, device=device)
    if law.law == "uniform":
        return uniform
    normal = torch.randn(batch, generator=generator, device=device)
    t = torch.sigmoid(law.mean + law.std * normal)
    if law.law == "logit_normal":
        return t
    return torch.where(torch.rand(batch, generator=generator, device=device) < law.tail, uniform, t)


class Draws(NamedTuple):
    """The random numbers of a flow loss."""

    t: Tensor  # [B] noise levels
    z: Tensor  # [B, (S / p)^2, 3 p^2], standard normal
    keep: Tensor  # [B] bool: whose conditioning stays


@untraced
def draw(
    model: ModelConfig,
    batch: int,
    loss: LossConfig,
    noise: NoiseConfig,
    generator: torch.Generator | None,
    device: torch.device,
) -> Draws:
    t = sample_noise_levels(batch, noise, generator, device)
    z = torch.randn(batch, model.grid**2, 3 * model.patch**2, generator=generator, device=device)
    keep = torch.rand(batch, generator=generator, device=device) >= loss.condition_dropout
    return Draws(t, z, keep)


class CodeNoise(NamedTuple):
    """The random numbers of a code; None where it takes none."""

    draw: Tensor | None  # [B, T, C], standard normal: where in its Gaussian a kl code lies
    level: Tensor | None  # [B] in [0, 1], of noise sync
    noise: Tensor | None  # [B, T, C], standard normal, of noise sync


@untraced
def draw_code_noise(
    model: ModelConfig,
    t: Tensor,  # [B] noise levels of the pictures
    loss: LossConfig,
    generator: torch.Generator | None,
) -> CodeNoise:
    shape = len(t), model.latent_tokens, model.latent_channels
    draw = torch.randn(shape, generator=generator, device=t.device) if model.quantizer == "kl" else None
    if not loss.noise_sync:
        return CodeNoise(draw, None, None)
    share, chosen = torch.rand(2, len(t), generator=generator, device=t.device)
    level = torch.where(chosen < loss.noise_sync, share * t, 0.0)
    return CodeNoise(draw, level, torch.randn(shape, generator=generator, device=t.device))


def flow_loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to the target velocity, noise minus data (paper, eq. 5), in fp32."""
    return (velocity.float() - (noise.float() - data.float())).square().mean()


def pretrain_loss(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1], fp32
    loss: LossConfig,
    noise: NoiseConfig,
    perceptual: nn.Module | None = None,
    generator: torch.Generator | None = None,
    frozen_encoder: bool = False,
    code_counts: Tensor | None = None,  # int64 [vocabulary], to which the tokens of the batch are added
) -> dict[str, Tensor]:  # scalars, fp32; "total" carries the gradient
    """L_flow + perceptual L_perc + entropy L_ent + commitment L_commit (paper, eq. 9).

    Entropy and commitment are those of LFQ; quantizer kl has a divergence instead, and fsq and none have nothing. The
    perceptual distance is taken on the one-step denoised picture x_t - t v (eq. 6 in the released sign). The
    conditioning of a sample is dropped with probability `condition_dropout`; entropy and commitment see every
    sample. With a frozen encoder the codes carry no gradient and the quantizer's losses are reported only. The
    entropy of the codebook is that of this batch, as in the released implementation, or with `loss.codebook_entropy`
    "world" that of the batches of all processes. Codes of quantizer kl are draws, here and nowhere else.

    With probability `noise_sync`, a sample's code c becomes (1 - s) c + s e, e standard normal, s uniform on [0, t]:
    never noisier than its picture, so that a noisy code still says what a picture of that noise level shows (DiTo,
    Chen et al. 2025; there s is drawn first, then t uniform on [s, 1]; here t keeps its law).
    """
    c = model.config
    t, z, keep = draw(c, len(images), loss, noise, generator, images.device)
    noised = draw_code_noise(c, t, loss, generator)
    data = patchify(images, c.patch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
        latent = model.latent(images)
        quantized = model.quantize(latent, noised.draw)
        if loss.codebook_entropy == "world" and quantized.codebook_entropy is not None:
            of_all = model.quantize(gather_rows(latent))
            quantized = quantized._replace(codebook_entropy=of_all.codebook_entropy)
    if code_counts is not None and quantized.tokens is not None:
        seen = quantized.tokens.flatten()
        code_counts.scatter_add_(0, seen, torch.ones_like(seen))
    level = t[:, None, None]
    x_t = level * z + (1 - level) * data
    codes = quantized.codes
    if noised.level is not None and noised.noise is not None:
        s = noised.level[:, None, None]
        codes = (1 - s) * codes + s * noised.noise
    velocity = model.velocity(x_t, t, model.condition(codes, keep))
    flow = flow_loss(velocity, data, z)
    total = flow + quantized.loss(loss)
    report = {"flow": flow, **quantized.losses()}
    if perceptual is not None:
        denoised = unpatchify(x_t - level * velocity.float(), c.patch, c.image_size)
        report["perceptual"] = perceptual(images, denoised).mean()
        total = total + loss.perceptual_weight * report["perceptual"]
    return {"total": total, **report}


class Pretrain(AutoencoderStage):
    """Encoder and decoder together, then, from `optim.freeze_encoder_at` on, the decoder alone."""

    name = "pretrain"

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.perceptual: nn.Module | None = load_perceptual(
            config.loss.perceptual, weights=config.loss.perceptual_weights, heads=config.loss.perceptual_heads
        )
        if self.perceptual is not None:
            self.perceptual.to(device)
        if config.model.vocabulary is not None:
            self.code_counts = torch.zeros(config.model.vocabulary, dtype=torch.int64, device=device)
        self.loss = torch.compile(pretrain_loss) if config.trainer.compile else pretrain_loss

    def update(self, step: int) -> bool:
        freeze_at = self.config.optim.freeze_encoder_at
        frozen = freeze_at is not None and step >= freeze_at
        if frozen == self.frozen:
            return False
        self.frozen = frozen
        for name, parameter in self.trained.items():
            if name.startswith("encoder."):
                parameter.requires_grad_(not frozen)
        return True

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        c = self.config
        return self.loss(
            self.model, images, c.loss, c.noise, self.perceptual, generator,
            frozen_encoder=self.frozen, code_counts=self.code_counts,
        )  # fmt: skip

    def distance(self, x: Tensor, y: Tensor) -> Tensor | None:
        return None if self.perceptual is None else self.perceptual(x, y)
