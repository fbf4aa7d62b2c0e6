"""Stage 1B: its loss and gradients, its memory modes, and the runs that it makes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import flowmo
from flowmo import FlowMo
from flowmo.config import ConfigError, LossConfig, NoiseConfig, PosttrainConfig, parse
from flowmo.layers import patchify, unpatchify
from flowmo.sampling import random_times
from flowmo.training import checkpoint, heldout
from flowmo.training.heldout import Heldout, read_curve
from flowmo.training.loop import Trainer
from flowmo.training.posttrain import posttrain_loss, remembering
from flowmo.training.pretrain import flow_loss, sample_noise_levels
from tests.model import golden


class Distance(nn.Module):
    """Stands in for the ResNet-50: a convolution's features at a hundredth of the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 8, 5, stride=4)
        with torch.no_grad():
            self.network.weight.normal_(generator=torch.Generator().manual_seed(5))
        self.requires_grad_(False)
        self.calls = 0

    def features(self, x):
        self.calls += 1
        return self.network(x).flatten(1)

    def distance(self, x, y):
        return (x - y).square().mean(1)

    def forward(self, x, y):
        return self.distance(self.features(x), self.features(y))


@pytest.fixture
def model() -> FlowMo:
    model = FlowMo("tiny")
    golden.fill(model.named_parameters())
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loss(model, images, memory="full", distance=None, steps=8, **options):
    return posttrain_loss(
        model, images, PosttrainConfig(steps=steps, weight=0.5), LossConfig(**options), NoiseConfig(),
        distance or Distance(), torch.Generator().manual_seed(3), memory,
    )  # fmt: skip


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradient_are_those_of_the_unrolled_reference(model, images):
    distance = Distance()
    out = loss(model, images, distance=distance, condition_dropout=0.5)
    assert distance.calls == 2, "the target's features are computed once"
    out["total"].backward()
    actual = gradients(model)
    model.zero_grad()

    random = torch.Generator().manual_seed(3)
    data = patchify(images, 4)
    t = sample_noise_levels(3, NoiseConfig(), random)
    z = torch.randn(data.shape, generator=random)
    keep = torch.rand(3, generator=random) >= 0.5
    start = torch.randn(data.shape, generator=random)
    times = random_times(3, 8, random)
    codes = model.encode(images, plan=False)
    x_t = torch.lerp(data, z, t[:, None, None])
    flow = flow_loss(model.velocity(x_t, t, model.condition(codes, keep)), data, z)
    x = start
    for i in range(8):
        x = x + (times[:, i + 1] - times[:, i])[:, None, None] * model.velocity(x, times[:, i], model.condition(codes))
    sample = (distance.network(unpatchify(x, 4, 32)) - distance.network(images)).square().mean()
    torch.testing.assert_close(out["flow"], flow)
    torch.testing.assert_close(out["sample"], sample)
    torch.testing.assert_close(out["total"], flow + 0.5 * sample)
    (flow + 0.5 * sample).backward()
    expected = {k: v for k, v in gradients(model).items() if k.startswith("decoder.")}
    assert actual.keys() == expected.keys() and all(k.startswith("decoder.") for k in actual)
    for key in expected:
        # Two orders of summation of the same fp32 terms, through nine passes: a few units of the gradient's size.
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-3, atol=1e-5 * float(expected[key].abs().max()))


def test_memory_modes_give_the_same_gradients_and_save10_repeats_no_product(model, images):
    results, flops = {}, {}
    for memory in ("none", "save10", "full"):
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss(model, images, memory, steps=3)["total"].backward()
        results[memory], flops[memory] = gradients(model), counter.get_total_flops()
    for memory in ("save10", "full"):
        assert results[memory].keys() == results["none"].keys()
        for key, expected in results["none"].items():
            atol = 1e-6 * float(expected.abs().max())
            torch.testing.assert_close(results[memory][key], expected, rtol=1e-5, atol=atol)
    assert flops["save10"] == flops["none"]
    # Four calls of a decoder run once more each: between a fifth and a third of all operations.
    assert 1.2 < flops["full"] / flops["none"] < 1.34


