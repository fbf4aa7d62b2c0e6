"""What a run says about itself: its length, its log, its profile, and the page made of them."""

from __future__ import annotations

import json
import re
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowmo import FlowMo
from flowmo.config import ConfigError, parse, to_yaml
from flowmo.training import report
from flowmo.training.autoencoder import code_statistics
from flowmo.training.flops import peak_flops, step_flops, transformer_flops
from flowmo.training.loop import Trainer


def config(run, *more):
    return parse(
        [
            *("tiny", f"run={run}", "data.batch=4", "trainer.precision=fp32", "trainer.threads=1", "sampler.steps=1"),
            *("trainer.log_every=2", "trainer.sample_images=1", "heldout.images=2", *more),
        ]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    more = ["trainer.steps=8", "trainer.profile=1", "trainer.sample_every=2", "heldout.every=4", "heldout.metric=psnr"]
    Trainer(config(folder, *more, "loss.entropy=0.123")).fit()
    return folder


def test_log_holds_norms_code_usage_speed_and_memory(run):
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"gradient_norm", "parameter_norm", "code_usage", "code_perplexity", "skipped_steps", "entropy_codebook"}
    assert wanted | {"images_per_second", "seconds_per_step", "peak_memory_gib"} <= line.keys()
    assert 0 < line["code_perplexity"] <= line["code_usage"] <= 1
    # Two steps of 4 pictures of 32 tokens can show at most 256 of the 512 codes.
    assert line["code_usage"] <= 0.5


def test_code_statistics():
    assert code_statistics(torch.tensor([5, 5, 0, 0])) == pytest.approx({"code_usage": 0.5, "code_perplexity": 0.5})
    assert code_statistics(torch.tensor([3, 3, 3, 3])) == pytest.approx({"code_usage": 1.0, "code_perplexity": 1.0})


def test_profile_on_request(run):
    trace = json.loads((run / "profile" / "trace.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])
    assert "addmm" in (run / "profile" / "operators.txt").read_text()


def test_page_shows_curves_grids_and_settings(run, tmp_path, capsys):
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "page.html" in capsys.readouterr().out
    curves = re.findall(r"<svg.*?</svg>", page)
    names = {"".join(ElementTree.fromstring(c).find("text/tspan").itertext()) for c in curves}
    assert {"flow", "loss", "code_usage", "psnr", "gradient_norm", "lr"} <= names
    assert page.count("data:image/png;base64,") == 4
    assert "loss.entropy</td><td>0.123" in page and "8 of 8" in page and "best held out" in page
    assert "model.patch" not in page, "as the defaults have it"
    with pytest.raises(FileNotFoundError, match="no training run"):
        report.report(tmp_path)


def test_page_of_known_numbers(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(config(tmp_path, "trainer.steps=8")))  # a line every 2 steps of 4
    lines = [{"step": s, "loss": 1.0, "seconds_per_step": 3600.0, "skipped_steps": s - 2} for s in (2, 4, 6)]
    cut = '{"step": 8, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    measured = [{"step": s, "psnr": float(s), "best": s < 6} for s in (2, 4, 6)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    page = report.report(tmp_path)
    for name, value in (("steps", "6 of 8"), ("images seen", "24"), ("time, about", "6.00 h"), ("steps skipped", "4")):
        assert f"<td>{name}</td><td>{value}</td>" in page
    assert "<td>best held out</td><td>step 4: psnr 4</td>" in page


def test_operations_of_a_step_are_those_of_its_passes(tmp_path):
    """Forward passes count once, those that learn three times; of a batch of 4."""
    c = config(tmp_path)
    m = c.model
    sizes = m.grid**2, m.latent_tokens, 3 * m.patch**2
    encoder = transformer_flops(m.encoder_hidden, m.encoder_depth, *sizes, m.latent_channels, False)
    decoder = transformer_flops(m.decoder_hidden, m.decoder_depth, *sizes, m.latent_channels + 1, True)
    assert step_flops(c, False) == pytest.approx(4 * 3 * (encoder + decoder), rel=1e-12)
    assert step_flops(c, True) == pytest.approx(4 * (encoder + 3 * decoder), rel=1e-12)
    c.stage, c.distill.steps = "distill", (1, 2, 4)
    c.sampler.steps, c.sampler.guidance, c.sampler.guidance_interval = 5, 2.0, None
    # the chains share their first of 1 + 2 + 4 passes; the teacher takes 5 steps of two
    assert step_flops(c, False) == pytest.approx(4 * (encoder + (3 * 5 + 10) * decoder), rel=1e-12)
    c.stage, c.posttrain.steps, c.posttrain.resnet = "posttrain", 8, "random"
    assert step_flops(c, False) == pytest.approx(4 * (encoder + 3 * 9 * decoder), rel=1e-12)
    c.posttrain.resnet = "none"  # then there is no chain
    assert step_flops(c, False) == pytest.approx(4 * (encoder + 3 * decoder), rel=1e-12)


def test_curve_spans_its_box():
    svg = ElementTree.fromstring(report.curve("x", [(i, float(i % 7)) for i in range(5000)]))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    assert len(points) <= 450 and svg.findall("text")[-1].text == "step 4999"
    assert min(p[0] for p in points) == 62 and max(p[0] for p in points) == 412
    assert min(p[1] for p in points) == 20 and max(p[1] for p in points) == 128
    assert "points='62.0,128.0 412.0,20.0'" in report.curve("x", [(0, 1.0), (1, 2.0)])  # larger is higher
    assert "points='62.0,20.0'" in report.curve("x", [(7, 1.0)])  # a run that has logged once


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("lo", "1,300,000 steps of 128 images, 166,400,000 images seen, 129.88 epochs of ImageNet-1K"),
        ("hi", "800,000 steps of 128 images, 102,400,000 images seen, 79.93 epochs of ImageNet-1K"),
        ("small", "400,000 steps of 128 images, 51,200,000 images seen, 39.96 epochs of ImageNet-1K"),
    ],
)
def test_presets_say_their_published_length(tmp_path, preset, words):
    """The lengths of the recipe (130, 80 and 40 epochs), said by a model small enough for a test."""
    small = [f"model.{k}={v}" for k, v in {"heads": 1, "encoder_depth": 1, "decoder_depth": 1}.items()]
    trainer = Trainer(parse([preset, f"run={tmp_path}", "data.path=samples", "loss.perceptual=none", *small]))
    assert words in trainer.describe()


