"""Stage 1B, mode-seeking post-training (paper, section 3.3): a perceptual loss through the whole sampling chain.

Loss = L_flow + 0.01 L_sample. The encoder is frozen, so its codes are computed once for both terms. L_sample starts
from noise, takes a chain of random steps through the decoder down to t = 0, and compares the picture that comes out
with the original by a ResNet-50's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, LossConfig, ModelConfig, NoiseConfig, PosttrainConfig
from flowmo.layers import patchify, unpatchify
from flowmo.perceptual import load_resnet_distance
from flowmo.perceptual.resnet import ResNetDistance
from flowmo.sampling import euler_chain, random_times
from flowmo.tracing import untraced
from flowmo.training.autoencoder import AutoencoderStage
from flowmo.training.pretrain import draw, flow_loss

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

# Whose outputs save10 keeps: every matrix product and the attention with its log-sum-exp. Of each block these are qkv
# (3 tensors of [tokens, D]), the attention's output and its projection, fc1 before its GELU (4) and fc2: ten in all.
# The residual streams, norms, rotations and GELUs between them are taken again in the backward pass.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear")
_ATTENTION = ("aten::_scaled_dot_product_", "flowmo_kernels::attention_triton", "flash_attn", "xformers")


def _policy(ctx: object, op: torch._ops.OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    name = op.name().split(".")[0]
    keep = name in _PRODUCTS or name.startswith(_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def remembering(call: Call, mode: str) -> Call:
    """A decoder call with the memory of its backward pass chosen; the gradients are the same in every mode.

    Args:
        mode: "none" keeps all that autograd wants; "save10" keeps ten tensors of [tokens, D] a block and computes no
            matrix product twice; "full" keeps the inputs alone and runs the call again in the backward pass.
    """
    if mode == "none":
        return call

    def again(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        out: Tensor
        if mode == "full":
            out = checkpoint(call, x, t, condition, use_reentrant=False)
        else:
            out = checkpoint(
                call, x, t, condition, use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, _policy),
            )  # fmt: skip
        return out

    return again


@untraced
def draw_chain(
    model: ModelConfig, batch: int, steps: int, generator: torch.Generator | None, device: torch.device
) -> tuple[Tensor, Tensor]:  # [B, (S / p)^2, 3 p^2] and [B, steps + 1]
    """Where a chain starts, and its times."""
    start = torch.randn(batch, model.grid**2, 3 * model.patch**2, generator=generator, device=device)
    return start, random_times(batch, steps, generator, device)


def posttrain_loss(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1], fp32
    config: PosttrainConfig,
    loss: LossConfig,
    noise: NoiseConfig,
    distance: ResNetDistance | None,
    generator: torch.Generator | None = None,
    memory: str = "full",
) -> dict[str, Tensor]:  # scalars, fp32; "total" carries the gradient
    """L_flow + weight L_sample (paper, eq. 10 to 12). Only the decoder gets gradients.

    L_flow is Stage 1A's, condition dropout included. The chain takes `config.steps` steps at times of each image's
    own, with the whole code and without guidance.
    """
    c = model.config
    t, z, keep = draw(c, len(images), loss, noise, generator, images.device)
    start, times = draw_chain(c, len(images), config.steps, generator, images.device)
    call = remembering(model.velocity, memory)
    with torch.no_grad():
        codes = model.quantize(model.latent(images)).codes
        data = patchify(images, c.patch)
        level = t[:, None, None]
        x_t = level * z + (1 - level) * data
        target = None if distance is None else distance.features(images)
    flow = flow_loss(call(x_t, t, model.condition(codes, keep)), data, z)
    if distance is None or target is None:
        return {"total": flow, "flow": flow}
    condition = model.condition(codes)
    end = euler_chain(lambda x, t, _: call(x, t, condition).float(), start, times)
    sample = distance.distance(distance.features(unpatchify(end, c.patch, c.image_size)), target).mean()
    return {"total": flow + config.weight * sample, "flow": flow, "sample": sample}


class Posttrain(AutoencoderStage):
    """The decoder alone, from the weights of a trained model."""

    name = "posttrain"

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        if config.init is None:
            raise ConfigError("stage=posttrain needs init=: a pre-training run, a model folder or a checkpoint")
        self.model.encoder.requires_grad_(False).eval()
        self.trained = {k: p for k, p in self.trained.items() if k.startswith("decoder.")}
        self.resnet = load_resnet_distance(
            config.posttrain.resnet,  # type: ignore[arg-type]  # checked by flowmo.config
            config.posttrain.resnet_weights,
            option="posttrain.resnet",
        )
        if self.resnet is not None:
            self.resnet.to(device)
        self.loss = torch.compile(posttrain_loss) if config.trainer.compile else posttrain_loss

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        c = self.config
        return self.loss(self.model, images, c.posttrain, c.loss, c.noise, self.resnet, generator, memory=c.checkpoint)

    def distance(self, x: Tensor, y: Tensor) -> Tensor | None:
        return None if self.resnet is None else self.resnet(x, y)

    def describe(self) -> str:
        p = self.config.posttrain
        return (
            f"from {self.config.init}, frozen encoder, {p.weight} x {p.resnet} distance through {p.steps} steps, "
            f"checkpoint={self.config.checkpoint}"
        )
