"""The MMDiT of FlowMo's encoder and decoder (paper, section 3.1): two streams, one joint attention.

Shapes: B images, T latent tokens, N image tokens, L = T + N (latent tokens first), D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmo.layers import MLP, MLPEmbedder, Modulation, StreamAttention, rope_tables, timestep_embedding
from flowmo_kernels import (
    gate_residual,
    gate_residual_norm_modulate,
    joint_attention,
    norm_modulate,
    qk_norm_rope,
)

Stream = Literal["img", "txt"]


class Residual(NamedTuple):
    """A residual stream whose last branch is still to be added: the sum is taken inside the next LayerNorm's pass."""

    x: Tensor  # [B, n, D]
    branch: Tensor | None = None  # [B, n, D]
    gate: Tensor | None = None  # [B, D]; None is a gate of one

    def norm(self, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + gate * branch, its modulated LayerNorm)."""
        if self.branch is None:
            return self.x, norm_modulate(self.x, shift, scale)
        return gate_residual_norm_modulate(self.x, self.branch, self.gate, shift, scale)

    def sum(self) -> Tensor:
        return self.x if self.branch is None else gate_residual(self.x, self.branch, self.gate)


class DoubleStreamBlock(nn.Module):
    """Joint attention and one MLP per stream, each behind an AdaLN-modulated LayerNorm.

    `live` names the only stream whose output is used (the last block), None where both are. What feeds the dead
    stream's output alone is not computed; its keys and values are.
    """

    img_mod: Modulation
    txt_mod: Modulation
    img_attn: StreamAttention
    txt_attn: StreamAttention
    img_mlp: MLP
    txt_mlp: MLP

    def __init__(self, hidden: int, heads: int, live: Stream | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.live = live
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(hidden))
            self.add_module(f"{stream}_attn", StreamAttention(hidden, heads))
            self.add_module(f"{stream}_mlp", MLP(hidden))

    def forward(
        self,
        img: Residual,  # [B, N, D]
        txt: Residual,  # [B, T, D]
        activated: Tensor | None,  # [B, D] SiLU of the conditioning vector; None in the encoder: no modulation
        rope: tuple[Tensor, Tensor],  # [L, d / 2] each
    ) -> tuple[Residual, Residual]:
        none = (None,) * 6
        img_mod = none if activated is None else self.img_mod(activated)
        txt_mod = none if activated is None else self.txt_mod(activated)
        img_x, img_y = img.norm(img_mod[0], img_mod[1])
        txt_x, txt_y = txt.norm(txt_mod[0], txt_mod[1])
        latents = txt_x.shape[1]

        qkv = torch.cat([self.txt_attn.qkv(txt_y), self.img_attn.qkv(img_y)], dim=1)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        q_scale = torch.stack([self.txt_attn.norm.query_norm.scale, self.img_attn.norm.query_norm.scale])
        k_scale = torch.stack([self.txt_attn.norm.key_norm.scale, self.img_attn.norm.key_norm.scale])
        q, k, v = qk_norm_rope(qkv, q_scale, k_scale, rope, split=latents).unbind(2)
        softmax_scale = 8.0 / q.shape[-1]  # muP: 8 / d, not 1 / sqrt(d)

        if self.live == "img":
            attended = joint_attention(q[:, latents:], k, v, softmax_scale).flatten(2)
            return self._finish("img", img_x, attended, img_mod), Residual(txt_x)
        if self.live == "txt":
            attended = joint_attention(q[:, :latents], k, v, softmax_scale).flatten(2)
            return Residual(img_x), self._finish("txt", txt_x, attended, txt_mod)
        attended = joint_attention(q, k, v, softmax_scale).flatten(2)
        return (
            self._finish("img", img_x, attended[:, latents:], img_mod),
            self._finish("txt", txt_x, attended[:, :latents], txt_mod),
        )

    def _finish(self, stream: Stream, x: Tensor, attended: Tensor, mod: tuple[Tensor | None, ...]) -> Residual:
        """Attention output projection, then the MLP, of one stream."""
        _, _, gate1, shift2, scale2, gate2 = mod
        branch = getattr(self, f"{stream}_attn").proj(attended)
        x, y = gate_residual_norm_modulate(x, branch, gate1, shift2, scale2)
        return Residual(x, getattr(self, f"{stream}_mlp")(y), gate2)


class LastLayer(nn.Module):
    """LayerNorm, modulation, LayerNorm again, projection; without a timestep one LayerNorm and the projection."""

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, stream: Residual, vec: Tensor | None) -> Tensor:
        if vec is None:
            _, y = stream.norm(None, None)
        else:
            shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
            _, y = stream.norm(shift, scale)
            y = norm_modulate(y)
        return self.linear(y)


class MMDiT(nn.Module):
    """One transformer of FlowMo. Parameter names are those of the released checkpoints.

    Args:
        grid: image tokens per side.
        patch_dim: numbers in a patch, 3 p^2.
        latent_channels: numbers in a latent token, going in; also coming out, unless `latent_out` says otherwise.
        output: the stream whose head is used: "img" in the decoder, "txt" (the latent) in the encoder. The other
            head, and in the encoder the time and modulation weights, exist because released checkpoints carry
            them; nothing reads them.
    """

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        depth: int,
        grid: int,
        latent_tokens: int,
        patch_dim: int,
        latent_channels: int,
        output: Stream,
        latent_out: int | None = None,
    ) -> None:
        super().__init__()
        self.latent_tokens = latent_tokens
        self.output: Stream = output
        self.gradient_checkpointing = False
        self.img_in = nn.Linear(patch_dim, hidden)
        self.txt_in = nn.Linear(latent_channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden, heads, live=output if i == depth - 1 else None) for i in range(depth)
        )
        self.final_layer_img = LastLayer(hidden, patch_dim)
        self.final_layer_txt = LastLayer(hidden, latent_out or latent_channels)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        cos, sin = rope_tables(latent_tokens, grid, hidden // heads)
        device = self.img_in.weight.device  # the default one; tables on meta could not be filled in later
        if device.type != "meta":
            cos, sin = cos.to(device), sin.to(device)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def unread_parameters(self) -> Iterator[nn.Parameter]:
        """Weights that only exist because released checkpoints carry them, or that feed a dead stream's output."""
        dead = "img" if self.output == "txt" else "txt"
        last = self.double_blocks[-1]
        parts: list[nn.Module] = [getattr(self, f"final_layer_{dead}"), getattr(last, f"{dead}_mlp")]
        attention: StreamAttention = getattr(last, f"{dead}_attn")
        parts += [attention.proj, attention.norm.query_norm]
        if self.output == "txt":  # the encoder has no timestep
            parts += [self.time_in, self.final_layer_txt.adaLN_modulation]
            parts += [getattr(b, f"{s}_mod") for b in self.double_blocks for s in ("img", "txt")]
        for part in parts:
            yield from part.parameters()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves the rotary tables with the module but keeps them in fp32 when the weights are cast."""
        tables = self.rope_cos, self.rope_sin
        super()._apply(fn, recurse)
        self.rope_cos, self.rope_sin = (t.to(b.device) for t, b in zip(tables, (self.rope_cos, self.rope_sin)))
        return self

    def forward(
        self,
        patches: Tensor,  # [B, N, patch_dim]
        latents: Tensor,  # [B, T, latent_in]
        t: Tensor | None = None,  # [B] noise levels in [0, 1]; None: no modulation (encoder)
    ) -> Tensor:  # [B, N, patch_dim] or [B, T, latent_out], as `output` says
        rope = (self.rope_cos, self.rope_sin)
        img, txt = Residual(self.img_in(patches)), Residual(self.txt_in(latents))
        vec = activated = None
        if t is not None:
            vec = self.time_in(timestep_embedding(t).to(self.time_in.in_layer.weight.dtype))
            activated = torch.nn.functional.silu(vec)
        for block in self.double_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                img, txt = checkpoint(block, img, txt, activated, rope, use_reentrant=False)
            else:
                img, txt = block(img, txt, activated, rope)
        if self.output == "img":
            return self.final_layer_img(img, vec)
        return self.final_layer_txt(txt, vec)
