"""The published execution, rebuilt in our own words: the baseline that every speed-up is given against.

As the released implementation runs: one compiled call a velocity, autocast over fp32 weights, the state in fp32 and
images unpatched between calls, guidance as two calls, and inside every call the modulation of all blocks, the rotary
tables in fp64 for every image, both streams of every block and both heads, whether or not anything reads them.

Shapes: B images, S image side, T latent tokens, N image tokens, L = T + N, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowmo import FlowMo
from flowmo.layers import ROPE_AXES, ROPE_THETA, patchify, unpatchify
from flowmo.sampling import guided_steps, random_times, time_grid


def rotary_tables(batch: int, latents: int, grid: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, L, d / 2] fp32, computed in fp64 for every image of the batch."""
    index = torch.arange(latents, device=device)
    row = torch.arange(grid, device=device).repeat_interleave(grid)
    column = torch.arange(grid, device=device).repeat(grid)
    latent = index[:, None].expand(-1, 3)
    image = torch.stack([torch.zeros_like(row), row, column], -1)
    positions = torch.cat([latent, image]).expand(batch, -1, 3)
    angles = []
    for axis, part in enumerate(ROPE_AXES):
        width = part * head_dim // 64
        frequency = 1.0 / ROPE_THETA ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angles.append(positions[..., axis, None].double() * frequency)
    joined = torch.cat(angles, -1)[:, None]
    return joined.cos().float(), joined.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, H, L, d]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * gain


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def block(
    module: Any, img: Tensor, txt: Tensor, vec: Tensor | None, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """One double-stream block, both streams to their end."""
    streams = {"txt": txt, "img": img}
    mods: dict[str, Any] = {}
    joint: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for name, x in streams.items():
        attention = getattr(module, f"{name}_attn")
        if vec is None:
            mods[name] = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
        else:
            mods[name] = getattr(module, f"{name}_mod").lin(F.silu(vec))[:, None].chunk(6, -1)
        shift, scale = mods[name][:2]
        qkv = attention.qkv((1 + scale) * layer_norm(x) + shift)
        q, k, v = qkv.unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
        joint["q"].append(rms_norm(q, attention.norm.query_norm.scale).to(v.dtype))
        joint["k"].append(rms_norm(k, attention.norm.key_norm.scale).to(v.dtype))
        joint["v"].append(v)
    q, k, v = (torch.cat(joint[n], 2) for n in ("q", "k", "v"))
    q, k = rotate(q, *tables), rotate(k, *tables)
    o = F.scaled_dot_product_attention(q, k, v, scale=8.0 / q.shape[-1]).transpose(1, 2).flatten(2)
    attended = dict(zip(("txt", "img"), o.split([txt.shape[1], img.shape[1]], 1)))
    for name, x in streams.items():
        _, _, gate1, shift, scale, gate2 = mods[name]
        x = x + gate1 * getattr(module, f"{name}_attn").proj(attended[name])
        mlp = getattr(module, f"{name}_mlp")
        hidden = F.gelu(mlp[0]((1 + scale) * layer_norm(x) + shift), approximate="tanh")
        streams[name] = x + gate2 * mlp[2](hidden)
    return streams["img"], streams["txt"]


def head(module: Any, x: Tensor, vec: Tensor | None) -> Tensor:
    x = layer_norm(x)
    if vec is not None:
        shift, scale = module.adaLN_modulation(vec)[:, None].chunk(2, -1)
        x = layer_norm((1 + scale) * x + shift)
    return module.linear(x)


def transformer(module: Any, patches: Tensor, latents: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both outputs of one pass of an encoder or decoder."""
    grid = math.isqrt(patches.shape[1])
    blocks = list(module.double_blocks)
    head_dim = module.img_in.out_features // blocks[0].heads
    tables = rotary_tables(patches.shape[0], latents.shape[1], grid, head_dim, patches.device)
    img, txt, vec = module.img_in(patches), module.txt_in(latents), None
    if t is not None:
        frequency = torch.exp(-math.log(10_000.0) * torch.arange(128, device=t.device) / 128)
        angles = 1000.0 * t[:, None] * frequency
        vec = module.time_in(torch.cat([angles.cos(), angles.sin()], -1).to(module.time_in.in_layer.weight.dtype))
    for one in blocks:
        img, txt = block(one, img, txt, vec, tables)
    return head(module.final_layer_img, img, vec), head(module.final_layer_txt, txt, vec)


def quantize(latent: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes with straight-through gradient, and the quantizer's loss by a softmax over all 2^bits codes."""
    tokens = latent.unflatten(-1, (bits, -1)).transpose(-1, -2).reshape(-1, bits)
    codes = torch.where(latent > 0, 1.0, -1.0)
    every = 2.0 * (
        (torch.arange(2**bits, device=latent.device)[:, None] >> torch.arange(bits, device=latent.device)) & 1
    )
    log_p = F.log_softmax(2 * tokens @ (every - 1).to(tokens.dtype).T / 0.1, -1)
    p = log_p.exp()
    mean = p.mean(0)
    entropy = -(p * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()
    commitment = (latent - codes).square().mean()
    return latent + (codes - latent).detach(), 0.0025 * entropy + 0.000625 * commitment


def loss_of(model: FlowMo, optimize: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """images -> Stage 1A loss without its perceptual term; encoder, quantizer and decoder each compiled on its own."""
    c = model.config

    def encode(images: Tensor) -> Tensor:
        zeros = images.new_zeros(images.shape[0], c.latent_tokens, c.latent_channels)
        return transformer(model.encoder, patchify(images, c.patch), zeros, None)[1]

    parts = [optimize(f) for f in (encode, lambda latent: quantize(latent, c.entropy_bits), velocity_of(model))]

    def loss(images: Tensor) -> Tensor:
        codes, penalty = parts[1](parts[0](images))
        t = torch.sigmoid(torch.randn(len(images), device=images.device))
        z = torch.randn_like(images)
        level = t[:, None, None, None]
        keep = (torch.rand(len(images), 1, 1, device=images.device) >= 0.1).to(codes.dtype)
        condition = torch.cat([codes, torch.ones_like(codes[..., :1])], -1) * keep
        v = parts[2](level * z + (1 - level) * images, t, condition)
        return (v - (z - images)).square().mean() + penalty

    return loss


def posttrain_loss_of(
    model: FlowMo, optimize: Callable[[Any], Any], distance: Any, steps: int = 8
) -> Callable[[Tensor], Tensor]:
    """images -> Stage 1B loss: every velocity of the chain is run again in the backward pass."""
    c = model.config
    velocity, encode = optimize(velocity_of(model)), optimize(encode_of(model))

    def remembered(z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = checkpoint(velocity, z, t, condition, use_reentrant=False)
        return out

    def loss(images: Tensor) -> Tensor:
        with torch.no_grad():
            codes = encode(images)
            target = distance.features(images)
        condition = model.condition(codes)
        t = torch.sigmoid(torch.randn(len(images), device=images.device))
        noise, z = torch.randn_like(images), torch.randn_like(images)
        level = t[:, None, None, None]
        flow = (remembered(level * noise + (1 - level) * images, t, condition) - (noise - images)).square().mean()
        times = random_times(len(images), steps, device=images.device)
        for i in range(steps):
            z = z - (times[:, i] - times[:, i + 1])[:, None, None, None] * remembered(z, times[:, i], condition).float()
        assert z.shape[-1] == c.image_size
        return flow + 0.01 * distance.distance(distance.features(z), target).mean()

    return loss


class Optimizer:
    """Adam by PyTorch, then the held norms weight by weight, then the average tensor by tensor, every tenth step."""

    def __init__(self, named: dict[str, torch.nn.Parameter], held: list[str]) -> None:
        self.named = named
        self.adam = torch.optim.Adam(named.values(), lr=1e-4, betas=(0.9, 0.95), foreach=True)
        self.norms = {k: named[k].detach().norm() for k in held}
        self.average = {k: p.detach().clone() for k, p in named.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for name, norm in self.norms.items():
            weight = self.named[name]
            weight.mul_(norm / weight.norm())
        self.steps += 1
        if self.steps % 10 == 0:
            for name, weight in self.named.items():
                self.average[name].mul_(0.999).add_(weight, alpha=0.001)


Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def velocity_of(model: FlowMo) -> Velocity:
    """(image [B, 3, S, S], t [B], condition [B, T, C + 1]) -> velocity [B, 3, S, S], to be compiled."""

    def velocity(image: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        out, _unread = transformer(model.decoder, patchify(image, model.config.patch), condition, t)
        return unpatchify(out, model.config.patch, model.config.image_size)

    return velocity


def encode_of(model: FlowMo) -> Callable[[Tensor], Tensor]:
    """image -> codes, to be compiled."""

    def encode(images: Tensor) -> Tensor:
        c = model.config
        zeros = images.new_zeros(images.shape[0], c.latent_tokens, c.latent_channels)
        _unread, latent = transformer(model.encoder, patchify(images, c.patch), zeros, None)
        return torch.where(latent > 0, 1.0, -1.0)

    return encode


@torch.no_grad()
def decode(model: FlowMo, velocity: Velocity, codes: Tensor, noise: Tensor, steps: int = 25) -> Tensor:
    """The sampler around the compiled velocity: guidance as two calls, the state as an fp32 picture."""
    times = time_grid(steps, 4.0)
    condition, null = model.condition(codes), model.condition(codes, keep=False)
    z = noise
    for i, guided in enumerate(guided_steps(times, 1.5, (0.17, 1.02))):
        t = torch.full((z.shape[0],), times[i], device=z.device)
        v = velocity(z, t, condition)
        if guided:
            v_null = velocity(z, t, null)
            v = v_null + 1.5 * (v - v_null)
        z = z - (times[i] - times[i + 1]) * v
    return z.clamp(-1, 1)
