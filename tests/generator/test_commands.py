"""tokenize, generate and the quickstart, as a user calls them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo import FlowMo, generate, tokenize
from flowmo.data import load_image, normalize
from flowmo.data.tokens import PENDING, UNREADABLE, TokenCache, TokenCacheError, layout_of, picture_views
from flowmo.generator import Generator, quickstart
from flowmo.generator.sampler import SamplerPlan, TokenSamplerConfig
from flowmo.training.state import noise_seed
from tests.generator.conftest import run_generate, stop_after
from tests.processes import together

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "photos" / ("birds" if i < 4 else "cats") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def run_tokenize(photos: Path, tokenizer: Path, out: Path, *more: str) -> None:
    arguments = [str(photos), "--checkpoint", str(tokenizer), "--out", str(out), "--device", "cpu"]
    assert tokenize.main([*arguments, *more]) == 0


def test_the_cache_holds_the_tokens_of_the_views(photos, tokenizer, tmp_path, capsys):
    (photos / "cats" / "broken.png").write_bytes(b"no picture")
    run_tokenize(photos, tokenizer, tmp_path / "tokens", "--batch", "5")
    cache = TokenCache.open(tmp_path / "tokens")
    model = FlowMo.from_pretrained(tokenizer)
    assert cache.header.classes == ["birds", "cats"] and cache.header.layout == layout_of(model)
    assert cache.header.dtype == "float32" and cache.header.views == 2 and cache.header.crop == "center+flip"
    assert cache.labels.tolist() == [0] * 4 + [1] * 4 and cache.state.tolist() == [1] * 7 + [UNREADABLE]
    paths = sorted(photos.rglob("[0-9].png"))
    for i, path in enumerate(paths):
        views = normalize(picture_views(load_image(path), 32, "center+flip"))
        tokens, _ = cache.read(np.array([i, i]), np.array([0, 1]))
        assert torch.equal(tokens, model.tokenize(views))
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 could not be read" in said.out and "7 pictures x 2 views" in said.out


def test_pictures_in_an_archive_give_the_same_cache(photos, tokenizer, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, arcname=".")
    run_tokenize(photos, tokenizer, tmp_path / "folder")
    run_tokenize(tmp_path / "photos.tar", tokenizer, tmp_path / "archive")
    folder, archive = TokenCache.open(tmp_path / "folder"), TokenCache.open(tmp_path / "archive")
    assert archive.header.classes == ["birds", "cats"] and np.array_equal(archive.labels, folder.labels)
    assert np.array_equal(archive.packed, folder.packed)
    with pytest.raises(ValueError, match="names none"):
        run_tokenize(photos, tokenizer, tmp_path / "other", "--index", "index.json")


def test_tokenize_goes_on_where_it_was_stopped(photos, tokenizer, tmp_path, monkeypatch, capsys):
    run_tokenize(photos, tokenizer, tmp_path / "whole")
    encode, calls = tokenize.encode, []

    def stopped(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(tokenize, "encode", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_tokenize(photos, tokenizer, tmp_path / "parts", "--batch", "4")
    cache = TokenCache(tmp_path / "parts", TokenCache.open(tmp_path / "whole").header)
    assert (cache.state == PENDING).sum() == 3
    monkeypatch.setattr(tokenize, "encode", lambda *a: calls.append(a[2].shape[0]) or encode(*a))
    run_tokenize(photos, tokenizer, tmp_path / "parts", "--batch", "4")
    assert calls == [1, 1, 2, 1] and "3 of them still to do" in capsys.readouterr().out
    whole, parts = TokenCache.open(tmp_path / "whole"), TokenCache.open(tmp_path / "parts")
    assert np.array_equal(whole.packed, parts.packed) and np.array_equal(whole.labels, parts.labels)


def test_a_cache_of_other_data_or_crops_is_not_touched(photos, tokenizer, tmp_path):
    run_tokenize(photos, tokenizer, tmp_path / "tokens")
    with pytest.raises(TokenCacheError, match=r"crop.*name another folder"):
        run_tokenize(photos, tokenizer, tmp_path / "tokens", "--crop", "ten-crop")
    (photos / "cats" / "6.png").rename(photos / "cats" / "66.png")
    with pytest.raises(TokenCacheError, match="data"):
        run_tokenize(photos, tokenizer, tmp_path / "tokens")


def test_two_processes_make_the_same_cache(photos, tokenizer, tmp_path):
    run_tokenize(photos, tokenizer, tmp_path / "one", "--crop", "ten-crop")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "flowmo.tokenize", str(photos), "--checkpoint", str(tokenizer), "--out", str(tmp_path / "two"),
         "--crop", "ten-crop"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 pictures of this process, one of 2" in done.stdout
    one, two = TokenCache.open(tmp_path / "one"), TokenCache.open(tmp_path / "two")
    assert one.header == two.header and np.array_equal(one.packed, two.packed)


def test_generate_writes_pictures_grid_and_archive(tokenizer, generator, tmp_path):
    out = tmp_path / "out"
    run_generate(tokenizer, generator, out, "--classes", "2,0", "--n", "6", "--batch", "5")
    with np.load(out / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        pictures, labels = archive["arr_0"], archive["arr_1"]
    assert pictures.shape == (12, 32, 32, 3) and pictures.dtype == np.uint8
    assert sorted(labels.tolist()) == [0] * 6 + [2] * 6
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 1  # not one class after the other
    files = sorted((out / "pictures").iterdir())
    assert [f.name for f in files] == [f"{i:06d}_{label:04d}.png" for i, label in enumerate(labels)]
    for file, pixels in zip(files, pictures):
        assert np.array_equal(np.asarray(Image.open(file)), pixels)
    with Image.open(out / "grid.png") as grid:
        assert grid.height >= 2 * 32 and grid.width > 6 * 32

    more = ("--classes", "cow,ant", "--n", "6", "--batch", "5", "--no-png")
    run_generate(tokenizer, generator, tmp_path / "again", *more)
    with np.load(tmp_path / "again" / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], pictures) and np.array_equal(archive["arr_1"], labels)
    assert not (tmp_path / "again" / "pictures").exists()


def test_pictures_are_the_decoded_tokens(tokenizer, generator):
    network, model = generate.load_pair(generator, tokenizer, torch.device("cpu"), torch.float32)
    plan = SamplerPlan(network, 4, TokenSamplerConfig(steps=4))
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    parts = list(generate.generate(plan, model, labels, seed=3, steps=2))
    assert [(number, len(pictures)) for number, pictures in parts] == [(0, 4), (1, 2)]
    for number, pictures in parts:
        seed = noise_seed(3, number, 0)
        drawn = plan(labels[4 * number : 4 * number + 4], seed=seed)
        expected = model.detokenize(drawn, steps=2, generator=torch.Generator().manual_seed(seed))
        # half a grey level of rounding
        assert (normalize(pictures) - expected).abs().max() <= 0.5001 / 127.5
    pictures = parts[0][1]
    assert pictures[0].float().sub(pictures[1].float()).abs().mean() > 1


TOLD = """
import sys
from flowmo.generate import main
from flowmo.generator.samples import SampleFolder
keep = SampleFolder.keep
SampleFolder.keep = lambda self, number, pictures: (keep(self, number, pictures), print(f"drawn: {number}"))
main(sys.argv[1:])
"""


def test_two_processes_draw_what_one_does(tokenizer, generator, tmp_path):
    more = ("--n", "5", "--batch", "4", "--seed", "7")
    run_generate(tokenizer, generator, tmp_path / "one", *more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # two go on with what one began
        stop_after(patch, 1)
        run_generate(tokenizer, generator, tmp_path / "two", *more)
    assert [p.name for p in (tmp_path / "two" / ".parts").iterdir()] == ["000000.npy"]
    arguments = ["--tokenizer", tokenizer, "--generator", generator, "--out", tmp_path / "two", "--device", "cpu"]
    told = together(TOLD, *map(str, arguments), "--steps", "4", "--decoder-steps", "2", *more)
    assert ["drawn: 1" in told[0], "drawn: 3" in told[0], "drawn: 2" in told[1]] == [True] * 3
    assert sum(text.count("drawn: ") for text in told) == 3, "a batch was drawn twice, or was there already"
    with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
        assert one["arr_0"].std(axis=0).max() > 1
    names = [sorted(str(p.relative_to(tmp_path / run)) for p in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1] and "grid.png" in names[0] and len(names[0]) == 15 + 4
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()


def test_generate_refuses_tokens_of_another_tokenizer(tokenizer, generator, tmp_path):
    FlowMo("tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="speaks other tokens"):
        run_generate(tmp_path / "other", generator, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "classes"), [("all", [0, 1, 2]), ("1", [1]), ("0-2", [0, 1, 2]), ("bee,0", [1, 0])]
)
def test_classes_by_number_range_and_name(generator, text, classes):
    assert generate.parse_classes(text, Generator.from_pretrained(generator)) == classes


@pytest.mark.parametrize("text", ["3", "dog", "0,0", "2-1", "", "-1"])
def test_classes_that_are_none(generator, text):
    with pytest.raises(ValueError, match="--classes"):
        generate.parse_classes(text, Generator.from_pretrained(generator))


def test_quickstart_runs_to_its_verdict(tokenizer, tmp_path, capsys):
    """Untrained models draw noise, and the command says so."""
    arguments = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "quick"), "--steps", "2", "--n", "1"]
    assert quickstart.main(arguments) == 1
    said = capsys.readouterr().out
    assert "NOT MET" in said and "astronaut" in said and "train the tokenizer for longer" in said
    result = json.loads((tmp_path / "quick" / "result.json").read_text())
    assert not result["met"] and result["pictures"] == 10 and sum(result["right_by_class"].values()) == result["right"]
    made = ("generator/model/model.safetensors", "generator/config.yaml", "samples/samples.npz", "tokens/header.json")
    for name in ("grid.png", "result.json", *made):
        assert (tmp_path / "quick" / name).exists(), name


def test_the_judge_names_the_nearest_photograph():
    source = torch.Generator().manual_seed(0)
    photographs = [torch.rand(2, 3, 8, 8, generator=source) for _ in range(3)]
    pictures = torch.stack([photographs[2][1], photographs[0][0] + 0.01, photographs[1][0]])
    nearest, error = quickstart.judge(pictures, photographs)
    assert nearest.tolist() == [2, 0, 1]
    assert error.tolist() == pytest.approx([0.0, 1e-4, 0.0], abs=1e-6)


def test_quickstart_without_weights_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "shipped_weights", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        quickstart.main(["--out", str(tmp_path)])