def test_stage_1b_defaults_are_published():
    c = parse(["lo", "stage=posttrain", "init=runs/lo"])
    assert (c.optim.lr, c.data.batch, c.posttrain.weight, c.posttrain.steps) == (5e-5, 64, 0.01, 8)
    assert (c.trainer.steps, c.heldout.every, c.run, c.checkpoint) == (20_018, 5_000, "runs/lo-posttrain", "full")


def test_operations_are_those_that_pytorch_counts():
    model = FlowMo("tiny")
    m = model.config
    for part, channels, decoder in ((model.encoder, 18, False), (model.decoder, 19, True)):
        arguments = torch.zeros(1, 64, 48), torch.zeros(1, 16, channels)
        # The counter knows plain products, not the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            part(*arguments, torch.zeros(1)) if decoder else part(*arguments)
        depth = m.decoder_depth if decoder else m.encoder_depth
        ours = transformer_flops(64, depth, 64, 16, 48, channels, decoder)
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    lo = parse(["lo"])
    assert step_flops(lo, frozen_encoder=True) < step_flops(lo, frozen_encoder=False)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("unknown") is None


def test_wandb_is_told_everything_or_its_absence_is(tmp_path, monkeypatch):
    sent, settings = [], {}

    class Run:
        def log(self, values, step):
            sent.append((step, values))

        def finish(self):
            sent.append("finished")

    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    stand_in.init = lambda **options: (settings.update(options), Run())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    Trainer(config(tmp_path / "a", "trainer.steps=2", "trainer.wandb=offline")).fit()
    assert settings["mode"] == "offline" and settings["config"]["optim"]["lr"] == 2e-3
    assert sent[0][0] == 2 and "flow" in sent[0][1] and sent[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install flowmo\[wandb\]"):
        Trainer(config(tmp_path / "b", "trainer.steps=2", "trainer.wandb=offline")).fit()
