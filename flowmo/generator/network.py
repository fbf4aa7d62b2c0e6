"""The generator: a U-ViT over one class token and the tokens of a picture (paper, section 4.3).

The paper names 397 M parameters; of the published masked generators it is TiTok's U-ViT that has this many at its
sizes. Pre-norm blocks in three groups, depth / 2 in-blocks, one mid block and depth / 2 out-blocks, each out-block
reading the output of the in-block across from it.

Shapes: B pictures, N tokens of a picture, L = 1 + N, V = 2^bits codes, D hidden width, H heads, d = D / H.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmo.data.tokens import TokenLayout
from flowmo.files import atomic_write, write_tensors
from flowmo.generator_config import NetworkConfig
from flowmo.pretrained import CheckpointError, check_keys
from flowmo_kernels import gate_residual, gate_residual_norm_modulate, joint_attention, norm_modulate

EPS = 1e-5  # of every LayerNorm
INIT_STD = 0.02


class Norm(nn.Module):
    """Affine LayerNorm y = (1 + scale) LN(x) + shift, in the form of the fused ops: the gain is 1 + scale."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(hidden))
        self.shift = nn.Parameter(torch.zeros(hidden))

    def forward(
        self,
        x: Tensor,  # [B, L, D]
    ) -> Tensor:  # [B, L, D]
        return norm_modulate(x, *self._rows(x), eps=EPS)

    def after(
        self,
        x: Tensor,  # [B, L, D]
        branch: Tensor,  # [B, L, D]
    ) -> tuple[Tensor, Tensor]:
        """x + branch and its norm, in one pass."""
        shift, scale = self._rows(x)
        return gate_residual_norm_modulate(x, branch, None, shift, scale, eps=EPS)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.shift.expand(x.shape[0], -1), self.scale.expand(x.shape[0], -1)


class Block(nn.Module):
    """x += attention(norm1(x)); x += MLP(norm2(x)).

    The residual sum of the MLP is left to the caller, who can fuse it with the next norm.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        d = config.hidden
        self.heads = config.heads
        self.norm1 = Norm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d)
        self.norm2 = Norm(d)
        self.fc1 = nn.Linear(d, config.mlp_ratio * d)
        self.fc2 = nn.Linear(config.mlp_ratio * d, d)

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        normed: Tensor,  # [B, L, D], norm1(x)
    ) -> tuple[Tensor, Tensor]:  # the stream after attention, and the MLP's branch that is still to be added
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = joint_attention(q, k, v, q.shape[-1] ** -0.5)
        x, normed = self.norm2.after(x, self.proj(out.flatten(2)))
        # The MLP has the erf form of GELU; the fused first layer of the tokenizer has the tanh form.
        return x, self.fc2(F.gelu(self.fc1(normed)))


class OutBlock(Block):
    """A block that first merges the output of its partner across the U: x = W [x, skip] + b."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.skip = nn.Linear(2 * config.hidden, config.hidden)

    def merge(
        self,
        x: Tensor,  # [B, L, D]
        skip: Tensor,  # [B, L, D]
    ) -> Tensor:  # [B, L, D]
        return self.skip(torch.cat([x, skip], dim=-1))


class Generator(nn.Module):
    """Logits of every token of a picture, given some of its tokens and its class.

    Ids of the one embedding table: the codes, then the mask, then the classes, then the null class. The class is a
    token in front of the others; positions are learned.

    Args:
        config: sizes.
        layout: of the tokens it speaks, where known: what it saves, and what `flowmo.generate` compares.
        class_names: by label, where known.
    """

    def __init__(
        self,
        config: NetworkConfig | None = None,
        layout: TokenLayout | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = c = config or NetworkConfig()
        c.check()
        self.layout, self.class_names = layout, list(class_names)
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(c.codes + c.classes + 2, c.hidden)
        self.position_embedding = nn.Parameter(torch.empty(c.tokens + 1, c.hidden))
        self.in_blocks = nn.ModuleList(Block(c) for _ in range(c.depth // 2))
        self.mid_block = Block(c)
        self.out_blocks = nn.ModuleList(OutBlock(c) for _ in range(c.depth // 2))
        self.norm = Norm(c.hidden)
        self.head = nn.Linear(c.hidden, c.codes)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position_embedding, std=INIT_STD)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(
        self,
        ids: Tensor,  # [B, N] int64: codes, and mask_id where not known
        labels: Tensor,  # [B] int64: classes, or null_class
    ) -> Tensor:  # [B, N, V] fp32
        """Logits of every position. The last layer runs in fp32: bf16 logits have ties, which samplers trip over."""
        c = self.config
        prefix = c.codes + 1 + labels[:, None]
        x = self.embedding(torch.cat([prefix, ids], dim=1)) + self.position_embedding
        skips: list[Tensor] = []
        down = [*cast(list[Block], list(self.in_blocks)), self.mid_block]
        normed = down[0].norm1(x)
        for block, following in itertools.pairwise(down):
            x, branch = self._run(block, x, normed)
            x, normed = following.norm1.after(x, branch)
            skips.append(x)
        x, branch = self._run(self.mid_block, x, normed)
        for block in cast(list[OutBlock], list(self.out_blocks)):
            x = block.merge(gate_residual(x, branch), skips.pop())
            x, branch = self._run(block, x, block.norm1(x))
        _, normed = self.norm.after(x, branch)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(normed[:, 1:].float(), self.head.weight.float(), self.head.bias.float())

    def _run(self, block: Block, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: tuple[Tensor, Tensor] = checkpoint(block, x, normed, use_reentrant=False)
        else:
            out = block(x, normed)
        return out

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into a folder, each replaced atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().to("cpu").contiguous() for k, v in self.state_dict().items()}
        content = {
            "generator": asdict(self.config),
            "layout": None if self.layout is None else asdict(self.layout),
            "class_names": self.class_names,
        }
        write_tensors(folder / "model.safetensors", state)
        atomic_write(folder / "config.json", lambda f: Path(f).write_text(json.dumps(content, indent=2) + "\n"))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Generator:
        """Load a folder of :meth:`save_pretrained`, or a training run (its `model` folder), in evaluation mode.

        Raises:
            FileNotFoundError: nothing at `path`.
            CheckpointError: no generator, or weights that do not fit it.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json here or in its folder 'model'; expected a generator")
        try:
            content = json.loads((folder / "config.json").read_text())
            if "generator" not in content:
                raise CheckpointError(
                    f"{folder / 'config.json'}: no generator, it has {sorted(content)[:4]}; a tokenizer perhaps?"
                )
            config = NetworkConfig(**content["generator"])
            layout = None if content.get("layout") is None else TokenLayout(**content["layout"])
            state = load_file(folder / "model.safetensors")
        except (json.JSONDecodeError, TypeError, FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: no generator that can be read: {error}; save it again") from error
        with torch.device("meta"):
            model = cls(config, layout, content.get("class_names", ()))
        check_keys(model.state_dict(), state, str(folder))
        model.load_state_dict(state, assign=True)
        return model.to(device=device, dtype=dtype).eval().requires_grad_(True)
