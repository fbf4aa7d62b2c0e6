"""Finding pictures, leaving out bad ones, classes, deterministic crops."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo.data.folder import ImageFolder, find_images, readable_extensions
from flowmo.data.transforms import ImageReadError, resize_shorter, to_tensor


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)
    return path


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-400])  # the header stays good, the pixels do not
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    save(tmp_path / "dog" / "b.PNG", 0)
    save(tmp_path / "cat" / "deep" / "a.jpg", 1, quality=95)
    save(tmp_path / "cat" / "z.webp", 2, lossless=True)
    save(tmp_path / "top.bmp", 3)
    save(tmp_path / "dog" / "no_ending", 4, format="PNG")
    save(tmp_path / "dog" / "odd.ending", 5, format="GIF")
    (tmp_path / "notes.txt").write_text("words")
    save(tmp_path / ".hidden.png", 6)
    save(tmp_path / ".cache" / "x.png", 7)
    (tmp_path / "void").mkdir()
    return tmp_path


def names(folder: Path, paths: list[Path] | list[str]) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in paths]


ALL = ["cat/deep/a.jpg", "cat/z.webp", "dog/b.PNG", "dog/no_ending", "dog/odd.ending", "top.bmp"]


def test_every_picture_is_found_in_a_fixed_order(mixed: Path) -> None:
    assert names(mixed, find_images(mixed)) == ALL
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif"} <= readable_extensions() and ".pdf" not in readable_extensions()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images(mixed / "nowhere")


def test_linked_folders_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "data" / "a" / "x.png")
    os.symlink(tmp_path / "data" / "a", tmp_path / "data" / "b")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "up")
    assert names(tmp_path / "data", find_images(tmp_path / "data")) == ["a/x.png", "b/x.png"]


def test_classes_and_labels_come_from_the_sub_folders(mixed: Path) -> None:
    data = ImageFolder(mixed, 16)
    assert names(mixed, data.paths) == ALL
    assert data.classes == ["cat", "dog"] and data.labels == [0, 0, 1, 1, 1, -1]
    assert [data[i].label for i in range(6)] == data.labels and data[-1].label == -1
    assert data.skipped == [] and len(data) == 6
    with pytest.raises(IndexError, match="6 of 6"):
        data[6]


def test_single_file(tmp_path: Path) -> None:
    data = ImageFolder(save(tmp_path / "a.png"), 16)
    assert len(data) == 1 and data.classes == [] and data.labels == [-1]


def test_bad_headers_are_skipped_named_and_counted(mixed: Path) -> None:
    (mixed / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    Image.new("RGB", (100, 15)).save(mixed / "dog" / "thin.png")
    (mixed / "dog" / "empty.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 3 files") as caught:
        data = ImageFolder(mixed, 32)
    message = str(caught[0].message)
    assert all(name in message for name in ("broken.jpg", "thin.png", "empty.png", "too small: 100 x 15"))
    assert names(mixed, [s.path for s in data.skipped]) == ["cat/broken.jpg", "dog/empty.png", "dog/thin.png"]
    assert names(mixed, data.paths) == ALL and data.labels == [0, 0, 1, 1, 1, -1]


def test_smallest_side_follows_the_size_and_can_be_set(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolder(tmp_path, 128)) == 2
        assert len(ImageFolder(tmp_path, 256, min_side=20)) == 2
    with pytest.warns(UserWarning, match=r"a\.png"):
        assert len(ImageFolder(tmp_path, 256)) == 1


def test_damage_behind_a_good_header_is_replaced_by_the_next_picture(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    cut_short(tmp_path / "2.png")
    data = ImageFolder(tmp_path, 16, crop="center")
    with pytest.warns(UserWarning, match=r"skipped 1 file .*2\.png"):
        replaced = data[2].image
    assert torch.equal(replaced, data[0].image)  # after the last comes the first
    assert not torch.equal(replaced, data[1].image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data[2]  # named once is enough
    assert [Path(s.path).name for s in data.skipped] == ["2.png"]


def test_the_next_picture_comes_with_its_own_label_and_another_crop(tmp_path: Path) -> None:
    for i, kind in enumerate(("cat", "dog", "eel")):
        (tmp_path / kind).mkdir()
        picture(i, 4000, 16).save(tmp_path / kind / "x.png")  # 3985 positions: no chance coincidences
    data = ImageFolder(tmp_path, 16)
    cut_short(tmp_path / "cat" / "x.png")
    (tmp_path / "dog" / "x.png").unlink()  # gone since the headers were read
    with pytest.warns(UserWarning, match="skipped 2 files"):
        replaced = data[0]
    assert replaced.label == 2 and not torch.equal(replaced.image, data[2].image)
    assert [Path(s.path).parent.name for s in data.skipped] == ["cat", "dog"]


def test_headers_need_not_be_checked(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    data = ImageFolder(tmp_path, 16, check_headers=False)
    assert len(data) == 3
    with pytest.warns(UserWarning, match="2 files"):
        data[1]
    assert [Path(s.path).name for s in data.skipped] == ["b.png", "c.png"]


def test_nothing_usable_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no usable picture under .*\.jpg.*at least 16 pixels; 0 picture"):
        ImageFolder(tmp_path, 32)
    Image.new("RGB", (4, 4)).save(tmp_path / "dot.png")
    with pytest.raises(FileNotFoundError, match=r"1 picture files found, skipped: .*dot\.png \(too small: 4 x 4"):
        ImageFolder(tmp_path, 32)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere", 32)


def test_all_files_damaged_later_is_an_error_too(tmp_path: Path) -> None:
    cut_short(save(tmp_path / "a.png"))
    with pytest.raises(ImageReadError, match=r"none of its 1 pictures.*a\.png"):
        ImageFolder(tmp_path, 16)[0]


def test_warnings_stay_short_and_the_list_is_whole(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    for i in range(50):
        (tmp_path / f"bad{i:02}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 50 files.*bad19.*and 30 more") as caught:
        data = ImageFolder(tmp_path, 16)
    assert "bad20" not in str(caught[0].message) and len(data.skipped) == 50


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    picture(0, 4000, 16).save(tmp_path / "a.png")  # 3985 positions: no chance coincidences
    picture(0, 4000, 16).save(tmp_path / "b.png")  # the same pixels under another index
    data = ImageFolder(tmp_path, 16, seed=1)
    first = data[0].image
    data[1]
    assert torch.equal(data[0].image, first) and torch.equal(data[0, 0].image, first)
    assert torch.equal(ImageFolder(tmp_path, 16, seed=1)[0].image, first)
    for other in (data[1], data[1, 0], data[2, 0], ImageFolder(tmp_path, 16, seed=2)[0]):
        assert not torch.equal(first, other.image)


def test_items_are_crops_of_the_resized_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    whole = to_tensor(resize_shorter(picture(0), 16))  # [3, 16, 24]
    image = ImageFolder(tmp_path, 16)[0].image
    assert image.dtype == torch.float32
    assert [x for x in range(9) if torch.equal(whole[:, :, x : x + 16], image)]
    assert torch.equal(ImageFolder(tmp_path, 16, crop="center")[0].image, whole[:, :, 4:20])
    raw = ImageFolder(tmp_path, 16, crop="center", as_uint8=True)[0].image
    assert raw.dtype == torch.uint8 and torch.equal(raw.float() / 127.5 - 1, whole[:, :, 4:20])


def test_flip_mirrors_about_half_of_the_crops(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 1, 3))).save(tmp_path / "a.png")
    data = ImageFolder(tmp_path, 16, flip=True)
    mirrored = sum((x := data[epoch, 0].image)[0, 0, 0].item() > x[0, 0, -1].item() for epoch in range(100))
    assert 25 <= mirrored <= 75  # binomial, five standard deviations


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="centre"):
        ImageFolder(tmp_path, 16, crop="centre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size >= 1"):
        ImageFolder(tmp_path, 0)
