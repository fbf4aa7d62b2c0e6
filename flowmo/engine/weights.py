"""What an engine computes once for a set of weights: casts, joined vectors, and the modulation of every step.

Shapes: T latent tokens, N image tokens, L = T + N, D width, H heads, d = D / H, S sampler evaluations.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo.layers import timestep_embedding
from flowmo.transformer import MMDiT
from flowmo_kernels import quantize_rows

TABLES = 4  # modulation tables kept for a set of weights: schedules that take turns


class Fingerprint:
    """Tells whether a module's parameters are the same tensors with the same contents as when this was made.

    In-place writes are seen through PyTorch's version counters, replaced storage through its address. Writes through
    `.data` leave no trace; `Engine.clear` is for them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen = [(weakref.ref(p), p.data_ptr(), _version(p)) for p in module.parameters()]

    def matches(self, module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return len(parameters) == len(self._seen) and all(
            seen() is p and address == p.data_ptr() and version == _version(p)
            for p, (seen, address, version) in zip(parameters, self._seen)
        )


def _version(p: Tensor) -> int:
    return 0 if p.is_inference() else p._version


class Linear(NamedTuple):
    w: Tensor  # [F, D], or float8_e4m3fn
    b: Tensor  # [F]
    scale: Tensor | None = None  # [F, 1] fp32 row scales of an fp8 weight


class StreamWeights(NamedTuple):
    qkv: Linear  # rows of k and v alone where the stream's queries are dead
    proj: Linear | None  # None: the stream ends at this block's attention
    fc1: Linear | None
    fc2: Linear | None


class BlockWeights(NamedTuple):
    txt: StreamWeights
    img: StreamWeights
    q_scale: Tensor  # [2, d] fp32, latent row first
    k_scale: Tensor  # [2, d] fp32
    logit_bound: float  # no |8 / d q k| exceeds it, by the query-key norm


class TransformerWeights:
    """One transformer's weights in the engine's dtype; parameters already in it are shared, not copied."""

    def __init__(self, mmdit: MMDiT, dtype: torch.dtype, fp8: bool = False) -> None:
        blocks = _blocks(mmdit)
        self.fingerprint = Fingerprint(mmdit)
        self.dtype, self.fp8 = dtype, fp8
        self.latents = mmdit.latent_tokens
        self.heads: int = blocks[0].heads
        self.live = mmdit.output
        self.img_in, self.txt_in = self._linear(mmdit.img_in), self._linear(mmdit.txt_in)
        self.out = self._linear(getattr(mmdit, f"final_layer_{mmdit.output}").linear)
        self.rope = mmdit.rope_cos, mmdit.rope_sin
        self.blocks = [self._block(b) for b in blocks]
        self._tables: dict[tuple[float, ...], Modulation] = {}

    @property
    def width(self) -> int:
        return self.img_in.w.shape[0]

    @property
    def length(self) -> int:
        return self.rope[0].shape[0]

    def modulation(self, mmdit: MMDiT, times: Sequence[float]) -> Modulation:
        """The modulation table of these times, computed on first demand."""
        key = tuple(times)
        table = self._tables.pop(key, None)
        if table is None:
            table = Modulation.compute(mmdit, times)
            while len(self._tables) >= TABLES:
                self._tables.pop(next(iter(self._tables)))
        self._tables[key] = table
        return table

    def _linear(self, layer: nn.Linear, fp8: bool = False, first: int = 0) -> Linear:
        w, b = layer.weight.detach()[first:], layer.bias.detach()[first:]
        if fp8:
            values, scales = quantize_rows(w)
            return Linear(values, b.to(self.dtype), scales)
        return Linear(w.to(self.dtype), b.to(self.dtype))

    def _stream(self, block: Any, stream: str) -> StreamWeights:
        attention, mlp = getattr(block, f"{stream}_attn"), getattr(block, f"{stream}_mlp")
        if block.live not in (None, stream):
            return StreamWeights(self._linear(attention.qkv, self.fp8, first=attention.proj.in_features), *[None] * 3)
        # What makes the other inputs sees whole rows and can round them; the rows of proj's input span the heads.
        return StreamWeights(
            self._linear(attention.qkv, self.fp8),
            self._linear(attention.proj),
            self._linear(mlp[0], self.fp8),
            self._linear(mlp[2], self.fp8),
        )

    def _block(self, block: Any) -> BlockWeights:
        norms = block.txt_attn.norm, block.img_attn.norm
        q_scale = torch.stack([n.query_norm.scale.detach().float() for n in norms])
        k_scale = torch.stack([n.key_norm.scale.detach().float() for n in norms])
        bound = 8.0 * float(q_scale.abs().max()) * float(k_scale.abs().max())
        return BlockWeights(self._stream(block, "txt"), self._stream(block, "img"), q_scale, k_scale, bound)


class Modulation(NamedTuple):
    """Every modulation vector of a schedule, in fp32: its rounding would move the whole picture, and it is small."""

    times: tuple[float, ...]
    blocks: Tensor  # [S, depth, 6, 2, D]: (shift1, scale1, gate1, shift2, scale2, gate2) x (latent, image)
    last: Tensor  # [S, 2, D]: shift, scale of the last layer

    @classmethod
    @torch.no_grad()
    def compute(cls, mmdit: MMDiT, times: Sequence[float]) -> Modulation:
        """The modulation of all times at once: the weights are read once a schedule, not once a forward pass.

        Raises:
            RuntimeError: the modulation weights were dropped.
        """
        if modulation_dropped(mmdit):
            raise RuntimeError(DROPPED)
        device = mmdit.img_in.weight.device
        with torch.autocast(device.type, enabled=False):
            t = torch.tensor(list(times), dtype=torch.float32, device=device)
            vec = _linear32(timestep_embedding(t), mmdit.time_in.in_layer)
            vec = _linear32(F.silu(vec), mmdit.time_in.out_layer)
            activated = F.silu(vec)
            blocks = torch.stack(
                [
                    torch.stack([_linear32(activated, m.lin).unflatten(-1, (6, -1)) for m in (b.txt_mod, b.img_mod)], 2)
                    for b in _blocks(mmdit)
                ],
                1,
            )
            head = getattr(mmdit, f"final_layer_{mmdit.output}")
            last = _linear32(activated, head.adaLN_modulation[1]).unflatten(-1, (2, -1))
        return cls(tuple(times), blocks, last)

    def to(self, device: torch.device) -> Modulation:
        return Modulation(self.times, self.blocks.to(device), self.last.to(device))


def _blocks(mmdit: MMDiT) -> list[Any]:
    """The blocks; their parts are looked up by name, which type checkers do not follow through nn.Module."""
    return list(mmdit.double_blocks)


def _linear32(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


DROPPED = (
    "the decoder's modulation weights were dropped (drop_modulation=True): it decodes with the schedule it was made "
    "for, and can neither take another schedule, nor train, nor be saved; load the checkpoint again for that"
)


def modulation_dropped(mmdit: MMDiT) -> bool:
    return _blocks(mmdit)[0].img_mod.lin.weight is None


def drop_modulation(mmdit: MMDiT) -> None:
    """Free the weights that only the modulation reads; what would read them then fails with the reason."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(DROPPED)

    head = getattr(mmdit, f"final_layer_{mmdit.output}")
    layers: list[Any] = [mmdit.time_in.in_layer, mmdit.time_in.out_layer, head.adaLN_modulation[1]]
    layers += [m.lin for b in _blocks(mmdit) for m in (b.txt_mod, b.img_mod)]
    for layer in layers:
        layer.weight = layer.bias = None
    mmdit.register_forward_pre_hook(refuse)
    mmdit.register_state_dict_pre_hook(refuse)
