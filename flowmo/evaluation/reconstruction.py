"""Scores of reconstructions under two protocols.

"rounded", the default: every measure sees the 8-bit picture that a file would hold. Features of rFID come from
Inception after TensorFlow 1's resize.

"released" repeats the authors' evaluation where it differs: originals and reconstructions are cut off, not rounded, to
8 bits before PSNR and SSIM; LPIPS and rFID see unquantised pictures; Inception resizes with half-pixel centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowmo.cli import Progress
from flowmo.data import normalize, to_uint8
from flowmo.evaluation.pictures import Pictures, read_batches
from flowmo.evaluation.processes import Processes
from flowmo.evaluation.tokenizers import Tokenizer, code_bits_per_pixel
from flowmo.metrics import (
    CodeCounts,
    Moments,
    frechet_distance,
    mean_squared_error,
    pooled_psnr,
    psnr_of,
    ssim,
    truncated_levels,
)
from flowmo.perceptual import LPIPS, InceptionFeatures

PROTOCOLS = ("rounded", "released")


@dataclass
class Judges:
    """The networks that take part; what is absent is not computed. Names of untrained ones carry `random`."""

    inception: InceptionFeatures | None = None
    lpips: dict[str, LPIPS] = field(default_factory=dict)  # by name: vgg, alex

    def to(self, device: torch.device) -> Judges:
        for network in (self.inception, *self.lpips.values()):
            if isinstance(network, torch.nn.Module):
                network.to(device)
        return self


@dataclass
class Scores:
    """What one process measured; :meth:`merge` joins processes, :meth:`summary` gives the numbers."""

    indices: list[int] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)  # float64 [n] a batch
    real: Moments = field(default_factory=Moments)
    fake: Moments = field(default_factory=Moments)
    codes: CodeCounts | None = None
    pixels: tuple[int, int] = (0, 0)
    skipped: list[str] = field(default_factory=list)

    def merge(self, other: Scores) -> None:
        self.indices += other.indices
        for name, values in other.values.items():
            self.values.setdefault(name, []).extend(values)
        self.real.merge(other.real)
        self.fake.merge(other.fake)
        if other.codes is not None:
            if self.codes is None:
                self.codes = other.codes
            else:
                self.codes.merge(other.codes)
        self.pixels = max(self.pixels, other.pixels)
        self.skipped += other.skipped

    def per_picture(self) -> dict[str, Tensor]:
        """float64 [N] of every measure that pictures have of their own, in the order of the data."""
        order = torch.tensor(self.indices).argsort()
        return {name: torch.cat(values)[order] for name, values in self.values.items()}

    def summary(self) -> dict[str, float]:
        """All numbers; PSNR in dB, entropies in bits.

        Raises ValueError where no picture could be read.
        """
        if not self.indices:
            raise ValueError("none of the pictures could be read: " + "; ".join(self.skipped[:4]))
        each = self.per_picture()
        error = each.pop("squared_error")
        result = {
            "pictures": float(len(error)),
            "psnr": float(psnr_of(error).mean()),
            "psnr_pooled": pooled_psnr(error),
        }
        result |= {name: float(values.mean()) for name, values in each.items()}
        if self.real.n > 1:
            result["rfid"] = frechet_distance(self.fake, self.real)
        if self.codes is not None and len(self.codes.counts):
            usage = self.codes.usage()
            size = code_bits_per_pixel(usage.tokens, self.codes.vocabulary, len(error), *self.pixels)
            share = usage.entropy / math.log2(self.codes.vocabulary) if self.codes.vocabulary > 1 else 0.0
            result |= {
                "bits_per_pixel": size,
                "entropy_bits_per_pixel": size * share,  # what an ideal coder of single tokens would need
                "codes_used": usage.used,
                "code_entropy": usage.entropy,
                "code_perplexity": usage.perplexity,
                "code_position_entropy": usage.position_entropy,
            }
        return result


def score_reconstruction(
    tokenizer: Tokenizer,
    pictures: Pictures,
    judges: Judges,
    *,
    indices: Sequence[int] | None = None,
    batch: int = 8,
    protocol: str = "rounded",
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    workers: int = 4,
    progress: bool = False,
) -> Scores | None:
    """Measure every picture; the result on the first process, None on the others.

    Each process takes a part of `indices` (all pictures by default). Neither the number of processes nor the batch
    changes a number beyond rounding.

    Raises:
        ValueError: an unknown protocol, pictures of different sizes, or what tokenizer and judges refuse.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    processes = processes or Processes()
    mine = processes.share(list(range(len(pictures))) if indices is None else indices)
    scores = Scores(codes=None if tokenizer.vocabulary is None else CodeCounts(tokenizer.vocabulary))
    whose = f" of this process, one of {processes.world}" if processes.world > 1 else ""
    bar = Progress(len(mine), whose, shown=progress and processes.main)
    for places, pixels in read_batches(pictures, mine, batch, scores.skipped, workers):
        pixels = pixels.to(device)
        result = tokenizer(normalize(pixels), places)
        if scores.codes is not None and result.tokens is not None:
            scores.codes.add(result.tokens)
        scores.indices += places
        scores.pixels = (pixels.shape[2], pixels.shape[3])
        measured = measure(pixels, result.images.to(device).float(), judges, protocol, scores)
        for name, values in measured.items():
            scores.values.setdefault(name, []).append(values.detach().double().cpu())
        bar.update(len(places))
    bar.close()
    parts = processes.gather(scores)
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0] if parts else None


@torch.no_grad()
def measure(
    pixels: Tensor,  # uint8 [B, 3, H, W], the originals
    images: Tensor,  # float32 [B, 3, H, W] in [-1, 1], the reconstructions
    judges: Judges,
    protocol: str,
    scores: Scores,  # takes up the features
) -> dict[str, Tensor]:  # name -> [B]
    """The measures of one batch."""
    if protocol == "released":
        original = (pixels.double() / 127.5 - 1).float()
        a, b = truncated_levels(original), truncated_levels(images)
        seen = (original, images)
        network_inputs: tuple[Tensor, Tensor] = (original, images)
    else:
        a, b = pixels, to_uint8(images)
        seen = (normalize(a), normalize(b))
        network_inputs = (a, b)
    result = {
        "squared_error": mean_squared_error(a, b),
        "ssim": ssim(a, b, "uniform"),
        "ssim_gaussian": ssim(a, b, "gaussian"),
    }
    for name, lpips in judges.lpips.items():
        result[f"lpips_{name}"] = lpips(*seen)
    if judges.inception is not None:
        real, fake = (judges.inception(x).pool for x in network_inputs)
        scores.real.add(real)
        scores.fake.add(fake)
        result["inception_distance"] = (real - fake).double().square().mean(1)
    return result


def protocol_lines(protocol: str) -> dict[str, str]:
    """What a protocol means, for the saved results."""
    released = protocol == "released"
    return {
        "protocol": protocol,
        "levels": "cut off to 8 bits for PSNR and SSIM; LPIPS and rFID unquantised"
        if released
        else "rounded to 8 bits for every measure",
        "psnr": "mean of the pictures' own, data range 255",
        "psnr_pooled": "of the mean error of 5 successive pictures, as the release computes it",
        "ssim": "7 x 7 uniform window, sample covariance, per channel (scikit-image's default)",
        "ssim_gaussian": "11 x 11 Gaussian window, deviation 1.5, inside the picture",
        "rfid": "originals of the same pictures, pooled Inception features, float64 covariances (N - 1), "
        + ("bilinear resize with half-pixel centres" if released else "bilinear resize of TensorFlow 1"),
    }
