"""The five numbers that the ADM evaluator gives for a published set of samples; runs where the files are.

FLOWMO_ADM_FILES names a folder with VIRTUAL_imagenet256_labeled.npz and admnet_guided_upsampled_imagenet256.npz, as
published beside the ADM evaluator, and the Inception weights of pytorch-fid.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flowmo.evaluation import NpzPictures, score_generation
from flowmo.perceptual import load_inception
from flowmo.perceptual.inception import INCEPTION

FOLDER = Path(os.environ.get("FLOWMO_ADM_FILES", "nowhere"))
FILES = ("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz", INCEPTION.name)
# published by the ADM evaluator, and how far a careful port to PyTorch lies from them
EXPECTED = {
    "inception_score": (215.837, 0.3),
    "fid": (3.94256, 0.005),
    "sfid": (6.14043, 0.005),
    "precision": (0.8265, 0.002),
    "recall": (0.5309, 0.004),
}


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.skipif(
    not all((FOLDER / name).is_file() for name in FILES),
    reason=f"FLOWMO_ADM_FILES names no folder with {', '.join(FILES)}",
)
def test_numbers_of_the_adm_evaluator() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference, samples = (NpzPictures(FOLDER / name) for name in FILES[:2])
    inception = load_inception(FOLDER / INCEPTION.name).to(device)
    result = score_generation(samples, reference, inception, batch=64, device=device)
    assert result is not None
    for name, (value, tolerance) in EXPECTED.items():
        assert result[0][name] == pytest.approx(value, abs=tolerance), name
