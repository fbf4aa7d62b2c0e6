"""Scores of reconstructions: batches and processes do not matter, the two protocols, codes, commands, errors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flowmo import FlowMo, evaluate
from flowmo.data import normalize, to_uint8
from flowmo.evaluation import (
    FlowMoTokenizer,
    FolderPictures,
    ForeignTokenizer,
    Judges,
    Reconstruction,
    Scores,
    score_reconstruction,
    spaced,
)
from flowmo.evaluation.tokenizers import starting_noise
from flowmo.metrics import Moments, frechet_distance, pooled_psnr, psnr, ssim, truncated_levels
from flowmo.perceptual import WeightsMissing, random_lpips
from flowmo.perceptual.inception import InceptionOutput
from flowmo.perceptual.lpips import LPIPS

ROOT = Path(__file__).parents[2]


@lru_cache(maxsize=1)
def alex() -> LPIPS:
    return random_lpips(net="alex")


class MeanColours(nn.Module):
    """In place of Inception: features of two halves of a picture, and a record of what came in."""

    published = True
    resize = "tf1"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> InceptionOutput:
        self.seen.append(images)
        x = images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()
        pool = nn.functional.adaptive_avg_pool2d(x, (1, 2)).flatten(1)
        return InceptionOutput(pool, pool[:, :3])


def posterise(images: Tensor) -> tuple[Tensor, Tensor]:
    """A tokenizer of its own: colours to steps of a quarter, and twelve tokens of 3 bits."""
    out = (images * 4).round() / 4
    tokens = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
    return out, ((tokens + 1) * 3.99).long()


def folder(path: Path, n: int, size: int = 40) -> Path:
    rng = np.random.default_rng(0)
    path.mkdir()
    for i in range(n):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size + 8, size), Image.Resampling.BICUBIC).save(path / f"{i:03d}.png")
    return path


def model() -> FlowMo:
    torch.manual_seed(0)
    result = FlowMo("tiny").eval()
    with torch.no_grad():
        for p in result.parameters():  # fresh gates are zero, and would hide most of the model
            p.add_(0.1 * torch.randn_like(p))
    return result


def scores(tokenizer: Any, pictures: Any, judges: Judges | None = None, **options: Any) -> Scores:
    result = score_reconstruction(tokenizer, pictures, judges or Judges(), **options)
    assert result is not None
    return result


def test_a_hundred_pictures_in_sevens_equal_one_by_one(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "d", 100), 32)
    results = []
    for batch in (7, 1):
        judges = Judges(MeanColours(), {"alex": alex()})  # type: ignore[arg-type]
        tokenizer = FlowMoTokenizer(model(), steps=2, batch=batch)
        results.append(scores(tokenizer, pictures, judges, batch=batch))
    sevens, ones = (r.summary() for r in results)
    assert sevens["pictures"] == ones["pictures"] == 100 and sevens.keys() == ones.keys()
    # fp32 sums in another order move a value by some 1e-6 of 255 levels, so that about one of a picture's 3072 may
    # round to its neighbour: that changes the squared error, here some 1e4, by at most 2 x 255 / 3072
    for name, value in sevens.items():
        assert value == pytest.approx(ones[name], rel=1e-4, abs=1e-6), name
    each = [r.per_picture() for r in results]
    for name in each[0]:
        assert torch.allclose(each[0][name], each[1][name], rtol=1e-4, atol=1e-5), name
    assert sevens["bits_per_pixel"] == pytest.approx(16 * 18 / 32**2) and sevens["code_entropy"] <= 9


def test_rounded_protocol_sees_what_a_file_holds(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "d", 7), 32)
    judge = MeanColours()
    result = scores(ForeignTokenizer(posterise, vocabulary=8), pictures, Judges(judge, {"alex": alex()}), batch=4)  # type: ignore[arg-type]
    a = torch.stack([pictures.read(i) for i in range(7)])
    b = to_uint8(posterise(normalize(a))[0])
    each = result.per_picture()
    summary = result.summary()
    assert summary["psnr"] == pytest.approx(float(psnr(a, b).mean()), rel=1e-12)
    assert summary["psnr_pooled"] == pytest.approx(pooled_psnr(each["squared_error"]), rel=1e-12)
    assert torch.equal(each["ssim"], ssim(a, b)) and torch.equal(each["ssim_gaussian"], ssim(a, b, "gaussian"))
    assert torch.allclose(each["lpips_alex"].float(), alex()(normalize(a), normalize(b)), rtol=1e-5)
    real, fake = Moments(), Moments()
    features = [MeanColours()(x).pool for x in (a, b)]
    real.add(features[0])
    fake.add(features[1])
    assert summary["rfid"] == pytest.approx(frechet_distance(fake, real), rel=1e-9) and summary["rfid"] > 0
    assert torch.allclose(each["inception_distance"], (features[0] - features[1]).square().mean(1))
    assert all(x.dtype == torch.uint8 for x in judge.seen)
    assert summary["bits_per_pixel"] == pytest.approx(12 * 3 / 32**2)
    assert 0 < summary["code_position_entropy"] <= summary["code_entropy"] <= 3 and summary["codes_used"] <= 1


def test_released_protocol_cuts_off_and_shows_networks_unquantised(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "d", 6), 32)
    judge = MeanColours()
    shift = 0.7 / 127.5

    def brighter(x: Tensor) -> Tensor:
        return x + shift

    tokenizer, judges = ForeignTokenizer(brighter), Judges(judge, {"alex": alex()})  # type: ignore[arg-type]
    released = scores(tokenizer, pictures, judges, protocol="released", batch=4)
    a = torch.stack([pictures.read(i) for i in range(6)])
    original, image = (a.double() / 127.5 - 1).float(), (normalize(a) + shift).clamp(-1, 1)
    expected = (truncated_levels(original).double() - truncated_levels(image).double()).square().mean((1, 2, 3))
    assert torch.equal(released.per_picture()["squared_error"], expected)
    # 0.7 of a level is cut off, except where the original itself lost a level; rounding makes it one
    assert 0.1 < float(expected.mean()) < 0.8
    rounded = scores(tokenizer, pictures, batch=4).per_picture()["squared_error"]
    assert bool((rounded > 0.9).all())
    assert all(x.is_floating_point() for x in judge.seen)
    assert torch.equal(judge.seen[0], original[:4]) and torch.equal(judge.seen[1], image[:4])
    lpips = released.per_picture()["lpips_alex"].float()
    assert torch.allclose(lpips, alex()(original, image), rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match="rounded, released"):
        score_reconstruction(tokenizer, pictures, Judges(), protocol="official")


def test_perfect_reconstructions() -> None:
    class Source:
        names = ("a", "b", "c")

        def __len__(self) -> int:
            return 3

        def read(self, index: int) -> Tensor:
            return torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))

        def describe(self) -> dict[str, Any]:
            return {}

    summary = scores(ForeignTokenizer(lambda x: x), Source(), Judges(MeanColours())).summary()  # type: ignore[arg-type]
    assert summary["psnr"] == summary["psnr_pooled"] == math.inf and summary["ssim"] == pytest.approx(1)
    assert summary["rfid"] == pytest.approx(0, abs=1e-6) and summary["inception_distance"] == 0


SCRIPT = """
import json
import sys
from pathlib import Path