def test_compiled_chain_with_save10_has_the_same_gradients(model, images):
    results = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        model.zero_grad()
        f = torch.compile(posttrain_loss, backend="aot_eager") if compiled else posttrain_loss
        random = torch.Generator().manual_seed(3)
        settings = PosttrainConfig(steps=2), LossConfig(), NoiseConfig(), Distance(), random
        f(model, images, *settings, memory="save10")["total"].backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for key, expected in results[0].items():
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(results[1][key], expected, rtol=1e-5, atol=atol)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_shipped_model_comes_nearer_to_held_out_photographs(tmp_path):
    """Eight steps from the shipped quickstart weights, with the chain of eight and an untrained ResNet-50.

    What they learn is measured on parts of photographs that training does not see, sampled from other noise at other
    times: their distance falls (by 3 to 5 % with three seeds), and PSNR does not fall by more than 0.3 dB.
    """
    shipped = Path(flowmo.__file__).parent / "assets" / "quickstart.safetensors"
    run = tmp_path / "run"
    trainer = Trainer(
        parse(
            [
                *("quickstart", "stage=posttrain", f"init={shipped}", f"run={run}", "trainer.steps=8"),
                *("trainer.precision=fp32", "trainer.threads=1", "data.batch=6", "trainer.accumulate=1"),
                *("optim.ema_decay=0.8", "optim.ema_every=1", "sampler.steps=8", "sampler.guidance=1.0"),
                *("heldout.images=12", "heldout.every=8", "trainer.sample_images=1", "trainer.sample_every=100"),
                *("checkpoint=none", "trainer.save_every=100"),
            ]
        )
    )
    assert trainer.config.optim.lr == 5e-5 and trainer.config.posttrain.steps == 8
    trainer.fit()
    start, end = read_curve(run / "heldout.jsonl")
    assert end["perceptual"] < 0.98 * start["perceptual"], (start, end)
    assert end["psnr"] > start["psnr"] - 0.3, (start, end)


def test_rfid_decides_when_asked(tmp_path, trained, monkeypatch):
    class Features:
        def to(self, device):
            return self

        def __call__(self, images):
            return SimpleNamespace(pool=images.mean((2, 3)))

    monkeypatch.setattr(heldout, "load_inception", lambda path, **options: Features() if path == "file" else None)
    more = ["heldout.metric=rfid", "heldout.inception_weights=file", "heldout.every=1", "trainer.steps=1"]
    trainer = stand_in(Trainer(config(tmp_path, trained, *more)))
    trainer.fit()
    for line in read_curve(tmp_path / "heldout.jsonl"):
        assert line["rfid"] > 0 and {"psnr", "perceptual"} < line.keys()
    with pytest.raises(ConfigError, match=r"heldout\.inception_weights=PATH"):
        config(tmp_path, trained, "heldout.metric=rfid")
    with pytest.raises(ConfigError, match=r"set heldout\.metric=psnr"):
        parse(["tiny", "loss.perceptual=none", "heldout.every=5"])
    parse(["tiny", "loss.perceptual=none", "heldout.every=5", "heldout.metric=psnr"])


