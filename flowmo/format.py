"""The token file, `.flowmo`: the code of one picture of any size. docs/format.md describes it byte by byte.

A reader trusts nothing in a file: the header is checked and must fit the file's length before anything is allocated
from it, so a file can ask for no more memory than it has bytes, and a checksum covers every byte.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowmo.data.tokens import TokenLayout, fingerprint, layout_of
from flowmo.files import atomic_write
from flowmo.tiles import TileGrid
from flowmo_kernels import pack_tokens, unpack_tokens

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo

SUFFIX = ".flowmo"
MAGIC = b"\x89FlowMo\n"
VERSION = 1
HEADER = struct.Struct("<8s2BH5I32s")
CHECKSUM = struct.Struct("<I")

MAX_SIDE = 2**16 - 1  # pixels of a side, also of a tile
MAX_PIXELS = 2**28
MAX_TOKENS = 2**20  # of a tile
MAX_BITS = 32  # of a token
TOKENS, NUMBERS = 0, 1  # kinds of payload
NUMBER_BITS = 16  # of a real number: IEEE half precision

_UNPACKED_AT_ONCE = 64  # tiles; a byte takes 64 while it is unpacked


class TokenFileError(ValueError):
    """A file that is no usable token file; the message names the file, what is wrong and the way out."""


@dataclass
class LatentLayout(TokenLayout):
    """How a file spells a continuous code: N = T C half-precision numbers, their bits taken as tokens of 16 bits."""

    def encode(
        self,
        codes: Tensor,  # [B, T, C]
    ) -> Tensor:  # [B, T C] int64 in [0, 2^16)
        """Raises ValueError: a number that is not finite, or too large for half precision."""
        halves = codes.to(torch.float16).flatten(1)
        if not bool(halves.isfinite().all()):
            raise ValueError("codes: not all finite in half precision, which ends at 65,504; has training diverged?")
        return halves.view(torch.int16).to(torch.int64) & 0xFFFF

    def decode(
        self,
        tokens: Tensor,  # [B, T C] int64
    ) -> Tensor:  # [B, T, C] fp32
        """The inverse of :meth:`encode`.

        Raises:
            ValueError: bits that are no finite number.
        """
        signed = torch.where(tokens < 2**15, tokens, tokens - 2**16).to(torch.int16)
        codes = signed.view(torch.float16).float().unflatten(-1, (-1, self.channels))
        if not bool(codes.isfinite().all()):
            raise ValueError("its numbers are not all finite")
        return codes


def file_layout(model: FlowMo) -> TokenLayout:
    """How files spell the code of this model, with its fingerprint."""
    c = model.config
    if c.discrete:
        return layout_of(model)
    return LatentLayout(
        c.latent_tokens * c.latent_channels, NUMBER_BITS, c.latent_channels, tokenizer=fingerprint(model)
    )


@dataclass(frozen=True)
class TokenFile:
    """What a token file says.

    Attributes:
        width, height: of the picture in pixels.
        tile: side of a tile, the tokenizer's image size.
        overlap: of neighbouring tiles, as in `flowmo.tiles.TileGrid`.
        tokens, bits: N tokens of E bits for each tile; of a continuous code, N numbers of 16 bits.
        tokenizer: sha256 of the tokenizer (`flowmo.data.tokens.fingerprint`) in hex.
        payload: packed tokens, ceil(N E / 8) bytes for each tile, row by row.
        kind: TOKENS or NUMBERS, what the payload holds.
    """

    width: int
    height: int
    tile: int
    overlap: int
    tokens: int
    bits: int
    tokenizer: str
    payload: bytes
    kind: int = TOKENS

    @property
    def grid(self) -> TileGrid:
        return TileGrid(self.height, self.width, self.tile, self.overlap)

    @property
    def tile_bytes(self) -> int:
        return (self.tokens * self.bits + 7) // 8

    @property
    def bits_per_pixel(self) -> float:
        """Of the payload."""
        return 8 * len(self.payload) / (self.width * self.height)

    @classmethod
    def pack(
        cls,
        grid: TileGrid,
        codes: Tensor,  # [n, T, C] of the tiles, row by row
        layout: TokenLayout,
    ) -> TokenFile:
        """The file of a picture's codes.

        Raises:
            ValueError: more or fewer tiles than the grid has, a picture beyond what the format holds, numbers beyond
                half precision, or a layout without the tokenizer's fingerprint.
        """
        if len(layout.tokenizer) != 64:
            raise ValueError("layout: no fingerprint of the tokenizer; take it from file_layout(model)")
        if codes.shape[0] != grid.count:
            raise ValueError(f"codes: expected those of {grid.count} tiles, got {codes.shape[0]}")
        if max(grid.width, grid.height) > MAX_SIDE or grid.width * grid.height > MAX_PIXELS:
            raise ValueError(
                f"a picture of {grid.width} x {grid.height}: a token file holds sides up to {MAX_SIDE:,} and "
                f"{MAX_PIXELS:,} pixels; scale it down"
            )
        parts = [pack_tokens(layout.encode(part), layout.bits).cpu() for part in codes.split(_UNPACKED_AT_ONCE)]
        payload = torch.cat(parts).numpy().tobytes()
        return cls(
            grid.width, grid.height, grid.size, grid.overlap, layout.tokens, layout.bits, layout.tokenizer, payload,
            NUMBERS if isinstance(layout, LatentLayout) else TOKENS,
        )  # fmt: skip

    def codes(
        self,
        layout: TokenLayout,
        source: str = "token file",
    ) -> Tensor:  # [n, T, C], int8 for codes of +1 and -1, else fp32
        """Codes of the tiles, row by row, by the layout of a model that :meth:`check` let pass.

        Raises:
            TokenFileError: tokens beyond the vocabulary, or numbers that are not finite.
        """
        packed = torch.from_numpy(np.frombuffer(self.payload, np.uint8).reshape(-1, self.tile_bytes).copy())
        signs = self.kind == TOKENS and not layout.levels
        parts = []
        for part in packed.split(_UNPACKED_AT_ONCE):
            try:
                codes = layout.decode(unpack_tokens(part, self.bits, self.tokens))
            except ValueError as error:
                raise TokenFileError(f"{source}: damaged or hostile, {error}; fetch or make it again") from error
            parts.append(codes.to(torch.int8) if signs else codes)
        return torch.cat(parts)

    def describe_code(self) -> str:
        """What a tile holds, in words."""
        if self.kind == NUMBERS:
            return f"{self.tokens} numbers of {self.bits} bits"
        return f"{self.tokens} tokens of {self.bits} bits"

    def check(
        self, model: FlowMo, layout: TokenLayout, source: str = "token file", any_tokenizer: bool = False
    ) -> None:
        """Raises TokenFileError where the model is not the one that made the file.

        Args:
            any_tokenizer: let pass a model of the same sizes with other weights.
        """
        kind = NUMBERS if isinstance(layout, LatentLayout) else TOKENS
        if self.kind != kind:
            holds, takes = ("tokens", "real numbers") if kind == NUMBERS else ("real numbers", "tokens")
            raise TokenFileError(
                f"{source}: holds {holds}, but the model takes {takes}; name the model that made the file with "
                "--checkpoint"
            )
        for name, mine, theirs in (
            ("tiles of {} pixels", self.tile, model.config.image_size),
            (("{} tokens a tile", "{} numbers a tile")[kind], self.tokens, layout.tokens),
            ("tokens of {} bits", self.bits, layout.bits),
        ):
            if mine != theirs:
                raise TokenFileError(
                    f"{source}: {name.format(mine)}, but the model has {theirs}; name the model that made the file "
                    "with --checkpoint"
                )
        if self.tokenizer != layout.tokenizer and not any_tokenizer:
            raise TokenFileError(
                f"{source}: made by tokenizer {self.tokenizer[:12]}, but this model is {layout.tokenizer[:12]}; name "
                "the model that made the file with --checkpoint, or decode with --any-tokenizer, which gives a picture "
                "of noise unless the encoders are the same"
            )

    def to_bytes(self) -> bytes:
        head = HEADER.pack(
            MAGIC, VERSION, self.kind, self.bits, self.width, self.height, self.tile, self.overlap,
            self.tokens, bytes.fromhex(self.tokenizer),
        )  # fmt: skip
        body = head + self.payload
        return body + CHECKSUM.pack(zlib.crc32(body))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, making its folder; nobody ever sees half of it."""
        path, content = Path(path), self.to_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda name: Path(name).write_bytes(content))
        return path

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "token file") -> TokenFile:
        """Raises TokenFileError: foreign, damaged, cut short, too long, of another version, or impossible sizes."""
        length = expected_length(data[: HEADER.size], len(data), source)
        body, checksum = data[: length - CHECKSUM.size], data[length - CHECKSUM.size :]
        if CHECKSUM.unpack(checksum)[0] != zlib.crc32(body):
            raise TokenFileError(f"{source}: damaged, its bytes do not give its checksum; fetch or make it again")
        _, _, kind, bits, width, height, tile, overlap, tokens, tokenizer = HEADER.unpack_from(data)
        return cls(width, height, tile, overlap, tokens, bits, tokenizer.hex(), body[HEADER.size :], kind)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Read a file; its header is checked before the rest is read.

        Raises:
            FileNotFoundError: nothing at `path`.
            TokenFileError: as :meth:`from_bytes`, or not a regular file.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no such token file: {path}")
        if not path.is_file():
            raise TokenFileError(f"{path}: not a regular file; give the path of one {SUFFIX} file")
        with open(path, "rb") as file:
            head = file.read(HEADER.size)
            length = expected_length(head, os.fstat(file.fileno()).st_size, str(path))
            return cls.from_bytes(head + file.read(length - len(head)), str(path))


