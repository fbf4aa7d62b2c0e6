"""Runs of generate that are killed, and what the same command, or another one, makes of what they left."""

from __future__ import annotations

import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmo import generate
from flowmo.generator import Generator
from flowmo.generator.samples import SampleFolder, digest
from tests.generator.conftest import run_generate, stop_after
from tests.processes import run

MORE = ("--n", "5", "--batch", "4", "--seed", "7")  # 15 pictures: batches of 4, 4, 4 and 3

KILLED = """
import os, signal, sys
from flowmo import files, generate
replace = os.replace
def die_before(temporary, path):
    if "/000009_" in str(path):  # the second picture of the third batch is written, and not in its place yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)
files.os.replace = die_before
generate.main(sys.argv[1:])
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Numbers of the batches that are drawn."""
    keep, numbers = SampleFolder.keep, []
    monkeypatch.setattr(SampleFolder, "keep", lambda self, n, p: (numbers.append(n), keep(self, n, p)) and None)
    return numbers


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tokenizer, generator, tmp_path, drawn, capsys):
    arguments = ["--tokenizer", tokenizer, "--generator", generator, "--out", tmp_path / "killed", "--device", "cpu"]
    run([sys.executable, "-c", KILLED, *arguments, "--steps", "4", "--decoder-steps", "2", *MORE], code=-signal.SIGKILL)
    left = files(tmp_path / "killed")
    assert ".parts/000001.npy" in left and ".parts/000002.npy" not in left and "samples.npz" not in left
    assert any(name.startswith("pictures/.000009_") for name in left), "it was not killed while it wrote"

    run_generate(tokenizer, generator, tmp_path / "killed", *MORE)
    assert drawn == [2, 3] and "15 pictures of 3 classes, 8 of them there already" in capsys.readouterr().out
    run_generate(tokenizer, generator, tmp_path / "whole", *MORE)
    killed, whole = files(tmp_path / "killed"), files(tmp_path / "whole")
    assert killed == whole and len(whole) == 15 + 3 and not (tmp_path / "killed" / ".parts").exists()
    with zipfile.ZipFile(tmp_path / "whole" / "samples.npz") as archive:  # or bytes would tell the time of day
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

    run_generate(tokenizer, generator, tmp_path / "killed", *MORE)
    assert drawn == [2, 3, 0, 1, 2, 3] and "holds these 15 pictures already" in capsys.readouterr().out


