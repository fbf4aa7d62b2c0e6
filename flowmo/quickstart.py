"""The main job with no arguments: train from scratch on real photographs, then show what was learned.

Five minutes on two CPU cores make no tokenizer: the shipped weights, of a longer run of the same preset, stand
beside them. A dozen photographs are no quality benchmark either; the figures say that everything works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.config import Config
from flowmo.data import (
    CropSampler,
    center_crop,
    heldout_photographs,
    make_grid,
    resize_shorter,
    save_png,
    to_tensor,
    train_photographs,
)
from flowmo.files import atomic_write
from flowmo.metrics import mean_colour_baseline, psnr
from flowmo.pretrained import shipped_weights
from flowmo.tiles import reconstruct_tiled
from flowmo.training.loop import Trainer

SIDE = 128  # of the photographs shown, in pixels: 4 x 4 tiles of the model's 32
CROPS = 128
UNSEEN_SCALE = 128  # shorter side that the unseen crops are cut at


def run(config: Config) -> int:
    """Train (or resume, or find trained), print the figures, write RUN/reconstructions.png and RUN/result.json."""
    heldout = heldout_photographs()
    trainer = Trainer(config, samples=pictures(heldout))
    trainer.fit()
    if not trainer.finished:
        return 0
    result = show(trainer, heldout)
    atomic_write(trainer.run / "result.json", lambda name: Path(name).write_text(json.dumps(result, indent=2) + "\n"))
    return 0


def pictures(photographs: Mapping[str, Image.Image]) -> Tensor:  # [N, 3, SIDE, SIDE]
    """Centre crops in [-1, 1]."""
    return torch.stack([to_tensor(center_crop(resize_shorter(p, SIDE), SIDE)) for p in photographs.values()])


def show(trainer: Trainer, heldout: Mapping[str, Image.Image]) -> dict[str, object]:
    config, run = trainer.config, trainer.run
    originals = pictures(heldout)
    baseline = psnr(mean_colour_baseline(originals), originals)
    models = {"this run": trainer.averaged()}
    weights = shipped_weights("quickstart")
    if weights is not None:
        models["shipped weights"] = FlowMo.from_pretrained(weights, device=trainer.device, dtype=torch.float32)
    rows = {name: reconstruct(model, originals, config) for name, model in models.items()}
    scores = {name: psnr(row, originals) for name, row in rows.items()}

    print(f"\nheld-out photographs at {SIDE} x {SIDE}, {config.model.describe_code()}, PSNR in dB:")
    print(f"  {'':24}{'mean colour':>14}" + "".join(f"{name:>18}" for name in rows))
    for i, name in enumerate(heldout):
        print(f"  {name:24}{baseline[i]:14.2f}" + "".join(f"{s[i]:18.2f}" for s in scores.values()))
    print(f"  {'mean':24}{baseline.mean():14.2f}" + "".join(f"{s.mean():18.2f}" for s in scores.values()))

    crops = unseen_crops(config)
    crop_baseline = float(psnr(mean_colour_baseline(crops), crops).mean())
    crop_score = float(psnr(reconstruct(models["this run"], crops, config), crops).mean())
    first, last = trainer.first_loss or math.nan, last_flow(run)
    bars = {
        f"flow loss {first:.4f} to {last:.4f}, under a quarter": last < first / 4,
        f"unseen crops of the training photographs {crop_score:.2f} dB, mean colour {crop_baseline:.2f} dB, "
        "above it": crop_score > crop_baseline,
    }
    if weights is not None:
        gain = float((scores["shipped weights"] - baseline).mean())
        bars[f"shipped weights {gain:.2f} dB above the mean colour on held-out photographs, at least 4"] = gain >= 4
    print(f"trained {trainer.step} steps in {trainer.seconds:.0f} s")
    for text, met in bars.items():
        print(f"  {'met' if met else 'NOT MET'}: {text}")

    train = pictures(train_photographs())
    grid_rows = [torch.cat([originals, train])]
    grid_rows += [torch.cat([rows[n], reconstruct(m, train, config)]) for n, m in models.items()]
    path = save_png(make_grid(grid_rows, ["original", *models], scale=1, separator=4), run / "reconstructions.png")
    print(f"wrote {path}: {len(originals)} held-out photographs, then {len(train)} of the training ones")
    print(f"a photograph of yours: python -m flowmo.reconstruct PHOTO --checkpoint {run} --any-size")
    print("by the shipped weights: the same without --checkpoint; all commands: python -m flowmo")
    return {
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "bits_per_pixel": config.model.bits_per_pixel,
        "psnr": {name: {k: round(float(v), 3) for k, v in zip(heldout, s)} for name, s in scores.items()},
        "psnr_mean_colour": {k: round(float(v), 3) for k, v in zip(heldout, baseline)},
        "unseen_crops": {"psnr": round(crop_score, 3), "mean_colour": round(crop_baseline, 3)},
        "flow_loss": {"first": first, "last": last},
        "bars": bars,
    }


def unseen_crops(config: Config) -> Tensor:  # [CROPS, 3, S, S]
    """Crops of the training photographs from the columns that no training crop touches."""
    rest = (config.data.columns[1], 1.0)
    sampler = CropSampler(
        train_photographs(), config.model.image_size, CROPS, seed=1, scales=[UNSEEN_SCALE], columns=rest
    )
    return next(sampler)


def reconstruct(model: FlowMo, images: Tensor, config: Config) -> Tensor:
    s = config.sampler
    out = reconstruct_tiled(
        model,
        images.to(model.device),
        steps=s.steps,
        rho=s.rho,
        guidance=s.guidance,
        guidance_interval=s.guidance_interval,
        generator=torch.Generator().manual_seed(config.trainer.seed),
    )
    return out.cpu()


def last_flow(run: Path) -> float:
    """Flow loss of the last two log lines, averaged."""
    lines = (run / "metrics.jsonl").read_text().splitlines()[-2:]
    return sum(json.loads(line)["flow"] for line in lines) / len(lines)
