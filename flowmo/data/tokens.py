"""Token cache: the tokens of a whole data set in memory-mapped files, made once and read by Stage 2.

A cache is a folder:

    header.json   TokenHeader: what the tokens are and where they come from
    tokens.npy    uint8 [P, W, ceil(N E / 8)], packed tokens (least significant bit first)
    labels.npy    int32 [P], class of every picture, -1 without one
    state.npy     uint8 [P], 0 not done yet, 1 done, 2 the picture could not be read

Legend: P pictures, W views of a picture, N tokens of a view, E bits of a token, d channels of a token (E of lfq), T
latent tokens, C latent channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmo.data.transforms import PathLike, center_crop, deliver, resize_shorter
from flowmo.files import atomic_write
from flowmo.quantizer import fsq_codes, fsq_tokens
from flowmo_kernels import codes_to_tokens, pack_tokens, tokens_to_codes, unpack_tokens

if TYPE_CHECKING:
    from flowmo.autoencoder import FlowMo

GROUPINGS = ("parity", "contiguous")
PENDING, DONE, UNREADABLE = 0, 1, 2


class TokenCacheError(ValueError):
    """A token cache that cannot be used; the message names the folder, what was expected and the way out."""


@dataclass
class TokenLayout:
    """How tokens spell the code of one tokenizer.

    Attributes:
        tokens: N, of a picture.
        bits: E, that a token takes in files; its values are 0 .. vocabulary - 1.
        channels: C, of a latent token, F d with F tokens to a latent token.
        grouping: which channels make token t F + f. "parity": k F + f for its digits k, the quantizer's own groups.
            "contiguous": f d + k.
        tokenizer: fingerprint of the encoder; empty where unknown.
        levels: of the d channels of a token of finite scalar quantization; empty for the bits of lookup-free
            quantization.
    """

    tokens: int
    bits: int
    channels: int
    grouping: str = "parity"
    tokenizer: str = ""
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.levels = tuple(self.levels)  # files give lists
        if self.grouping not in GROUPINGS:
            raise ValueError(f"grouping={self.grouping!r}: expected one of {', '.join(GROUPINGS)}")

    @property
    def vocabulary(self) -> int:
        return math.prod(self.levels) if self.levels else 2**self.bits

    @property
    def token_channels(self) -> int:
        """d, latent channels that make one token."""
        return len(self.levels) or self.bits

    def encode(
        self,
        codes: Tensor,  # [B, T, C]
    ) -> Tensor:  # [B, N] int64
        """Tokens of codes; of lfq only the signs are read."""
        if self.grouping == "contiguous":
            codes = codes.unflatten(-1, (-1, self.token_channels)).transpose(-1, -2).flatten(-2)
        return fsq_tokens(codes, self.levels) if self.levels else codes_to_tokens(codes, self.bits)

    def decode(
        self,
        tokens: Tensor,  # [B, N] int64
    ) -> Tensor:  # [B, T, C] fp32: +1 or -1, or levels
        """Codes of tokens, the inverse of :meth:`encode`.

        Raises:
            ValueError: values outside of the vocabulary.
        """
        if self.levels:
            codes = fsq_codes(tokens, self.levels, self.channels)
        else:
            codes = tokens_to_codes(tokens, self.bits, self.channels)
        if self.grouping == "contiguous":
            codes = codes.unflatten(-1, (self.token_channels, -1)).transpose(-1, -2).flatten(-2)
        return codes

    def differences(self, other: TokenLayout) -> list[str]:
        """'name: mine and other' for everything that differs, an unknown tokenizer excepted."""
        found = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "tokenizer":
                mine, theirs = mine[:12], theirs[:12]
                if not (mine and theirs):
                    continue
            if mine != theirs:
                found.append(f"{f.name}: {mine} and {theirs}")
        return found


def layout_of(model: FlowMo, grouping: str = "parity") -> TokenLayout:
    """The layout of a tokenizer's tokens, with its fingerprint.

    Raises:
        ValueError: a continuous model, which has no tokens, or an unknown grouping.
    """
    c = model.config
    if not c.discrete:
        raise ValueError(
            f"the tokenizer is a continuous model (quantizer {c.quantizer}), which has no tokens; a .flowmo file or "
            "encode() and decode() hold its latents"
        )
    levels = tuple(c.fsq_levels) if c.quantizer == "fsq" else ()
    return TokenLayout(c.tokens, c.token_bits, c.latent_channels, grouping, fingerprint(model), levels)


def fingerprint(model: FlowMo) -> str:
    """sha256 of the encoder's weights and what makes its output a code, in hex; docs/format.md says of which bytes.

    The decoder does not count: Stage 1B trains it alone, and tokens made before stay good. Take it of fp32 weights,
    before a cast for speed.
    """
    c = model.config
    code = {"lfq": str(c.entropy_bits), "fsq": f"fsq {c.fsq_levels}"}.get(c.quantizer, c.quantizer)
    digest = hashlib.sha256(f"{c.image_size} {c.latent_tokens} {c.latent_channels} {code}".encode())
    for name, weight in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class TokenHeader:
    """What header.json says.

    Attributes:
        layout: of the tokens.
        pictures, views: P and W.
        crop: the policy that made the views, one of CROPS.
        image_size: side of the views in pixels.
        dtype: arithmetic of the encoder: codes near zero may flip between fp32 and bf16.
        classes: names by label.
        data: fingerprint of the list of files, so that an interrupted run goes on with the same ones.
    """

    layout: TokenLayout
    pictures: int
    views: int
    crop: str
    image_size: int
    dtype: str
    classes: list[str] = field(default_factory=list)
    data: str = ""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


# Views of one picture.

CROPS = {"center": 1, "center+flip": 2, "ten-crop": 10}  # policy -> views
TEN_CROP_RANGE = 1.1  # side of the square that the ten crops are cut from, in units of the view's side


def picture_views(
    img: Image.Image,
    size: int,
    crop: str,
) -> Tensor:  # [W, 3, size, size] uint8
    """The views of a picture that a cache holds.

    "center": shorter side to `size`, central square. "center+flip": that and its mirror image. "ten-crop": from the
    central square of 1.1 `size`, the four corners and the centre, then the mirror images of these five.

    Raises:
        ValueError: unknown policy.
    """
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r}: expected one of {', '.join(CROPS)}")
    if crop == "ten-crop":
        side = max(size, int(size * TEN_CROP_RANGE))
        square = np.asarray(center_crop(resize_shorter(img, side), side))
        far, middle = side - size, round((side - size) / 2)
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
        views = [square[top : top + size, left : left + size] for top, left in corners]
    else:
        views = [np.asarray(center_crop(resize_shorter(img, size), size))]
    if CROPS[crop] > len(views):
        views += [view[:, ::-1] for view in views]
    return torch.from_numpy(np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2)))


class TokenCache:
    """A token cache on the disk.

    Attributes:
        header: what its header.json says.
        labels: int32 [P]; packed: uint8 [P, W, bytes]; state: uint8 [P]. Memory-mapped.
    """

    def __init__(self, folder: PathLike, header: TokenHeader, mode: Literal["r", "r+"] = "r") -> None:
        self.folder, self.header = Path(folder), header
        try:
            self.packed = np.load(self.folder / "tokens.npy", mmap_mode=mode)
            self.labels = np.load(self.folder / "labels.npy", mmap_mode=mode)
            self.state = np.load(self.folder / "state.npy", mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise TokenCacheError(f"{folder}: damaged token cache ({error}); delete it and tokenize again") from error
        h = header
        expected = (h.pictures, h.views, (h.layout.tokens * h.layout.bits + 7) // 8)
        if self.packed.shape != expected or len(self.labels) != h.pictures or len(self.state) != h.pictures:
            raise TokenCacheError(
                f"{folder}: tokens.npy is {list(self.packed.shape)}, its header says {list(expected)}; tokenize again"
            )

    @classmethod
    def create(cls, folder: PathLike, header: TokenHeader, labels: Sequence[int]) -> TokenCache:
        """A cache with everything still to do; an existing one of the same header is continued.

        Raises:
            TokenCacheError: the folder holds a cache of something else.
        """
        folder = Path(folder)
        if (folder / "header.json").exists():
            found = read_header(folder)
            mine, other = json.loads(header.text()), json.loads(found.text())
            wrong = [k for k in mine if mine[k] != other[k]]
            if wrong:
                pairs = "; ".join(f"{k}: {_short(other[k])} there and {_short(mine[k])} here" for k in wrong)
                raise TokenCacheError(f"{folder} holds another token cache ({pairs}); name another folder")
            return cls(folder, found, "r+")
        folder.mkdir(parents=True, exist_ok=True)
        width = (header.layout.tokens * header.layout.bits + 7) // 8
        shapes = {"tokens": (header.pictures, header.views, width), "state": (header.pictures,)}
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, shape).flush()
        np.save(folder / "labels.npy", np.asarray(labels, np.int32))
        # the header comes last: a folder without one is no cache yet, and is made anew
        atomic_write(folder / "header.json", lambda name: Path(name).write_text(header.text()))
        return cls(folder, header, "r+")

    @classmethod
    def open(cls, folder: PathLike, expected: TokenLayout | None = None) -> TokenCache:
        """A finished cache, for reading.

        Args:
            expected: the layout that the reader needs.

        Raises:
            FileNotFoundError: no cache there.
            TokenCacheError: damaged, unfinished, or of another tokenizer or layout than expected.
        """
        cache = cls(folder, read_header(Path(folder)))
        left = int((cache.state == PENDING).sum())
        if left:
            raise TokenCacheError(
                f"{folder}: {left} of {len(cache.state)} pictures are not tokenized yet; run the same flowmo.tokenize "
                "command again to go on"
            )
        if not (cache.state == DONE).any():
            raise TokenCacheError(f"{folder}: none of its pictures could be read")
        if expected is not None and (wrong := cache.header.layout.differences(expected)):
            raise TokenCacheError(
                f"{folder}: its tokens are not the expected ones (there and here: {'; '.join(wrong)}); tokenize the "
                "data with this tokenizer into another folder"
            )
        return cache

    def todo(self) -> np.ndarray:
        """Indices of the pictures that are not done, int64."""
        return np.flatnonzero(self.state == PENDING)

    def done(self) -> np.ndarray:
        """Indices of the pictures that have tokens, int64."""
        return np.flatnonzero(self.state == DONE)

    def write(
        self,
        indices: Sequence[int],
        tokens: Tensor,  # [len(indices), W, N] int64
    ) -> None:
        """Store the tokens of some pictures; they count as done only once their tokens are on the disk."""
        n, layout = len(indices), self.header.layout
        packed = pack_tokens(tokens.reshape(n * self.header.views, layout.tokens).cpu(), layout.bits)
        self.packed[list(indices)] = packed.reshape(n, self.header.views, -1).numpy()
        self.packed.flush()
        self._mark(indices, DONE)

    def mark_unreadable(self, indices: Sequence[int]) -> None:
        self._mark(indices, UNREADABLE)

    def _mark(self, indices: Sequence[int], state: int) -> None:
        self.state[list(indices)] = state
        self.state.flush()

    def read(
        self,
        pictures: np.ndarray,  # [B]
        views: np.ndarray,  # [B]
    ) -> tuple[Tensor, Tensor]:  # tokens [B, N] int64, labels [B] int64
        """One view of each of some pictures."""
        layout = self.header.layout
        packed = torch.from_numpy(np.array(self.packed[pictures, views]))
        labels = torch.from_numpy(self.labels[pictures].astype(np.int64))
        return unpack_tokens(packed, layout.bits, layout.tokens), labels

    def describe(self) -> str:
        """One line for the log."""
        h = self.header
        return (
            f"{int((self.state == DONE).sum())} pictures x {h.views} views ({h.crop}) of {h.layout.tokens} tokens of "
            f"{h.layout.bits} bits ({h.layout.grouping}), {len(h.classes)} classes, in {self.folder}"
        )


def read_header(folder: Path) -> TokenHeader:
    """Raises FileNotFoundError where there is none, TokenCacheError where it cannot be read."""
    path = folder / "header.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no token cache (header.json is not there); make one with python -m flowmo.tokenize DATA "
            f"--checkpoint C --out {folder}"
        )
    try:
        content = json.loads(path.read_text())
        return TokenHeader(**{**content, "layout": TokenLayout(**content["layout"])})
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise TokenCacheError(f"{path}: no header of a token cache: {error}") from error


class TokenBatches:
    """Endless batches of a cache, shuffled anew every epoch, with a position that can be restored.

    An epoch visits every picture once, in a view drawn uniformly. With several processes, each takes its part of
    every global batch of `batch` x `world` pictures.

    Yields (tokens int64 [batch, N], labels int64 [batch]). `position` counts the pictures of all processes.

    Raises:
        ValueError: the cache has pictures without a class.
    """

    def __init__(
        self,
        cache: TokenCache,
        batch: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or seed < 0 or not 0 <= rank < world:
            raise ValueError(
                "TokenBatches expects batch >= 1, seed >= 0 and 0 <= rank < world; "
                f"got batch={batch}, seed={seed}, rank={rank}, world={world}"
            )
        self.cache, self.batch, self.seed, self.rank, self.world = cache, batch, seed, rank, world
        self.device = torch.device(device)
        self.position = 0
        self._pictures = cache.done()
        without = int((cache.labels[self._pictures] < 0).sum())
        if without:
            raise ValueError(
                f"{cache.folder}: {without} pictures have no class; a generator needs one folder of pictures to a class"
            )
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        first = self.position + self.rank * self.batch
        rows = [self._at(p) for p in range(first, first + self.batch)]
        self.position += self.batch * self.world
        tokens, labels = self.cache.read(np.array([r[0] for r in rows]), np.array([r[1] for r in rows]))
        return deliver(tokens, self.device), deliver(labels, self.device)

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self._pictures))
        if epoch not in self._orders:  # a batch seldom touches more than the current epoch and the next
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(self._pictures), rng.integers(0, self.cache.header.views, len(self._pictures))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        pictures, views = self._orders[epoch]
        return int(pictures[place]), int(views[place])

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs: the position, and what must agree for it to mean the same."""
        layout = self.cache.header.layout
        return {
            "position": self.position,
            "seed": self.seed,
            "pictures": len(self._pictures),
            "tokens": [layout.tokenizer, layout.tokens, layout.bits, layout.grouping],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["position"]` pictures; raises ValueError if seed, pictures or tokens differ."""
        for key, mine in self.state_dict().items():
            if key != "position" and state[key] != mine:
                raise ValueError(
                    f"{self.cache.folder}: the saved data position was made with {key}={state[key]!r}, this run has "
                    f"{mine!r}"
                )
        self.position = int(state["position"])

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.cache.describe()}; batches of {self.batch}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
