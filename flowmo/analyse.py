"""How distortion and perception of a model depend on its sampler; every study writes a CSV file and a picture.

python -m flowmo.analyse noise    --checkpoint C --data D    norm of the starting noise (paper, supplement C.1)
python -m flowmo.analyse steps    --checkpoint C --data D    number and spacing of the steps
python -m flowmo.analyse guidance --checkpoint C --data D    guidance weight, within the interval and everywhere
python -m flowmo.analyse modes    --checkpoint C --data D    several decodes of one code, their mean and spread
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmo import FlowMo, cli
from flowmo.data import make_grid, normalize, save_png
from flowmo.evaluate import (
    add_shared_options,
    load_judges,
    load_model,
    load_pictures,
    random_judges,
    reconstruction_metrics,
    skipped_measures,
)
from flowmo.evaluation import FlowMoTokenizer, Judges, Processes, score_reconstruction, spaced
from flowmo.evaluation.pictures import Pictures, read_batches
from flowmo.files import atomic_write
from flowmo.metrics import psnr
from flowmo.training.loop import resolve_device

logger = logging.getLogger("flowmo")

INTERVAL = (0.17, 1.02)
SHOWN_DECODES = 4  # of the modes picture

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.checkpoint is None:
        raise ValueError("--checkpoint is not set: name a released .pth, a model folder or a run")
    options.skip = skipped_measures(options.skip)
    cli.at_least(1, options, "batch", "limit", "size", "decodes")
    cli.output_folder(options.out)
    if importlib.util.find_spec("matplotlib") is None and options.study != "modes":
        raise ValueError("plots need matplotlib, which is not installed: pip install matplotlib")
    processes = Processes()
    try:
        device = resolve_device(options.device)
        if options.study == "modes":
            model = load_model(options.checkpoint, options, device)
            if processes.main:
                modes(options, model)
            return 0
        judges = load_judges(options).to(device)
        model = load_model(options.checkpoint, options, device)
        rows = sweep(options, model, judges, SETTINGS[options.study](options), processes, device)
        if processes.main:
            if random := random_judges(judges):
                print(f"columns named `random` come from untrained networks: {', '.join(random)}")
            write_csv(rows, options.out / f"{options.study}.csv")
            plot(options.study, rows, options.out / f"{options.study}.png")
    finally:
        processes.close()
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.analyse", description=__doc__, formatter_class=cli.Help)
    p.add_argument("study", choices=("noise", "steps", "guidance", "modes"))
    p.add_argument("--checkpoint", help="released .pth, model folder, .safetensors or run")
    p.add_argument("--out", type=Path, default=Path("analysis"), help="folder for the CSV file and the picture")
    p.add_argument("--scales", type=numbers, default=[0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1], help="of noise")
    p.add_argument(
        "--steps", type=integers, default=[1, 2, 4, 8, 16, 25, 50], help="of steps; else its 25, or the last"
    )
    p.add_argument("--rhos", type=numbers, default=[1.0, 2.0, 4.0], help="of steps")
    p.add_argument("--weights", type=numbers, default=[1.0, 1.25, 1.5, 2.0, 3.0], help="of guidance")
    p.add_argument("--decodes", type=int, default=8, help="of modes: decodes of each code")
    add_shared_options(p)
    return p


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _plain_steps(options: argparse.Namespace) -> int:
    """Steps of the studies that vary something else: the paper's 25 where they are among --steps."""
    return 25 if 25 in options.steps else options.steps[-1]


def noise_settings(options: argparse.Namespace) -> list[Row]:
    """Starting noise scaled from nothing, which aims at the mean of all pictures of a code, to beyond its own norm."""
    steps = _plain_steps(options)
    return [{"noise_scale": scale, "steps": steps} for scale in options.scales]


def steps_settings(options: argparse.Namespace) -> list[Row]:
    return [{"rho": rho, "steps": steps} for rho in options.rhos for steps in options.steps]


def guidance_settings(options: argparse.Namespace) -> list[Row]:
    steps = _plain_steps(options)
    return [
        {"guidance_interval": interval, "guidance": weight, "steps": steps}
        for interval in (INTERVAL, None)
        for weight in options.weights
    ]


SETTINGS = {"noise": noise_settings, "steps": steps_settings, "guidance": guidance_settings}


def sweep(
    options: argparse.Namespace,
    model: FlowMo,
    judges: Judges,
    settings: Iterable[Row],
    processes: Processes,
    device: torch.device,
) -> list[Row]:
    """A row of settings and scores for each setting, on the same pictures with the same noise; empty off the first
    process."""
    rows = []
    pictures: Pictures | None = None
    for setting in settings:
        tokenizer = FlowMoTokenizer(model, side=options.size, seed=options.seed, batch=options.batch, **setting)
        pictures = pictures or load_pictures(options, tokenizer.side)
        scores = score_reconstruction(
            tokenizer,
            pictures,
            judges,
            indices=spaced(len(pictures), options.limit),
            batch=options.batch,
            protocol=options.protocol,
            processes=processes,
            device=device,
            workers=options.workers,
        )
        if scores is not None:
            named = {k: "everywhere" if v is None else v for k, v in setting.items()}
            if isinstance(named.get("guidance_interval"), tuple):
                named["guidance_interval"] = "{} to {}".format(*named["guidance_interval"])
            rows.append({**named, **reconstruction_metrics(scores, judges)})
            logger.info("%s", ", ".join(f"{k} {v}" for k, v in named.items()) + f": PSNR {rows[-1]['psnr']:.2f} dB")
    return rows


