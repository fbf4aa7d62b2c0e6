"""Archives give what the folder that they were packed from gives: pictures, order, faults, every number."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo import FlowMo, evaluate, tokenize
from flowmo.data import index as index_command
from flowmo.data.archive import ArchiveError
from flowmo.data.tokens import TokenCache
from flowmo.evaluation import ArchivePictures, FolderPictures, open_images, open_pictures
from flowmo.evaluation.pictures import read_batches
from flowmo.format import TokenFile
from flowmo.training.heldout import heldout_images


def picture(seed: int, form: str) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(out, form)
    return out.getvalue()


def pack(folder: Path, archive: Path, names: list[str] | None = None, prefix: str = "") -> Path:
    """A tar of a folder's files, last name first, so that only sorting brings them into order."""
    names = names or [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    with tarfile.open(archive, "w") as tar:
        for name in sorted(names, reverse=True):
            tar.add(folder / name, prefix + name)
    return archive


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flat/ is as ImageNet's validation set comes; in classes/, file names and folders sort differently, and there is
    what is no picture or none any more."""
    path = tmp_path_factory.mktemp("archives")
    for name in ("flat", "classes/n02", "classes/n01", "classes/.hidden"):
        (path / name).mkdir(parents=True)
    for i in range(1, 12):
        (path / "flat" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(picture(i, "jpeg"))
    files = {
        "n02/a.png": picture(20, "png"), "n02/._a.png": b"of macOS", "n02/broken.jpg": picture(21, "jpeg")[:300],
        "n02/text.txt": b"no picture", "n01/z.png": picture(22, "png"), "n01/without_ending": picture(23, "png"),
        "n01/sly.dat": picture(24, "webp"), "top.png": picture(25, "png"), ".hidden/h.png": picture(26, "png"),
    }  # fmt: skip
    for name, content in files.items():
        (path / "classes" / name).write_bytes(content)
    for name in ("flat", "classes"):
        pack(path / name, path / f"{name}.tar", prefix="./" if name == "classes" else "")
    (path / "shards").mkdir()
    names = sorted(p.name for p in (path / "flat").iterdir())
    for s in range(3):
        pack(path / "flat", path / "shards" / f"val-{2 - s:03d}.tar", names[s::3])
    (path / "quarters.py").write_text("def reconstruct(x):\n    return (x * 4).round() / 4\n")
    return path


@pytest.mark.parametrize(
    ("archive", "folder"),
    [("flat.tar", "flat"), ("classes.tar", "classes"), ("shards", "flat"), ("shards/*.tar", "flat")],
)
def test_pictures_are_those_of_the_folder_in_its_order(place: Path, archive: str, folder: str) -> None:
    packed, loose = open_images(place / archive, 32), open_images(place / folder, 32)
    assert isinstance(packed, ArchivePictures) and isinstance(loose, FolderPictures)
    assert [Path(n).name for n in packed.names] == [Path(n).name for n in loose.names]
    if folder == "classes":
        assert packed.names == loose.names == ["n01/sly.dat", "n01/without_ending", "n01/z.png", "n02/a.png",
                                               "n02/broken.jpg", "top.png"]  # fmt: skip
    faults: list[list[str]] = [[], []]
    both = [list(read_batches(p, range(len(p)), 3, skipped)) for p, skipped in zip((packed, loose), faults)]
    for (places, pixels), (others, expected) in zip(*both, strict=True):
        assert places == others and torch.equal(pixels, expected)
    assert [len(f) for f in faults] == [folder == "classes"] * 2 and all(
        "n02/broken.jpg" in f for part in faults for f in part
    )
    assert open_pictures(place / archive, None).read(0).shape == (3, 40, 48)


def test_the_command_gives_the_same_numbers_and_names_the_archive(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(tmp_path)
    index_command.main([str(place / "shards"), "--out", "index.json"])
    records = json.loads(Path("index.json").read_text())
    Path("short.json").write_text(json.dumps(records[1:]))
    assert len(open_images(place / "shards", 32, "short.json")) == 10, "headers were read though there is an index"
    results = {}
    for name, *more in (("flat",), ("flat.tar",), ("shards", "--index", "index.json")):
        evaluate.main(["--tokenizer", "quarters:reconstruct", "--size", "32", "--data", str(place / name), "--device",
                       "cpu", "--skip", "fid,lpips", "--limit", "4", "--batch", "3", *more])  # fmt: skip
        results[name] = json.loads(Path("evaluation.json").read_text())
    numbers = [r["metrics"] for r in results.values()]
    assert numbers[0] == numbers[1] == numbers[2] and numbers[0]["pictures"] == 4
    said = results["flat.tar"]["protocol"]
    assert said["pictures"] == str(place / "flat.tar") and said["order"] == "sorted by path inside the archive"
    assert said["subset"] == "4 of 11, evenly spaced"
    three = ", ".join(str(place / "shards" / f"val-00{s}.tar") for s in range(3))
    assert results["shards"]["protocol"]["pictures"] == three


def test_held_out_pictures_of_a_run_may_be_packed(place: Path) -> None:
    packed, loose = (heldout_images(str(place / name), 32, 4) for name in ("flat.tar", "flat"))
    assert packed.shape == (4, 3, 32, 32) and torch.equal(packed, loose)


def test_tokens_of_an_archive(place: Path, tmp_path: Path) -> None:
    """A cache of pictures without classes, and a file for each picture."""
    torch.manual_seed(0)
    FlowMo("tiny").save_pretrained(tmp_path / "m")
    shared = ["--checkpoint", str(tmp_path / "m"), "--device", "cpu"]
    for name in ("flat", "flat.tar"):
        tokenize.main([str(place / name), *shared, "--crop", "center", "--out", str(tmp_path / f"{name}.cache")])
    caches = [TokenCache.open(tmp_path / f"{name}.cache") for name in ("flat", "flat.tar")]
    assert np.array_equal(caches[0].packed, caches[1].packed) and len(caches[0].packed) == 11
    assert set(caches[1].labels.tolist()) == {-1}
    for name in ("classes", "classes.tar"):
        assert (
            tokenize.main([str(place / name), *shared, "--files", "--out", str(tmp_path / name)]) == 1
        )  # one is broken
    made = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.flowmo"))
        for n in ("classes", "classes.tar")
    ]
    assert made[0] == made[1] and len(made[0]) == 5
    for name in made[0]:
        assert (
            TokenFile.read(tmp_path / "classes" / name).payload
            == TokenFile.read(tmp_path / "classes.tar" / name).payload
        )


def test_members_cannot_write_outside_of_the_folder(place: Path, tmp_path: Path) -> None:
    pack(place / "flat", tmp_path / "evil.tar", ["ILSVRC2012_val_00000001.JPEG"], prefix="../../")
    FlowMo("tiny").save_pretrained(tmp_path / "m")
    tokenize.main([str(tmp_path / "evil.tar"), "--checkpoint", str(tmp_path / "m"), "--files", "--device", "cpu",
                   "--out", str(tmp_path / "deep" / "out")])  # fmt: skip
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.flowmo")] == [
        "deep/out/ILSVRC2012_val_00000001.flowmo"
    ]


def test_what_cannot_be_read_in_place_is_said(place: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "val.tar.gz", "w:gz") as tar:
        tar.add(place / "flat", "flat")
    with pytest.raises(ArchiveError, match=r"val\.tar\.gz: a compressed archive cannot be read in place; unpack it"):
        open_images(tmp_path / "val.tar.gz", 32)
    with pytest.raises(ValueError, match="is of tar archives"):
        open_images(place / "flat", 32, "index.json")
    content = (place / "flat.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArchiveError, match=r"cut\.tar.*cut short.*fetch the archive again"):
        open_images(tmp_path / "cut.tar", 32)
