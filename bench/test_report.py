"""The report shows what was measured, all of it, and nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import components, report
from bench import model as model_bench


def test_component_names() -> None:
    for name, expected in {
        "aten::addmm": "linear layers",
        "nvjet_hsh_256x144_TNT": "linear layers",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "qk_norm_rope_kernel": "query-key norm and rotation",
        "norm_residual_kernel": "norm, modulation, residual",
        "step_boundary_kernel": "sampler",
        "aten::gelu": "GELU",
        "Memcpy DtoD": "copies and joins",
        "aten::sin": "other",
    }.items():
        assert components.component(name) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="small sizes for a CPU")
def test_report_of_small_runs(tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = ["--providers", "published", "plan", "--model", "tiny"]
    assert (
        model_bench.main(
            [*words, "--tasks", "decode", "--batch", "1", "2", "--seconds", "0.01", "--out", str(results / "model.csv")]
        )
        == 0
    )
    assert components.main([*words, "--task", "forward", "--out", str(results / "components.csv")]) == 0
    (results / "ops.csv").write_text(
        "op,pass,shape,provider,status,gb_per_s,tflop_per_s,peak_copy_gb_per_s,peak_matmul_tflop_per_s,card\n"
        "lfq,forward,[1],ref,ok,100,0.5,1000,10,test row\nlfq,forward,[1],cuda,wrong,,,1000,10,test row\n"
    )
    assert report.main(["--results", str(results), "--out", str(tmp_path / "REPORT.md")]) == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert "| decode | tiny | 2 | plan |" in text and "attention" in text and "| wrong |" in text
    assert "peak_gib" not in text  # no row has it on a CPU
    if find_spec("matplotlib"):
        drawn = {p.stem for p in tmp_path.glob("*.png")}
        assert drawn == {"speedup", "batch", "components", "roofline"}
        assert all(f"({name}.png)" in text for name in drawn)


def test_parts_of_a_table_are_joined(tmp_path: Path) -> None:
    """A lent machine runs the large batches by themselves, into a file of their own."""
    for name, batch in (("model", 8), ("model-32", 32)):
        (tmp_path / f"{name}.csv").write_text(f"task,batch,provider,status\ndecode,{batch},plan+graph,ok\n")
    assert [row["batch"] for row in report.read(tmp_path)["model"]] == ["8", "32"]


def test_rows_of_several_machines_say_which(tmp_path: Path) -> None:
    row = "task,model,batch,provider,status,ms_p50,images_per_s,speedup_published,card\n"
    for card in ("one", "two"):
        (tmp_path / f"model-{card}.csv").write_text(f"{row}decode,tiny,8,plan,ok,2,4000,1.50,{card}\n")
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "REPORT.md")]) == 0
    text = (tmp_path / "REPORT.md").read_text()
    assert "| 1.50 | one |" in text and "| 1.50 | two |" in text and "card one, two" in text


def test_no_results_is_said(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "REPORT.md")]) == 2
    assert "run the benches first" in capsys.readouterr().out and not (tmp_path / "REPORT.md").exists()
