"""A tar of tars with a damaged member, webdataset shards, indices, and archives that are not what they should be."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo.data import index as index_command
from flowmo.data.archive import ArchiveError, ArchiveImages, find_archives, scan
from flowmo.data.loader import TrainingBatches, build_data
from flowmo.data.transforms import load_image

SYNSETS = ("n01440764", "n02102040")


def picture(level: int) -> bytes:
    pixels = np.random.default_rng(level).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels[..., 0] = level
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar(members: dict[str, bytes], **options) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:
        for name, data in members.items():
            add(archive, name, data)
    return out.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """As ImageNet comes: a tar to a class inside one tar. Of ten pictures, one is damaged and no text counts."""
    classes = {}
    for c, synset in enumerate(SYNSETS):
        pictures = {f"{synset}_{i}.JPEG": picture(10 * (5 * c + i)) for i in range(5)}
        classes[f"{synset}.tar"] = tar({**pictures, "readme.txt": b"no picture"})
    damaged = f"{SYNSETS[1]}_2.JPEG"
    whole = picture(70)
    classes[f"{SYNSETS[1]}.tar"] = classes[f"{SYNSETS[1]}.tar"].replace(whole, whole[:40] + bytes(len(whole) - 40))
    assert damaged.encode() in classes[f"{SYNSETS[1]}.tar"]
    path = tmp_path / "train.tar"
    path.write_bytes(tar(classes))
    return path


def which(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5 / 10).round().int().tolist()


def write_index(*arguments: object, capsys) -> str:
    assert index_command.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_a_tar_of_tars_is_read_in_place_and_damage_is_named(imagenet):
    data = ArchiveImages(imagenet, 16, crop="center")
    assert len(data) == 10 and data.classes == list(SYNSETS) and list(data.labels) == [0] * 5 + [1] * 5
    assert data.paths[0] == "train.tar/n01440764/n01440764_0.JPEG"
    with pytest.warns(UserWarning, match=r"n02102040_2\.JPEG"):
        examples = [data[i] for i in range(10)]
    # The next readable picture stands in for the damaged one, with its own label.
    assert which(torch.stack([e.image for e in examples])) == [0, 1, 2, 3, 4, 5, 6, 8, 8, 9]
    assert [e.label for e in examples] == [0] * 5 + [1] * 5
    assert [Path(s.path).name for s in data.skipped] == ["n02102040_2.JPEG"]
    # The bytes are those of the file that was packed.
    with Image.open(io.BytesIO(picture(30))) as original:
        assert np.array_equal(np.asarray(data.read(3)), np.asarray(original))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_with_an_index_and_workers(imagenet, tmp_path, capsys, workers):
    said = write_index(imagenet, "--out", tmp_path / "index.json", capsys=capsys)
    assert "10 pictures of 2 classes in 1 archives" in said
    records = json.loads((tmp_path / "index.json").read_text())
    assert set(records[0]) == {"name", "offset", "size"}, "the release's own form"
    with_index = build_data(imagenet, 16, 10, seed=1, index=tmp_path / "index.json", workers=workers)
    without = build_data(imagenet, 16, 10, seed=1)
    assert isinstance(with_index, TrainingBatches)
    with pytest.warns(UserWarning, match="n02102040_2"):
        a, b = next(with_index), next(without)
    assert torch.equal(a, b) and sorted(which(a)) == [0, 1, 2, 3, 4, 5, 6, 8, 8, 9]
    assert "10 pictures of 2 classes in 1 archives" in with_index.describe()
    pickle.loads(pickle.dumps(with_index.source)).read(0)  # as a worker process gets it


def test_the_order_does_not_depend_on_the_packing(imagenet, tmp_path, capsys):
    write_index(imagenet, "--out", tmp_path / "index.json", capsys=capsys)
    records = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(records[::-1]))
    names = [ArchiveImages(imagenet, 16, index=i).paths for i in (None, tmp_path / "index.json")]
    assert names[0] == names[1]


def test_webdataset_shards_with_their_labels(tmp_path, capsys):
    for s in range(2):
        members = {}
        for i in range(3):
            members |= {f"{s}{i:04}.jpg": picture(10 * (3 * s + i)), f"{s}{i:04}.cls": str(7 + i).encode()}
        (tmp_path / f"train-{s:03}.tar").write_bytes(tar(members))
    write_index(tmp_path, "--out", tmp_path / "index.json", capsys=capsys)
    for source, index in ((tmp_path, None), (tmp_path / "train-*.tar", None), (tmp_path, tmp_path / "index.json")):
        data = ArchiveImages(source, 16, crop="center", index=index)
        assert list(data.labels) == [7, 8, 9] * 2
        assert which(torch.stack([data[i].image for i in range(6)])) == list(range(6))
    one = ArchiveImages(tmp_path / "train-001.tar", 16)
    assert len(one) == 3
    with pytest.raises(FileNotFoundError, match=r"train-000\.tar"):
        ArchiveImages(tmp_path / "train-001.tar", 16, index=tmp_path / "index.json")


@pytest.mark.parametrize("at", ["within a picture", "between pictures", "without its end"])
def test_truncated_archives_are_found_at_the_start(imagenet, tmp_path, capsys, at):
    write_index(imagenet, "--out", tmp_path / "index.json", capsys=capsys)
    entries = scan(imagenet)
    cut = {
        "within a picture": entries[-1].offset + 100,
        "between pictures": entries[7].offset - 512,
        "without its end": entries[-1].offset + -(-entries[-1].size // 512) * 512,
    }[at]
    imagenet.write_bytes(imagenet.read_bytes()[:cut])
    with pytest.raises(ArchiveError, match=r"train\.tar.*cut short.*fetch the archive again"):
        ArchiveImages(imagenet, 16)
    if at != "without its end":  # every picture is there
        with pytest.raises(ArchiveError, match="cut short or the index is of another"):
            ArchiveImages(imagenet, 16, index=tmp_path / "index.json")


def test_wrong_indices_are_found_at_the_start(imagenet, tmp_path, capsys):
    path = tmp_path / "index.json"
    write_index(imagenet, "--out", path, capsys=capsys)
    good = json.loads(path.read_text())
    shifted = [{**r, "offset": r["offset"] - 512} for r in good]
    swapped = [{**r, "name": other["name"]} for r, other in zip(good, good[::-1])]
    within = [{**r, "offset": r["offset"] + 7} for r in good]
    for records, words in (
        (shifted, r"no member at byte|holds .* where"),
        (swapped, "holds .* where"),
        (within, "no member at byte"),
        ([{**r, "size": r["size"] - 1} for r in good], "holds .* where"),
        ([], "the index is empty"),
        ([{"file": "x"}], "KeyError"),
        ({"a": 1}, "no index"),
    ):
        path.write_text(json.dumps(records))
        with pytest.raises(ArchiveError, match=words):
            ArchiveImages(imagenet, 16, index=path)
    path.write_text("not json")
    with pytest.raises(ArchiveError, match=r"python -m flowmo\.data\.index"):
        ArchiveImages(imagenet, 16, index=path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        ArchiveImages(imagenet, 16, index=tmp_path / "nowhere.json")


def test_pictures_of_a_flat_archive(tmp_path, capsys):
    """No folders: ImageNet's names tell the class. Names beyond a tar header's 100 characters are cut there."""
    path, long = tmp_path / "flat.tar", f"n02102040_{'1' * 120}.png"
    members = {long: picture(10), "n01440764_2.png": picture(20), "._n01440764_2.png": picture(30), "x.png": picture(0)}
    path.write_bytes(tar(members))
    write_index(path, "--out", tmp_path / "index.json", capsys=capsys)
    for index in (None, tmp_path / "index.json"):
        data = ArchiveImages(path, 16, crop="center", index=index)
        assert data.classes == list(SYNSETS) and list(data.labels) == [0, 1, -1]
        assert which(torch.stack([data[i].image for i in range(3)])) == [2, 1, 0]


def test_shards_are_one_list_by_file_name(tmp_path, capsys):
    for s in range(2):  # pictures dealt out in turn; the second shard is the smaller one
        members = {f"{'zy'[s]}/{i}.png": picture(10 * i) for i in range(s, 6 - s, 2)}
        members |= {f"{'zy'[s]}/{i}.cls": b"3" for i in range(s, 6 - s, 2)}
        (tmp_path / f"{s}.tar").write_bytes(tar(members))
    data = ArchiveImages(tmp_path, 16, crop="center")
    assert which(torch.stack([data[i].image for i in range(5)])) == list(range(5))
    assert list(data.labels) == [3] * 5 and data.classes == []  # numbers are said: folders name no class
    write_index(tmp_path, "--out", tmp_path / "index.json", capsys=capsys)
    last = max(scan(tmp_path / "1.tar"), key=lambda e: e.offset)
    shard = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(shard[: last.offset + last.size - 1])
    with pytest.raises(ArchiveError, match=r"1\.tar has .* cut short"):
        ArchiveImages(tmp_path, 16, index=tmp_path / "index.json")
    (tmp_path / "1.tar").write_bytes(shard[: last.offset - 512])  # between two members, nothing follows
    with pytest.raises(ArchiveError, match=r"1\.tar: its end is missing"):
        ArchiveImages(tmp_path, 16)


def test_what_is_no_archive_is_said(tmp_path):
    (tmp_path / "text.tar").write_bytes(b"no archive at all " * 100)
    with pytest.raises(ArchiveError, match=r"text\.tar.*no uncompressed tar archive"):
        ArchiveImages(tmp_path / "text.tar", 16)
    (tmp_path / "empty.tar").write_bytes(tar({"readme.txt": b"x"}))
    with pytest.raises(ArchiveError, match="no picture in it"):
        ArchiveImages(tmp_path / "empty.tar", 16)
    with pytest.raises(FileNotFoundError, match="no tar archive"):
        ArchiveImages(tmp_path / "none*.tar", 16)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(1))
    assert find_archives(tmp_path / "pictures") == [] and load_image(tmp_path / "pictures" / "a.png").size == (32, 24)
    with pytest.raises(ValueError, match=r"data\.index=i\.json is of tar archives"):
        build_data(tmp_path / "pictures", 16, 1, index="i.json")


def test_archives_that_could_be_taken_for_others_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(tar({f"{name}.png": picture(ord(name))}))
    (tmp_path / "a" / "._0.tar").write_bytes(b"of macOS")
    assert find_archives(tmp_path / "a") == find_archives(tmp_path / "a" / "*.tar") == [tmp_path / "a" / "0.tar"]
    with pytest.raises(ArchiveError, match=r"a/0\.tar and .*b/0\.tar have one file name.*rename one"):
        find_archives(tmp_path / "*" / "0.tar")
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more" / "c.png").write_bytes(picture(3))
    with pytest.raises(ArchiveError, match=r"holds archives and pictures \(0\.tar, more/c\.png\); .*a/\*\.tar, or"):
        find_archives(tmp_path / "a")
    (tmp_path / "w.tar").write_bytes(tar({"x.png": picture(1), "x.cls": b"dog"}))
    with pytest.raises(ArchiveError, match=r"w\.tar: x\.cls holds b'dog'; expected the number"):
        scan(tmp_path / "w.tar")
