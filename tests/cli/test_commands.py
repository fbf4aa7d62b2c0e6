"""The commands as a user types them, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowmo import FlowMo
from flowmo.data import heldout_photographs

ROOT = Path(__file__).parents[2]


def command(module: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_dry_run_prints_the_resolved_configuration(tmp_path):
    done = command("flowmo.train", "hi", "optim.lr=2e-4", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "latent_channels: 56" in done.stdout and "lr: 0.0002" in done.stdout and "run: runs/hi" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lo", "optim.rl=1"], "did you mean optim.lr?"),
        (["lo"], "data.path is not set"),
        (["tiny", "data.path=nowhere"], "nowhere"),
        (["tiny", "loss.perceptual=lpips"], "loss.perceptual=none"),
    ],
)
def test_mistakes_end_in_one_paragraph(tmp_path, arguments, words):
    done = command("flowmo.train", *arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_where(tmp_path):
    assert "Traceback" in command("flowmo.train", "low", "--debug", cwd=tmp_path).stderr


def test_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("flowmo.train", "tiny", "data.path=empty", cwd=tmp_path)
    assert done.returncode == 1 and "empty" in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_reconstruct_files_and_folders(tmp_path):
    torch.manual_seed(0)
    FlowMo("tiny").save_pretrained(tmp_path / "model")
    photos = tmp_path / "photos" / "deep"
    photos.mkdir(parents=True)
    names = list(heldout_photographs())
    for name, picture in heldout_photographs().items():
        picture.resize((80, 60)).save(photos / f"{name}.jpg")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    done = command(
        "flowmo.reconstruct", "photos", photos / "coffee.jpg", "--checkpoint", "model", "--out", "out", "--size", 64,
        "--steps", 2, "--batch", 3, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # not all was done: a script has to know
    for name in names:
        with Image.open(tmp_path / "out" / "deep" / f"{name}.png") as picture:
            assert picture.size == (64, 64)
    assert (tmp_path / "out" / "coffee.png").exists()
    lines = [line for line in done.stdout.splitlines() if "PSNR" in line]
    assert len(lines) == 6 and lines[-1].startswith("mean PSNR") and "over 5 pictures" in lines[-1]
    assert "broken.jpg" in done.stderr and "1 of 6 inputs were skipped" in done.stderr


def test_quickstart_with_a_few_steps(tmp_path):
    """The whole of the main job, too short to reach its bars, and again from where it ended."""
    arguments = ["quickstart", "trainer.steps=24", "trainer.log_every=4", "trainer.minutes=null", "sampler.steps=2"]
    done = command("flowmo.train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "quickstart"
    for words in ("mean colour", "bits per pixel", "coffee", "NOT MET", "reconstructions.png"):
        assert words in done.stdout
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 24 and set(result["psnr"]["this run"]) == set(heldout_photographs())
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.width > 7 * 128 and picture.height >= 2 * 128
    again = command("flowmo.train", *arguments, cwd=tmp_path)
    assert again.returncode == 0 and "is finished at step 24" in again.stdout, again.stdout + again.stderr


def test_import_touches_neither_triton_nor_the_network(tmp_path):
    code = (
        "import sys, socket\n"
        "for name in ('triton', 'skimage', 'sklearn', 'torchvision', 'tensorboard'): sys.modules[name] = None\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = refuse\n"
        "import flowmo; print(flowmo.FlowMo('tiny').config.tokens)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "32"
