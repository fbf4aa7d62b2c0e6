"""The loop: it learns, logs, saves, and goes on exactly where it stopped."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from PIL import Image

from flowmo import FlowMo
from flowmo.config import ConfigError, parse
from flowmo.data import heldout_photographs
from flowmo.training import checkpoint
from flowmo.training.loop import Trainer, resolve_device


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four real photographs as files, 64 pixels high."""
    folder = tmp_path_factory.mktemp("photographs")
    for name, picture in heldout_photographs().items():
        picture.resize((64 * picture.width // picture.height, 64)).save(folder / f"{name}.png")
    return folder


def config(run, photographs, *more):
    return parse(
        [
            "tiny",
            f"run={run}",
            f"data.path={photographs}",
            "trainer.precision=fp32",
            "trainer.threads=1",
            "trainer.log_every=5",
            *more,
        ]
    )


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_flow_loss_falls_by_half_in_300_steps(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.log_every=20", "trainer.sample_every=300"))
    trainer.fit()
    log = metrics(tmp_path / "run")
    first, last = log[0]["flow"], log[-1]["flow"]
    assert log[-1]["step"] == 300
    assert last < first / 2, f"flow loss {first} to {last}"
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    with Image.open(tmp_path / "run" / "samples" / "step_00000300.png") as grid:
        assert grid.height >= 2 * 32
    # The run is a model that loads, and it holds the averaged weights.
    model = FlowMo.from_pretrained(tmp_path / "run")
    average = trainer.optimizer.average["decoder.img_in.weight"]
    assert torch.equal(model.decoder.img_in.weight, average)
    assert not torch.equal(model.decoder.img_in.weight, trainer.model.decoder.img_in.weight)


def run_state(trainer):
    state = trainer.state_dict()
    flat = {f"model.{k}": v for k, v in state["model"].items()}
    for part in ("exp_avg", "exp_avg_sq", "average"):
        flat |= {f"{part}.{k}": v for k, v in state["optimizer"][part].items()}
    return flat | {"generator": state["generator"], "step": state["step"], "data": state["data"]}


@pytest.mark.parametrize("source", ["folder", "samples"])
def test_resume_is_bit_for_bit(tmp_path, photographs, source):
    path = "samples" if source == "samples" else photographs
    straight = Trainer(config(tmp_path / "a", path, "trainer.steps=10", "trainer.save_every=5"))
    straight.fit()
    half = Trainer(config(tmp_path / "b", path, "trainer.steps=5", "trainer.save_every=5"))
    half.fit()
    resumed = Trainer(config(tmp_path / "b", path, "trainer.steps=10", "trainer.save_every=5"))
    resumed.fit()
    a, b = run_state(straight), run_state(resumed)
    assert a.keys() == b.keys()
    for key in a:
        same = torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        assert same, key

    def numbers(run):
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in metrics(run)]

    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_micro_batches_add_up(tmp_path, photographs):
    """Two micro-batches of 4 give the gradient of the means over them, not of their sum."""
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.accumulate=2"))
    gradients = []
    trainer.optimizer.step = lambda lr: gradients.append(  # type: ignore[method-assign]
        trainer.model.decoder.img_in.weight.grad.clone()
    )
    position, random = trainer.data.state_dict(), trainer.generator.get_state()
    trainer.train_step()
    trainer.model.zero_grad()
    trainer.data.load_state_dict(position)
    trainer.generator.set_state(random)
    parts = []
    for _ in range(2):
        loss = trainer.loss(
            trainer.model, next(trainer.data), trainer.config.loss, trainer.config.noise, None, trainer.generator
        )
        loss["total"].backward()
        parts.append(trainer.model.decoder.img_in.weight.grad.clone())
        trainer.model.zero_grad()
    torch.testing.assert_close(gradients[0], (parts[0] + parts[1]) / 2)


def test_sigterm_saves_and_the_same_command_resumes(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.steps=30"))
    step = trainer.train_step

    def interrupted():
        out = step()
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    trainer.train_step = interrupted  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.step == 7 and not trainer.finished
    assert [p.stem for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000007"]
    again = Trainer(config(tmp_path / "run", photographs, "trainer.steps=8"))
    again.fit()
    assert again.step == 8


def test_encoder_freezes_at_its_step(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs, "optim.freeze_encoder_at=2", "trainer.steps=4"))
    weights = []
    for _ in range(4):
        trainer.train_step()
        weights.append(trainer.model.encoder.img_in.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[3])


def test_checkpoints_are_kept_by_rule_and_damage_falls_back(tmp_path, caplog):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2, keep_every=2)
    assert [p.stem[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["2", "4", "5"]
    newest = checkpoint.path_of(tmp_path, 5)
    newest.write_bytes(newest.read_bytes()[:-50])
    assert checkpoint.load_newest(tmp_path) == {"step": 4}
    assert "step_00000005.pt" in caplog.text
    for path in checkpoint.list_checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of its 3 checkpoints"):
        checkpoint.load_newest(tmp_path)


def test_a_run_folder_is_of_one_configuration(tmp_path, photographs):
    Trainer(config(tmp_path / "run", photographs, "trainer.steps=1", "trainer.save_every=1")).fit()
    with pytest.raises(ConfigError, match=r"optim.lr=0.002 there and 0.1 here"):
        Trainer(config(tmp_path / "run", photographs, "optim.lr=0.1"))
    Trainer(config(tmp_path / "run", photographs, "trainer.steps=2")).fit()


def test_missing_data_and_devices_are_said(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path"):
        Trainer(parse(["lo", f"run={tmp_path / 'a'}", "loss.perceptual=none"]))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            resolve_device("cuda")


def test_loss_that_is_not_finite_stops_the_run(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs))
    with torch.no_grad():
        trainer.model.decoder.img_in.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 5"):
        trainer.fit()
    assert checkpoint.list_checkpoints(tmp_path / "run") == []
