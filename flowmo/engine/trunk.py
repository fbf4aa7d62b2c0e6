"""The blocks of a transformer at inference, on sequence-major rows.

Row l * B + b is token l of image b, latent tokens first. So the latent rows of the whole batch, and its image rows,
are each one contiguous matrix: every linear layer is one matrix product with its bias, written straight into its part
of a joint buffer, and nothing is concatenated. One timestep serves the batch, so the norms see one sequence of L B
rows with two modulation vectors. Attention reads q, k and v as strided views of the joint buffer.

Shapes: B images, T latent tokens, N image tokens, L = T + N, D width, H heads, d = D / H.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo.engine.weights import BlockWeights, Linear, StreamWeights, TransformerWeights
from flowmo_kernels import (
    attention_backend,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_fp8,
    gelu_fp8,
    joint_attention,
    linear_fp8,
    linear_gelu,
    norm_modulate,
    norm_modulate_fp8,
    qk_norm_rope,
)


class Branch(NamedTuple):
    """A residual stream and what is still to be added to it."""

    x: Tensor  # [1, rows, D]
    branch: Tensor  # [1, rows, D]
    gate: Tensor | None  # [1, D] or [1, 2, D]; None is a gate of one


class Rows(NamedTuple):
    """Input rows of linear layers."""

    values: Tensor  # [1, rows, D]
    scales: Tensor | None = None  # [1, rows, 1] fp32 of fp8 values

    def linear(self, part: slice, layer: Linear, out: Tensor) -> None:
        """out [rows of part, F] <- values[part] W^T + b."""
        if layer.scale is None:
            torch.addmm(layer.b, self.values[0, part], layer.w.t(), out=out)
        else:
            self._fp8(part, layer, out.dtype, out)

    def gelu(self, part: slice, layer: Linear, dtype: torch.dtype) -> Rows:
        """GELU(values[part] W^T + b), [1, rows of part, F]; of an fp8 layer in fp8 again."""
        if layer.scale is None:
            return Rows(linear_gelu(self.values[0, part], layer.w, layer.b)[None])
        return Rows(*gelu_fp8(self._fp8(part, layer, dtype)[None]))

    def _fp8(self, part: slice, layer: Linear, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert self.scales is not None and layer.scale is not None
        x = self.values[0, part], self.scales[0, part]
        return linear_fp8(*x, layer.w, layer.scale, layer.b, dtype=dtype, out=out)


def attend(
    q: Tensor,  # [B, M, H, d]
    k: Tensor,  # [B, L, H, d]
    v: Tensor,  # [B, L, H, d]
    backend: str,
    logit_bound: float,
) -> Tensor:  # [M B, D], sequence-major rows
    """Joint attention at scale 8 / d; rows are a view of what the backend writes, where that is in q's order."""
    scale = 8.0 / q.shape[-1]
    o = joint_attention(q, k, v, scale, backend=backend, logit_bound=logit_bound, contiguous=False)
    return o.transpose(0, 1).reshape(-1, q.shape[2] * q.shape[3])


Part = tuple[slice, StreamWeights]  # rows of one stream, and its weights