import numpy as np
import torch

from flowmo import evaluate
from flowmo.evaluation import FolderPictures, ForeignTokenizer, Judges, NpzPictures, Processes
from flowmo.evaluation import score_generation, score_reconstruction
from flowmo.perceptual.inception import InceptionOutput


class MeanColours(torch.nn.Module):
    published, resize = False, "tf1"

    def forward(self, images):
        pool = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, (1, 2)).flatten(1)
        return InceptionOutput(pool, pool[:, :3].square())

    def logits(self, pool):
        return 10 * pool[:, :4]


processes, net = Processes(), MeanColours()
data = "d.tar" if processes.world > 1 else "d"  # packed, the same pictures in the same order
command = f"--tokenizer posteriser:reconstruct --size 32 --vocabulary 8 --data {data} --batch 2 --limit 7 --device cpu"
evaluate.main([*command.split(), *"--skip fid,lpips-vgg --lpips-alex random --out".split(), sys.argv[1] + ".command"])
tokenizer = ForeignTokenizer.named("posteriser:reconstruct", vocabulary=8)
scores = score_reconstruction(tokenizer, FolderPictures("d", 32), Judges(net), batch=2, processes=processes)
generation = score_generation(NpzPictures("s.npz"), NpzPictures("r.npz"), net, batch=3, processes=processes)
assert (scores is None) == (generation is None) == (processes.rank > 0)
if scores is not None:
    each = {name: values.tolist() for name, values in scores.per_picture().items()}
    Path(sys.argv[1]).write_text(json.dumps({"mean": scores.summary(), "each": each, "generation": generation[0]}))
