"""Studies of the sampler: the settings they run, and the files they write."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowmo import FlowMo, analyse
from flowmo.data import save_png


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("analysis")
    torch.manual_seed(0)
    model = FlowMo("tiny")
    with torch.no_grad():
        for p in model.parameters():  # fresh gates are zero: the picture would not depend on the code
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(path / "model")
    for i in range(3):
        save_png(torch.rand(3, 8, 8).repeat_interleave(4, 1).repeat_interleave(4, 2) * 2 - 1, path / "d" / f"{i}.png")
    return path


def run(place: Path, study: str, *options: str) -> list[dict[str, str]]:
    pytest.importorskip("matplotlib")
    arguments = [study, "--checkpoint", str(place / "model"), "--data", str(place / "d"), "--device", "cpu"]
    analyse.main([*arguments, "--out", str(place / "out"), "--limit", "2", "--skip", "fid,lpips", *options])
    with Image.open(place / "out" / f"{study}.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 32
    with open(place / "out" / f"{study}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_noise_study_scales_the_starting_noise(place: Path) -> None:
    rows = run(place, "noise", "--scales", "0,1", "--steps", "2")
    assert [(row["noise_scale"], row["steps"]) for row in rows] == [("0.0", "2"), ("1.0", "2")]
    assert float(rows[0]["psnr"]) != float(rows[1]["psnr"])
    assert all(float(row["pictures"]) == 2 and float(row["bits_per_pixel"]) > 0 for row in rows)
    assert rows[0]["code_entropy"] == rows[1]["code_entropy"]  # the codes do not know of the sampler


def test_steps_study_crosses_steps_and_spacing(place: Path) -> None:
    rows = run(place, "steps", "--rhos", "1,4", "--steps", "1,3", "--lpips-alex", "random", "--skip", "fid,lpips-vgg")
    assert [(row["rho"], row["steps"]) for row in rows] == [("1.0", "1"), ("1.0", "3"), ("4.0", "1"), ("4.0", "3")]
    assert rows[0]["psnr"] == rows[2]["psnr"] and rows[1]["psnr"] != rows[3]["psnr"]  # one step has no spacing
    assert all(float(row["lpips_alex_random"]) > 0 for row in rows)


def test_guidance_study_crosses_weight_and_interval(place: Path) -> None:
    rows = run(place, "guidance", "--weights", "1,3", "--steps", "6")
    assert [(row["guidance_interval"], row["guidance"]) for row in rows] == [
        ("0.17 to 1.02", "1.0"), ("0.17 to 1.02", "3.0"), ("everywhere", "1.0"), ("everywhere", "3.0"),
    ]  # fmt: skip
    assert rows[0]["psnr"] == rows[2]["psnr"]  # weight 1 is no guidance
    assert len({rows[i]["psnr"] for i in (0, 1, 3)}) == 3


def test_modes_study_shows_mean_and_spread(place: Path) -> None:
    rows = run(place, "modes", "--decodes", "3", "--steps", "2")
    assert [row["picture"] for row in rows] == ["0.png", "1.png"] and rows[0]["decodes"] == "3"
    for row in rows:
        assert float(row["variance"]) > 0
        assert float(row["largest_spread_in_levels"]) >= float(row["spread_in_levels"]) > 0
        # the squared error of a mean is the mean squared error less the variance
        assert float(row["psnr_of_mean"]) > float(row["psnr_of_decodes"])
    with Image.open(place / "out" / "modes.png") as picture:
        assert picture.width >= 6 * 32 and picture.height >= 2 * 32  # original, mean, spread, three decodes
    with pytest.raises(ValueError, match="at least 2"):
        run(place, "modes", "--decodes", "1")


def test_plot_shows_the_best_measure_of_perception_there_is() -> None:
    assert analyse.perception_of({"psnr": 1, "ssim": 1, "lpips_vgg": 1, "rfid": 1}) == "rfid"
    assert analyse.perception_of({"psnr": 1, "ssim": 1, "lpips_vgg_random": 1}) == "lpips_vgg_random"
    assert analyse.perception_of({"psnr": 1, "ssim": 1}) == "ssim"


def test_a_model_must_be_named() -> None:
    with pytest.raises(ValueError, match="--checkpoint is not set"):
        analyse.main(["noise"])