def modes(options: argparse.Namespace, model: FlowMo) -> list[Row]:
    """modes.csv and modes.png of up to --limit pictures (4 by default), each decoded --decodes times.

    In the picture, the spread is the standard deviation over the decodes, the mean of the three colours, white at the
    largest one of all pictures. A blurred mean beside sharp decodes shows what the code leaves open.
    """
    if options.decodes < 2:
        raise ValueError(f"--decodes {options.decodes}: expected at least 2")
    steps = _plain_steps(options)
    tokenizers = [
        FlowMoTokenizer(model, side=options.size, seed=options.seed + k, batch=options.batch, steps=steps)
        for k in range(options.decodes)
    ]
    pictures: Pictures = load_pictures(options, tokenizers[0].side)
    limit = 4 if options.limit is None else options.limit
    skipped: list[str] = []
    rows: list[Row] = []
    tiles: list[Tensor] = []
    spreads: list[Tensor] = []
    for places, pixels in read_batches(pictures, spaced(len(pictures), limit), 1, skipped, options.workers):
        original = normalize(pixels)
        decodes = torch.cat([t(original, places).images.float().cpu() for t in tokenizers])
        mean, spread = decodes.mean(0, keepdim=True), decodes.std(0, keepdim=True).mean(1, keepdim=True)
        each = psnr(decodes, original.expand_as(decodes))
        rows.append(
            {
                "picture": pictures.names[places[0]],
                "decodes": len(decodes),
                "psnr_of_decodes": float(each.mean()),
                "psnr_of_mean": float(psnr(mean, original)),
                "variance": float(decodes.var(0).mean()),
                "spread_in_levels": float(spread.mean()) * 127.5,
                "largest_spread_in_levels": float(spread.max()) * 127.5,
            }
        )
        tiles.append(torch.cat([original, mean, decodes[:SHOWN_DECODES]]))
        spreads.append(spread)
    for text in skipped:
        logger.warning("passed over: %s", text)
    if not rows:
        raise ValueError("none of the pictures could be read")
    largest = max(float(s.max()) for s in spreads) or 1.0
    shown = [
        torch.cat([row[:2], (s / largest * 2 - 1).expand(-1, 3, -1, -1), row[2:]]) for row, s in zip(tiles, spreads)
    ]
    write_csv(rows, options.out / "modes.csv")
    columns = f"original, mean and spread of {options.decodes} decodes, and {len(shown[0]) - 3} of them"
    print(f"columns of {save_png(make_grid(shown), options.out / 'modes.png')}: {columns}; white is a spread of "
          f"{largest * 127.5:.1f} levels")  # fmt: skip
    return rows


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, under the names of all columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda name: Path(name).write_text(text.getvalue()))
    print(f"saved: {path}")


# study -> what varies along a line, and what tells the lines apart
_AXES = {"noise": ("noise_scale", None), "steps": ("steps", "rho"), "guidance": ("guidance", "guidance_interval")}
_LABELS = {
    "noise_scale": "norm of the starting noise, relative",
    "steps": "sampler steps",
    "guidance": "guidance weight",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "rfid": "rFID",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
}


def perception_of(row: Row) -> str:
    """The measure of perception that the plot shows: rFID, else an LPIPS, else SSIM."""
    for start in ("rfid", "lpips_alex", "lpips_vgg", "ssim"):
        for name in row:
            if name.startswith(start):
                return name
    raise ValueError(f"no measure of perception among {', '.join(row)}")


def plot(study: str, rows: Sequence[Row], path: Path) -> None:
    """Distortion and perception along the study's axis, and one against the other."""
    from matplotlib.figure import Figure

    axis, group = _AXES[study]
    perception = perception_of(rows[0])
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for name in dict.fromkeys(row[group] if group else "" for row in rows):
        line = [row for row in rows if not group or row[group] == name]
        label = f"{group.replace('_', ' ')} {name}" if group else None
        for ax, x, y in (
            (axes[0], axis, "psnr"),
            (axes[1], axis, perception),
            (axes[2], "psnr", perception),
        ):
            ax.plot([row[x] for row in line], [row[y] for row in line], marker="o", label=label)
            ax.set_xlabel(_LABELS.get(x, x))
            ax.set_ylabel(_LABELS.get(y, y.replace("_", " ")))
            ax.grid(alpha=0.3)
        for row in line:
            axes[2].annotate(
                f"{row[axis]:g}", (row["psnr"], row[perception]), (4, 4), textcoords="offset points", fontsize=7
            )
    if study == "steps":
        ticks = sorted({int(row["steps"]) for row in rows})
        for ax in axes[:2]:
            ax.set_xscale("log")
            ax.set_xticks(ticks, [str(n) for n in ticks])
            ax.minorticks_off()
    if group:
        axes[0].legend(fontsize=8)
    atomic_write(path, lambda name: figure.savefig(name, format="png", dpi=150))
    print(f"saved: {path}")


if __name__ == "__main__":
    cli.run(main)
