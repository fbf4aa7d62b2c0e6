"""Few-step distillation: its chains, its loss and gradients, the teacher that stays, and the runs that it makes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowmo import FlowMo
from flowmo.config import ConfigError, DistillConfig, parse
from flowmo.engine import Schedule
from flowmo.layers import patchify, unpatchify
from flowmo.metrics import psnr
from flowmo.pretrained import CheckpointError
from flowmo.training import checkpoint
from flowmo.training.distill import chain_ends, distill_loss
from flowmo.training.heldout import read_curve
from flowmo.training.loop import Trainer
from tests.model import golden
from tests.processes import together


class Distance(nn.Module):
    """Stands in for the perceptual networks: a convolution's features at a hundredth of the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 8, 5, stride=4)
        with torch.no_grad():
            self.network.weight.normal_(generator=torch.Generator().manual_seed(5))
        self.requires_grad_(False)

    def features(self, x):
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
def batch(model) -> SimpleNamespace:
    random = torch.Generator().manual_seed(1)
    images, noise, target = (torch.randn(3, 3, 32, 32, generator=random).clamp(-1, 1) for _ in range(3))
    codes = torch.randn(3, 16, 18, generator=random).sign()
    return SimpleNamespace(images=images, codes=codes, noise=noise, target=target)


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_chains_are_those_of_the_sampler_that_will_decode(model, batch):
    z = patchify(batch.noise, 4)
    calls = []

    def call(x, t, condition):
        calls.append(float(t[0]))
        return model.velocity(x, t, condition)

    with torch.no_grad():
        ends = chain_ends(call, z, model.condition(batch.codes), [1, 2, 4], 2.0)
    assert calls == [1.0, 0.25, 0.5625, 0.25, 0.0625], "the first evaluation is shared"
    for n, end in zip((1, 2, 4), ends):
        expected = model.decode(batch.codes, n, 2.0, 1.0, noise=batch.noise, plan=False)
        # Here to + (from - to), there the same difference of times: the last digit of the steps, over four steps.
        torch.testing.assert_close(unpatchify(end, 4, 32).clamp(-1, 1), expected, rtol=0, atol=2e-6)


def test_loss_and_gradient_are_those_of_the_unrolled_reference(model, batch):
    config = DistillConfig(steps=[1, 3], rho=1.0, original=[0.25, 0.5])
    judges = [(0.5, Distance())]
    out = distill_loss(model, batch.images, batch.codes, batch.noise, batch.target, config, judges, "full")
    out["total"].backward()
    actual = gradients(model)
    model.zero_grad()

    condition, z = model.condition(batch.codes), patchify(batch.noise, 4)
    total = torch.zeros(())
    for n, share in ((1, 0.25), (3, 0.5)):
        x = z
        for i in range(n):
            x = x - model.velocity(x, torch.full((3,), 1 - i / n), condition) / n
        picture = unpatchify(x, 4, 32)
        match, original = ((picture - y).square().mean() for y in (batch.target, batch.images))
        judged = (judges[0][1].features(picture) - judges[0][1].features(batch.images)).square().mean()
        torch.testing.assert_close(out[f"match_{n}"], match)
        total = total + ((1 - share) * match + share * original + 0.5 * judged) / 2
    torch.testing.assert_close(out["total"], total)
    total.backward()
    expected = gradients(model)
    assert actual.keys() == expected.keys() and all(k.startswith("decoder.") for k in actual)
    for key in expected:
        # Two orders of summation of the same fp32 terms, through four passes: a few units of the gradient's size.
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-3, atol=1e-5 * float(expected[key].abs().max()))