class Trunk:
    """All blocks, with the buffers they share, for up to `batch` images.

    With `overlap` the linear layers of the latent rows run on a second CUDA stream beside those of the image rows: the
    few tiles of 256 rows an image leave most of a card idle when they run by themselves. Forks and joins are events,
    so a capture takes both streams into one graph.
    """

    def __init__(self, weights: TransformerWeights, batch: int, attention: str = "auto", overlap: bool = False) -> None:
        self.weights = weights
        self.attention = attention
        self.overlap = overlap
        w = weights.img_in.w
        rows = weights.length * batch
        # Dead queries are never written; zeros keep the norm that passes over them finite.
        self._qkv = torch.zeros(rows, 3 * weights.width, dtype=weights.dtype, device=w.device)
        self._branch = torch.empty(rows, weights.width, dtype=weights.dtype, device=w.device)
        # A backend that cannot run here is an error now, not at the first picture.
        attention_backend(*self._qkv[:1].view(1, 1, 3, weights.heads, -1).unbind(2), backend=attention)

    def __call__(
        self,
        x: Tensor,  # [L B, D], left as it is
        batch: int,
        modulation: Tensor | None = None,  # [depth, 6, 2, D]; None: no modulation (encoder)
        *,
        last: int | None = None,
        early: int | None = None,
    ) -> tuple[Branch, Tensor | None]:
        """The live stream's rows after `last` blocks (all of them), and its rows after `early` blocks, if asked for."""
        w = self.weights
        split, rows = w.latents * batch, w.length * batch
        live_rows = slice(split, rows) if w.live == "img" else slice(0, split)
        blocks, seen = w.blocks[:last], None
        state = Branch(x[None], x[None], None)
        for i, block in enumerate(blocks):
            m = None if modulation is None else modulation[i][:, None]  # [6, 1, 2, D]
            stream, y = self._norm(state, m, split, first=i == 0)
            if i == early:
                seen = stream[:, live_rows]
            ends = i + 1 == len(blocks)
            o = self._attention(y, block, batch, w.live if ends else None)
            parts: list[Part] = [(slice(0, split), block.txt), (slice(split, rows), block.img)]
            if ends:  # the live stream alone goes on
                live = 1 if w.live == "img" else 0
                part, weights = parts[live]
                stream = stream[:, part]
                m = None if m is None else m[:, :, live]  # [6, 1, D]
                split, parts = 0, [(slice(0, stream.shape[1]), weights)]
            state = self._mlp(stream, o, m, split, parts)
        return state, seen

    def _norm(self, state: Branch, m: Tensor | None, split: int, first: bool) -> tuple[Tensor, Rows]:
        shift, scale = (None, None) if m is None else (m[0], m[1])
        split = 0 if m is None else split
        if first:
            x = state.x
            if self.weights.fp8:
                return x, Rows(*norm_modulate_fp8(x, shift, scale, split=split))
            return x, Rows(norm_modulate(x, shift, scale, split=split))
        return self._residual_norm(state, shift, scale, split)

    def _residual_norm(
        self, state: Branch, shift: Tensor | None, scale: Tensor | None, split: int
    ) -> tuple[Tensor, Rows]:
        op = gate_residual_norm_modulate_fp8 if self.weights.fp8 else gate_residual_norm_modulate
        x, *y = op(*state, shift, scale, split=split)
        return x, Rows(*y)

    def _attention(self, y: Rows, block: BlockWeights, batch: int, live: str | None) -> Tensor:
        """Attention output [rows, D]: of all tokens, or of the live stream's."""
        w = self.weights
        split, rows = w.latents * batch, w.length * batch
        qkv = self._qkv[:rows]

        def project(part: slice, weights: StreamWeights) -> None:
            y.linear(part, weights.qkv, qkv[part, qkv.shape[1] - weights.qkv.w.shape[0] :])

        self._each(project, [(slice(0, split), block.txt), (slice(split, rows), block.img)])
        joint = qkv.view(w.length, batch, 3, w.heads, -1).transpose(0, 1)
        q, k, v = qk_norm_rope(joint, block.q_scale, block.k_scale, w.rope, split=w.latents, inplace=True).unbind(2)
        if live is not None:
            q = q[:, w.latents :] if live == "img" else q[:, : w.latents]
        return attend(q, k, v, self.attention, block.logit_bound)

    def _mlp(self, x: Tensor, o: Tensor, m: Tensor | None, split: int, parts: list[Part]) -> Branch:
        """Attention's projection and the MLP of the streams in `parts`."""
        gate1, shift, scale, gate2 = (None,) * 4 if m is None else (m[2], m[3], m[4], m[5])
        split = 0 if m is None else split
        branch = self._branch[: x.shape[1]]

        def project(part: slice, weights: StreamWeights) -> None:
            assert weights.proj is not None
            torch.addmm(weights.proj.b, o[part], weights.proj.w.t(), out=branch[part])

        def mlp(part: slice, weights: StreamWeights) -> None:
            assert weights.fc1 is not None and weights.fc2 is not None
            y.gelu(part, weights.fc1, branch.dtype).linear(slice(None), weights.fc2, branch[part])

        self._each(project, parts)
        x, y = self._residual_norm(Branch(x, branch[None], gate1), shift, scale, split)
        self._each(mlp, parts)
        return Branch(x, branch[None], gate2)

    def _each(self, work: Callable[[slice, StreamWeights], None], parts: list[Part]) -> None:
        """The work of all parts: one after the other, or the latent one beside the image one.

        What the work allocates it must also use up, on its own stream; what it reads stays alive until the join.
        """
        if not self.overlap or len(parts) == 1:
            for part in parts:
                work(*part)
            return
        latent, image = parts
        main = torch.cuda.current_stream()
        side = second_stream(main.device, threading.get_ident())
        side.wait_stream(main)
        with torch.cuda.stream(side):
            work(*latent)
        work(*image)
        main.wait_stream(side)


@functools.cache
def second_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all plans of a thread, as `capture_stream` and for its reason."""
    return torch.cuda.Stream(device)