def expected_length(head: bytes, length: int, source: str) -> int:
    """Bytes of a file with this header, which are those it has.

    Raises:
        TokenFileError: no header of this format, numbers that no picture has, or `length` is another.
    """
    start = head[: len(MAGIC)]
    if start != MAGIC[: len(start)] or not start:
        raise TokenFileError(f"{source}: no FlowMo token file; `python -m flowmo.tokenize` makes them of pictures")
    if len(head) < HEADER.size:
        raise TokenFileError(f"{source}: cut short, {length} bytes are less than a header; fetch or make it again")
    _, version, kind, bits, width, height, tile, overlap, tokens, _ = HEADER.unpack(head)
    if version != VERSION:
        raise TokenFileError(
            f"{source}: format version {version}, but this program reads version {VERSION}; a newer one may know it"
        )
    if not (
        1 <= width <= MAX_SIDE
        and 1 <= height <= MAX_SIDE
        and width * height <= MAX_PIXELS
        and 1 <= tile <= MAX_SIDE
        and overlap <= tile // 2
        and 1 <= tokens <= MAX_TOKENS
        and (1 <= bits <= MAX_BITS if kind == TOKENS else bits == NUMBER_BITS)
        and kind in (TOKENS, NUMBERS)
    ):
        raise TokenFileError(
            f"{source}: damaged or hostile, its header speaks of {width} x {height} pixels in tiles of {tile} that "
            f"overlap by {overlap}, with {tokens} tokens of {bits} bits, kind {kind}; fetch or make it again"
        )
    payload = TileGrid(height, width, tile, overlap).count * ((tokens * bits + 7) // 8)
    expected = HEADER.size + payload + CHECKSUM.size
    if length != expected:
        fault = "cut short" if length < expected else "too long"
        raise TokenFileError(
            f"{source}: {fault}, {length:,} bytes instead of the {expected:,} of its header; fetch or make it again"
        )
    return expected