def test_one_share_of_the_original_stands_for_all_numbers_of_steps(model, batch):
    totals = []
    for original in ([0.5], [0.5, 0.5, 0.5]):
        config = DistillConfig(original=original)
        with torch.no_grad():
            out = distill_loss(model, batch.images, batch.codes, batch.noise, batch.target, config)
        totals.append(out["total"])
    assert torch.equal(*totals)
    torch.testing.assert_close(totals[0], (out["match"] + out["original"]) / 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrain") / "run"
    arguments = ["tiny", f"run={run}", "trainer.steps=80", "trainer.log_every=20", "trainer.precision=fp32"]
    more = ["trainer.threads=1", "sampler.steps=1", "trainer.sample_images=1", "optim.ema_decay=0.9"]
    Trainer(parse([*arguments, *more])).fit()
    return run


def arguments(run, init, *more):
    return [
        *("tiny", "stage=distill", f"init={init}", f"run={run}", "data.batch=4", "sampler.steps=4"),
        *("trainer.precision=fp32", "trainer.threads=1", "trainer.log_every=1", "trainer.sample_images=1"),
        *("heldout.images=4", "distill.steps=[1,2]", "trainer.accumulate=1", "heldout.every=2"),
        *("optim.ema_every=1", "optim.ema_decay=0.9", *more),
    ]


def test_a_run_starts_from_its_teacher_which_stays_and_resumes_bit_for_bit(tmp_path, trained):
    start = FlowMo.from_pretrained(trained).state_dict()
    trainers = {}
    for name, stops in (("a", (4,)), ("b", (2, 4))):
        for stop in stops:
            more = [f"trainer.steps={stop}", "trainer.accumulate=2", "trainer.save_every=2", "optim.schedule=constant"]
            trainer = Trainer(parse(arguments(tmp_path / name, trained, *more)))
            if not checkpoint.list_checkpoints(trainer.run):
                assert all(torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items())
            trainer.fit()
            for k, v in trainer.stage.teacher.state_dict().items():
                assert torch.equal(v, start[k]), "the teacher learns nothing, and a resumed run has the first one"
        trainers[name] = trainer
    a, b = (t.model.state_dict() for t in trainers.values())
    assert all(torch.equal(a[k], b[k]) for k in a)
    changed = {k.split(".")[0] for k in a if not torch.equal(a[k], start[k])}
    assert changed == {"decoder"}, "the encoder is frozen: tokens of the teacher are the student's"
    curves = [read_curve(tmp_path / name / "heldout.jsonl") for name in trainers]
    assert curves[0] == curves[1] and [line["step"] for line in curves[0]] == [0, 2, 4]
    assert {"teacher", "teacher_1", "teacher_2", "psnr", "psnr_1", "psnr_2"} < curves[0][0].keys()
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"match", "match_1", "match_2", "original", "gradient_norm"} <= line.keys()
    with pytest.raises(ConfigError, match=r"sampler\.steps=4 there and 5 here"):
        Trainer(parse(arguments(tmp_path / "a", trained, "sampler.steps=5", "trainer.accumulate=2")))
    (tmp_path / "a" / "teacher" / "config.json").unlink()
    with pytest.raises(ConfigError, match="teacher is gone"):
        Trainer(parse(arguments(tmp_path / "a", trained, *more)))


def test_the_target_is_the_guided_picture_of_the_same_noise(tmp_path, trained):
    stage = Trainer(parse(arguments(tmp_path / "run", trained))).stage
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen = {}
    stage.loss = lambda model, images, codes, noise, target, *rest, **more: seen.update(z=noise, y=target)
    stage(images, torch.Generator().manual_seed(7))
    assert torch.equal(seen["z"], torch.randn(images.shape, generator=torch.Generator().manual_seed(7)))
    teacher = FlowMo.from_pretrained(trained)
    expected = teacher.reconstruct(images, steps=4, rho=4.0, guidance=1.5, noise=seen["z"], plan=False)
    # The engine sums in another order: some units of fp32 at pictures of size 1, through four steps.
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=2e-5)
    unguided = teacher.reconstruct(images, steps=4, guidance=1.0, noise=seen["z"], plan=False)
    assert (expected - unguided).abs().max() > 1e-3


def test_the_student_comes_nearer_to_its_teacher_and_says_how_it_decodes(tmp_path, trained):
    more = ["trainer.steps=50", "heldout.every=50", "heldout.images=16", "trainer.sample_every=50", "sampler.steps=8"]
    trainer = Trainer(parse(arguments(tmp_path / "run", trained, *more)))
    trainer.fit()
    start, end = read_curve(tmp_path / "run" / "heldout.jsonl")
    for n, gain in ((1, 3.0), (2, 0.8)):  # dB; seeds 0 to 2 bring 4.7 and more in one step, 1.3 and more in two
        assert end[f"teacher_{n}"] > start[f"teacher_{n}"] + gain
    for folder in ("run", "run/model", "run/model/model.safetensors", "run/best"):
        student = FlowMo.from_pretrained(tmp_path / folder)
        assert student.sampler == Schedule(2, 1.0, 1.0)
    images = trainer.samples
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    plain = student.reconstruct(images, noise=noise)
    assert torch.equal(plain, student.reconstruct(images, steps=2, rho=1.0, guidance=1.0, noise=noise))
    assert torch.equal(plain, student.decode_plan(1)(student.encode(images), noise))
    assert not torch.equal(plain, student.reconstruct(images, steps=1, noise=noise))
    teacher = FlowMo.from_pretrained(tmp_path / "run" / "teacher")
    assert teacher.sampler == Schedule() and torch.equal(teacher.encode(images), student.encode(images))
    assert (tmp_path / "run" / "samples" / "step_00000050.png").is_file()


