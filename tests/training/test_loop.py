"""The loop: it learns, logs, saves, and goes on exactly where it stopped."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from PIL import Image

from flowmo import FlowMo
from flowmo.config import ConfigError, parse
from flowmo.data import heldout_photographs
from flowmo.training import checkpoint, distributed
from flowmo.training.loop import Trainer, noise_seed, resolve_device
from flowmo.training.precision import take_device

MEASURED = ("images_per_second", "seconds_per_step", "peak_memory_gib")  # differ from run to run


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
    return flat | {"step": state["step"], "data": state["data"]}


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
        return [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics(run)]

    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


def test_micro_batches_add_up(tmp_path, photographs):
    """Two micro-batches of 4 give the gradient of the means over them, not of their sum."""
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.accumulate=2"))
    gradients = []
    trainer.optimizer.step = lambda lr, found_inf: gradients.append(  # type: ignore[method-assign]
        trainer.model.decoder.img_in.weight.grad.clone()
    )
    position = trainer.data.state_dict()
    trainer.train_step()
    trainer.model.zero_grad()
    trainer.data.load_state_dict(position)
    parts = []
    for place in range(2):
        trainer.generator.manual_seed(noise_seed(0, 0, place))
        trainer.stage(next(trainer.data), trainer.generator)["total"].backward()
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


def test_asked_again_it_still_saves(tmp_path, photographs):
    """Ctrl-C reaches processes of torchrun twice: from the terminal, and from torchrun."""
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.steps=3", "trainer.save_every=100"))
    save = trainer.save

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return save()

    trainer.save = interrupted  # type: ignore[method-assign]
    trainer.fit()
    assert [p.stem for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000003"]


def test_all_processes_know_that_training_has_ended_early(tmp_path, photographs, monkeypatch, caplog):
    """Only the first measures, and the others have to stop with it, also when the command is given again."""
    more = ["heldout.every=1", "heldout.patience=2", "heldout.metric=psnr", "heldout.images=2", "sampler.steps=1"]
    given = config(tmp_path / "run", photographs, f"heldout.path={photographs}", *more)
    trainer = Trainer(given)
    assert trainer.heldout is not None
    trainer.heldout.score = lambda model: {"psnr": 1.0}
    trainer.fit()
    assert trainer.step == 2
    caplog.set_level("INFO")
    Trainer(given).fit()
    assert "is finished at step 2; raise heldout.patience" in caplog.text
    monkeypatch.setattr(distributed, "join", lambda: distributed.Processes(1, 1, 1))
    monkeypatch.setattr(distributed, "from_first", lambda own: own or checkpoint.path_of(tmp_path / "run", 2))
    second = Trainer(given)
    assert second.heldout is None and second.resume() and second.finished


def test_every_process_computes_on_a_device_of_its_own(monkeypatch):
    """Whichever it is becomes the current one: the event that tells when a step's outcome is there is of that."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    alone, third = distributed.Processes(), distributed.Processes(2, 4, 2)
    taken = [take_device("cuda:1", alone), take_device("auto", third), take_device("cuda:0", third)]
    assert taken == current == [torch.device("cuda", i) for i in (1, 2, 0)]
    assert [take_device("cpu", third).type, take_device("cuda", alone).type] == ["cpu", "cuda"] and len(current) == 3


def test_a_finished_run_has_the_model_of_its_last_checkpoint(tmp_path, photographs):
    """Also one that was killed, or found the disk full, between the two."""
    given = config(tmp_path / "run", photographs, "trainer.steps=2", "sampler.steps=1")
    Trainer(given).fit()
    path = tmp_path / "run" / "model" / "model.safetensors"
    expected = path.read_bytes()
    path.unlink()
    Trainer(given).fit()
    assert path.read_bytes() == expected


def test_encoder_freezes_at_its_step(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs, "optim.freeze_encoder_at=2", "trainer.steps=4"))
    weights = []
    for _ in range(4):
        trainer.train_step()
        weights.append(trainer.model.encoder.img_in.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[3])


def test_freezing_the_encoder_keeps_all_moments(tmp_path, photographs):
    """The optimizer goes on with the decoder's moments and count of steps; the encoder's stay as they were."""
    trainer = Trainer(config(tmp_path / "run", photographs, "optim.freeze_encoder_at=3"))
    for _ in range(3):
        trainer.train_step()
    first = {k: v.clone() for k, v in trainer.optimizer.exp_avg.items()}
    second = {k: v.clone() for k, v in trainer.optimizer.exp_avg_sq.items()}
    trainer.train_step()
    assert trainer.optimizer.step_count == 4
    frozen = [k for k in first if k.startswith("encoder.")]
    assert frozen and all(torch.equal(trainer.optimizer.exp_avg[k], first[k]) for k in frozen)
    assert all(torch.equal(trainer.optimizer.exp_avg_sq[k], second[k]) for k in frozen)
    for key in first.keys() - set(frozen):
        # v = 0.95 v + 0.05 g^2, never less than 0.95 v; from nothing it would be 0.05 g^2.
        now = trainer.optimizer.exp_avg_sq[key]
        assert (now >= 0.95 * second[key] * (1 - 1e-6)).all() and not torch.equal(now, second[key]), key
    assert any(v.abs().sum() > 0 for k, v in second.items() if k not in frozen)


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


def test_steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run(tmp_path, photographs):
    trainer = Trainer(config(tmp_path / "run", photographs, "trainer.max_skipped=3", "trainer.steps=8"))
    loss, calls = trainer.stage.loss, []

    def poisoned(*arguments, **options):
        out = loss(*arguments, **options)
        calls.append(out)
        return {**out, "total": out["total"] * float("nan")} if len(calls) in (2, 3, 5, 6, 7) else out

    trainer.stage.loss = poisoned
    weights, averages = [], []
    for _ in range(4):
        trainer.train_step()
        weights.append(trainer.model.decoder.img_in.weight.detach().clone())
        averages.append(trainer.optimizer.average["decoder.img_in.weight"].clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert torch.equal(averages[0], averages[2])
    assert not torch.equal(weights[2], weights[3]) and torch.isfinite(weights[3]).all()
    trainer.settle()
    assert (trainer.skipped, trainer.optimizer.step_count, trainer.step) == (2, 2, 4)
    position = trainer.data.state_dict()["position"]
    for _ in range(3):
        trainer.train_step()
    # The host learns of the last one when it asks, or in the step after.
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 7"):
        trainer.train_step()
    assert torch.equal(trainer.model.decoder.img_in.weight, weights[3]), "the step after is not taken"
    (saved,) = (tmp_path / "run" / "nonfinite").iterdir()
    content = torch.load(saved, weights_only=True)
    assert content["step"] == 6 and not math.isfinite(content["losses"]["total"])
    trainer.data.load_state_dict({**trainer.data.state_dict(), "position": position + 2 * 8})
    assert torch.equal(content["batches"][0], next(trainer.data))
