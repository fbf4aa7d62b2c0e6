"""The loop trains whatever a stage brings, and says how long it will take."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowmo.config import HeldoutConfig, parse
from flowmo.training import loop
from flowmo.training.heldout import CURVE, Heldout, read_curve
from flowmo.training.log import RunLog
from flowmo.training.loop import Trainer
from flowmo.training.session import length_note
from flowmo.training.stage import Stage


class Slope(nn.Linear):
    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        torch.save(self.state_dict(), os.path.join(folder, "slope.pt"))


class Points:
    """Batches of (x, 3 x)."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        x = torch.full((4, 1), float(self.position % 3))
        return x, 3 * x

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def describe(self):
        return "points of a line"


class Descent:
    """Plain gradient descent; its average is the weights themselves."""

    def __init__(self, named):
        self.named, self.step_count = named, 0
        self.average = {k: p.detach() for k, p in named.items()}

    def step(self, lr, found_inf=None):
        self.step_count += 1
        for p in self.named.values():
            if found_inf is None or not found_inf:
                p.data.add_(p.grad, alpha=-lr)
            p.grad = None

    def state_dict(self):
        return {"step": self.step_count}

    def load_state_dict(self, state):
        self.step_count = state["step"]


class Line(Stage):
    name = "line"
    sequence = 1

    def __init__(self, config, device):
        super().__init__(config, device)
        self.model = self.empty_model()
        self.trained = dict(self.model.named_parameters())
        self.asked = []

    def empty_model(self):
        return Slope(1, 1, bias=False)

    def batches(self, processes):
        return Points()

    def optimizer(self):
        return Descent(self.trained)

    def learning_rate(self, step, progress):
        self.asked.append((step, progress))
        return 0.1

    def forward(self, batch, generator):
        x, y = batch
        return {"total": (self.model(x) - y).square().mean()}

    def statistics(self):
        return {"slope": float(self.model.weight.detach())}


def line(run, steps):
    config = parse(["tiny", f"run={run}", f"trainer.steps={steps}", "trainer.log_every=7", "trainer.save_every=10"])
    return replace(config, stage="line")


@pytest.fixture
def slope(tmp_path, monkeypatch, capsys):
    """A run of 15 steps that was interrupted by its end after 10, and what it printed."""
    monkeypatch.setitem(loop.STAGES, "line", Line)
    Trainer(line(tmp_path, 10)).fit()
    trainer = Trainer(line(tmp_path, 25))
    trainer.fit()
    return trainer, tmp_path, capsys.readouterr().out


def test_a_model_of_one_number_trains_logs_saves_and_resumes(slope):
    """Nothing of pictures, codes or FlowMo: no grid, no TensorBoard picture, a model of its own form."""
    trainer, run, said = slope
    # What a schedule goes by; the log asks for the rate of the step to come.
    assert set(trainer.stage.asked) == {(step, step / 25) for step in range(10, 26)}
    assert float(torch.load(run / "model" / "slope.pt", weights_only=True)["weight"]) == pytest.approx(3, abs=1e-3)
    log = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [7, 10, 14, 21, 25] and log[-1]["slope"] == pytest.approx(3, abs=1e-3)
    assert "stage line, 1 parameters (1 learn), Slope" in said and "points of a line" in said
    assert "step 25: loss 0.0000, " in said
    assert not (run / "samples").exists()
    assert trainer.data.position == 25


def test_first_steps_are_remembered_over_a_restart(slope):
    """Their mean is of the first 20 steps, whatever is logged when; the numbers themselves by hand."""
    trainer, _, _ = slope
    torch.manual_seed(0)
    weight, losses = float(Slope(1, 1, bias=False).weight.detach()), []
    for step in range(20):
        x = float((step + 1) % 3)
        losses.append((weight * x - 3 * x) ** 2)
        weight -= 0.1 * 2 * x * (weight * x - 3 * x)
    assert trainer.first_loss == pytest.approx(sum(losses) / 20, rel=1e-4)


def test_rates_count_what_the_device_still_does_and_means_only_what_is_finite(tmp_path, monkeypatch):
    """A card works on the last step when the host asks for its numbers, and a step that is skipped has none."""
    monkeypatch.setitem(loop.STAGES, "line", Line)
    config = line(tmp_path, 14)
    trainer = Trainer(config)
    settle, forward = trainer.settle, trainer.stage.forward

    def slowly():
        if trainer.step % 7 == 0 and trainer._verdict is not None:
            time.sleep(0.7)
        settle()

    def poisoned(*given):
        return {k: v * (float("nan") if trainer.step == 9 else 1) for k, v in forward(*given).items()}

    trainer.settle, trainer.stage.forward = slowly, poisoned
    trainer.fit()
    log = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped_steps"] for r in log] == [0, 1] and math.isfinite(log[1]["loss"])
    assert all(r["seconds_per_step"] > 0.1 and r["images_per_second"] < config.data.batch / 0.1 for r in log)


def test_numbers_of_any_size_are_logged(tmp_path):
    """The rate of a warm-up of 10,000 steps begins at 1e-8."""
    log = RunLog(tmp_path, 1, 0, line(tmp_path, 1))
    log.metrics(1, {"loss": 1234.5678, "images_per_second": 1.0, "lr": 2.5e-8})
    log.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["lr"], record["loss"]) == (2.5e-8, 1234.568)


def test_length_is_told_by_the_median_step(slope):
    note = length_note([9.0, 0.5, 0.5, 0.6, 0.5], 1_728_000, None)  # the first step compiled
    assert note.startswith("0.500 s a step (median of 5): 10.00 days to go")
    assert "0.04 days to go" in length_note([0.5], 1_728_000, 3456.0)
    assert "days to go" not in slope[2], "nothing is guessed on a CPU"


@pytest.mark.parametrize(
    ("metric", "values", "best", "exhausted"),
    [
        ("psnr", [math.nan, 20.0, 21.0, 20.5, 21.0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]),
        ("rfid", [20.0, math.inf, 20.0, 19.0, 21.0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0]),
    ],
)
def test_best_is_the_highest_psnr_and_the_lowest_of_distances(tmp_path, metric, values, best, exhausted):
    """Of finite numbers, and strictly; `patience` measurements in a row without one are the end."""
    left = iter(values)
    heldout = Heldout(HeldoutConfig(metric=metric, patience=2), lambda model: {metric: next(left)}, tmp_path)
    saved, ends = [], []
    for step in range(len(values)):
        saved.append(0)
        heldout.update(step, SimpleNamespace(save_pretrained=lambda path: saved.append(saved.pop() + 1)))
        ends.append(heldout.exhausted)
    assert saved == best == [r["best"] for r in read_curve(tmp_path / CURVE)] and ends == exhausted
    assert heldout.best_step == max(i for i, b in enumerate(best) if b)
