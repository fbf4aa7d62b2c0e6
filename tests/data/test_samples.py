"""The built-in photographs and the in-memory crop sampler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo.data import samples
from flowmo.data.samples import CropSampler

HAVE_PHOTOGRAPHS = all(importlib.util.find_spec(name) for name in ("skimage", "sklearn"))
needs_photographs = pytest.mark.skipif(not HAVE_PHOTOGRAPHS, reason="needs scikit-image and scikit-learn")


def pictures() -> dict[str, Image.Image]:
    """Two pictures of very different size; red tells which picture, green which column (0 to 255)."""
    out = {}
    for name, red, (width, height) in (("small", 10, (64, 40)), ("large", 200, (400, 300))):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = red
        pixels[..., 1] = np.linspace(0, 255, width)[None].round()
        out[name] = Image.fromarray(pixels)
    return out


@needs_photographs
def test_photographs_are_there_and_held_out_ones_are_apart() -> None:
    train, heldout = samples.train_photographs(), samples.heldout_photographs()
    assert list(train) == [
        "astronaut",
        "chelsea",
        "hubble_deep_field",
        "retina",
        "immunohistochemistry",
        "stereo_motorcycle_left",
        "flower",
    ]
    assert list(heldout) == ["coffee", "china", "rocket", "stereo_motorcycle_right"]
    for img in (*train.values(), *heldout.values()):
        assert img.mode == "RGB" and min(img.size) >= 300
        assert np.asarray(img).std() > 20  # a photograph, not a blank
    assert train["astronaut"].size == (512, 512) and heldout["coffee"].size == (600, 400)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(samples.SamplePhotographsMissing, match=r"scikit-image.*quickstart"):
        samples.train_photographs()
    monkeypatch.undo()
    monkeypatch.setattr(samples, "_package_folder", lambda package: tmp_path)
    with pytest.raises(samples.SamplePhotographsMissing, match="'coffee' is not in the installed"):
        samples.heldout_photographs()


def test_import_needs_neither_package() -> None:
    code = "import sys; sys.modules.update(skimage=None, sklearn=None, torchvision=None); import flowmo.data"
    paths = os.pathsep.join(filter(None, sys.path))  # pytest's, which hold where the project is not installed
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})


def test_batches_have_the_promised_form_and_are_crops() -> None:
    x = next(CropSampler(pictures(), 32, 64, seed=1))
    assert x.shape == (64, 3, 32, 32) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and x.is_contiguous()
    levels = (x + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert set(levels[:, 0].round().unique().tolist()) == {10.0, 200.0}


def test_picture_is_drawn_before_the_crop() -> None:
    sampler = CropSampler(pictures(), 32, 500, seed=0)
    small = (torch.cat([next(sampler)[:, 0, 0, 0] for _ in range(4)]) < 0).sum().item()
    # binomial, five standard deviations; drawn by area it would be about 42
    assert abs(small - 1000) < 5 * (2000 * 0.25) ** 0.5


def test_flip_mirrors_half_of_the_crops() -> None:
    def rising(x: torch.Tensor) -> torch.Tensor:
        return x[:, 1, 0, -1] > x[:, 1, 0, 0]

    assert rising(next(CropSampler(pictures(), 32, 400, seed=0))).all()
    share = rising(next(CropSampler(pictures(), 32, 400, seed=0, flip=True))).float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / 20


def test_columns_keep_training_and_unseen_crops_apart() -> None:
    left = CropSampler({"large": pictures()["large"]}, 32, 300, columns=(0, 0.75), scales=(64, 128, 256))
    right = CropSampler({"large": pictures()["large"]}, 32, 300, columns=(0.75, 1), scales=(64, 128, 256))
    seen, unseen = ((next(s)[:, 1] + 1) * 127.5 for s in (left, right))
    one_column = 255 / 85  # of the smallest scale
    assert seen.max() <= 0.75 * 255 + one_column and unseen.min() >= 0.75 * 255 - one_column
    with pytest.raises(ValueError, match="'large' of 400 x 300 holds no 32 x 32 crop"):
        CropSampler({"large": pictures()["large"]}, 32, 1, columns=(0.9, 1), scales=(64,))


def test_scales_never_enlarge_unless_nothing_else_is_left() -> None:
    sampler = CropSampler(pictures(), 32, 1, scales=(32, 64, 128))
    assert [[level.shape[1] for level in levels] for levels in sampler._levels] == [[32], [32, 64, 128]]
    tiny = CropSampler([Image.new("RGB", (8, 9))], 32, 1)
    assert [level.shape[1:] for level in tiny._levels[0]] == [(36, 32)]


def test_state_continues_exactly_and_seeds_differ() -> None:
    first = CropSampler(pictures(), 32, 8, seed=3)
    for _ in range(3):
        next(first)
    state = first.state_dict()
    expected = [next(first) for _ in range(3)]
    second = CropSampler(pictures(), 32, 8, seed=3)
    second.load_state_dict(state)
    assert all(torch.equal(a, next(second)) for a in expected)
    assert not torch.equal(expected[0], expected[1])
    third, fourth = (next(CropSampler(pictures(), 32, 8, seed=seed)) for seed in (3, 4))
    assert not torch.equal(third, fourth)
    with pytest.raises(ValueError, match="seed=3, this run has 4"):
        CropSampler(pictures(), 32, 8, seed=4).load_state_dict(state)


def test_processes_take_the_batches_in_turn() -> None:
    alone = CropSampler(pictures(), 32, 8, seed=3)
    parts = [CropSampler(pictures(), 32, 8, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for _ in range(2):
        assert all(torch.equal(next(part), next(alone)) for part in parts)
    assert parts[0].position == alone.position == 4


def test_another_batch_size_goes_on_behind_the_pictures_delivered() -> None:
    state = CropSampler(pictures(), 32, 8, seed=3).state_dict()
    for batch, position in ((8, 3), (4, 6), (5, 5), (16, 2)):  # 24 pictures; a batch begun counts as delivered
        sampler = CropSampler(pictures(), 32, batch, seed=3)
        sampler.load_state_dict({**state, "position": 3})
        assert sampler.position == position


def test_every_scale_and_every_position_is_drawn() -> None:
    """Two scales of one position more than the crop, in which rows and columns count up."""
    pixels = np.add.outer(100 * np.arange(2), np.arange(2)).astype(np.uint8)[..., None]
    sampler = CropSampler([Image.fromarray(pixels.repeat(3, 2))], 1, 400, scales=(1, 2))
    levels = ((next(sampler)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert set(levels) == {0, 1, 100, 101, 51}  # the four pixels of scale 2, and at scale 1 their mean


def test_global_random_state_is_untouched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(CropSampler(pictures(), 32, 8))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        CropSampler([], 32, 8)
    with pytest.raises(ValueError, match="batch=0"):
        CropSampler(pictures(), 32, 0)
    with pytest.raises(ValueError, match="crop size 32"):
        CropSampler(pictures(), 32, 8, scales=(16, 64))
    with pytest.raises(ValueError, match="columns"):
        CropSampler(pictures(), 32, 8, columns=(0.5, 0.5))
