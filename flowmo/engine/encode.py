"""The encode plan: codes of pictures without what the code does not need.

The encoder has no timestep, so no modulation and unit gates; its initial latent is zero, so its latent input is a bias;
of the last block's image stream only keys and values are computed, and neither entropies nor token numbers.

Shapes: B images, S image side, T latent tokens, C latent channels, N image tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.engine.plan import Plan
from flowmo.engine.trunk import Trunk
from flowmo.layers import patchify
from flowmo.quantizer import codes_of_latent
from flowmo_kernels import gate_residual_norm_modulate

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo


class EncodePlan(Plan):
    """Codes of pictures: `plan(images) -> codes`. Made by :meth:`FlowMo.encode_plan`."""

    part = "encoder"

    def __call__(
        self,
        images: Tensor,  # [b, 3, S, S] in [-1, 1], b at most the plan's batch
    ) -> Tensor:  # [b, T, C] codes in the plan's dtype
        """Raises TypeError, ValueError: images of another dtype or shape; RuntimeError: the model moved elsewhere."""
        if not images.is_floating_point():
            raise TypeError(
                f"images: expected a float tensor in [-1, 1], got {images.dtype}; convert uint8 by x / 127.5 - 1"
            )
        size, b = self.config.image_size, images.shape[0]
        if images.shape[1:] != (3, size, size) or not 1 <= b <= self.batch:
            expected = f"[b, 3, {size}, {size}] with b from 1 to {self.batch}"
            raise ValueError(
                f"images: expected shape {expected}, got {list(images.shape)}; make a plan of a larger batch"
            )
        self.refresh()
        return self.run(images)

    def _build(self, model: FlowMo) -> None:
        c, w, b = self.config, self._weights, self.batch
        self._images = torch.zeros(b, 3, c.image_size, c.image_size, dtype=self.dtype, device=self.device)
        self._trunk = Trunk(w, b, self.attention, self.overlap)
        self._rows = torch.zeros(w.length, b, w.width, dtype=self.dtype, device=self.device)
        self._rows[: w.latents] = w.txt_in.b

    def _inputs(self) -> tuple[Tensor, ...]:
        return (self._images,)

    def _run(self) -> Tensor:
        w, b = self._weights, self.batch
        patches = patchify(self._images, self.config.patch)
        self._rows[w.latents :].copy_(F.linear(patches, w.img_in.w, w.img_in.b).transpose(0, 1))
        state, _ = self._trunk(self._rows.flatten(0, 1), b)
        _, y = gate_residual_norm_modulate(*state)
        latent = F.linear(y.view(w.latents, b, -1).transpose(0, 1), w.out.w, w.out.b)
        return codes_of_latent(latent, self.config)
