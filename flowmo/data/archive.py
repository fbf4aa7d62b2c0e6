"""Pictures inside uncompressed tar archives, read in place by offset: ImageNet's tar of tars, webdataset shards.

An index is a JSON list of {"name", "offset", "size"}, offsets in bytes from the start of the (outer) archive, as the
authors' release uses; ours also has "label" where the archive says one, and "archive" where there are several.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from PIL import Image

from flowmo.data.folder import Pictures, readable_extensions, recognised, walk
from flowmo.data.transforms import ImageReadError, PathLike, decode_image

_BLOCK = 512  # bytes of a tar header
_CHECKED = 64  # entries of an index that are compared with the archive at the start
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_SYNSET = re.compile(r"(n\d{8})_")


class ArchiveError(ValueError):
    """An archive that is cut short or compressed, or an index that does not belong to it."""


@dataclass(frozen=True)
class Entry:
    """A picture in an archive."""

    name: str  # with the folders or inner archives that it lies in
    offset: int  # of its first byte, from the start of the outer archive
    size: int  # bytes
    archive: str  # file name
    label: int | None = None  # as a webdataset's .cls member says

    @property
    def group(self) -> str | None:
        """The class that the name tells: ImageNet's synset, else the first folder."""
        synset = _SYNSET.match(PurePosixPath(self.name).name)
        if synset:
            return synset[1]
        parts = PurePosixPath(self.name).parts
        return parts[0] if len(parts) > 1 else None

    def as_record(self, with_archive: bool) -> dict[str, Any]:
        record: dict[str, Any] = {"name": self.name, "offset": self.offset, "size": self.size}
        if self.label is not None:
            record["label"] = self.label
        return {**record, "archive": self.archive} if with_archive else record


def find_archives(source: PathLike) -> list[Path]:
    """The tar archives that a path names, sorted: itself, those in a folder that holds some, or those of a pattern.

    Raises:
        ArchiveError: a compressed archive, in which nothing can be read in place; a folder with pictures beside its
            archives; two archives of one file name, by which an index knows them.
    """
    path = Path(source)
    if path.name.lower().endswith(_COMPRESSED) and path.is_file():
        raise ArchiveError(f"{path}: a compressed archive cannot be read in place; unpack it to .tar, or to a folder")
    if path.is_dir():
        found = sorted(p for p in path.glob("*.tar") if p.is_file() and not _hidden(p.name))
        loose = next((p for p in walk(path) if p.suffix.lower() in readable_extensions()), None) if found else None
        if loose is not None:
            raise ArchiveError(
                f"{path} holds archives and pictures ({found[0].name}, {loose.relative_to(path)}); name the archives, "
                f"{path}/*.tar, or move them out of the pictures' folder"
            )
        return found
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    text = os.fspath(source)
    found = sorted(Path(p) for p in glob.glob(text) if p.endswith(".tar")) if glob.has_magic(text) else []
    by_name: dict[str, Path] = {}
    for archive in found:
        if by_name.setdefault(archive.name, archive) is not archive:
            raise ArchiveError(
                f"{text}: {by_name[archive.name]} and {archive} have one file name, by which an index knows archives; "
                "rename one"
            )
    return found


def scan(path: Path) -> list[Entry]:
    """Every picture of an archive, those of archives inside it as well, by reading all headers.

    A member counts as a picture, and hidden ones do not, as files in a folder do (see find_images). A member KEY.cls
    beside KEY.jpg holds the label, as in webdatasets.

    Raises:
        ArchiveError: cut short, compressed, or no tar archive.
    """
    with open(path, "rb") as file:
        entries = list(_scan(file, path, "", os.path.getsize(path)))
    if not entries:
        raise ArchiveError(f"{path}: no picture in it that Pillow recognises (.jpg, .png, .webp ...)")
    return entries


