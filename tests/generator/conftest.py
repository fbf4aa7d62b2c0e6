"""A tiny tokenizer, a tiny generator of its tokens, and the command that draws with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowmo import FlowMo, generate
from flowmo.data.tokens import layout_of
from flowmo.generator import Generator, NetworkConfig
from flowmo.generator.samples import SampleFolder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    torch.manual_seed(0)
    model = FlowMo("tiny")
    with torch.no_grad():  # open the gates, so that pictures differ by their tokens
        for name, p in model.decoder.named_parameters():
            if "_mod.lin" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def generator(tokenizer, tmp_path) -> Path:
    torch.manual_seed(1)
    layout = layout_of(FlowMo.from_pretrained(tokenizer))
    network = NetworkConfig(tokens=32, bits=9, classes=3, hidden=32, depth=2, heads=2)
    model = Generator(network, layout, ["ant", "bee", "cow"])
    with torch.no_grad():
        model.head.weight.mul_(100)
    model.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def run_generate(tokenizer: Path, generator: Path, out: Path, *more: str) -> None:
    arguments = ["--tokenizer", str(tokenizer), "--generator", str(generator), "--out", str(out), "--device", "cpu"]
    assert generate.main([*arguments, "--steps", "4", "--decoder-steps", "2", *more]) == 0


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Interrupt generate where it would keep one batch more; the numbers that were kept."""
    keep, kept = SampleFolder.keep, []

    def stop(self: SampleFolder, number: int, pictures: object) -> None:
        if len(kept) == batches:
            raise KeyboardInterrupt
        keep(self, number, pictures)  # type: ignore[arg-type]
        kept.append(number)

    monkeypatch.setattr(SampleFolder, "keep", stop)
    return kept
