"""The weights that come with the package are those of their record, and do what the README says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

import flowmo
from flowmo import FlowMo
from flowmo.config import from_yaml, parse
from flowmo.data import heldout_photographs
from flowmo.metrics import mean_colour_baseline, psnr
from flowmo.pretrained import shipped_weights
from flowmo.quickstart import pictures, reconstruct

ASSETS = Path(flowmo.__file__).parent / "assets"


def test_record_of_the_shipped_weights():
    weights = shipped_weights("quickstart")
    assert weights is not None and weights.stat().st_size <= 16 * 2**20
    record = json.loads((ASSETS / "quickstart.json").read_text())
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]
    assert {"command", "seed", "commit", "hardware", "versions", "steps", "seconds"} <= record.keys()
    log = [json.loads(line) for line in (ASSETS / "quickstart.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == record["steps"] and log[0]["flow"] > 4 * log[-1]["flow"]


def test_they_are_of_exactly_the_preset():
    """Everything that shapes the weights is the preset's; only the length of the run and its bookkeeping differ."""
    run = from_yaml((ASSETS / "quickstart.yaml").read_text())
    preset = parse(["quickstart"])
    for section in ("model", "loss", "noise", "optim", "data"):
        assert getattr(run, section) == getattr(preset, section), section
    assert run.trainer.seed == preset.trainer.seed
    assert FlowMo.from_pretrained(shipped_weights("quickstart")).config == preset.model


def test_held_out_photographs_are_four_decibels_above_the_mean_colour():
    model = FlowMo.from_pretrained(shipped_weights("quickstart"), dtype=torch.float32)
    originals = pictures(heldout_photographs())
    gain = psnr(reconstruct(model, originals, parse(["quickstart"])), originals)
    gain = gain - psnr(mean_colour_baseline(originals), originals)
    assert float(gain.mean()) >= 4.0