@pytest.mark.parametrize("at", ["write_archive", "finish"])
def test_stopped_when_all_is_drawn(tokenizer, generator, tmp_path, drawn, monkeypatch, at):
    def stop(self: SampleFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleFolder, at, stop)
        run_generate(tokenizer, generator, tmp_path / "out", *MORE)
    if at == "write_archive":  # as a kill leaves it
        (tmp_path / "out" / ".samples.npz.abc.npz").write_bytes(b"half an archive")
    run_generate(tokenizer, generator, tmp_path / "out", *MORE)
    assert drawn == [0, 1, 2, 3]
    run_generate(tokenizer, generator, tmp_path / "whole", *MORE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_part_is_drawn_again(tokenizer, generator, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run_generate(tokenizer, generator, tmp_path / "out", *MORE)
    parts = tmp_path / "out" / ".parts"
    content = (parts / "000000.npy").read_bytes()
    (parts / "000000.npy").write_bytes(content[: len(content) // 2])
    np.save(parts / "000001.npy", np.zeros((4, 8, 8, 3), np.uint8))
    (parts / "000002.npy").write_bytes(b"")
    with pytest.warns(UserWarning) as warned:
        run_generate(tokenizer, generator, tmp_path / "out", *MORE)
    assert [f"00000{i}.npy is damaged" in str(w.message) for i, w in enumerate(warned)] == [True] * 3
    run_generate(tokenizer, generator, tmp_path / "whole", *MORE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_settings_are_refused_by_name(tokenizer, generator, tmp_path, monkeypatch, drawn):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run_generate(tokenizer, generator, out, *MORE)
    before = files(out)
    for finished in (False, True):
        for option, value, words in (
            ("--seed", "8", r"\(seed: 7 there and 8 here\)"),
            ("--n", "6", r"\(n: 5 there and 6 here\)"),
            ("--batch", "5", r"\(batch: 4 there and 5 here\)"),
            ("--classes", "2,0,1", r"\(classes: all there and 2,0,1 here\)"),
            ("--guidance", "3", r"\(guidance: 1.5 there and 3.0 here\)"),
            ("--decoder-steps", "3", r"\(decoder_steps: 2 there and 3 here\)"),
            ("--precision", "bf16", r"\(precision: float32 there and bfloat16 here; generator: "),
            ("--no-png", None, r"\(png: True there and False here\)"),
        ):
            words = "out holds pictures of other settings " + words + ".*name another --out, or .*--overwrite"
            with pytest.raises(ValueError, match=words if option != "--precision" else words.split(";")[0]):
                run_generate(tokenizer, generator, out, *MORE, *(x for x in (option, value) if x))
        assert files(out) == before, "a refused command changed the folder"
        if not finished:
            run_generate(tokenizer, generator, out, *MORE)
            before = files(out)
    model = Generator.from_pretrained(generator)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    model.save_pretrained(generator)
    with pytest.raises(ValueError, match=r"\(generator: [0-9a-f]{12}\.\.\. there and [0-9a-f]{12}\.\.\. here\)"):
        run_generate(tokenizer, generator, out, *MORE)

    fewer = ("--n", "1", "--batch", "4", "--no-png")
    (out / "notes.txt").write_text("of the user's")
    drawn.clear()
    run_generate(tokenizer, generator, out, *fewer, "--overwrite")
    assert set(files(out)) == {"notes.txt", "grid.png", "samples.npz", "settings.json"} and drawn == [0]
    (out / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json: no settings of flowmo\.generate .*--overwrite"):
        run_generate(tokenizer, generator, out, *fewer)


def test_files_of_unknown_settings_are_neither_mixed_with_nor_lost(tmp_path, monkeypatch):
    folder = SampleFolder(tmp_path, torch.zeros(2, dtype=torch.int64), 2, 8, {"seed": 0})
    (tmp_path / "pictures").mkdir()
    own = ["pictures/20240131_120000.png", "pictures/.hidden.png", "pictures/1_2.png"]
    for name in (*own, "pictures/000001_0002.png", "samples.npz"):
        (tmp_path / name).write_bytes(b"some")
    before = files(tmp_path)
    for left in ("samples.npz", "000001_0002.png"):
        with pytest.raises(ValueError, match=rf"{left} is there, and no settings\.json .*--overwrite"):
            folder.begin()
        assert files(tmp_path) == before
        before.pop("samples.npz", None)
        (tmp_path / "samples.npz").unlink(missing_ok=True)
    assert folder.begin(overwrite=True) == [0] and set(files(tmp_path)) == {*own, "settings.json"}

    unlink = Path.unlink

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".png":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    (tmp_path / "pictures" / "000001_0002.png").write_bytes(b"some")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # stopped while it removes
        patch.setattr(Path, "unlink", stop)
        folder.begin(overwrite=True)
    with pytest.raises(ValueError, match=r"seed: 0 there and 1 here"):
        SampleFolder(tmp_path, folder.labels, 2, 8, {"seed": 1}).begin()


def test_the_archive_of_large_batches_holds_every_picture(tmp_path):
    """Batches of more pictures than are written at once."""
    labels = torch.arange(220) % 7
    folder = SampleFolder(tmp_path, labels, 150, 2, {"seed": 0})
    pictures = np.random.default_rng(0).integers(0, 256, (220, 2, 2, 3), dtype=np.uint8)
    assert folder.begin() == [0, 1]
    for number, part in enumerate(np.split(pictures, [150])):
        folder.keep(number, part)
    folder.write_archive()
    with np.load(tmp_path / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"], pictures) and np.array_equal(archive["arr_1"], labels)
    assert np.array_equal(folder.pictures([3, 149, 150, 219]), pictures[[3, 149, 150, 219]])
    folder.finish()
    assert not folder.finished and folder.begin() == [0, 1]  # no grid: it is made of the parts, which are gone


def test_parts_of_nobody_knows_what_are_not_gone_on_with(tmp_path):
    labels = torch.zeros(4, dtype=torch.int64)
    folder = SampleFolder(tmp_path, labels, 2, 2, {"seed": 0, "guidance": 1.5})
    assert folder.begin() == [0, 1]
    folder.keep(0, np.zeros((2, 2, 2, 3), np.uint8))
    np.save(tmp_path / ".parts" / "000001.npy", np.zeros((2, 2, 2, 3), np.int8))
    with pytest.warns(UserWarning, match="000001"):
        assert folder.begin() == [1]
    with pytest.raises(ValueError, match=r"\(guidance: 1\.5 there and None here\)"):  # a setting that is no more
        SampleFolder(tmp_path, labels, 2, 2, {"seed": 0}).begin()
    (tmp_path / "settings.json").unlink()
    assert folder.begin() == [0, 1]


def test_models_that_differ_in_sizes_alone_are_told_apart():
    model = torch.nn.Linear(2, 2)
    assert len({digest(model, c) for c in ("2 heads", "4 heads")} | {digest(torch.nn.Linear(2, 2), "2 heads")}) == 3


def test_a_batch_does_not_depend_on_those_before(tokenizer, generator):
    """The last one, which is smaller, is computed as the others are: prepared samplers are made by the batch."""
    network, model = generate.load_pair(generator, tokenizer, torch.device("cpu"), torch.float32)
    plan, labels = generate.SamplerPlan(network, 4), torch.tensor([0, 1, 2, 1, 0, 2])
    both = dict(generate.generate(plan, model, labels, 3, steps=2))
    assert model.engine.built == 1
    (alone,) = generate.generate(plan, model, labels, 3, [1], steps=2)
    assert torch.equal(alone[1], both[1]) and model.engine.built == 1
