"""Score reconstructions or generated pictures, and save the protocol with the numbers.

reconstructions of a model, a run or anyone's function:
  python -m flowmo.evaluate --checkpoint C --data D --inception pt_inception-2015-12-05-6726825d.pth ...
  python -m flowmo.evaluate --checkpoint C --data ILSVRC2012_img_val.tar ...
  python -m flowmo.evaluate --tokenizer mymodel:reconstruct --size 256 --data D ...
  python -m flowmo.evaluate --watch runs/lo --data D --limit 5000 ...
generated pictures, from an .npz (arr_0), a folder or a tar archive:
  python -m flowmo.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception W
D: a folder, a tar archive (flat or with folders, also a tar of tars), a folder or pattern of shards; read in place.
on several cards: torchrun --nproc-per-node 8 -m flowmo.evaluate ...
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from flowmo import FlowMo, cli
from flowmo.evaluation import (
    ArchivePictures,
    FlowMoTokenizer,
    FolderPictures,
    ForeignTokenizer,
    Judges,
    Processes,
    SamplePictures,
    Scores,
    open_images,
    open_pictures,
    score_generation,
    score_reconstruction,
    spaced,
)
from flowmo.evaluation.generation import MEASURES
from flowmo.evaluation.reconstruction import PROTOCOLS, protocol_lines
from flowmo.evaluation.watch import Watch, follow
from flowmo.files import atomic_write
from flowmo.perceptual import WeightsMissing, load_inception, load_lpips, random_lpips
from flowmo.perceptual.weights import sha256_of
from flowmo.pretrained import weights_file
from flowmo.training.loop import resolve_device

SKIPPABLE = ("fid", "lpips-vgg", "lpips-alex", "sfid", "inception_score", "precision_recall")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    subjects = [n for n in ("checkpoint", "tokenizer", "watch", "samples") if getattr(options, n) is not None]
    if len(subjects) != 1:
        raise ValueError("name one thing to score: --checkpoint C, --tokenizer module:callable, --watch RUN or "
                         f"--samples S; got {', '.join('--' + s for s in subjects) or 'none'}")  # fmt: skip
    options.skip = skipped_measures(options.skip)
    cli.at_least(1, options, "batch", "limit", "size", "steps")
    if subjects != ["watch"]:  # which writes into its run
        output_file(options.out or Path("evaluation.json"))
    processes = Processes()
    try:
        device = torch.device(resolve_device(options.device))
        if device.type == "cuda" and device.index is None and processes.world > 1:
            device = torch.device("cuda", processes.local_rank % torch.cuda.device_count())
        if subjects == ["samples"]:
            evaluate_samples(options, processes, device)
        else:
            evaluate_reconstructions(options, subjects[0], processes, device)
    finally:
        processes.close()
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.evaluate", description=__doc__, formatter_class=cli.Help)
    p.add_argument("--checkpoint", help="released .pth, model folder, .safetensors or run")
    p.add_argument(
        "--tokenizer",
        metavar="MODULE:CALLABLE",
        help="a function from pictures [B, 3, H, W] in [-1, 1] to such pictures, or to (pictures, tokens)",
    )
    p.add_argument("--watch", type=Path, metavar="RUN", help="score each model that a training run saves")
    p.add_argument("--samples", help="generated pictures: .npz with arr_0, a folder or a tar archive")
    p.add_argument("--reference", help="of --samples: reference .npz of the ADM evaluator, folder or archive")
    p.add_argument("--vocabulary", type=int, help="number of codes of a --tokenizer that returns tokens")
    p.add_argument("--steps", type=int, help="sampler steps; default: the model's own, 25 unless distilled")
    p.add_argument("--rho", type=float, help="time spacing, 1 is even; default: the model's own, 4")
    p.add_argument("--guidance", type=float, help="guidance weight, 1 is off; default: the model's own, 1.5")
    p.add_argument("--out", type=Path, help="JSON of the result; default evaluation.json; a watch writes to its run")
    p.add_argument("--best-by", help="of --watch: the measure that decides; default rfid, or psnr without it")
    p.add_argument("--interval", type=float, default=30.0, help="of --watch: seconds between looks")
    p.add_argument("--once", action="store_true", help="of --watch: score what is there, then end")
    add_shared_options(p)
    return p


def add_shared_options(p: argparse.ArgumentParser) -> None:
    """Options that say on which pictures and by which judges."""
    p.add_argument("--data", help="pictures: a folder, tar archives, or 'samples' for the held-out photographs")
    p.add_argument("--index", type=Path, help="of --data's archives, as python -m flowmo.data.index writes it")
    p.add_argument("--size", type=int, help="side of the crops; by default the model's. Larger ones go in tiles")
    p.add_argument("--limit", type=int, help="take so many pictures, evenly spaced")
    p.add_argument("--protocol", default="rounded", choices=PROTOCOLS, help="released: as the authors' evaluation")
    p.add_argument("--inception", metavar="PATH", help="Inception weights, or 'random' for an untrained network")
    for net in ("vgg", "alex"):
        p.add_argument(f"--lpips-{net}", metavar="PATH", help=f"weights of LPIPS's {net} trunk, or 'random'")
        p.add_argument(f"--lpips-{net}-heads", metavar="PATH", help="by default those inside torchmetrics")
    p.add_argument("--skip", default="", help=f"leave out, separated by commas: {', '.join(SKIPPABLE)}, lpips")
    p.add_argument("--batch", type=int, default=8, help="pictures at once")
    p.add_argument("--seed", type=int, default=0, help="of the starting noise")
    p.add_argument("--raw", action="store_true", help="of a released .pth: the raw weights, not the averaged ones")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA")
    p.add_argument("--workers", type=int, default=4, help="threads that read pictures")


def skipped_measures(text: str) -> tuple[str, ...]:
    """The measures named by --skip; "lpips" stands for both.

    Raises ValueError for other words.
    """
    words = [w for part in text.split(",") if (w := part.strip())]
    words = [name for w in words for name in (("lpips-vgg", "lpips-alex") if w == "lpips" else (w,))]
    for word in words:
        if word not in SKIPPABLE:
            raise ValueError(f"--skip {word}: expected some of {', '.join(SKIPPABLE)}, lpips")
    return tuple(words)


def output_file(path: Path) -> None:
    """Check that the result can be written, not after hours of work. Raises OSError."""
    if path.is_dir():
        raise IsADirectoryError(f"--out {path}: this is a folder; name a file, such as {path / 'evaluation.json'}")
    cli.output_folder(path.parent)


def load_model(path: str | Path, options: argparse.Namespace, device: torch.device) -> FlowMo:
    """A model in the precision asked for."""
    fast = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if fast else torch.float32
    return FlowMo.from_pretrained(path, ema=not options.raw, device=device, dtype=dtype)


def load_pictures(options: argparse.Namespace, side: int) -> SamplePictures | FolderPictures | ArchivePictures:
    """The pictures of --data, cropped to side x side."""
    if options.data is None:
        raise ValueError("--data is not set: name a folder of pictures or a tar archive, or --data samples for a trial")
    return SamplePictures(side) if options.data == "samples" else open_images(options.data, side, options.index)


def load_judges(options: argparse.Namespace) -> Judges:
    """The networks that take part.

    Raises:
        WeightsMissing: one message that names every missing file and the ways on.
    """
    judges, missing, names = Judges(), [], []
    resize = "half_pixel" if options.protocol == "released" else "tf1"
    if "fid" not in options.skip:
        try:
            judges.inception = load_inception(options.inception, resize=resize)
        except WeightsMissing as error:
            missing.append(str(error))
            names.append("fid")
    for net in ("vgg", "alex"):
        weights, heads = getattr(options, f"lpips_{net}"), getattr(options, f"lpips_{net}_heads")
        if f"lpips-{net}" in options.skip:
            continue
        if weights == "random":
            judges.lpips[f"{net}_random"] = random_lpips(net=net)
            continue
        try:
            names_of_options = (f"--lpips-{net}", f"--lpips-{net}-heads")
            judges.lpips[net] = load_lpips(net, weights, heads, options=names_of_options, channels_last=True)
        except WeightsMissing as error:
            missing.append(f"{error}. Or go on without: --lpips-{net}=random takes an untrained network")
            names.append(f"lpips-{net}")
    if missing:
        raise WeightsMissing("\n".join([*missing, f"To leave these measures out: --skip {','.join(names)}"]))
    return judges


def random_judges(judges: Judges) -> list[str]:
    """Names of the untrained networks among them."""
    names = [f"lpips_{name}" for name in judges.lpips if name.endswith("_random")]
    return names + (["inception"] if judges.inception is not None and not judges.inception.published else [])


def evaluate_reconstructions(
    options: argparse.Namespace, subject: str, processes: Processes, device: torch.device
) -> None:
    judges = load_judges(options).to(device)
    pictures_of = lru_cache(maxsize=1)(partial(load_pictures, options))  # a watch lists them, or reads headers, once

    def evaluate(tokenizer: FlowMoTokenizer | ForeignTokenizer, side: int, source: dict[str, Any]) -> dict[str, Any]:
        pictures = pictures_of(side)
        indices = spaced(len(pictures), options.limit)
        scores = score_reconstruction(
            tokenizer, pictures, judges, indices=indices, batch=options.batch, protocol=options.protocol,
            processes=processes, device=device, workers=options.workers, progress=True,
        )  # fmt: skip
        if scores is None:
            return {}
        subset = f"{len(indices)} of {len(pictures)}, evenly spaced" if len(indices) < len(pictures) else "all"
        protocol = {
            **source, **tokenizer.describe(), **pictures.describe(), "subset": subset,
            **protocol_lines(options.protocol), **surroundings(options, judges, processes, device),
            "skipped pictures": scores.skipped,
        }  # fmt: skip
        return {"metrics": reconstruction_metrics(scores, judges), "protocol": protocol}

    def load(path: str | Path) -> tuple[FlowMoTokenizer, int, dict[str, Any]]:
        model = load_model(path, options, device)
        tokenizer = FlowMoTokenizer(
            model, side=options.size, seed=options.seed, batch=options.batch,
            steps=options.steps, rho=options.rho, guidance=options.guidance,
        )  # fmt: skip
        source = {"checkpoint": str(path), "weights": "raw" if options.raw else "averaged where the file has both"}
        if file := weights_file(path):
            source["sha256"] = sha256_of(file)
        return tokenizer, tokenizer.side, source

    if subject == "watch":
        measure = options.best_by or ("rfid" if judges.inception is not None else "psnr")

        def score(weights: Path) -> dict[str, Any]:
            result = evaluate(*load(weights))
            return {**result, "metrics": finite(result["metrics"])} if result else {}

        def keep(weights: Path, folder: Path) -> None:
            FlowMo.from_pretrained(weights).save_pretrained(folder)

        watch = Watch(options.watch, measure) if processes.main else None
        follow(watch, processes, score, keep, interval=options.interval, once=options.once)
        return
    if subject == "tokenizer":
        if options.size is None:
            raise ValueError("--size is not set: name the side of the pictures that the --tokenizer takes")
        foreign = ForeignTokenizer.named(
            options.tokenizer, vocabulary=options.vocabulary, device=device, seed=options.seed
        )
        result = evaluate(foreign, options.size, {})
    else:
        result = evaluate(*load(options.checkpoint))
    if processes.main:
        report(result, options.out or Path("evaluation.json"))


def reconstruction_metrics(scores: Scores, judges: Judges) -> dict[str, float]:
    """The numbers, with those of an untrained Inception named so."""
    metrics = scores.summary()
    if "inception" in random_judges(judges):
        for name in ("rfid", "inception_distance"):
            if name in metrics:
                metrics[f"{name}_random"] = metrics.pop(name)
    return metrics


def evaluate_samples(options: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    if options.reference is None:
        raise ValueError("--reference is not set: name the reference .npz of the ADM evaluator, or a folder")
    if set(MEASURES) <= set(options.skip):
        raise ValueError("--skip leaves nothing to compute")
    inception = load_inception(options.inception).to(device)
    scored = score_generation(
        open_pictures(options.samples, options.size), open_pictures(options.reference, options.size), inception,
        skip=options.skip, limit=options.limit, batch=options.batch, processes=processes, device=device,
        workers=options.workers, progress=True,
    )  # fmt: skip
    if scored is None:
        return
    metrics, protocol = scored
    if not inception.published:
        metrics = {name if name == "samples" else f"{name}_random": value for name, value in metrics.items()}
    judges = Judges(inception=inception)
    result = {"metrics": metrics, "protocol": {**protocol, **surroundings(options, judges, processes, device)}}
    report(result, options.out or Path("evaluation.json"))


def surroundings(
    options: argparse.Namespace, judges: Judges, processes: Processes, device: torch.device
) -> dict[str, Any]:
    """What else a number may depend on."""
    import flowmo

    return {
        "left out": list(options.skip),
        "untrained networks": random_judges(judges),
        "batch": options.batch,
        "processes": processes.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "kernels": cli.kernels().removeprefix("kernels: "),
        "versions": {
            "flowmo": flowmo.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def report(result: dict[str, Any], path: Path) -> None:
    """Print the numbers and the protocol, and save them; numbers that JSON does not know become null."""
    print("\n".join(table(result["metrics"])))
    for name, value in result["protocol"].items():
        if value not in (None, [], {}):
            print(f"  {name}: {value}")
    if random := result["protocol"].get("untrained networks"):
        print(
            f"numbers named `random` come from untrained networks ({', '.join(random)}): no published number compares"
        )
    text = json.dumps({**result, "metrics": finite(result["metrics"])}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda name: Path(name).write_text(text))
    print(f"saved: {path}")


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """The numbers, None for an infinite PSNR."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def table(metrics: dict[str, float]) -> Sequence[str]:
    """One line a number."""
    width = max(map(len, metrics))
    return [f"{name:<{width}}  {value:.6g}" for name, value in metrics.items()]


if __name__ == "__main__":
    cli.run(main)
