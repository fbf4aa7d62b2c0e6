"""The ablations of the paper's Table 4 and the codes of its Table 3: each override trains, and does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowmo import FlowMo
from flowmo.config import Config, parse
from flowmo.training.loop import Trainer

# By row of the table: what it adds to the command of preset small. The last two change the sampler alone.
ABLATIONS = {
    "fewer params": ["model.patch=8"],
    "doubled patch size": ["model.patch=16"],
    "without perceptual loss": ["loss.perceptual=none"],
    "with FSQ quantization": ["model.quantizer=fsq", "model.latent_channels=6"],
    "with logit-normal schedule": ["noise.law=logit_normal"],
    "without shifted sampler": ["sampler.rho=1"],
    "without guidance": ["sampler.guidance=1"],
    "continuous, KL": ["model.quantizer=kl", "model.latent_channels=16", "loss.noise_sync=0.1"],
    "continuous": ["model.quantizer=none", "model.latent_channels=16", "loss.noise_sync=0.1"],
}
MSE_ENCODER = ["noise.law=one", "loss.perceptual=none", "loss.condition_dropout=0"]
ONE_STEP = ["sampler.steps=1", "sampler.guidance=1"]
FROZEN = ["init_part=encoder", "optim.freeze_encoder_at=0"]


def short(run: Path, *more: str) -> Config:
    """Three steps of the smallest model, averaged after each."""
    quick = ["trainer.steps=3", "trainer.log_every=1", "trainer.sample_every=3", "trainer.save_every=3"]
    place = ["trainer.precision=fp32", "trainer.device=cpu", "trainer.threads=1", "trainer.sample_images=1"]
    average = ["optim.ema_decay=0.5", "optim.ema_every=1"]
    return parse(["tiny", f"run={run}", "data.batch=2", *quick, *place, *average, *more])


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_row_trains_saves_and_decodes(tmp_path, name):
    compared = name in ("fewer params", "without perceptual loss")  # a perceptual network takes its time
    more = ["loss.perceptual=random"] if compared else []
    c = short(tmp_path / "run", "sampler.steps=2", *more, *ABLATIONS[name])
    Trainer(c).fit()
    assert [r["step"] for r in logged(tmp_path / "run")] == [1, 2, 3]
    assert ("perceptual" in logged(tmp_path / "run")[-1]) == (name == "fewer params")
    model = FlowMo.from_pretrained(tmp_path / "run")
    assert model.config == c.model
    picture = model.reconstruct(torch.zeros(1, 3, 32, 32), steps=2, rho=c.sampler.rho, guidance=c.sampler.guidance)
    assert bool(picture.isfinite().all())
    grids = list((tmp_path / "run" / "samples").glob("*.png"))
    assert len(grids) == 1


def test_encoder_trained_with_mse_and_then_frozen(tmp_path):
    """Two commands: a one-step regression, then a new decoder over its frozen encoder."""
    first, second = tmp_path / "mse", tmp_path / "frozen"
    Trainer(short(first, *MSE_ENCODER, *ONE_STEP)).fit()
    trainer = Trainer(short(second, f"init={first}", *FROZEN))
    model = trainer.stage.model
    taken = {k: p.detach().clone() for k, p in model.named_parameters()}
    fresh = dict(Trainer(short(tmp_path / "unused")).stage.model.named_parameters())
    trainer.fit()
    saved, mse = FlowMo.from_pretrained(second), FlowMo.from_pretrained(first)
    for name, weight in mse.named_parameters():
        if name.startswith("encoder."):
            assert torch.equal(taken[name], weight) and torch.equal(model.get_parameter(name), weight), name
            assert torch.equal(saved.get_parameter(name), weight), name
        else:
            assert torch.equal(taken[name], fresh[name]), name
    moved = [k for k, p in model.named_parameters() if not torch.equal(p, taken[k])]
    assert moved and all(k.startswith("decoder.") for k in moved)
    for name in ("encoder.img_in.weight", "decoder.img_in.weight"):
        assert not torch.equal(fresh[name], mse.get_parameter(name)), "the first run did not train"
    assert "entropy_per_sample" in logged(second)[-1]


def test_init_gives_all_weights_where_nothing_else_is_asked(tmp_path):
    Trainer(short(tmp_path / "first")).fit()
    trainer = Trainer(short(tmp_path / "second", f"init={tmp_path / 'first'}"))
    for name, weight in FlowMo.from_pretrained(tmp_path / "first").named_parameters():
        assert torch.equal(trainer.stage.model.get_parameter(name), weight)


def test_one_step_regression_learns_pictures_from_codes(tmp_path):
    """Its flow loss is the error of a picture in one step: at first about that of noise, then that of a picture."""
    c = short(tmp_path / "mse", "data.batch=8", *MSE_ENCODER, *ONE_STEP)
    c.trainer.steps = c.trainer.save_every = c.trainer.sample_every = 80
    Trainer(c).fit()
    log = logged(tmp_path / "mse")
    assert log[-1]["flow"] < log[0]["flow"] / 2
