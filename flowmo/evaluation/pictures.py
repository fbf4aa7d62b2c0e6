"""Pictures to evaluate on: folders, tar archives, held-out sample photographs, `.npz` files of the ADM evaluator."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmo.data import (
    ArchiveImages,
    ImageReadError,
    center_crop,
    find_images,
    heldout_photographs,
    load_image,
    resize_shorter,
)
from flowmo.data.archive import find_archives
from flowmo.data.transforms import PathLike


class Pictures(Protocol):
    """Pictures in a fixed order. `read` gives uint8 [3, H, W], or raises ImageReadError."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


class FolderPictures:
    """The pictures under a folder (or one file), sorted by path.

    Args:
        size: the shorter side is resized to it (bilinear, antialiased) and the central square taken; None takes the
            pictures as they are.

    Raises:
        FileNotFoundError: nothing at `root`, or no picture in it.
    """

    def __init__(self, root: PathLike, size: int | None) -> None:
        self.root, self.size = Path(root), size
        self.paths = find_images(root)
        if not self.paths:
            raise FileNotFoundError(f"{self.root}: no pictures under this folder")
        self.names = [str(p.relative_to(self.root)) if self.root.is_dir() else p.name for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        return _square(load_image(self.paths[index]), self.size)

    def describe(self) -> dict[str, Any]:
        return {"pictures": str(self.root), "order": "sorted by path", "crop": _crop(self.size)}


class ArchivePictures:
    """The pictures in tar archives, read in place, in the order of the folder that they would unpack to.

    Args:
        source, index: as for ArchiveImages, which reads them; no labels are needed.
        size: as for FolderPictures.

    Attributes:
        names: paths inside the archive, with that of the archive before it where there are several.

    Raises:
        FileNotFoundError: no archive there. ArchiveError: cut short, or an index of another archive.
    """

    def __init__(self, source: PathLike, size: int | None, index: PathLike | None = None) -> None:
        self.size, self.archives = size, find_archives(source)
        self._images = ArchiveImages(source, size or 1, index=index, crop="center")
        found = [str(path).split("/", 1) for path in self._images.paths]
        keys = [(PurePosixPath(inside).as_posix(), archive) for archive, inside in found]
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        several = len(self.archives) > 1
        self.names = [f"{keys[i][1]}/{keys[i][0]}" if several else keys[i][0] for i in self._order]

    def __len__(self) -> int:
        return len(self._order)

    def read(self, index: int) -> Tensor:
        return _square(self._images.read(self._order[index]), self.size)

    def describe(self) -> dict[str, Any]:
        names = [str(path) for path in self.archives]
        said = f"{names[0]} to {names[-1]}, {len(names)} archives" if len(names) > 3 else ", ".join(names)
        return {"pictures": said, "order": "sorted by path inside the archive", "crop": _crop(self.size)}


class SamplePictures:
    """The photographs that the quickstart holds out: a trial of the command, no quality benchmark."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._images = list(heldout_photographs().values())
        self.names = list(heldout_photographs())

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Tensor:
        return _square(self._images[index], self.size)

    def describe(self) -> dict[str, Any]:
        return {"pictures": "held-out sample photographs", "order": "fixed", "crop": _crop(self.size)}


class NpzPictures:
    """uint8 pictures [N, H, W, 3] under the key `arr_0` of an `.npz` file, read a few at a time.

    Attributes:
        labels: `arr_1`, where there is one.

    Raises:
        FileNotFoundError: no such file. ValueError: another layout.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._archive = _open_npz(self.path)
        if "arr_0.npy" not in self._archive.namelist():
            found = ", ".join(self._archive.namelist())
            raise ValueError(f"{self.path}: expected pictures under the key arr_0, found {found}")
        shape, order, dtype = self._open()
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or order or not shape[0]:
            raise ValueError(
                f"{self.path}: expected arr_0 to hold uint8 pictures [N, H, W, 3] in C order, got {dtype} {list(shape)}"
            )
        self.shape = shape
        self.names = range_names(shape[0])
        self.labels = self.array("arr_1")
        self._next = 0  # picture that the open file stands before

    def __len__(self) -> int:
        return self.shape[0]

    def has_array(self, key: str) -> bool:
        return f"{key}.npy" in self._archive.namelist()

    def array(self, key: str) -> np.ndarray | None:
        """Another array of the file, whole."""
        return read_npz_array(self.path, key)

    def read(self, index: int) -> Tensor:
        size = int(np.prod(self.shape[1:]))
        if index < self._next:
            self._open()
            self._next = 0
        while self._next <= index:  # a compressed file can only be read through
            data = self._file.read(size)
            self._next += 1
        if len(data) != size:
            raise ValueError(f"{self.path}: arr_0 ends within picture {index}; the file is cut short")
        pixels = np.frombuffer(data, np.uint8).reshape(self.shape[1:])
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def describe(self) -> dict[str, Any]:
        return {"pictures": str(self.path), "order": "as stored", "crop": _crop(None)}

    def _open(self) -> tuple[tuple[int, ...], bool, np.dtype]:
        self._file = self._archive.open("arr_0.npy")
        version = np.lib.format.read_magic(self._file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(self._file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(self._file)
        raise ValueError(
            f"{self.path}: arr_0 has .npy format {version}, expected 1.0 or 2.0; save it again by np.savez"
        )


def read_npz_array(path: PathLike, key: str) -> np.ndarray | None:
    """One array of an `.npz` file, None where it has none of that name."""
    _open_npz(Path(path)).close()
    with np.load(path) as archive:
        return np.asarray(archive[key]) if key in archive.files else None


def _open_npz(path: Path) -> zipfile.ZipFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an .npz of pictures")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not an .npz file ({error})") from error


def range_names(n: int) -> list[str]:
    """Names of pictures that have only a number."""
    return [str(i) for i in range(n)]


def open_pictures(source: PathLike, size: int | None) -> FolderPictures | ArchivePictures | NpzPictures:
    """An `.npz` file, or what :func:`open_images` opens."""
    return NpzPictures(source) if str(source).endswith(".npz") else open_images(source, size)


def open_images(source: PathLike, size: int | None, index: PathLike | None = None) -> FolderPictures | ArchivePictures:
    """A folder or tar archives (one, a folder of them, or a pattern); `size` crops as in FolderPictures.

    Raises:
        ValueError: an index of what is no archive, and what the two classes raise.
    """
    if find_archives(source):
        return ArchivePictures(source, size, index)
    if index is not None:
        raise ValueError(f"--index {index} is of tar archives, and {source} names none")
    return FolderPictures(source, size)


def spaced(total: int, limit: int | None) -> list[int]:
    """`limit` of `total` numbers, evenly spaced and starting at 0; all where limit is None or larger.

    Raises ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 picture")
    n = total if limit is None else min(limit, total)
    return [i * total // n for i in range(n)]


def read_batches(
    pictures: Pictures,
    indices: Sequence[int],
    batch: int,
    skipped: list[str],
    workers: int = 4,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of (indices, uint8 [n, 3, H, W]) in order; the next one is read while the current one is used.

    Unreadable pictures are passed over and described in `skipped`; a batch then is smaller.

    Raises:
        ValueError: pictures of different sizes.
    """
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    # an open .npz has one place to read from
    with ThreadPoolExecutor(1 if isinstance(pictures, NpzPictures) else max(1, workers)) as pool:
        ahead = [pool.submit(pictures.read, i) for i in parts[0]] if parts else []
        for number, part in enumerate(parts):
            pending = ahead
            following = parts[number + 1] if number + 1 < len(parts) else []
            ahead = [pool.submit(pictures.read, i) for i in following]
            read: list[int] = []
            images: list[Tensor] = []
            for index, future in zip(part, pending):
                try:
                    images.append(future.result())
                    read.append(index)
                except ImageReadError as error:
                    skipped.append(str(error))
            if len({image.shape for image in images}) > 1:
                sizes = sorted({f"{image.shape[2]} x {image.shape[1]}" for image in images})
                raise ValueError(f"pictures of different sizes: {', '.join(sizes[:4])}; give one with --size")
            if images:
                yield read, torch.stack(images)


def _square(img: Image.Image, size: int | None) -> Tensor:
    """uint8 [3, H, W] of the central square, of the whole picture where the size is None."""
    if size is not None:
        img = center_crop(resize_shorter(img, size), size)
    return torch.from_numpy(np.array(img.convert("RGB")).transpose(2, 0, 1).copy())


def _crop(size: int | None) -> str:
    return "none" if size is None else f"shorter side to {size} (bilinear, antialiased), central {size} x {size}"
