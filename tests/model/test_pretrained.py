"""Files of models: the released layout, model folders, and what is said about files that do not fit."""

from __future__ import annotations

import json
import pickle
import resource

import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.pretrained import CheckpointError, save_released


@pytest.fixture(scope="module")
def model() -> FlowMo:
    torch.manual_seed(0)
    return FlowMo(model_config("tiny", latent_tokens=8))


@pytest.fixture
def released(model, tmp_path):
    """A checkpoint in the released layout whose raw weights are one above the averaged ones."""
    path = tmp_path / "flowmo_lo.pth"
    raw = {k: v + 1 for k, v in model.state_dict().items()}
    save_released(raw, path, ema=model.state_dict(), steps=7)
    return path


def same(a: FlowMo, b: FlowMo) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_released_checkpoint_round_trip_is_bit_exact(model, released, tmp_path):
    loaded = FlowMo.from_pretrained(released, image_size=32, latent_tokens=8)
    assert loaded.config == model.config
    assert not loaded.training
    assert same(loaded, model)
    raw = FlowMo.from_pretrained(released, image_size=32, latent_tokens=8, ema=False)
    assert torch.equal(raw.decoder.img_in.bias, model.decoder.img_in.bias + 1)
    again = tmp_path / "again.pth"
    save_released(raw.state_dict(), again, ema=loaded.state_dict(), steps=7)
    first, second = (torch.load(p, weights_only=True) for p in (released, again))
    assert first.keys() == second.keys() and first["total_steps"] == second["total_steps"]
    for part in ("model_state_dict", "model_ema_state_dict"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][k], second[part][k]) for k in first[part])
    # The model works: its rotary tables are real although it was built without memory.
    assert loaded.reconstruct(torch.zeros(1, 3, 32, 32), steps=1).isfinite().all()


def test_key_names_are_the_released_ones(model):
    keys = model.state_dict().keys()
    for key in (
        "encoder.time_in.in_layer.weight",
        "decoder.txt_in.bias",
        "decoder.double_blocks.1.img_mod.lin.weight",
        "decoder.double_blocks.0.txt_attn.norm.key_norm.scale",
        "decoder.double_blocks.1.txt_mlp.2.bias",
        "encoder.final_layer_txt.linear.weight",
        "decoder.final_layer_img.adaLN_modulation.1.bias",
    ):
        assert key in keys
    assert len(keys) == 2 * (4 + 4) + 2 * 8 + 3 * 2 * (2 + 4 + 2 + 4)


def test_every_size_is_read_off_the_shapes(tmp_path):
    with torch.device("meta"):
        sizes = {name: FlowMo(name) for name in ("lo", "hi", "small", "continuous")}
    from flowmo.pretrained import infer_config

    for name, model in sizes.items():
        config = infer_config(model.state_dict())
        expected = model_config(name)
        assert config == expected, name


def test_unknown_channel_count_asks_for_the_bits(tmp_path):
    model = FlowMo(model_config("tiny", latent_channels=20, entropy_bits=10))
    path = tmp_path / "odd.pth"
    save_released(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="entropy_bits="):
        FlowMo.from_pretrained(path, image_size=32, latent_tokens=16)
    assert same(FlowMo.from_pretrained(path, image_size=32, latent_tokens=16, entropy_bits=10), model)


def test_folder_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["latent_tokens"] == 8
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        loaded = FlowMo.from_pretrained(path)
        assert loaded.config == model.config and same(loaded, model)
    assert FlowMo.from_pretrained(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16
    # A training run holds its model in a folder of that name.
    (tmp_path / "m").rename(tmp_path / "model")
    assert same(FlowMo.from_pretrained(tmp_path), model)


def test_keys_that_do_not_fit_are_named(model, tmp_path):
    path = tmp_path / "bad.pth"
    state = dict(model.state_dict())
    del state["decoder.img_in.bias"]
    state["decoder.extra"] = torch.zeros(1)
    state["encoder.txt_in.bias"] = torch.zeros(3)
    save_released(state, path)
    with pytest.raises(CheckpointError) as caught:
        FlowMo.from_pretrained(path, image_size=32, latent_tokens=8)
    wrong = "encoder.txt_in.bias is [3], expected [64]"
    for words in ("1 missing: decoder.img_in.bias", "1 unexpected: decoder.extra", wrong):
        assert words in str(caught.value)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_checkpoints(model, tmp_path, capsys):
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"weights": 1}, tmp_path / "other.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "empty").mkdir()
    for name in ("garbage.pth", "evil.pth", "other.pth", "broken.safetensors", "empty"):
        with pytest.raises(CheckpointError, match=name):
            FlowMo.from_pretrained(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        FlowMo.from_pretrained(tmp_path / "nowhere.pth")


def test_half_written_model_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        FlowMo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"sizes": 1}')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        FlowMo.from_pretrained(tmp_path)


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path):
    """Commands say such errors in one line; the file that was there stays, and no scrap beside it."""
    model = FlowMo("tiny")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*model\.safetensors"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
