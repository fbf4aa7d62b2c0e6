"""The table of few-step decoding, on an untrained model and a student that is its copy."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bench import distill
from flowmo import FlowMo
from flowmo.engine import Schedule


def test_a_copy_of_the_teacher_stands_where_the_teacher_does(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(distill, "milliseconds", lambda row, batch: 1.0)  # slow: a plan of each row
    torch.manual_seed(0)
    model = FlowMo("tiny")
    model.save_pretrained(tmp_path / "copy" / "teacher")
    model.sampler = Schedule(2, 1.0, 1.0)
    model.save_pretrained(tmp_path / "copy" / "model")
    out = tmp_path / "out" / "table.csv"
    command = ["--student", str(tmp_path / "copy"), "--out", str(out), "--side", "32", "--draws", "1"]
    command += ["--steps", "1", "2"]
    assert distill.main(command) == 0
    lines = list(csv.DictReader(out.open()))
    found = [(r["decoder"], int(r["steps"]), float(r["rho"]), int(r["forwards"])) for r in lines]
    assert found == [
        ("teacher", 1, 4.0, 1), ("teacher", 2, 4.0, 2), ("teacher", 25, 4.0, 31), ("teacher", 2, 1.0, 2),
        ("copy", 1, 1.0, 1), ("copy", 2, 1.0, 2),
    ]  # fmt: skip
    by = dict(zip(found, lines))
    assert by["teacher", 25, 4.0, 31]["psnr_to_teacher"] == "inf"
    for measure in distill.MEASURES:
        assert by["copy", 2, 1.0, 2][measure] == by["teacher", 2, 1.0, 2][measure]
        assert by["copy", 1, 1.0, 1][measure] == by["teacher", 1, 4.0, 1][measure], "one step has no spacing"
    assert " ".join(command) in lines[0]["command"] and lines[0]["judge"] == "an untrained VGG-16"
    text = out.with_suffix(".md").read_text()
    alike = next(line for line in text.splitlines() if "2 steps, rho 1" in line)
    assert alike.count("the same") == 4, "a copy is as good as what it copies, where it takes the same steps"
    assert text in capsys.readouterr().out and text.count("\n| ") == len(lines) + 2

    other = json.loads((tmp_path / "copy" / "model" / "config.json").read_text())
    assert other["sampler"] == {"steps": 2, "rho": 1.0, "guidance": 1.0}
    torch.manual_seed(1)
    FlowMo("tiny").save_pretrained(tmp_path / "stranger" / "model")
    with pytest.raises(SystemExit):
        distill.main([*command, "--student", str(tmp_path / "stranger")])
    assert "no student of this teacher" in capsys.readouterr().err


def test_a_verdict_names_the_better_one_of_each_measure() -> None:
    model = FlowMo("tiny")
    rows = [distill.Decoder("teacher", model, Schedule(1)), distill.Decoder("student", model, Schedule(1, 1.0, 1.0))]
    values = {name: torch.tensor([1.0, 2.0]) for name in distill.MEASURES}
    better = {**values, "psnr_to_teacher": values["psnr_to_teacher"] + 1, "perceptual_to_original": torch.zeros(2)}
    (line,) = distill.verdicts(rows, [values, {**better, "psnr_to_original": torch.zeros(2)}])
    assert "student against teacher, 1 step, rho 4, guidance 1.5" in line
    assert "psnr_to_teacher better by 1.000 (+- 0.000)" in line and "perceptual_to_original better by 1.500" in line
    assert "psnr_to_original WORSE by 1.500" in line
