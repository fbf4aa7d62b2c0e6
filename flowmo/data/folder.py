"""A folder of pictures as a data set: found recursively, checked, cropped by a random generator of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from flowmo.data.transforms import (
    ImageReadError,
    PathLike,
    center_crop,
    load_image,
    normalize,
    random_crop,
    resize_shorter,
)

_NAMED_IN_WARNING = 20  # files; the whole list stays in `skipped`
_HEADER_THREADS = 8  # reading headers waits for the disk, not for the processor


class Skipped(NamedTuple):
    """A file left out, and why."""

    path: str
    reason: str


class Example(NamedTuple):
    """One crop and the class it belongs to."""

    image: Tensor  # [3, S, S]
    label: int  # index into `classes`, -1 without one


class Fetched(NamedTuple):
    """What a data set hands to the loader: the bytes, and the files that failed on the way."""

    pixels: Tensor  # uint8 [3, S, S]
    label: int
    failed: tuple[Skipped, ...]


@lru_cache(maxsize=1)
def readable_extensions() -> frozenset[str]:
    """File name endings, lower case with the dot, of the formats that this Pillow reads."""
    extensions = Image.registered_extensions()  # also loads every plugin
    return frozenset(ext.lower() for ext, name in extensions.items() if name in Image.OPEN)


def find_images(root: PathLike) -> list[Path]:
    """Every picture file under a folder, sorted by its path inside it; for a file, the file itself.

    A file counts when its ending is one that Pillow reads, or when it has another ending or none and Pillow
    recognises its first bytes. Names that start with a dot are left out. Linked folders are followed, but never
    back into a folder that they lie in.

    Raises FileNotFoundError when `root` does not exist.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if root.is_file():
        return [root]
    found = (path for path in walk(root) if path.suffix.lower() in readable_extensions() or recognised(path))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files below a folder, hidden ones left out; linked folders are not followed back into those `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(Path(entry.path), (*above, real))
            elif entry.is_file():
                yield Path(entry.path)


def recognised(file: Path | BinaryIO) -> bool:
    """Whether Pillow takes the first bytes of a file for a picture's."""
    try:
        with Image.open(file):
            return True
    except Exception:  # as many kinds as there are decoders; here every one means "not a picture"
        return False


def _header_fault(path: Path, min_side: int) -> str | None:
    """Why the file cannot be used, judged by its header alone; None when nothing speaks against it."""
    try:
        with Image.open(path) as img:
            width, height = img.size
    except Image.DecompressionBombError as error:
        return str(error)
    except Exception as error:  # see load_image
        return f"not readable as a picture ({type(error).__name__})"
    return _size_fault(width, height, min_side)


def _size_fault(width: int, height: int, min_side: int) -> str | None:
    return f"too small: {width} x {height}, sides of {min_side} wanted" if min(width, height) < min_side else None


class Pictures(Dataset[Example]):
    """Crops of pictures in a fixed order; where they come from is a subclass's business.

    A subclass sets `paths`, `labels`, `classes` and `skipped` and overrides :meth:`read`.
    """

    root: Path
    image_size: int
    crop: Literal["random", "center"]
    flip: bool
    seed: int
    min_side: int
    as_uint8: bool
    paths: Sequence[str]
    labels: Sequence[int]
    classes: list[str]
    skipped: list[Skipped]

    def _set(
        self,
        root: PathLike,
        image_size: int,
        crop: Literal["random", "center"],
        flip: bool,
        seed: int,
        min_side: int | None,
        as_uint8: bool,
    ) -> None:
        if image_size < 1 or seed < 0:
            raise ValueError(
                f"{type(self).__name__} expects image_size >= 1 and seed >= 0; got {image_size} and {seed}"
            )
        if crop not in ("random", "center"):
            raise ValueError(f"crop must be 'random' or 'center', got {crop!r}")
        self.root, self.image_size, self.crop, self.flip, self.seed = Path(root), image_size, crop, flip, seed
        self.min_side = max(16, image_size // 8) if min_side is None else min_side
        self.as_uint8 = as_uint8
        self.skipped = []

    def read(self, at: int) -> Image.Image:
        """Picture `at` as 8-bit RGB; raises ImageReadError or OSError."""
        return load_image(self.paths[at])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | tuple[int, int]) -> Example:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        pixels, label, failed = self.fetch(epoch, index % len(self))
        self.record(failed)
        return Example(pixels if self.as_uint8 else normalize(pixels), label)

    def fetch(self, epoch: int, index: int) -> Fetched:
        """The crop of picture `index` in `epoch`, and the files that had to be passed over to get one.

        Raises ImageReadError when no file of the whole folder can be decoded any more.
        """
        failed: list[Skipped] = []
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                img = self.read(at)
                fault = _size_fault(*img.size, self.min_side)
            except (ImageReadError, OSError) as error:
                fault = error.reason if isinstance(error, ImageReadError) else str(error)
            if fault is None:
                return Fetched(self._crop(img, epoch, index), self.labels[at], tuple(failed))
            failed.append(Skipped(self.paths[at], fault))
        raise ImageReadError(self.root, f"none of its {len(self)} pictures can be decoded" + _listing(failed, ": "))

    def _crop(self, img: Image.Image, epoch: int, index: int) -> Tensor:
        img = resize_shorter(img, self.image_size)
        if self.crop == "center":
            pixels = np.array(center_crop(img, self.image_size))
        else:
            rng = np.random.default_rng((self.seed, epoch, index))
            pixels = np.array(random_crop(img, self.image_size, rng))
            if self.flip and rng.random() < 0.5:
                pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def record(self, failed: Iterable[Skipped]) -> None:
        """Add files to `skipped` and name them in a warning; a file that is listed already is not repeated."""
        known = {skipped.path for skipped in self.skipped}
        fresh = list({skipped.path: skipped for skipped in failed if skipped.path not in known}.values())
        if fresh:
            self.skipped.extend(fresh)
            count = "1 file" if len(fresh) == 1 else f"{len(fresh)} files"
            warnings.warn(f"skipped {count} under {self.root}" + _listing(fresh, ": "), stacklevel=2)


class ImageFolder(Pictures):
    """Crops of the pictures under a folder (or of a single file), in a fixed order.

    A picture is resized so that its shorter side is `image_size` and cropped to a square. The random crop of
    picture `index` in epoch `epoch` depends on (seed, epoch, index) alone, so runs repeat whatever the number of
    worker processes. Indexing takes `index` (epoch 0) or `(epoch, index)`.

    Corrupt and tiny files are skipped: those recognised by their header before the first picture is read, others
    when they are decoded, where the next readable picture takes their place. Each is named in a warning and
    listed, with the reason, in `skipped`.

    Args:
        root: folder, searched recursively (see find_images), or one picture file.
        image_size: side of the crops in pixels.
        crop: "random" or "center".
        flip: mirror half of the random crops left to right.
        seed: of the random crops.
        min_side: pictures with a shorter side below this are skipped; by default an eighth of `image_size`, and
            at least 16. Larger ones are enlarged where needed.
        as_uint8: give uint8 instead of float32 in [-1, 1].
        check_headers: False saves opening every file once at the start; then all faults show when decoding.

    Attributes:
        paths: the pictures, as strings. labels: class index of each, -1 for a file directly under `root`.
        classes: names of the sub-folders of `root` that hold pictures, sorted. skipped: what was left out.

    Raises:
        FileNotFoundError: `root` does not exist, or holds no usable picture.
    """

    def __init__(
        self,
        root: PathLike,
        image_size: int,
        *,
        crop: Literal["random", "center"] = "random",
        flip: bool = False,
        seed: int = 0,
        min_side: int | None = None,
        as_uint8: bool = False,
        check_headers: bool = True,
    ) -> None:
        self._set(root, image_size, crop, flip, seed, min_side, as_uint8)
        found = find_images(root)
        folder = self.root if self.root.is_dir() else self.root.parent
        class_of = [inside.parts[0] if len(inside.parts) > 1 else None for inside in _relative(found, folder)]
        self.classes = sorted({name for name in class_of if name is not None})
        index_of = {name: i for i, name in enumerate(self.classes)}

        faults: list[str | None] = [None] * len(found)
        if check_headers:
            readable_extensions()  # Pillow loads its plugins once, before the threads need them
            with ThreadPoolExecutor(_HEADER_THREADS) as pool:
                faults = list(pool.map(_header_fault, found, [self.min_side] * len(found)))
        good = [i for i, fault in enumerate(faults) if fault is None]
        self.paths = [str(found[i]) for i in good]
        self.labels = [-1 if (name := class_of[i]) is None else index_of[name] for i in good]
        bad = [Skipped(str(path), fault) for path, fault in zip(found, faults) if fault is not None]
        if not self.paths:
            raise FileNotFoundError(
                f"no usable picture under {self.root}: looked recursively for files that Pillow reads (.jpg, "
                f".png, .webp and {len(readable_extensions())} endings in all) with sides of at least "
                f"{self.min_side} pixels; {len(found)} picture files found" + _listing(bad, ", skipped: ")
            )
        self.record(bad)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{len(self)} pictures in {max(1, len(self.classes))} folders under {self.root}, {self.crop} crops of "
            f"{self.image_size} x {self.image_size}, {len(self.skipped)} files skipped"
        )


def _relative(paths: list[Path], folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in paths]


def _listing(skipped: list[Skipped], intro: str) -> str:
    if not skipped:
        return ""
    more = f"; and {len(skipped) - _NAMED_IN_WARNING} more" if len(skipped) > _NAMED_IN_WARNING else ""
    return intro + "; ".join(f"{path} ({reason})" for path, reason in skipped[:_NAMED_IN_WARNING]) + more