def _scan(file: BinaryIO, path: Path, inside: str, end: int) -> Iterator[Entry]:
    """Entries of the archive that starts at the file's position and ends by `end`."""
    where = f"{path}" + (f", in its member {inside}" if inside else "")
    try:
        archive = tarfile.TarFile(fileobj=file, mode="r")
    except tarfile.TarError as error:
        raise ArchiveError(f"{where}: no uncompressed tar archive ({error}); unpack .tar.gz to .tar") from error
    labels: dict[str, int] = {}
    pictures: list[tuple[str, int, int]] = []
    inner: list[tuple[str, int, int]] = []
    try:
        for member in archive:
            if not member.isfile() or _hidden(member.name):
                continue
            if member.offset_data + member.size > end:
                raise ArchiveError(f"{where}: cut short in {member.name}; fetch the archive again")
            stem, ending = os.path.splitext(member.name)
            place = (member.name, member.offset_data, member.size)
            if ending == ".tar":
                inner.append(place)
            elif ending == ".cls":
                file.seek(member.offset_data)
                said = file.read(member.size)
                try:
                    labels[stem] = int(said)
                except ValueError as error:
                    text = f"{where}: {member.name} holds {said[:20]!r}; expected the number of a class"
                    raise ArchiveError(text) from error
            elif ending.lower() in readable_extensions() or recognised(cast(BinaryIO, archive.extractfile(member))):
                pictures.append(place)
        file.seek(archive.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ArchiveError(f"{where}: its end is missing, so it is cut short; fetch the archive again")
    except tarfile.TarError as error:
        raise ArchiveError(f"{where}: {error}, so it is damaged or cut short; fetch the archive again") from error
    prefix = f"{os.path.splitext(inside)[0]}/" if inside else ""
    for name, offset, size in pictures:
        yield Entry(prefix + name, offset, size, path.name, labels.get(os.path.splitext(name)[0]))
    for name, offset, size in inner:
        file.seek(offset)
        yield from _scan(file, path, prefix + name, offset + size)


def _hidden(name: str) -> bool:
    """Whether the file or a folder above it begins with a dot; macOS puts ._NAME.jpg beside every NAME.jpg."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def read_index(index: PathLike, archives: list[Path]) -> list[Entry]:
    """The entries of a JSON index, after a comparison with the archives: sizes of all, headers of some.

    Raises:
        FileNotFoundError: no such index, or it names an archive that is not there.
        ArchiveError: not an index, or of other archives, or an archive is cut short.
    """
    try:
        records = json.loads(Path(index).read_text())
        entries = [
            Entry(r["name"], int(r["offset"]), int(r["size"]), r.get("archive", archives[0].name), r.get("label"))
            for r in records
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(
            f'{index}: no index ({type(error).__name__}: {error}); expected a JSON list of {{"name", "offset", "size"}}'
            ", which python -m flowmo.data.index writes"
        ) from error
    if not entries:
        raise ArchiveError(f"{index}: the index is empty; write it with python -m flowmo.data.index")
    by_name = {path.name: path for path in archives}
    missing = sorted({e.archive for e in entries} - by_name.keys())
    if missing:
        raise FileNotFoundError(f"{index} names archives that data.path does not hold: {', '.join(missing[:5])}")
    again = "fetch the archive again, or write the index of this one with python -m flowmo.data.index"
    sizes = {name: path.stat().st_size for name, path in by_name.items()}
    last = max(entries, key=lambda e: e.offset + e.size - sizes[e.archive])
    if last.offset + last.size > sizes[last.archive]:
        raise ArchiveError(
            f"{by_name[last.archive]} has {sizes[last.archive]} bytes, and {index} places {last.name} up to byte "
            f"{last.offset + last.size}: the archive is cut short or the index is of another; {again}"
        )
    for i in np.unique(np.linspace(0, len(entries) - 1, _CHECKED).round().astype(int)):
        _compare(entries[i], by_name[entries[i].archive], index, again)
    return entries


def _compare(entry: Entry, path: Path, index: PathLike, again: str) -> None:
    """Raises ArchiveError unless the header in front of an entry is that of a member of its name and size."""
    with open(path, "rb") as file:
        file.seek(max(0, entry.offset - _BLOCK))
        block = file.read(_BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError as error:
        raise ArchiveError(
            f"{path} has no member at byte {entry.offset}, where {index} places {entry.name}; {again}"
        ) from error
    same_name = PurePosixPath(header.name).name[:90] == PurePosixPath(entry.name).name[:90]  # long ones are cut there
    if header.size != entry.size or not same_name:
        raise ArchiveError(
            f"{path} holds {header.name} of {header.size} bytes where {index} places {entry.name} of {entry.size}; "
            f"{again}"
        )


class ArchiveImages(Pictures):
    """Crops of the pictures in tar archives, in an order that does not depend on how the archives were packed.

    Crops, damaged members and indexing are as in ImageFolder. Entries are sorted by file name, as the release does.
    Headers are checked at the start, the pictures when they are decoded.

    Args:
        source: a .tar file, a folder of them, or a pattern such as "shards/train-*.tar".
        index: JSON index (see the module); None reads all headers now, which for ImageNet takes minutes.
        image_size, crop, flip, seed, min_side, as_uint8: as for ImageFolder.

    Attributes:
        paths: "ARCHIVE/NAME" of each picture. labels: what the archive says, else the index of its class in `classes`
            (ImageNet's synsets, or first folders, sorted), else -1. archives: how many there are.

    Raises:
        FileNotFoundError: no archive there. ArchiveError: cut short, or an index of another archive.
    """

    def __init__(
        self,
        source: PathLike,
        image_size: int,
        *,
        index: PathLike | None = None,
        crop: Literal["random", "center"] = "random",
        flip: bool = False,
        seed: int = 0,
        min_side: int | None = None,
        as_uint8: bool = False,
    ) -> None:
        self._set(source, image_size, crop, flip, seed, min_side, as_uint8)
        archives = find_archives(source)
        if not archives:
            raise FileNotFoundError(f"no tar archive at {source}: name a .tar file, a folder of them, or a pattern")
        if index is not None:
            if not Path(index).is_file():
                raise FileNotFoundError(f"no such index: {index}; write it with python -m flowmo.data.index")
            entries = read_index(index, archives)
        else:
            entries = [entry for archive in archives for entry in scan(archive)]
        entries.sort(key=lambda e: (PurePosixPath(e.name).name, e.name, e.archive))
        self._files = {path.name: path for path in archives}
        self.archives = len(archives)
        self._archives = [e.archive for e in entries]
        self._offsets = np.array([e.offset for e in entries], dtype=np.int64)
        self._sizes = np.array([e.size for e in entries], dtype=np.int64)
        self.paths = [f"{e.archive}/{e.name}" for e in entries]
        self.classes = sorted({g for e in entries if e.label is None and (g := e.group) is not None})
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [e.label if e.label is not None else number.get(e.group or "", -1) for e in entries]

    def read(self, at: int) -> Image.Image:
        size = int(self._sizes[at])
        # Opened anew, as a picture of a folder is: shards may be more than a process can keep open, threads may read.
        with open(self._files[self._archives[at]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self._offsets[at]))
        if len(data) != size:
            raise ImageReadError(self.paths[at], "the archive ends inside it")
        return decode_image(io.BytesIO(data), self.paths[at])

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{len(self)} pictures of {len(set(self.labels))} classes in {len(self._files)} archives at {self.root}, "
            f"{self.crop} crops of {self.image_size} x {self.image_size}, {len(self.skipped)} skipped"
        )
