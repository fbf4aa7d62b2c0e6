"""Stage 2 from end to end, in minutes on a CPU: python -m flowmo.generator.quickstart [--tokenizer T] [--out DIR]

Ten of the built-in photographs are tokenized, a small generator learns them by heart with the photograph as the class,
and pictures are drawn of every class. Judged: the photograph nearest to each drawn picture is the one asked for.
It shows that all parts work together; ten photographs teach no generator what the world looks like.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowmo import FlowMo, cli, generate, tokenize
from flowmo.config import parse
from flowmo.data import heldout_photographs, make_grid, normalize, resize_shorter, save_png, train_photographs
from flowmo.data.tokens import TokenCache, picture_views
from flowmo.files import atomic_write
from flowmo.pretrained import shipped_weights
from flowmo.training.loop import Trainer

TWIN = "stereo_motorcycle_right"  # shows the scene of another photograph, which no judge could tell apart
CROP = "center+flip"
TEMPERATURE = "1"  # as the preset has it for few tokens


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    tokenizer = options.tokenizer or shipped_weights("quickstart")
    if tokenizer is None:
        raise FileNotFoundError(
            "this copy of flowmo ships no tokenizer weights; train one (python -m flowmo.train, five minutes) and name "
            "it with --tokenizer runs/quickstart"
        )
    out: Path = options.out
    photographs = {k: v for k, v in {**train_photographs(), **heldout_photographs()}.items() if k != TWIN}
    for name, photograph in photographs.items():
        save_png(resize_shorter(photograph, min(256, *photograph.size)), out / "photographs" / name / f"{name}.png")
    started = time.perf_counter()
    tokenize.main(
        [str(out / "photographs"), "--checkpoint", str(tokenizer), "--out", str(out / "tokens"), "--crop", CROP,
         "--device", "cpu"]
    )  # fmt: skip
    cache = TokenCache.open(out / "tokens")
    train(cache, tokenizer, out / "generator", options.steps, options.seed)
    generate.main(
        ["--tokenizer", str(tokenizer), "--generator", str(out / "generator"), "--out", str(out / "samples"),
         "--n", str(options.n), "--seed", str(options.seed), "--temperature", TEMPERATURE, "--decoder-steps", "8",
         "--overwrite", "--device", "cpu"]
    )  # fmt: skip
    seconds = time.perf_counter() - started

    size = cache.header.image_size
    views = {name: normalize(picture_views(photographs[name], size, CROP)) for name in cache.header.classes}
    with np.load(out / "samples" / "samples.npz") as archive:
        pictures = normalize(torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2))
        labels = torch.from_numpy(archive["arr_1"])
    nearest, error = judge(pictures, list(views.values()))
    right = nearest == labels
    able = tokenizer_alone(tokenizer, list(views.values()), options.seed)
    print(f"\n{'asked for':24}{'shown':>10}{'PSNR, dB':>12}{'the tokenizer alone':>22}")
    for label, name in enumerate(views):
        mine = labels == label
        psnr = -10 * math.log10(float(error[mine].mean()) / 4)
        alone = f"{able[label]} of {len(views[name])}"
        print(f"{name:24}{f'{int(right[mine].sum())} of {int(mine.sum())}':>10}{psnr:>12.2f}{alone:>22}")
    rows = [torch.cat([v[:1], pictures[labels == i]]) for i, v in enumerate(views.values())]
    path = save_png(make_grid(rows, list(views), scale=2), out / "grid.png")
    met = bool(right.all())
    print(f"{int(right.sum())} of {len(labels)} pictures show the photograph asked for, after {seconds:.0f} s")
    print(f"  {'met' if met else 'NOT MET'}: the nearest photograph is the one asked for, in every class")
    blurred = [name for name, count, v in zip(views, able, views.values()) if count < len(v)]
    if blurred:
        print(
            f"  the tokenizer's own reconstructions of {', '.join(blurred)} are nearest to another photograph: "
            "train the tokenizer for longer"
        )
    print(f"wrote {path}: the photograph, then pictures drawn of it")
    result = {
        "seconds": round(seconds, 1),
        "pictures": len(labels),
        "right": int(right.sum()),
        "right_of_tokenizer_alone": dict(zip(views, able)),
        "right_by_class": {name: int(right[labels == i].sum()) for i, name in enumerate(views)},
        "met": met,
    }
    atomic_write(out / "result.json", lambda name: Path(name).write_text(json.dumps(result, indent=2) + "\n"))
    return 0 if met else 1


def train(cache: TokenCache, tokenizer: str | Path, run: Path, steps: int, seed: int) -> None:
    """A small generator of the cache's tokens, in a run folder: what `python -m flowmo.train` would do."""
    layout, classes = cache.header.layout, cache.header.classes
    sizes = {"tokens": layout.tokens, "bits": layout.bits, "vocabulary": layout.vocabulary, "classes": len(classes)}
    config = parse(
        ["maskgit-quickstart", f"data.tokens={cache.folder}", f"run={run}", f"generator.tokenizer={tokenizer}",
         f"trainer.steps={steps}", f"trainer.seed={seed}", "trainer.device=cpu", "trainer.precision=fp32",
         *(f"generator.network.{name}={size}" for name, size in sizes.items())]
    )  # fmt: skip
    Trainer(config).fit()


def judge(
    pictures: Tensor,  # [N, 3, S, S]
    photographs: list[Tensor],  # each [W, 3, S, S], the views of one
) -> tuple[Tensor, Tensor]:  # [N] int64, [N]
    """The photograph that each picture is nearest to, and its mean squared distance from the nearest view of it."""
    distances = [((pictures[:, None] - views[None]) ** 2).flatten(2).mean(-1).amin(1) for views in photographs]
    error, nearest = torch.stack(distances, dim=1).min(dim=1)
    return nearest, error


def tokenizer_alone(tokenizer: str | Path, photographs: list[Tensor], seed: int) -> list[int]:
    """How many reconstructed views of each photograph are nearest to it: no generator can do better."""
    model = FlowMo.from_pretrained(tokenizer)
    counts = []
    for label, views in enumerate(photographs):
        noise = torch.Generator().manual_seed(seed)
        nearest, _ = judge(model.reconstruct(views, steps=8, generator=noise), photographs)
        counts.append(int((nearest == label).sum()))
    return counts


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m flowmo.generator.quickstart",
        description=__doc__,
        formatter_class=cli.Help,
    )
    p.add_argument("--tokenizer", help="model folder or run; default: the small weights that come along")
    p.add_argument("--out", type=Path, default=Path("runs/generator_quickstart"))
    p.add_argument("--steps", type=int, default=400, help="of training")
    p.add_argument("--n", type=int, default=4, help="pictures of each class")
    p.add_argument("--seed", type=int, default=0)
    return p


if __name__ == "__main__":
    cli.run(main)
