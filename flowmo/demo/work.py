"""What the demo computes: a photograph's code, its tokens as a picture, and what a setting makes of them, step by step.

Shapes: H x W the picture as the model sees it, n its tiles, S their side, T latent tokens, C latent channels, N tokens
of a tile, E bits of a token.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmo import FlowMo
from flowmo.config import from_yaml
from flowmo.data import ImageReadError, center_crop, load_image, resize_shorter, to_tensor, to_uint8
from flowmo.engine import Schedule
from flowmo.metrics import psnr
from flowmo.quantizer import code_tokens
from flowmo.reconstruct import SMALLEST_SIDE
from flowmo.tiles import TileDecoder, TileGrid, encode_tiles, grid_for

SQUARE, WHOLE = "square", "whole"
TILES_AT_ONCE = 16
LONGEST = 16  # longer side over shorter side, so that no scaling makes a picture huge
TOKENS_SIDE = 512  # pixels that a picture of tokens has at least along its longer side
STRIP = 8  # pictures in a strip, at most, in rows of STRIP_ROW
STRIP_ROW = 4
STRIP_HEIGHT = 160  # pixels, of each


@dataclass(frozen=True)
class Settings:
    """Of the sampler, as `FlowMo.decode` takes them, and the seed of the starting noise."""

    steps: int = 25
    rho: float = 4.0
    guidance: float = 1.5
    solver: str = "euler"
    seed: int = 0


class Code(NamedTuple):
    """A photograph as the model sees it, and its code."""

    original: Tensor  # [3, H, W] fp32 in [-1, 1]
    source: tuple[int, int]  # width and height of the file's picture
    grid: TileGrid
    codes: Tensor  # [n, T, C]
    seconds: float  # that encoding took


class Frame(NamedTuple):
    """The picture foreseen after one evaluation of the network: x - t v."""

    time: float  # t of the evaluation
    pixels: np.ndarray  # [H, W, 3] uint8
    psnr: float  # dB


class Result(NamedTuple):
    """What a setting makes of a code; the last frame is the picture."""

    frames: list[Frame]
    forwards: int  # passes through the decoder for each tile
    seconds: float

    @property
    def psnr(self) -> float:
        return self.frames[-1].psnr

    @property
    def pixels(self) -> np.ndarray:
        return self.frames[-1].pixels


class Studio:
    """One model that many visitors use in turn.

    Args:
        model: any FlowMo, in evaluation mode.
        max_side: to which the longer side of a whole picture is scaled down; by default twice that of a square.

    Raises:
        ValueError: max_side below the side of the model's pictures.
    """

    def __init__(self, model: FlowMo, max_side: int | None = None) -> None:
        self.model = model
        size = model.config.image_size
        self.side = max(size, SMALLEST_SIDE // size * size)
        self.tiled = self.side > size
        self.max_side = 2 * self.side if max_side is None else max_side
        if self.max_side < self.side:
            raise ValueError(f"--max-side {max_side}: expected at least {self.side}, the side of a square")
        self._lock = threading.Lock()  # one visitor at a time

    def encode(self, path: str | os.PathLike[str], extent: str = SQUARE) -> Code:
        """The code of a picture file.

        Args:
            extent: SQUARE, the centre in tiles side by side (one, for models of large pictures), or WHOLE, all of it in
                overlapping tiles.

        Raises:
            FileNotFoundError, ImageReadError: no file, or no picture.
            ValueError: a picture much longer than wide, or an unknown extent.
        """
        if extent not in (SQUARE, WHOLE):
            raise ValueError(f"extent={extent!r}: expected {SQUARE} or {WHOLE}")
        try:
            picture = load_image(path)
        except ImageReadError as error:  # the visitor's name of it, not the server's
            raise ImageReadError(Path(path).name, error.reason) from error
        source = picture.size
        if max(source) > LONGEST * min(source):
            raise ValueError(
                f"a picture of {source[0]} x {source[1]} pixels: expected sides of at most {LONGEST} to 1; cut it first"
            )
        if extent == SQUARE:
            picture = center_crop(resize_shorter(picture, self.side), self.side)
        else:
            picture = fit(picture, self.max_side)
        image = to_tensor(picture)
        grid = grid_for(self.model, picture.height, picture.width, 0 if extent == SQUARE else None)
        with self._lock:
            self._wait()
            start = time.perf_counter()
            codes = encode_tiles(self.model, image, grid, TILES_AT_ONCE)
            self._wait()
            return Code(image, source, grid, codes, time.perf_counter() - start)

    def decode(
        self,
        code: Code,
        settings: Settings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """The picture after every evaluation of the network.

        Args:
            progress: called after each with its number, from 1, and how many there are.

        Raises:
            ValueError: a setting out of range.
        """
        decoder = TileDecoder(
            self.model, TILES_AT_ONCE, settings.steps, settings.rho, settings.guidance, solver=settings.solver
        )
        total = len(decoder.schedule.guided)
        height, width = code.grid.height, code.grid.width
        foreseen: list[tuple[float, Tensor]] = []

        def watch(t: float, _: int, x: Tensor, v: Tensor) -> None:
            foreseen.append((t, to_uint8((x - t * v)[:, :height, :width].clamp(-1, 1)).cpu()))
            if progress is not None:
                progress(len(foreseen), total)

        with self._lock:
            self._wait()
            start = time.perf_counter()
            picture = decoder([(code.grid, code.codes)], seed=settings.seed, watch=watch)[0]
            self._wait()
            seconds = time.perf_counter() - start
        # Of Euler's rule the last picture foreseen is this one; of the others it is where their last step led.
        foreseen[-1] = foreseen[-1][0], to_uint8(picture).cpu()
        scores = psnr(torch.stack([p for _, p in foreseen]), to_uint8(code.original).expand(total, -1, -1, -1))
        frames = [
            Frame(t, pixels.permute(1, 2, 0).contiguous().numpy(), float(score))
            for (t, pixels), score in zip(foreseen, scores)
        ]
        return Result(frames, decoder.schedule.forwards, seconds)

    @property
    def token_bits(self) -> int | None:
        """Bits that a token takes, E; None of a model without tokens."""
        values = self.model.config.vocabulary
        return None if values is None else (values - 1).bit_length()

    def tokens(self, code: Code) -> Image.Image:
        """The code as a picture: see :func:`draw_tokens` and :func:`draw_latents`."""
        if self.token_bits is None:
            return draw_latents(code.codes, code.grid)
        return draw_tokens(code_tokens(code.codes.float(), self.model.config), self.token_bits, code.grid)

    def bits(self, code: Code) -> int | None:
        """Bits of the code's tokens; None of a model without tokens."""
        return None if self.token_bits is None else code.grid.count * self.model.config.tokens * self.token_bits

    def describe(self) -> str:
        """The model in one line."""
        c = self.model.config
        what = f"{c.latent_tokens} × {c.latent_channels} real numbers"
        if self.token_bits is not None:
            what = f"{c.tokens} tokens of {self.token_bits} bits"
        size = sum(p.numel() for p in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"{what} for {c.image_size} × {c.image_size} pixels · {size / 1e6:,.1f} M parameters · {dtype} on "
            f"{self.model.device}"
        )

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def fit(picture: Image.Image, most: int) -> Image.Image:
    """Scale down so that the longer side is at most so many pixels."""
    longer = max(picture.size)
    if longer <= most:
        return picture
    width, height = (max(1, side * most // longer) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)


def draw_tokens(
    tokens: Tensor,  # [n, N] integers in [0, 2^E)
    bits: int,  # E
    grid: TileGrid,  # of n tiles
) -> Image.Image:
    """Every token a square, every tile of the picture a block of them in reading order.

    A token's colour is its bits: every third of them, from bit 0, is the level of red, from bit 1 of green, from bit 2
    of blue. So every token of up to 21 bits has a colour of its own.
    """
    levels = []
    for channel in range(3):
        own = range(channel, bits, 3)
        value = sum((((tokens >> bit) & 1) << i for i, bit in enumerate(own)), torch.zeros_like(tokens))
        levels.append(value.double() / max(1, 2 ** len(own) - 1))
    return _blocks(64 + (240 - 64) * torch.stack(levels, -1), grid)  # neither black nor glaring


def draw_latents(
    codes: Tensor,  # [n, T, C] real numbers
    grid: TileGrid,
) -> Image.Image:
    """Every number a grey square, black two standard deviations below zero and white two above."""
    spread = codes.float().std().clamp(min=1e-6)
    grey = ((codes.float() / spread).clamp(-2, 2) + 2) / 4 * 255
    return _blocks(grey.flatten(1)[..., None].expand(-1, -1, 3), grid)


def _blocks(
    colours: Tensor,  # [n, N, 3] levels 0 to 255
    grid: TileGrid,
) -> Image.Image:
    """Tiles as blocks of squares with a line between them, magnified without smoothing."""
    n, items, _ = colours.shape
    rows, columns = len(grid.rows), len(grid.columns)
    high = max(d for d in range(1, int(items**0.5) + 1) if items % d == 0)
    wide = items // high
    line = int(n > 1)
    blocks = np.zeros((n, high + line, wide + line, 4), np.uint8)  # lines are transparent
    blocks[:, :high, :wide, :3] = colours.round().clamp(0, 255).reshape(n, high, wide, 3).cpu().numpy()
    blocks[:, :high, :wide, 3] = 255
    sheet = blocks.reshape(rows, columns, high + line, wide + line, 4).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * (high + line), columns * (wide + line), 4)
    sheet = sheet[: sheet.shape[0] - line, : sheet.shape[1] - line]
    scale = max(1, -(-TOKENS_SIDE // max(sheet.shape[:2])))
    return Image.fromarray(np.ascontiguousarray(sheet.repeat(scale, 0).repeat(scale, 1)))


def strip(frames: list[Frame]) -> Image.Image:
    """The pictures foreseen from the first to the last, at most STRIP of them, in reading order."""
    shown = min(STRIP, len(frames))
    chosen = [round(i * (len(frames) - 1) / max(1, shown - 1)) for i in range(shown)]
    height, width = frames[0].pixels.shape[:2]
    small = max(1, STRIP_HEIGHT * width // height), STRIP_HEIGHT
    gap = 8
    across, down = min(shown, STRIP_ROW), -(-shown // STRIP_ROW)
    sheet = Image.new("RGBA", (across * (small[0] + gap) - gap, down * (small[1] + gap) - gap))
    for i, index in enumerate(chosen):
        thumb = Image.fromarray(frames[index].pixels).resize(small, Image.Resampling.BILINEAR)
        sheet.paste(thumb, (i % STRIP_ROW * (small[0] + gap), i // STRIP_ROW * (small[1] + gap)))
    return sheet


def usual(model: FlowMo, checkpoint: str | os.PathLike[str] | None) -> Settings:
    """What a model is best tried with: a distilled one with its own sampler, another with the steps that its training
    run drew pictures with, where the run's configuration lies beside the weights, else 25."""
    own = model.sampler
    if own != Schedule():
        return Settings(own.steps, own.rho, own.guidance)
    if checkpoint is not None:
        path = Path(checkpoint)
        for file in (path.with_suffix(".yaml"), path / "config.yaml", path.parent / "config.yaml"):
            if file.is_file():
                return Settings(steps=from_yaml(file.read_text()).sampler.steps)
    return Settings()
