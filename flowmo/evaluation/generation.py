"""FID, sFID, Inception Score, precision and recall of generated pictures, as the ADM evaluator defines them.

Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021. FID and sFID compare with the statistics
`mu`, `sigma`, `mu_s`, `sigma_s` of a reference `.npz` where it has them (there they describe the whole training set),
else with the reference pictures; precision and recall always with the pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmo.cli import Progress
from flowmo.evaluation.pictures import NpzPictures, Pictures, read_batches, spaced
from flowmo.evaluation.processes import Processes
from flowmo.metrics import Moments, frechet_distance, inception_score, precision_recall
from flowmo.perceptual import InceptionFeatures

MOST_REFERENCES = 10_000  # pictures for precision and recall, as in the published reference files
MEASURES = ("fid", "sfid", "inception_score", "precision_recall")


@dataclass
class Features:
    """What Inception sees in a set of pictures."""

    pool: list[Tensor] = field(default_factory=list)  # float32 [n, 2048] a batch, in order
    moments: Moments = field(default_factory=Moments)  # of the pooled features
    spatial: Moments = field(default_factory=Moments)
    skipped: list[str] = field(default_factory=list)

    def merge(self, other: Features) -> None:
        self.pool += other.pool
        self.moments.merge(other.moments)
        self.spatial.merge(other.spatial)
        self.skipped += other.skipped


def extract(
    pictures: Pictures,
    indices: Sequence[int],
    inception: Callable[[Tensor], Any],
    *,
    batch: int = 32,
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    workers: int = 4,
    progress: bool = False,
) -> Features | None:
    """Features of these pictures, on the first process; None on the others.

    Raises ValueError where none of them can be read.
    """
    processes = processes or Processes()
    mine = processes.share(indices)
    result = Features()
    whose = f" of this process, one of {processes.world}" if processes.world > 1 else ""
    bar = Progress(len(mine), whose, shown=progress and processes.main)
    for places, pixels in read_batches(pictures, mine, batch, result.skipped, workers):
        out = inception(pixels.to(device))
        result.pool.append(out.pool.cpu())
        result.moments.add(out.pool)
        result.spatial.add(out.spatial)
        bar.update(len(places))
    bar.close()
    parts = processes.gather(result)
    for other in parts[1:]:
        parts[0].merge(other)
    if parts and not parts[0].moments.n:
        raise ValueError("none of the pictures could be read: " + "; ".join(parts[0].skipped[:4]))
    return parts[0] if parts else None


def score_generation(
    samples: Pictures,
    reference: Pictures,
    inception: InceptionFeatures,
    *,
    skip: Sequence[str] = (),
    limit: int | None = None,
    batch: int = 32,
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    workers: int = 4,
    progress: bool = False,
) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Numbers and the protocol behind them, on the first process; None on the others.

    Args:
        skip: of MEASURES, what to leave out.
        limit: take so many of the samples, evenly spaced.

    Raises:
        ValueError: the reference has neither statistics of this network nor pictures, or too few pictures.
    """
    processes = processes or Processes()
    options: dict[str, Any] = {
        "batch": batch, "processes": processes, "device": device, "workers": workers, "progress": progress,
    }  # fmt: skip
    statistics = _statistics(reference) if inception.published else None
    numbers = spaced(len(samples), limit)
    # with statistics there, pictures serve precision and recall alone
    needed = statistics is None or "precision_recall" not in skip
    references = spaced(len(reference), MOST_REFERENCES if statistics is not None else None) if needed else []
    theirs = extract(reference, references, inception, **options) if needed else Features()
    ours = extract(samples, numbers, inception, **options)
    if ours is None or theirs is None:
        return None
    pool = torch.cat(ours.pool)
    _warn(samples, numbers, len(pool))
    target, target_spatial = statistics or (theirs.moments, theirs.spatial)
    result: dict[str, float] = {"samples": float(len(pool))}
    if "inception_score" not in skip:
        result["inception_score"] = inception_score(torch.cat([inception.logits(p).cpu() for p in ours.pool]))
    if "fid" not in skip:
        result["fid"] = frechet_distance(ours.moments, target)
    if "sfid" not in skip:
        result["sfid"] = frechet_distance(ours.spatial, target_spatial)
    if "precision_recall" not in skip:
        balls = torch.cat(theirs.pool)
        balls = balls[torch.tensor(spaced(len(balls), MOST_REFERENCES))]
        result["precision"], result["recall"] = precision_recall(balls.to(device), pool.to(device))
        references = references[: len(balls)]
    protocol = {
        "samples": samples.describe(),
        "reference": reference.describe(),
        "fid and sfid": "stored statistics (mu, sigma, mu_s, sigma_s)" if statistics else "reference pictures",
        "precision and recall": f"pooled features, k = 3, {len(references)} reference pictures, fp32 distances",
        "inception_score": "logits without bias, successive splits of 5000, in the order given",
        "sfid features": "first 7 channels of Mixed_6d.branch1x1, channels last",
        "resize": "bilinear of TensorFlow 1" if inception.resize == "tf1" else "bilinear with half-pixel centres",
        "skipped pictures": ours.skipped + theirs.skipped,
    }
    return result, protocol


def _statistics(reference: Pictures) -> tuple[Moments, Moments] | None:
    if not isinstance(reference, NpzPictures):
        return None
    arrays = {key: reference.array(key) for key in ("mu", "sigma", "mu_s", "sigma_s")}
    present = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items() if value is not None}
    if not present:
        return None
    if len(present) < len(arrays):
        raise ValueError(
            f"{reference.path} holds {', '.join(sorted(present))} but not all of mu, sigma, mu_s and sigma_s; complete "
            "it, or remove them to have its pictures taken instead"
        )
    return (
        Moments.from_statistics(present["mu"], present["sigma"]),
        Moments.from_statistics(present["mu_s"], present["sigma_s"]),
    )


def _warn(samples: Pictures, numbers: Sequence[int], n: int) -> None:
    labels = samples.labels if isinstance(samples, NpzPictures) else None
    if labels is not None and labels.ndim == 1 and len(labels) == len(samples):
        seen = labels[np.asarray(numbers)]
        if len(np.unique(seen)) > 1 and bool((np.diff(seen) >= 0).all()):
            warnings.warn(
                "the samples are sorted by class: the Inception Score of successive splits comes out too low; shuffle",
                stacklevel=3,
            )
    if n < 2048:
        warnings.warn(f"{n} samples are fewer than Inception's 2048 features: FID is biased upwards", stacklevel=3)