processes.close()
"""


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, and both kinds of evaluation with features, by torchrun; 9, 7, 8 and 11 pictures do not halve."""
    shutil.make_archive(str(tmp_path / "d"), "tar", folder(tmp_path / "d", 9))
    (tmp_path / "posteriser.py").write_text(
        "import torch\ndef reconstruct(x):\n    return (x * 4).round() / 4, ((x.mean((2, 3)) + 1) * 3.99).long()\n"
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    for name, n in (("s", 11), ("r", 8)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["script.py", "one"])
    runpy.run_path("script.py")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 script.py two".split()
    done = subprocess.run([sys.executable, *torchrun], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("saved:") == 1
    results = [json.loads(Path(name).read_text()) for name in ("one", "two")]
    commands = [json.loads(Path(f"{name}.command").read_text()) for name in ("one", "two")]
    # pictures meet other ones in a batch: fp32 sums in another order
    for part in ("mean", "generation"):
        assert results[0][part] == pytest.approx(results[1][part], rel=1e-5), part
    for name, values in results[0]["each"].items():
        assert len(values) == 9 and values == pytest.approx(results[1]["each"][name], rel=1e-5), name
    assert results[0]["mean"]["rfid"] > 0 and results[0]["generation"]["samples"] == 11
    one, two = (c["metrics"] for c in commands)
    assert one == pytest.approx(two, rel=1e-5) and one["pictures"] == 7
    assert [c["protocol"]["processes"] for c in commands] == [1, 2]
    assert commands[0]["protocol"]["subset"] == "7 of 9, evenly spaced"
    assert commands[0]["protocol"]["untrained networks"] == ["lpips_alex_random"]


def test_moments_of_parts_merge_to_the_whole(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "d", 8), 32)
    tokenizer = ForeignTokenizer(posterise, vocabulary=8)
    whole = scores(tokenizer, pictures, Judges(MeanColours()), batch=3)  # type: ignore[arg-type]
    first, second = (
        scores(tokenizer, pictures, Judges(MeanColours()), batch=3, indices=part)  # type: ignore[arg-type]
        for part in ([5, 6, 7], [0, 1, 2, 3, 4])
    )
    first.merge(second)
    assert first.summary() == pytest.approx(whole.summary(), rel=1e-9)
    assert torch.equal(first.per_picture()["ssim"], whole.per_picture()["ssim"])


def test_noise_belongs_to_the_picture() -> None:
    together = starting_noise([3, 4, 9], 0, 8, 8)
    assert torch.equal(together[1:2], starting_noise([4], 0, 8, 8))
    assert not torch.equal(together[0], together[1]) and not torch.equal(together, starting_noise([3, 4, 9], 1, 8, 8))
    assert together.std().item() == pytest.approx(1, abs=0.2)


def test_larger_pictures_go_in_tiles() -> None:
    tokenizer = FlowMoTokenizer(model(), side=64, steps=1, batch=3, noise_scale=0.5)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    out = tokenizer(images, [4, 7])
    noise = 0.5 * starting_noise([4, 7], 0, 64, 64)
    corner = tokenizer.model.encode(images[1:, :, 32:, 32:])
    expected = tokenizer.model.decode(corner, noise=noise[1:, :, 32:, 32:], steps=1)
    assert torch.allclose(out.images[1:, :, 32:, 32:], expected, atol=1e-4)
    assert out.tokens is not None and out.tokens.shape == (8, 32)
    with pytest.raises(ValueError, match="multiple of the model's 32"):
        FlowMoTokenizer(tokenizer.model, side=48)


def test_subsets_are_evenly_spaced() -> None:
    assert spaced(10, 4) == [0, 2, 5, 7] and spaced(3, None) == spaced(3, 9) == [0, 1, 2]
    with pytest.raises(ValueError, match="limit=0"):
        spaced(3, 0)


def test_unreadable_pictures_are_passed_over_and_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "d", 4)
    (path / "001.png").write_bytes(b"\x89PNG nothing")
    result = scores(ForeignTokenizer(posterise, vocabulary=8), FolderPictures(path, 32), batch=2)
    assert result.summary()["pictures"] == 3 and len(result.skipped) == 1 and "001.png" in result.skipped[0]
    for i in (0, 2, 3):
        (path / f"00{i}.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"none of the pictures could be read: .*000\.png"):
        scores(ForeignTokenizer(posterise, vocabulary=8), FolderPictures(path, 32)).summary()


def test_functions_that_return_something_else_are_named(tmp_path: Path) -> None:
    pictures = FolderPictures(folder(tmp_path / "d", 2), 32)
    for function, words in (
        (
            lambda x: x[:, :, ::2],
            r"returned torch\.float32 \[2, 3, 16, 32\]; expected floating pictures \[2, 3, 32, 32",
        ),
        (lambda x: to_uint8(x), r"returned torch\.uint8"),
        (lambda x: None, "returned NoneType"),
        (lambda x: (x, x.mean((2, 3)).long()), "--vocabulary"),
        (lambda x: x * math.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            scores(ForeignTokenizer(function), pictures)
    beyond = scores(ForeignTokenizer(lambda x: 3 * x), pictures)  # clipped as any picture would be
    assert beyond.summary()["psnr"] > 0
    for name, words in (
        ("nocolon", "expected module:callable"),
        ("no_such_module_at_all:f", "no module 'no_such_module_at_all'"),
        ("math:nothing", "'math' has no 'nothing'"),
        ("math:pi", "expected something to call, got float"),
    ):
        with pytest.raises(ValueError, match=words):
            ForeignTokenizer.named(name)
    assert ForeignTokenizer.named("torch.nn.functional:relu")(torch.ones(1, 3, 2, 2), [0]) == Reconstruction(
        images=pytest.approx(torch.ones(1, 3, 2, 2)), tokens=None
    )


def test_missing_weights_are_one_message_with_every_way_on(tmp_path: Path) -> None:
    arguments = ["--tokenizer", "torch.nn.functional:relu", "--size", "32", "--data", str(tmp_path)]
    with pytest.raises(WeightsMissing) as error:
        evaluate.main(arguments)
    for part in (
        "pt_inception-2015-12-05-6726825d.pth", "sha256 begins 6726825d", "pytorch-fid", "--inception=PATH",
        "vgg16-397923af.pth", "--lpips-vgg=PATH", "alexnet-owt-7be5be79.pth", "7be5be79", "--lpips-alex=PATH",
        "--inception=random", "--skip fid,lpips-vgg,lpips-alex",
    ):  # fmt: skip
        assert part in str(error.value), part
    with pytest.raises(WeightsMissing) as error:
        evaluate.main([*arguments, "--skip", "lpips"])
    assert "--skip fid" in str(error.value) and "alexnet" not in str(error.value)


def test_commands_that_cannot_be_meant(tmp_path: Path) -> None:
    for arguments, words in (
        ([], "name one thing to score"),
        (["--checkpoint", "a", "--watch", "b"], "got --checkpoint, --watch"),
        (["--checkpoint", "a", "--skip", "psrn"], "--skip psrn: expected some of fid"),
        (["--tokenizer", "math:cos", "--skip", "fid,lpips"], "--size is not set"),
        (["--tokenizer", "math:cos", "--skip", "fid,lpips", "--size", "32"], "--data is not set"),
        (["--samples", "a.npz"], "--reference is not set"),
        (["--checkpoint", "a", "--out", str(tmp_path)], "this is a folder; name a file"),
        (["--checkpoint", "a", "--out", str(Path(__file__) / "a.json")], "a file of that name is there"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            evaluate.main(arguments)


def last_bias(net: FlowMo) -> Tensor:
    return net.decoder.get_parameter("final_layer_img.linear.bias")


def save(run: Path, net: FlowMo, step: int) -> None:
    net.save_pretrained(run / "model")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / f"step_{step:08d}.pt").write_bytes(b"")


def test_watch_scores_each_model_once_and_keeps_the_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    arguments = ["--watch", str(run), "--data", str(folder(tmp_path / "d", 2)), "--skip", "fid,lpips", "--steps", "1"]
    arguments += ["--once", "--device", "cpu", "--out", str(tmp_path)]  # of no use here, nor looked at
    with pytest.raises(FileNotFoundError, match="no model yet"):
        evaluate.main(arguments)
    good, bad = model(), model()
    worst = model()
    for net, bias in ((bad, -5.0), (worst, -6.0)):  # a velocity far below zero makes all pictures white
        nn.init.constant_(last_bias(net), bias)

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "evaluation" / "scores.jsonl").read_text().splitlines()]

    for net, step in ((bad, 10), (good, 20), (bad, 30)):
        save(run, net, step)
        evaluate.main(arguments)
        evaluate.main(arguments)  # nothing new
    assert [(line["step"], line["best"]) for line in lines()] == [(10, True), (20, True)]
    assert lines()[0]["scores"]["psnr"] < lines()[1]["scores"]["psnr"]
    assert lines()[0]["protocol"]["sampler"]["steps"] == 1 and lines()[0]["protocol"]["levels"].startswith("rounded")
    best = FlowMo.from_pretrained(run / "evaluation" / "best")
    assert torch.equal(last_bias(best), last_bias(good))
    save(run, worst, 40)
    evaluate.main(arguments)
    assert [(line["step"], line["best"]) for line in lines()][2:] == [(40, False)]
    assert lines()[2]["scores"]["psnr"] <= lines()[1]["scores"]["psnr"]
    assert torch.equal(last_bias(FlowMo.from_pretrained(run / "evaluation" / "best")), last_bias(good))
    nn.init.constant_(last_bias(bad), 0.01)
    save(run, bad, 50)
    with pytest.raises(ValueError, match="--best-by rfid: not among the scores"):
        evaluate.main([*arguments, "--best-by", "rfid"])


def test_result_of_a_model_says_how_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model().save_pretrained(tmp_path / "m")
    out = tmp_path / "r" / "result.json"
    data = folder(tmp_path / "d", 3)
    evaluate.main(
        ["--checkpoint", str(tmp_path / "m"), "--data", str(data), "--skip", "fid,lpips", "--steps", "2",
         "--protocol", "released", "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    saved = json.loads(out.read_text())
    text = capsys.readouterr().out
    assert f"{saved['metrics']['psnr']:.6g}" in text and "protocol: released" in text
    p = saved["protocol"]
    assert p["sampler"]["steps"] == 2 and p["sampler"]["guidance"] == 1.5 and p["sampler"]["seed"] == 0
    assert p["sha256"] == hashlib.sha256((tmp_path / "m" / "model.safetensors").read_bytes()).hexdigest()
    assert "cut off" in p["levels"] and p["left out"] == ["fid", "lpips-vgg", "lpips-alex"]
    assert p["subset"] == "all" and p["versions"]["torch"] == torch.__version__ and "central 32 x 32" in p["crop"]
    assert set(saved["metrics"]) >= {"psnr", "psnr_pooled", "ssim", "bits_per_pixel", "code_entropy", "codes_used"}
    assert "rfid" not in saved["metrics"]
