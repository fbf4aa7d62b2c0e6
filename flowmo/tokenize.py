"""Pictures to token files, or a data set to the token cache of Stage 2: python -m flowmo.tokenize DATA --out OUT

A token file for each picture, of any size, in overlapping tiles (python -m flowmo.detokenize brings them back):

    python -m flowmo.tokenize photo.jpg --out photo.flowmo                 with the small weights that come along
    python -m flowmo.tokenize photo.jpg --out photo.flowmo --checkpoint flowmo_lo.pth --size 256
    python -m flowmo.tokenize photos/ --files --out tokens/ --checkpoint flowmo_lo.pth

A token cache, made once:

    python -m flowmo.tokenize imagenet/train --checkpoint flowmo_lo.pth --out tokens/
    python -m flowmo.tokenize photos/ --checkpoint runs/lo --out tokens/ --crop ten-crop
    torchrun --nproc-per-node 8 -m flowmo.tokenize imagenet/train --checkpoint flowmo_lo.pth --out tokens/
    python -m flowmo.tokenize ILSVRC2012_img_train.tar --checkpoint flowmo_lo.pth --out tokens/

There DATA holds one folder, or one inner archive, of pictures to a class. The same command again goes on where it was
stopped. A continuous model (quantizer kl or none) has no tokens for a cache; its token files hold real numbers of 16
bits.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flowmo import FlowMo, cli
from flowmo.data import (
    ArchiveImages,
    ImageFolder,
    ImageReadError,
    center_crop,
    load_image,
    normalize,
    resize_shorter,
    to_tensor,
)
from flowmo.data.archive import find_archives
from flowmo.data.folder import Pictures
from flowmo.data.tokens import (
    CROPS,
    GROUPINGS,
    UNREADABLE,
    TokenCache,
    TokenHeader,
    TokenLayout,
    layout_of,
    picture_views,
)
from flowmo.format import SUFFIX, TokenFile, file_layout
from flowmo.pretrained import shipped_weights
from flowmo.reconstruct import collect, output_names
from flowmo.tiles import encode_tiles, grid_for
from flowmo.training.loop import resolve_device


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    cli.at_least(1, options, "batch", "size")
    cli.at_least(0, options, "overlap", "workers")
    archives = bool(find_archives(options.data))
    if not archives and not Path(options.data).exists():
        raise FileNotFoundError(f"no such file or folder: {options.data}")
    if options.files or options.out.suffix == SUFFIX or (Path(options.data).is_file() and not archives):
        return write_files(options)
    if options.checkpoint is None:
        raise ValueError("a token cache needs --checkpoint: name the tokenizer that Stage 2 will use")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = resolve_device(options.device)
    if world > 1:
        dist.init_process_group("gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    try:
        return run(options, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device, rank: int, world: int) -> int:
    fast = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if fast else torch.float32
    model = FlowMo.from_pretrained(options.checkpoint, dtype=torch.float32)
    layout = layout_of(model, options.grouping)
    model.to(device, dtype)
    if options.workers is None:  # without a card the encoder needs the processors itself
        options.workers = 8 if device.type == "cuda" else 0
    folder = open_pictures(options.data, model.config.image_size, options.index)
    header = TokenHeader(
        layout=layout,
        pictures=len(folder),
        views=CROPS[options.crop],
        crop=options.crop,
        image_size=model.config.image_size,
        dtype=str(dtype).removeprefix("torch."),
        classes=folder.classes,
        data=list_fingerprint(folder),
    )
    if rank == 0:
        cache = TokenCache.create(options.out, header, folder.labels)
    if world > 1:
        dist.barrier()
        if rank:
            cache = TokenCache.create(options.out, header, folder.labels)
    todo = cache.todo()
    if rank == 0:
        left = f", {len(todo)} of them still to do" if len(todo) < len(folder) else ""
        print(
            f"{len(folder)} pictures in {len(folder.classes)} classes{left}; {header.views} views ({header.crop}) of "
            f"{layout.tokens} tokens of {layout.bits} bits, tokenizer {layout.tokenizer[:12]}, {header.dtype} on "
            f"{device}; {cli.kernels()}",
            flush=True,
        )
    if world > 1:
        dist.barrier()  # nobody may mark pictures done before everybody has listed those that are not
    mine = todo[rank::world].tolist()
    bar = cli.Progress(len(mine), f" of this process, one of {world}" if world > 1 else "", shown=rank == 0)
    for indices, views, failed in view_batches(folder, mine, options):
        for index, reason in failed:
            tqdm.write(f"skipped: {folder.paths[index]} ({reason})", file=sys.stderr)
        cache.mark_unreadable([index for index, _ in failed])
        if indices:
            cache.write(indices, encode(model, layout, views, options.batch))
        bar.update(len(indices) + len(failed))
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        skipped = int((cache.state == UNREADABLE).sum())
        size = sum(f.stat().st_size for f in cache.folder.iterdir())
        note = f"; {skipped} could not be read and are left out" if skipped else ""
        print(f"wrote {cache.describe()}, {size:,} bytes{note}")
    return 0


def encode(
    model: FlowMo,
    layout: TokenLayout,
    views: Tensor,  # [n, W, 3, S, S] uint8
    batch: int,
) -> Tensor:  # [n, W, N] int64
    """Tokens of views, `batch` views at a time."""
    n, w = views.shape[:2]
    parts = views.flatten(0, 1).split(batch)
    tokens = [layout.encode(model.encode(normalize(part.to(model.device)))) for part in parts]
    return torch.cat(tokens).reshape(n, w, layout.tokens)


class PictureViews(Dataset[tuple[int, Tensor | str]]):
    """(index, its views [W, 3, S, S] uint8, or why it cannot be read), for some pictures of a folder."""

    def __init__(self, folder: Pictures, indices: Sequence[int], crop: str) -> None:
        self.folder, self.indices, self.crop = folder, indices, crop

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        index = int(self.indices[place])
        try:
            return index, picture_views(self.folder.read(index), self.folder.image_size, self.crop)
        except (ImageReadError, OSError) as error:
            return index, error.reason if isinstance(error, ImageReadError) else str(error)


Batch = tuple[list[int], Tensor, list[tuple[int, str]]]


def collate(items: list[tuple[int, Tensor | str]]) -> Batch:
    """Indices and views [n, W, 3, S, S] of the readable pictures, and (index, reason) of the others."""
    good = [(index, views) for index, views in items if isinstance(views, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    views = torch.stack([v for _, v in good]) if good else torch.empty(0, dtype=torch.uint8)
    return [index for index, _ in good], views, failed


def view_batches(folder: Pictures, indices: Sequence[int], options: argparse.Namespace) -> Iterator[Batch]:
    pictures = max(1, options.batch // CROPS[options.crop])
    data = PictureViews(folder, indices, options.crop)
    loader = DataLoader(data, pictures, num_workers=options.workers, collate_fn=collate, generator=torch.Generator())
    return iter(loader)


def open_pictures(source: str, size: int, index: Path | None) -> Pictures:
    """The pictures of a folder, or of tar archives: one, a folder of them, or a pattern."""
    if find_archives(source):
        return ArchiveImages(source, size, index=index, crop="center")
    if index is not None:
        raise ValueError(f"--index {index} is of tar archives, and {source} names none")
    return ImageFolder(source, size, crop="center", check_headers=False)


def list_fingerprint(folder: Pictures) -> str:
    """sha256 of the pictures' names and labels: the cache knows them by number alone."""
    if isinstance(folder, ImageFolder):
        root = folder.root if folder.root.is_dir() else folder.root.parent
        paths = [Path(p).relative_to(root).as_posix() for p in folder.paths]
    else:
        paths = list(folder.paths)
    names = [f"{path} {label}" for path, label in zip(paths, folder.labels)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def write_files(options: argparse.Namespace) -> int:
    """A token file for each picture; 1 where some could not be read."""
    logging.getLogger("flowmo.engine").setLevel(logging.WARNING)  # every picture size may make a plan
    inputs: list[tuple[Path, Path]]
    read: Callable[[Path], Image.Image]
    if find_archives(options.data):
        inputs, read = archive_members(ArchiveImages(options.data, 1, index=options.index))
    else:
        inputs, read = collect([options.data]), load_image
    names = {path: name.with_suffix(SUFFIX) for path, name in output_names(inputs).items()}
    one = len(inputs) == 1 and options.out.suffix == SUFFIX
    if options.out.suffix == SUFFIX and not one:
        raise ValueError(f"--out {options.out}: {len(inputs)} pictures need a folder")
    cli.output_folder(options.out.parent if one else options.out)
    model = open_model(options.checkpoint, options.device, "fp32")
    layout = file_layout(model)
    if options.precision == "bf16" or (options.precision == "auto" and model.device.type == "cuda"):
        model.to(torch.bfloat16)
    print(
        f"{len(inputs)} pictures, tokenizer {layout.tokenizer[:12]}, tiles of {model.config.image_size}, each "
        f"{model.config.describe_code()}, on {model.device}; {cli.kernels()}",
        flush=True,
    )
    failed = 0
    for path, _ in inputs:
        try:
            picture = read(path)
        except ImageReadError as error:
            if one:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        if options.size:
            picture = center_crop(resize_shorter(picture, options.size), options.size)
        grid = grid_for(model, picture.height, picture.width, options.overlap)
        codes = encode_tiles(model, to_tensor(picture), grid, options.batch)
        file = TokenFile.pack(grid, codes, layout)
        out = file.write(options.out if one else options.out / names[path])
        print(
            f"{path}  {grid.width} x {grid.height}, {grid.count} tiles, {len(file.payload):,} bytes of payload, "
            f"{file.bits_per_pixel:.4f} bits per pixel  -> {out}",
            flush=True,
        )
    return 1 if failed else 0


def archive_members(archive: ArchiveImages) -> tuple[list[tuple[Path, Path]], Callable[[Path], Image.Image]]:
    """The pictures of archives as :func:`collect` lists those of folders, and what reads one of them."""
    numbers: dict[Path, int] = {}
    inputs = []
    for i, path in enumerate(archive.paths):
        packed, *parts = PurePosixPath(path).parts
        inside = [part for part in parts if part not in ("/", "..")]  # nothing is written outside of --out
        numbers[Path(path)] = i
        inputs.append((Path(path), Path(*([Path(packed).stem] if archive.archives > 1 else []), *inside)))
    return inputs, lambda path: archive.read(numbers[path])


def open_model(checkpoint: str | None, device: str, precision: str) -> FlowMo:
    """The model of a command's options; without a checkpoint, the small weights that come along.

    Raises:
        FileNotFoundError: no checkpoint named, and none shipped.
    """
    if checkpoint is None:
        shipped = shipped_weights("quickstart")
        if shipped is None:
            raise FileNotFoundError("this copy of flowmo ships no weights; name a model with --checkpoint")
        print("no --checkpoint: using the small quickstart weights, which are no quality benchmark")
        checkpoint = str(shipped)
    place = resolve_device(device)
    fast = precision == "bf16" or (precision == "auto" and place.type == "cuda")
    return FlowMo.from_pretrained(checkpoint, device=place, dtype=torch.bfloat16 if fast else torch.float32)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.tokenize", description=__doc__, formatter_class=cli.Help)
    p.add_argument(
        "data", metavar="DATA", help="a picture, a folder or tar archives; for a cache, one sub-folder to a class"
    )
    p.add_argument("--checkpoint", help="the tokenizer: released .pth, model folder or run; a cache needs it named")
    p.add_argument("--out", required=True, type=Path, help="a .flowmo file, a folder of them, or that of the cache")
    p.add_argument("--files", action="store_true", help="of a folder, a .flowmo file for each picture, and no cache")
    p.add_argument("--size", type=int, help="files: scale and crop to a square of this side first; default: as it is")
    p.add_argument("--overlap", type=int, help="files: pixels that tiles overlap by; default: a quarter of a tile")
    p.add_argument("--crop", default="center+flip", choices=tuple(CROPS), help="the views of a picture")
    p.add_argument("--index", type=Path, help="of a tar archive, as python -m flowmo.data.index writes it")
    p.add_argument("--grouping", default="parity", choices=GROUPINGS, help="channels of a token")
    p.add_argument("--batch", type=int, default=64, help="views at once")
    p.add_argument("--workers", type=int, help="processes that read pictures; default: 8 with a card, 0 without")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA")
    return p


if __name__ == "__main__":
    cli.run(main)
