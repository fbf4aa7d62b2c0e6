"""Stage 1A, mode-matching pre-training (paper, section 3.2): its noise law and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowmo.autoencoder import FlowMo
from flowmo.config import LossConfig, NoiseConfig
from flowmo.layers import patchify, unpatchify


def sample_noise_levels(
    batch: int,
    law: NoiseConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:  # [batch] in (0, 1), fp32
    """Noise levels t: logit-normal with thick tails, plain logit-normal, or uniform.

    The thick-tailed law is sigmoid(mean + std n) for standard normal n, replaced by a uniform number with
    probability `tail` (supplement A; the released implementation takes 0.1).
    """
    uniform = torch.rand(batch, generator=generator, device=device)
    if law.law == "uniform":
        return uniform
    normal = torch.randn(batch, generator=generator, device=device)
    t = torch.sigmoid(law.mean + law.std * normal)
    if law.law == "logit_normal":
        return t
    return torch.where(torch.rand(batch, generator=generator, device=device) < law.tail, uniform, t)


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
) -> dict[str, Tensor]:  # scalars, fp32; "total" carries the gradient
    """L_flow + perceptual L_perc + entropy L_ent + commitment L_commit (paper, eq. 9).

    The perceptual distance is taken on the one-step denoised picture x_t - t v (eq. 6 in the released sign). The
    conditioning of a sample is dropped with probability `condition_dropout`; entropy and commitment see every
    sample. With a frozen encoder the codes carry no gradient and the quantizer's losses are reported only.
    """
    c = model.config
    data = patchify(images, c.patch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_encoder):
        quantized = model.quantize(model.latent(images))
    t = sample_noise_levels(len(images), noise, generator, images.device)
    z = torch.randn(data.shape, generator=generator, device=images.device)
    keep = torch.rand(len(images), generator=generator, device=images.device) >= loss.condition_dropout
    level = t[:, None, None]
    x_t = level * z + (1 - level) * data
    velocity = model.velocity(x_t, t, model.condition(quantized.codes, keep))
    flow = flow_loss(velocity, data, z)
    total = flow + quantized.loss(loss)
    report = {
        "flow": flow,
        "entropy_per_sample": quantized.per_sample_entropy,
        "entropy_codebook": quantized.codebook_entropy,
        "commitment": quantized.commitment,
    }
    if perceptual is not None:
        denoised = unpatchify(x_t - level * velocity.float(), c.patch, c.image_size)
        report["perceptual"] = perceptual(images, denoised).mean()
        total = total + loss.perceptual_weight * report["perceptual"]
    return {"total": total, **report}