def test_save10_keeps_ten_tensors_of_a_block(model, images):
    """What lives between forward and backward, in tensors of [tokens, width] for each block of the decoder."""
    codes = model.encode(images, plan=False)
    condition, data = model.condition(codes), patchify(images, 4)
    one = 3 * (64 + 16) * 64 * 4  # bytes of [B, L, D] in fp32
    kept = {}
    for memory in ("none", "save10", "full"):
        with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiled:
            out = remembering(model.velocity, memory)(data, torch.full((3,), 0.5), condition)
        events = profiled.profiler.kineto_results.events()
        kept[memory] = sum(e.nbytes() for e in events if e.name() == "[memory]") / one / 2
        del out
    assert kept["full"] < 0.5
    # Ends and modulation add a little, the last block's dead stream and the rotated q, k take some away.
    assert 8 < kept["save10"] < 12
    assert kept["none"] > 2 * kept["save10"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrain") / "run"
    arguments = ["tiny", f"run={run}", "trainer.steps=30", "trainer.log_every=10", "trainer.precision=fp32"]
    trainer = Trainer(parse([*arguments, "trainer.threads=1", "sampler.steps=1", "trainer.sample_images=1"]))
    trainer.fit()
    return run


def config(run, init, *more):
    return parse(
        [
            *("tiny", "stage=posttrain", f"init={init}", f"run={run}", "posttrain.resnet=none", "data.batch=4"),
            *("trainer.precision=fp32", "trainer.threads=1", "trainer.log_every=1", "trainer.sample_images=1"),
            *("heldout.images=4", "sampler.steps=1", "optim.ema_every=1", *more),
        ]
    )


def stand_in(trainer):
    trainer.stage.resnet = Distance()
    return trainer


def test_a_run_starts_from_another_and_resumes_bit_for_bit(tmp_path, trained):
    shipped = FlowMo.from_pretrained(trained)
    trainers = {}
    for name, stops in (("a", (4,)), ("b", (2, 4))):
        for stop in stops:
            more = [f"trainer.steps={stop}", "trainer.accumulate=2", "heldout.every=2", "trainer.save_every=2"]
            trainer = stand_in(Trainer(config(tmp_path / name, trained, *more)))
            if not checkpoint.list_checkpoints(trainer.run):
                assert all(torch.equal(v, shipped.state_dict()[k]) for k, v in trainer.model.state_dict().items())
            trainer.fit()
        trainers[name] = trainer
    a, b = (t.model.state_dict() for t in trainers.values())
    assert all(torch.equal(a[k], b[k]) for k in a)
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], shipped.state_dict()[k])}
    assert changed == {"decoder"}, "the encoder is frozen"
    assert read_curve(tmp_path / "a" / "heldout.jsonl") == read_curve(tmp_path / "b" / "heldout.jsonl")
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"flow", "sample", "seconds_per_step", "peak_memory_gib", "gradient_norm"} <= line.keys()
    assert FlowMo.from_pretrained(tmp_path / "a" / "best").config == shipped.config


def test_training_checkpoints_and_models_of_other_sizes_as_init(tmp_path, trained):
    (file,) = checkpoint.list_checkpoints(trained)
    trainer = Trainer(config(tmp_path / "a", file))
    shipped = FlowMo.from_pretrained(trained).state_dict()
    assert all(torch.equal(v, shipped[k]) for k, v in trainer.model.state_dict().items())
    with pytest.raises(ConfigError, match=r"model\.decoder_depth=2 there and 3 here"):
        Trainer(config(tmp_path / "b", trained, "model.decoder_depth=3"))
    with pytest.raises(ConfigError, match="stage=posttrain needs init="):
        parse(["tiny", "stage=posttrain"])
    with pytest.raises(ConfigError, match=r"stage='postrain'.*did you mean posttrain"):
        parse(["tiny", "stage=postrain"])


def test_training_stops_when_measurements_get_worse_and_keeps_the_best(tmp_path, trained, monkeypatch):
    psnr = iter([19.0, 20.0, 21.0, 20.5, 20.9, 22.0])
    monkeypatch.setattr(Heldout, "measure", lambda self, model: {"psnr": next(psnr)})
    more = ["heldout.metric=psnr", "heldout.every=2", "heldout.patience=2", "trainer.steps=40", "posttrain.steps=2"]
    trainer = stand_in(Trainer(config(tmp_path / "run", trained, *more)))
    weights = {}
    update = Heldout.update

    def watched(self, step, model):
        weights[step] = model.decoder.img_in.weight.clone()
        return update(self, step, model)

    monkeypatch.setattr(Heldout, "update", watched)
    trainer.fit()
    assert trainer.step == 8 and trainer.finished
    curve = read_curve(tmp_path / "run" / "heldout.jsonl")
    assert [(r["step"], r["psnr"], r["best"]) for r in curve] == [
        (0, 19.0, True), (2, 20.0, True), (4, 21.0, True), (6, 20.5, False), (8, 20.9, False)
    ]  # fmt: skip
    best = FlowMo.from_pretrained(tmp_path / "run" / "best").decoder.img_in.weight
    assert torch.equal(best, weights[4]) and not torch.equal(best, weights[8])
    again = stand_in(Trainer(config(tmp_path / "run", trained, *more)))
    again.fit()
    assert again.step == 8, "it has ended, and the same command does not start it anew"
    more[2:4] = ["heldout.patience=3", "trainer.steps=10"]
    patient = stand_in(Trainer(config(tmp_path / "run", trained, *more)))
    patient.fit()
    assert patient.step == 10 and read_curve(tmp_path / "run" / "heldout.jsonl")[-1]["best"]
