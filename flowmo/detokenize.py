"""Token files back to pictures: python -m flowmo.detokenize INPUT... --out OUT [--checkpoint C]

    python -m flowmo.detokenize photo.flowmo --out photo.png             with the small weights that come along
    python -m flowmo.detokenize tokens/ --out pictures/ --checkpoint flowmo_lo.pth
    python -m flowmo.detokenize photo.flowmo --out fast.png --checkpoint flowmo_lo.pth --steps 10 --solver dpm
    python -m flowmo.detokenize photo.flowmo --show                      what the file says, without a model

The model must be the one that made the files. Damaged files are named and passed over; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flowmo import cli
from flowmo.data import save_png
from flowmo.data.folder import readable_extensions
from flowmo.format import SUFFIX, TokenFile, TokenFileError, file_layout
from flowmo.solvers import SOLVERS
from flowmo.tiles import TileDecoder
from flowmo.tokenize import open_model

Readable = tuple[Path, TokenFile, Tensor]  # a file with its codes


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    logging.getLogger("flowmo.engine").setLevel(logging.WARNING)  # every picture size may make a plan
    inputs = collect_files(options.inputs)
    if options.show:
        for path, _ in inputs:
            print(f"{path}  {describe(TokenFile.read(path))}")
        return 0
    if options.out is None:
        raise ValueError("--out is not set: name a .png file, or a folder for several pictures")
    cli.at_least(1, options, "batch", "steps")
    suffix = options.out.suffix.lower()
    if suffix != ".png" and suffix in readable_extensions():
        raise ValueError(f"--out {options.out}: pictures are written as .png; name a .png file or a folder")
    one = len(inputs) == 1 and suffix == ".png"
    if suffix == ".png" and not one:
        raise ValueError(f"--out {options.out}: {len(inputs)} pictures need a folder")
    names = {path: options.out if one else options.out / relative.with_suffix(".png") for path, relative in inputs}
    if len(set(names.values())) < len(names):
        raise ValueError("two of the inputs have the same name; detokenize them into different --out folders")
    cli.output_folder(options.out.parent if one else options.out)
    if one:
        TokenFile.read(inputs[0][0])  # a damaged file is said before a large model is loaded

    model = open_model(options.checkpoint, options.device, "fp32")
    layout = file_layout(model)
    if options.precision == "bf16" or (options.precision == "auto" and model.device.type == "cuda"):
        model.to(torch.bfloat16)
    interval = None if options.guide_all else (0.17, 1.02)
    decoder = TileDecoder(
        model, options.batch, options.steps, options.rho, options.guidance, interval, solver=options.solver
    )
    print(
        f"{len(inputs)} files, tokenizer {layout.tokenizer[:12]}, {options.solver}, {decoder.schedule.steps} steps, "
        f"{decoder.schedule.forwards} forward passes a tile, on {model.device}; {cli.kernels()}",
        flush=True,
    )
    failed = 0

    def readable() -> Iterator[Readable]:
        nonlocal failed
        for path, _ in inputs:
            try:
                file = TokenFile.read(path)
                file.check(model, layout, str(path), options.any_tokenizer)
                codes = file.codes(layout, str(path))
            except TokenFileError as error:
                if one:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                failed += 1
                continue
            yield path, file, codes

    for group in groups(readable(), options.batch):
        pictures = decoder([(file.grid, codes) for _, file, codes in group], seed=options.seed)
        for (path, file, _), picture in zip(group, pictures):
            save_png(picture, names[path])
            print(f"{path}  {file.width} x {file.height}, {file.grid.count} tiles  -> {names[path]}", flush=True)
    return 1 if failed else 0


def collect_files(inputs: list[str]) -> list[tuple[Path, Path]]:
    """Every token file with its path below the input that named it.

    Raises:
        FileNotFoundError: an input that does not exist, or a folder without token files.
    """
    found: list[tuple[Path, Path]] = []
    for name in inputs:
        root = Path(name)
        if not root.is_dir():
            if not root.exists():
                raise FileNotFoundError(f"no such token file or folder: {root}")
            found.append((root, Path(root.name)))
            continue
        inside = sorted(path for path in root.rglob(f"*{SUFFIX}") if not path.name.startswith("."))
        if not inside:
            raise FileNotFoundError(f"{root}: no {SUFFIX} files in this folder; flowmo.tokenize --files makes them")
        found += [(path, path.relative_to(root)) for path in inside]
    return found


def groups(files: Iterator[Readable], tiles: int) -> Iterator[list[Readable]]:
    """Files that are decoded together: as many as have `tiles` tiles between them, or one that has more."""
    group: list[Readable] = []
    held = 0
    for item in files:
        count = item[1].grid.count
        if group and held + count > tiles:
            yield group
            group, held = [], 0
        group.append(item)
        held += count
    if group:
        yield group


def describe(file: TokenFile) -> str:
    return (
        f"{file.width} x {file.height} pixels, {file.grid.count} tiles of {file.tile} that overlap by {file.overlap}, "
        f"{file.describe_code()} each, {len(file.payload):,} bytes of payload, "
        f"{file.bits_per_pixel:.4f} bits per pixel, tokenizer {file.tokenizer[:12]}"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.detokenize", description=__doc__, formatter_class=cli.Help)
    p.add_argument("inputs", nargs="+", metavar="INPUT", help=f"{SUFFIX} files, or folders searched for them")
    p.add_argument("--out", type=Path, help="a .png file, or a folder for several pictures")
    p.add_argument(
        "--checkpoint", help="released .pth, model folder or run; default: the small weights that come along"
    )
    p.add_argument("--show", action="store_true", help="print what the files say and stop")
    p.add_argument("--any-tokenizer", action="store_true", help="let pass a model of the same sizes but other weights")
    p.add_argument("--batch", type=int, default=16, help="tiles at once")
    p.add_argument("--steps", type=int, help="of the sampler; default: the model's own, 25 unless distilled")
    p.add_argument("--rho", type=float, help="time spacing, 1 is even; default: the model's own, 4")
    p.add_argument("--solver", default="euler", choices=tuple(SOLVERS), help="of the flow")
    p.add_argument("--guidance", type=float, help="guidance weight, 1 is off; default: the model's own, 1.5")
    p.add_argument("--guide-all", action="store_true", help="guide every step, not those of the interval alone")
    p.add_argument("--seed", type=int, default=0, help="of the starting noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA")
    return p


if __name__ == "__main__":
    cli.run(main)