def test_files_of_other_samplers_are_refused(tmp_path, model):
    model.sampler = Schedule(2, 1.0, 1.0)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for sampler in (
        *({"steps": 0}, {"steps": 2.5}, {"steps": "4"}, {"steps": 10**9}, {"steps": True}),
        *({"rho": -1.0}, {"rho": "x"}, {"rho": None}, {"guidance": float("nan")}, {"solver": "heun"}, [4], 4),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | {"sampler": sampler}))
        with pytest.raises(CheckpointError, match=r"sampler|expected"):
            FlowMo.from_pretrained(tmp_path)
    del content["sampler"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert FlowMo.from_pretrained(tmp_path).sampler == Schedule()


def test_wrong_configurations_are_said(tmp_path, trained):
    for more, match in (
        (("distill.steps=[1,9]",), r"distill\.steps=\[1, 9\].*1 to sampler\.steps=4"),
        (("distill.steps=[]",), r"distill\.steps=\[\]"),
        (("distill.steps=[2,2]",), "different numbers"),
        (("distill.original=[0.5,0.5,0.5]",), r"one for each of distill\.steps"),
        (("distill.original=[1.5]",), "from 0 to 1"),
        (("distill.rho=0",), r"distill\.rho=0"),
        (("init=null",), "needs init="),
        (("noise.law=uniform",), "does not read noise.law"),
        (("stage=posttrain",), r"stage=posttrain does not read distill\.steps"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse(arguments(tmp_path / "run", trained, *more))
    with pytest.raises(ConfigError, match=r"model\.decoder_depth=2 there and 3 here"):
        Trainer(parse(arguments(tmp_path / "run", trained, "model.decoder_depth=3")))


TRAIN = "import json, sys; from flowmo.train import main; [main(a) for a in json.loads(sys.argv[1])]"


def test_two_processes_equal_one_replicated_or_sharded(tmp_path, trained):
    # With Adam's usual eps a gradient's sign decides, also where it is all rounding; with this one the step is smooth.
    more = ["trainer.steps=2", "trainer.save_every=2", "optim.eps=1e-2", "optim.schedule=constant"]
    Trainer(parse(arguments(tmp_path / "one", trained, *more, "trainer.accumulate=2"))).fit()
    runs = [arguments(tmp_path / way, trained, *more, f"trainer.parallel={way}") for way in ("ddp", "fsdp")]
    together(TRAIN, json.dumps(runs))
    one, start = (FlowMo.from_pretrained(path).state_dict() for path in (tmp_path / "one", trained))
    curve = read_curve(tmp_path / "one" / "heldout.jsonl")
    for way in ("ddp", "fsdp"):
        two = FlowMo.from_pretrained(tmp_path / way)
        assert two.sampler == Schedule(2, 1.0, 1.0)
        for key, value in two.state_dict().items():
            # Sums over processes instead of micro-batches: a rounding of the gradient, thousandths of a smooth step.
            # And of the weights themselves, in Adam's and the hold's product of two steps: four of 2^-23.
            moved = float((one[key] - start[key]).abs().max())
            torch.testing.assert_close(value, one[key], rtol=5e-7, atol=1e-3 * moved + 1e-8)
        found = read_curve(tmp_path / way / "heldout.jsonl")
        assert [line["teacher"] for line in found] == pytest.approx([line["teacher"] for line in curve], abs=1e-3)


def test_psnr_to_the_teacher_is_that_of_their_pictures(tmp_path, trained):
    trainer = Trainer(parse(arguments(tmp_path / "run", trained)))
    model, measure = trainer.averaged(), trainer.heldout.score
    values = measure(model)
    images = measure.originals.images
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    student = model.reconstruct(images, steps=1, rho=1.0, guidance=1.0, noise=noise)
    teacher = FlowMo.from_pretrained(trained).reconstruct(images, steps=4, noise=noise)
    assert values["teacher_1"] == pytest.approx(float(psnr(student, teacher).mean()), abs=1e-3)
    assert values["psnr_1"] == pytest.approx(float(psnr(student, images).mean()), abs=1e-6)
    assert values["teacher"] == pytest.approx((values["teacher_1"] + values["teacher_2"]) / 2)
