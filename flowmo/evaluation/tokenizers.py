"""What is scored: FlowMo, or anyone's function from pictures to pictures."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.quantizer import code_tokens
from flowmo.tiles import merge_tiles, split_tiles


class Reconstruction(NamedTuple):
    images: Tensor  # [B, 3, H, W] in [-1, 1]
    tokens: Tensor | None  # [N, T] integer: codes of the pictures, or of their tiles


class Tokenizer(Protocol):
    """`tokenizer(images, indices)`: images [B, 3, H, W] in [-1, 1], and their places in the data set."""

    vocabulary: int | None  # number of codes, None where there are no tokens

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Reconstruction: ...

    def describe(self) -> dict[str, Any]: ...


def starting_noise(
    indices: Sequence[int],
    seed: int,
    height: int,
    width: int,
) -> Tensor:  # [B, 3, height, width], standard normal
    """Noise that depends on the seed and on each picture's index alone, so that batches and processes do not matter."""
    noise = []
    for index in indices:
        state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) % 2**63)
        noise.append(torch.randn(3, height, width, generator=generator))
    return torch.stack(noise)


class FlowMoTokenizer:
    """A FlowMo model with fixed sampler options and reproducible starting noise.

    Args:
        side: pictures are side x side, a multiple of the model's image size; larger ones go in tiles.
        noise_scale: factor of the starting noise (paper, supplement C.1).
        sampler: options of `FlowMo.decode`.
    """

    def __init__(
        self,
        model: FlowMo,
        *,
        side: int | None = None,
        seed: int = 0,
        batch: int = 64,
        noise_scale: float = 1.0,
        **sampler: Any,
    ) -> None:
        self.model, self.seed, self.batch, self.noise_scale, self.sampler = model, seed, batch, noise_scale, sampler
        size = model.config.image_size
        self.side = side or size
        if self.side % size:
            raise ValueError(f"size {self.side}: expected a multiple of the model's {size} pixels")
        c = model.config
        self.vocabulary = c.vocabulary

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        c = self.model.config
        noise = starting_noise(indices, self.seed, *images.shape[2:]) * self.noise_scale
        pictures, tokens = [], []
        tiles, noises = (split_tiles(x, c.image_size).split(self.batch) for x in (images, noise))
        for part, start in zip(tiles, noises):
            codes = self.model.encode(part.to(self.model.device))
            pictures.append(self.model.decode(codes, noise=start, **self.sampler))
            if self.vocabulary is not None:
                tokens.append(code_tokens(codes, c))
        return Reconstruction(
            merge_tiles(torch.cat(pictures), *images.shape[2:]), torch.cat(tokens) if tokens else None
        )

    def describe(self) -> dict[str, Any]:
        s = self.model.schedule(**self.sampler)
        used = {"steps": s.steps, "rho": s.rho, "guidance": s.guidance, "guidance_interval": s.guidance_interval}
        return {
            "image size": self.model.config.image_size,
            "sampler": {**self.sampler, **used, "seed": self.seed, "noise scale": self.noise_scale},
            "precision": str(self.model.dtype).removeprefix("torch."),
        }


class ForeignTokenizer:
    """Any function images -> images, or images -> (images, tokens), under the same protocol.

    It is called without gradients on float32 pictures [B, 3, H, W] in [-1, 1] and returns such pictures. PyTorch's
    global random state is seeded from the first picture's index before each call.

    Args:
        vocabulary: number of codes of the tokens [B, T] that it returns.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        *,
        name: str = "function",
        vocabulary: int | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.function, self.name, self.vocabulary, self.device, self.seed = function, name, vocabulary, device, seed

    @classmethod
    def named(cls, name: str, **options: Any) -> ForeignTokenizer:
        """The function `module:attribute`.

        Raises:
            ValueError: another form, no such module or attribute, or nothing callable.
        """
        module, colon, attribute = name.partition(":")
        if not colon or not module or not attribute:
            raise ValueError(f"--tokenizer {name}: expected module:callable, for example mymodel:reconstruct")
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise ValueError(f"--tokenizer {name}: no module {module!r} here or among the installed ones")
        function = importlib.import_module(module)
        for part in attribute.split("."):
            if not hasattr(function, part):
                raise ValueError(f"--tokenizer {name}: {module!r} has no {attribute!r}")
            function = getattr(function, part)
        if not callable(function):
            raise ValueError(f"--tokenizer {name}: expected something to call, got {type(function).__name__}")
        return cls(function, name=name, **options)

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Reconstruction:
        torch.manual_seed(self.seed + indices[0])
        with torch.no_grad():
            result = self.function(images.to(self.device))
        out, tokens = result if isinstance(result, tuple) else (result, None)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape != images.shape:
            got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self.name} returned {got}; expected floating pictures {list(images.shape)} in [-1, 1]")
        if tokens is not None and self.vocabulary is None:
            raise ValueError(f"{self.name} returns tokens; say how many codes there are with --vocabulary")
        return Reconstruction(out.float().clamp(-1, 1), tokens)

    def describe(self) -> dict[str, Any]:
        return {"tokenizer": self.name, "vocabulary": self.vocabulary, "seed": self.seed}


def code_bits_per_pixel(tokens: int, vocabulary: int, pictures: int, height: int, width: int) -> float:
    """Bits of all tokens of so many pictures, per pixel."""
    return tokens * math.log2(vocabulary) / (pictures * height * width)
