"""Held-out data measured as training goes: the curve, the best weights, and when to stop.

A perceptual loss can be cheated: its own distance falls while pictures get worse. So PSNR stands beside it always, and
rFID, the published choice, can decide.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.config import HeldoutConfig
from flowmo.data import (
    ArchiveImages,
    ImageFolder,
    center_crop,
    heldout_photographs,
    normalize,
    resize_shorter,
    to_tensor,
)
from flowmo.data.archive import find_archives
from flowmo.files import atomic_write
from flowmo.metrics import Moments, frechet_distance, psnr
from flowmo.perceptual.inception import load_inception
from flowmo.training.stage import Measure

if TYPE_CHECKING:
    from flowmo.training.autoencoder import AutoencoderStage

CURVE = "heldout.jsonl"
_HIGHER_IS_BETTER = {"psnr", "teacher"}


class Heldout:
    """Measures the averaged model every so often, keeps the best one in RUN/best, and says when to stop.

    RUN/heldout.jsonl is the curve: a line to a measurement, with its numbers and whether it was the best so far.

    Args:
        score: numbers of a model, among them `config.metric`.
    """

    def __init__(self, config: HeldoutConfig, score: Measure, run: Path) -> None:
        self.config, self.score, self.run = config, score, run
        self.best: float | None = None
        self.best_step = 0
        self.worse = 0  # measurements since the best

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        return self.score(model)

    def update(self, step: int, model: Any) -> dict[str, float]:
        """Measure, append to the curve, and keep the model if it is the best so far.

        Raises:
            ValueError: the metric that is to decide is not there.
        """
        values = self.measure(model)
        metric = self.config.metric
        if metric not in values:
            raise ValueError(f"heldout.metric={metric}: this stage measures {', '.join(values)} only")
        value = -values[metric] if metric in _HIGHER_IS_BETTER else values[metric]
        better = math.isfinite(value) and (self.best is None or value < self.best)
        if better:
            self.best, self.best_step, self.worse = value, step, 0
            model.save_pretrained(self.run / "best")
        else:
            self.worse += 1
        record = {"step": step, **{k: round(v, 6) for k, v in values.items()}, "best": better}
        curve = self.run / CURVE
        before = [r for r in read_curve(curve) if r["step"] < step]  # a resumed run repeats its last measurements
        text = "".join(json.dumps(r) + "\n" for r in [*before, record])
        atomic_write(curve, lambda name: Path(name).write_text(text))
        return values

    @property
    def exhausted(self) -> bool:
        """Whether so many measurements in a row brought nothing that training should stop."""
        return 0 < self.config.patience <= self.worse

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of RUN/heldout.jsonl; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Reconstructions:
    """Numbers of a model's reconstructions, sampled with the same noise every time.

    PSNR in dB, the stage's perceptual distance where it has one, and rfid where that decides.

    Args:
        images: [N, 3, S, S] in [-1, 1].
    """

    def __init__(self, config: HeldoutConfig, stage: AutoencoderStage, images: Tensor) -> None:
        self.stage, self.images = stage, images.to(stage.device)
        self.inception = None
        if config.metric == "rfid":
            self.inception = load_inception(
                config.inception_weights, resize="half_pixel", option="heldout.inception_weights"
            ).to(stage.device)
            self.originals = self._features(self.images)

    def __call__(self, model: FlowMo) -> dict[str, float]:
        return self.scores(self.stage.pictures(model, self.images))

    def scores(self, pictures: Tensor) -> dict[str, float]:
        """Numbers of reconstructions [N, 3, S, S] of the held-out pictures."""
        values = {"psnr": float(psnr(pictures, self.images).mean())}
        parts = [self.stage.distance(a, b) for a, b in zip(self.images.split(32), pictures.split(32))]
        distances = [p for p in parts if p is not None]
        if distances:
            values["perceptual"] = float(torch.cat(distances).mean())
        if self.inception is not None:
            values["rfid"] = frechet_distance(self.originals, self._features(pictures))
        return values

    def _features(self, images: Tensor) -> Moments:
        assert self.inception is not None
        moments = Moments()
        for part in images.split(32):
            moments.add(self.inception(part).pool)
        return moments


def heldout_images(path: str, size: int, count: int) -> Tensor:  # [N, 3, size, size] in [-1, 1]
    """Centre crops of a folder's or archive's pictures, evenly spaced, or, for "samples", tiles of photographs."""
    if path == "samples":
        side = 4 * size
        photographs = [to_tensor(center_crop(resize_shorter(p, side), side)) for p in heldout_photographs().values()]
        tiles = torch.stack(photographs).unfold(2, size, size).unfold(3, size, size)  # [P, 3, 4, 4, size, size]
        return tiles.permute(2, 3, 0, 1, 4, 5).reshape(-1, 3, size, size)[:count]
    kind = ArchiveImages if find_archives(path) else ImageFolder
    pictures = kind(path, size, crop="center", as_uint8=True)
    step = max(1, len(pictures) // count)
    return torch.stack([normalize(pictures[i].image) for i in range(0, len(pictures), step)][:count])
