"""Send photographs through FlowMo and back: python -m flowmo.reconstruct INPUT... [--checkpoint C] [--out DIR]

python -m flowmo.reconstruct photo.jpg                       with the small weights that come along
python -m flowmo.reconstruct photos/ --checkpoint flowmo_lo.pth --out reconstructions
python -m flowmo.reconstruct photos/ --checkpoint flowmo_lo.pth --any-size    whole, in overlapping tiles, no seams
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flowmo import FlowMo, cli
from flowmo.data import ImageReadError, center_crop, find_images, load_image, resize_shorter, save_png, to_tensor
from flowmo.metrics import psnr
from flowmo.pretrained import shipped_weights
from flowmo.tiles import TileDecoder, encode_tiles, grid_for, reconstruct_tiled
from flowmo.training.loop import resolve_device

SMALLEST_SIDE = 128  # models of smaller pictures work in tiles


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.any_size and options.size is not None:
        raise ValueError("--any-size and --size: expected one of them")
    cli.at_least(1, options, "size", "batch", "steps")
    inputs = collect(options.inputs)  # what is wrong with the files is said before a large model is loaded
    names = output_names(inputs)
    cli.output_folder(options.out)
    if options.checkpoint is None:
        options.checkpoint = shipped_weights("quickstart")
        if options.checkpoint is None:
            raise FileNotFoundError("this copy of flowmo ships no weights; name a model with --checkpoint")
        print("no --checkpoint: using the small quickstart weights, which are no quality benchmark")
    device = resolve_device(options.device)
    fast = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if fast else torch.float32
    model = FlowMo.from_pretrained(options.checkpoint, device=device, dtype=dtype)
    side = options.size or max(
        model.config.image_size, SMALLEST_SIDE // model.config.image_size * model.config.image_size
    )
    if side % model.config.image_size:
        raise ValueError(f"--size {side}: expected a multiple of the model's {model.config.image_size} pixels")
    what = "in overlapping tiles" if options.any_size else f"at {side} x {side}"
    print(
        f"{len(inputs)} pictures {what}, {model.config.describe_code()}"
        f"{' of a tile' if options.any_size else ''}, on {device}; {cli.kernels()}"
    )
    scores: list[float] = []
    bar = tqdm(total=len(inputs), unit="picture", disable=not sys.stderr.isatty())
    sampler = {"steps": options.steps, "rho": options.rho, "guidance": options.guidance}
    if options.any_size:
        logging.getLogger("flowmo.engine").setLevel(logging.WARNING)  # every picture size may make a plan
        decoder = TileDecoder(model, options.batch, **sampler)
    for paths, images in batches(inputs, None, 1) if options.any_size else batches(inputs, side, options.batch):
        if options.any_size:
            grid = grid_for(model, *images.shape[-2:])
            codes = encode_tiles(model, images[0], grid, options.batch)
            out = torch.stack(decoder([(grid, codes)], seed=options.seed)).cpu()
        else:
            generator = torch.Generator().manual_seed(options.seed)
            out = reconstruct_tiled(model, images.to(device), generator=generator, **sampler).cpu()
        for path, picture, score in zip(paths, out, psnr(out, images)):
            save_png(picture, options.out / names[path])
            scores.append(float(score))
            tqdm.write(f"{path}  PSNR {score:.2f} dB  -> {options.out / names[path]}", file=sys.stdout)
        bar.update(len(paths))
    bar.close()
    if not scores:
        raise ValueError("none of the inputs could be read as a picture")
    print(f"mean PSNR {sum(scores) / len(scores):.2f} dB over {len(scores)} pictures")
    if len(scores) < len(inputs):
        print(f"{len(inputs) - len(scores)} of {len(inputs)} inputs were skipped, as said above", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.reconstruct", description=__doc__, formatter_class=cli.Help)
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures, or folders searched for them")
    p.add_argument(
        "--checkpoint", help="released .pth, model folder or run; default: the small weights that come along"
    )
    p.add_argument("--out", type=Path, default=Path("reconstructions"), help="folder for the PNG files")
    p.add_argument("--size", type=int, help="side in pixels, a multiple of the model's; larger ones go in tiles")
    p.add_argument("--any-size", action="store_true", help="pictures as they are, in overlapping tiles decoded jointly")
    p.add_argument("--batch", type=int, default=8, help="pictures at once; with --any-size, tiles")
    p.add_argument("--steps", type=int, help="Euler steps; default: the model's own, 25 unless distilled")
    p.add_argument("--rho", type=float, help="time spacing, 1 is even; default: the model's own, 4")
    p.add_argument("--guidance", type=float, help="guidance weight, 1 is off; default: the model's own, 1.5")
    p.add_argument("--seed", type=int, default=0, help="of the starting noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA")
    return p


def collect(inputs: list[str]) -> list[tuple[Path, Path]]:
    """Every picture with its path below the input that named it.

    Raises:
        FileNotFoundError: an input that does not exist, or a folder without pictures.
    """
    found: list[tuple[Path, Path]] = []
    for name in inputs:
        root = Path(name)
        pictures = find_images(root)
        if not pictures:
            raise FileNotFoundError(f"{root}: no pictures in this folder")
        found += [(path, path.relative_to(root) if root.is_dir() else Path(path.name)) for path in pictures]
    return found


def output_names(inputs: list[tuple[Path, Path]]) -> dict[Path, Path]:
    """Where each picture goes below --out: its own name, with its ending kept in the stem where two would collide."""
    taken: dict[Path, int] = {}
    for _, relative in inputs:
        taken[relative.with_suffix("")] = taken.get(relative.with_suffix(""), 0) + 1
    names = {}
    for path, relative in inputs:
        unique = taken[relative.with_suffix("")] == 1
        names[path] = relative.with_suffix(".png") if unique else relative.with_name(f"{relative.name}.png")
    if len(set(names.values())) < len(names):
        raise ValueError("two of the inputs have the same name; reconstruct them into different --out folders")
    return names


def batches(inputs: list[tuple[Path, Path]], side: int | None, batch: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of readable pictures [n, 3, side, side], or of their own sizes (one at a time) where `side` is None.

    Unreadable ones are named and passed over.
    """
    paths: list[Path] = []
    images: list[Tensor] = []
    for path, _ in inputs:
        try:
            picture = load_image(path)
            images.append(to_tensor(center_crop(resize_shorter(picture, side), side) if side else picture))
        except ImageReadError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        paths.append(path)
        if len(paths) == batch:
            yield paths, torch.stack(images)
            paths, images = [], []
    if paths:
        yield paths, torch.stack(images)


if __name__ == "__main__":
    cli.run(main)
