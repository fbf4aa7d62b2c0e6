"""The library as somebody meets it in a notebook: threads, near misses, names that messages mention."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import flowmo
from flowmo import FlowMo, model_config
from flowmo.config import ConfigError, parse
from flowmo.pretrained import CheckpointError, read_config, save_released, shipped_weights, weights_file
from flowmo.sampling import guided_steps, time_grid
from flowmo.tiles import TileDecoder, encode_tiles, grid_for
from flowmo.training.loop import Trainer


def test_threads_share_a_model(tiny):
    """A server's threads: every picture is that of its own tokens and noise, as if it had been alone."""
    noises = torch.randn(12, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def work(noise):
        codes = tiny.encode(noise.clamp(-1, 1))
        return tiny.decode(codes, steps=6, noise=noise)

    alone = [work(noise) for noise in noises]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, noises))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_threads_share_a_plan(tiny):
    """One that is kept is also the one that `decode` runs with the same settings, and two threads may call it."""
    noises = torch.randn(12, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = [tiny.encode(noise.clamp(-1, 1)) for noise in noises]
    plan = tiny.decode_plan(2, steps=6)

    def work(i):
        return tiny.decode(codes[i], steps=6, noise=noises[i]) if i % 3 == 0 else plan(codes[i], noises[i])

    alone = [work(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(12)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_threads_share_a_decoder_of_tiles(tiny):
    decoder = TileDecoder(tiny, batch=4, steps=6)
    grid = grid_for(tiny, 40, 40)
    codes = encode_tiles(tiny, torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1, grid, 4)

    def work(seed):
        return decoder([(grid, codes)], seed=seed)[0]

    alone = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_near_misses_are_named(tiny):
    codes = tiny.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        tiny.decode(codes, steps=1, generator=0)
    with pytest.raises(TypeError, match=r"noise: expected a float tensor \[1, 3, 32, 32\], got ndarray"):
        tiny.decode(codes, steps=1, noise=np.zeros((1, 3, 32, 32)))
    with pytest.raises(ConfigError, match="is a generator of Stage 2"):
        model_config("maskgit")


def test_tokens_of_any_integer_kind(tiny):
    tokens = tiny.tokenize(torch.zeros(1, 3, 32, 32))
    noise = torch.zeros(1, 3, 32, 32)
    expected = tiny.detokenize(tokens, steps=1, noise=noise)
    for dtype in (torch.int16, torch.int32, torch.uint16):
        assert torch.equal(tiny.detokenize(tokens.to(dtype), steps=1, noise=noise), expected)


@pytest.mark.parametrize(
    "sampler",
    [
        {"steps": 0},
        {"steps": 10_001},
        {"steps": True},
        {"rho": 0.0},
        {"rho": -1.0},
        {"guidance": 1e999},
        {"solver": "x"},
    ],
)
def test_samplers_that_files_cannot_ask_for(tiny, tmp_path, sampler):
    """A downloaded folder must not make a decode endless, nor fail in the middle of one."""
    tiny.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "sampler": {"steps": 2, **sampler}}))
    with pytest.raises(CheckpointError, match=r"config\.json: no model configuration"):
        read_config(tmp_path / "config.json")


def test_ends_of_the_guidance_interval_are_guided():
    assert guided_steps([0.75, 0.5, 0.25, 0.0], 2.0, (1.0, 3.0)) == [True, True, False]  # t = s / (1 + s)
    for rho in (math.inf, math.nan, 0.0):
        with pytest.raises(ValueError, match="rho="):
            time_grid(4, rho)


def test_names_that_messages_mention_need_no_import_of_their_own(monkeypatch):
    monkeypatch.delattr(flowmo, "data")  # as in a process that has imported flowmo alone
    assert flowmo.data.resize_shorter and flowmo.tiles.TileDecoder
    with pytest.raises(AttributeError, match="no attribute 'dta'"):
        flowmo.dta  # noqa: B018


def test_the_weights_that_come_along_have_a_name():
    if shipped_weights("quickstart") is None:
        pytest.skip("this copy ships no quickstart weights")
    assert FlowMo.from_pretrained("quickstart").config == model_config("quickstart")
    with pytest.raises(FileNotFoundError, match="weights of preset lo do not come along"):
        FlowMo.from_pretrained("lo")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Of a run of two steps, which is there."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    short = ["trainer.steps=2", "trainer.sample_every=9", "trainer.device=cpu", "trainer.threads=1", f"run={run}"]
    Trainer(parse(["tiny", *short])).fit()
    return ["tiny", *short]


def test_a_step_of_a_run_is_a_model(settings):
    """Those that `trainer.keep_every` keeps can be measured later, and the best of them taken."""
    run = Path(parse(settings).run)
    step, model = (FlowMo.from_pretrained(path) for path in (run / "checkpoints" / "step_00000002.pt", run))
    assert step.config == model.config and step.sampler == model.sampler
    assert all(torch.equal(a, b) for a, b in zip(step.state_dict().values(), model.state_dict().values()))
    raw = FlowMo.from_pretrained(run / "checkpoints" / "step_00000002.pt", ema=False)
    assert not torch.equal(raw.decoder.img_in.weight, model.decoder.img_in.weight)


def test_what_is_called_a_step_need_not_be_one(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "step_100")
    assert FlowMo.from_pretrained(tmp_path / "step_100").config == tiny.config
    save_released(tiny.state_dict(), tmp_path / "step_100.pt")
    with pytest.raises(CheckpointError, match=r"holds model_ema_state_dict, .*; give a released checkpoint"):
        FlowMo.from_pretrained(tmp_path / "step_100.pt")


def test_weight_files_may_lie_elsewhere_when_a_run_goes_on(settings):
    moved = ["loss.perceptual_weights=elsewhere/vgg16-397923af.pth", "posttrain.resnet_weights=elsewhere/resnet50.pth"]
    assert Trainer(parse([*settings, *moved])).resume()
    with pytest.raises(ConfigError, match=r"heldout\.inception_weights=None there and random here"):
        Trainer(parse([*settings, "heldout.inception_weights=random"]))


def test_the_file_of_the_weights_is_known(settings, tmp_path):
    """So that a result can say what it was measured with."""
    run = Path(parse(settings).run)
    assert weights_file("quickstart") == shipped_weights("quickstart")
    assert weights_file(run) == run / "model" / "model.safetensors" == weights_file(run / "model")
    assert weights_file(run / "model" / "model.safetensors").samefile(weights_file(run))
    step = run / "checkpoints" / "step_00000002.pt"
    assert weights_file(step) == step
    (tmp_path / "step_00000001").mkdir()
    assert weights_file(tmp_path / "step_00000001") is None, "shards"
