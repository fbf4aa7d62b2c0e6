"""Reading awkward picture files, crops, the 8-bit round trip, grids."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo.data import transforms as T


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_plain_rgb_png_is_read_unchanged(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    img = T.load_image(tmp_path / "a.png")
    assert img.mode == "RGB" and np.array_equal(np.asarray(img), np.asarray(photo()))


def test_name_without_picture_extension_is_read(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.dat", format="PNG")
    assert np.array_equal(np.asarray(T.load_image(str(tmp_path / "a.dat"))), np.asarray(photo()))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    img = Image.new("RGB", (40, 20))
    img.paste((255, 255, 255), (0, 0, 40, 10))  # white upper half as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
    img.save(tmp_path / "a.jpg", exif=exif, quality=95)
    out = np.asarray(T.load_image(tmp_path / "a.jpg")).astype(int)
    assert out.shape == (40, 20, 3)
    assert out[:, 12:].mean() > 250 and out[:, :8].mean() < 5  # white half is on the right


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 1, 3], rgba[:, 2, 3] = 128, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    out = np.asarray(T.load_image(tmp_path / "a.png"))
    assert out[0, 0].tolist() == [255, 255, 255]
    assert np.abs(out[0, 1].astype(int) - [227, 127, 127]).max() <= 1
    assert out[0, 2].tolist() == [200, 0, 0]


def test_palette_with_transparency(tmp_path: Path) -> None:
    img = Image.new("P", (2, 1))
    img.putpalette([10, 20, 30, 40, 50, 60])
    img.putdata([0, 1])
    img.save(tmp_path / "a.png", transparency=0)
    out = np.asarray(T.load_image(tmp_path / "a.png"))
    assert out[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_grey_and_grey_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7, 255]], np.uint8)).save(tmp_path / "l.png")
    Image.merge("LA", (Image.new("L", (1, 1), 9), Image.new("L", (1, 1), 0))).save(tmp_path / "la.png")
    assert np.asarray(T.load_image(tmp_path / "l.png"))[0].tolist() == [[0] * 3, [7] * 3, [255] * 3]
    assert np.asarray(T.load_image(tmp_path / "la.png"))[0].tolist() == [[255] * 3]


def test_16_bit_grey_is_scaled_with_rounding(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)  # 128 / 257 = 0.498, 129 / 257 = 0.502
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert np.asarray(T.load_image(tmp_path / name))[0, :, 1].tolist() == [0, 0, 1, 100, 255]


def test_float_tiff(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(np.array([[0.0, 1e6]], np.float32)).save(tmp_path / "huge.tif")
    assert np.asarray(T.load_image(tmp_path / "unit.tif"))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(T.ImageReadError, match=r"huge\.tif.*1e\+06"):
        T.load_image(tmp_path / "huge.tif")


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red = np.asarray(T.load_image(tmp_path / "a.jpg"))[8, 8].astype(int)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def test_animated_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(T.load_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_unusable_files_name_the_file_and_the_reason(tmp_path: Path) -> None:
    photo(200, 200).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png"):
        with pytest.raises(T.ImageReadError, match=name):
            T.load_image(tmp_path / name)
    with pytest.raises(T.ImageReadError, match="not a regular file"):
        T.load_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        T.load_image(tmp_path / "nowhere.png")


def test_decompression_bomb_is_a_named_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(T.ImageReadError, match=r"bomb\.png") as error:
        T.load_image(tmp_path / "bomb.png")
    assert isinstance(error.value.__cause__, Image.DecompressionBombError)


def test_read_error_survives_the_way_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(T.ImageReadError("a.png", "why")))
    assert str(error) == str(T.ImageReadError("a.png", "why")) and error.reason == "why"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (50, 25)), ((50, 101), (25, 50)), ((25, 25), (25, 25)), ((30, 10), (75, 25))],
)
def test_resize_shorter_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert T.resize_shorter(photo(*size), 25).size == expected


def test_resize_shorter_is_pillows_antialiased_bilinear() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing, a quarter of the size would be all black or all white
    small = np.asarray(T.resize_shorter(Image.fromarray(stripes), 16)).astype(int)
    assert abs(small[:, 2:-2] - 127).max() <= 2
    assert T.resize_shorter(photo(40, 30), 30).size == (40, 30)
    assert T.resize_shorter(photo(2, 300), 4).size == (4, 600)  # enlarging


def test_center_and_random_crop() -> None:
    img = photo(41, 30)
    assert np.array_equal(np.asarray(T.center_crop(img, 10)), np.asarray(img)[10:20, 16:26])
    seen = set()
    source = np.asarray(img)
    for i in range(200):
        crop = np.asarray(T.random_crop(img, 29, np.random.default_rng(i)))
        offsets = [(y, x) for y in range(2) for x in range(13)]
        hits = [(y, x) for y, x in offsets if np.array_equal(source[y : y + 29, x : x + 29], crop)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert {y for y, _ in seen} == {0, 1} and {x for _, x in seen} == set(range(13))  # both edges are reached
    whole = photo(8, 8)
    assert np.array_equal(np.asarray(T.random_crop(whole, 8, np.random.default_rng(0))), np.asarray(whole))
    for cut in (lambda: T.center_crop(img, 31), lambda: T.random_crop(img, 31, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="31 x 31 crop from a picture of 41 x 30"):
            cut()


def test_every_grey_level_survives_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = T.to_tensor(Image.fromarray(levels))
    assert x.dtype == torch.float32 and x.shape == (3, 16, 16)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(x, torch.from_numpy(levels).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(T.to_uint8(x), torch.from_numpy(levels).permute(2, 0, 1))
    assert torch.equal(T.to_tensor(levels), x)


def test_to_uint8_rounds_and_clips() -> None:
    level = torch.tensor([99.4, 99.6, -7.0, 300.0, float("inf")])
    assert T.to_uint8(level / 127.5 - 1).tolist() == [99, 100, 0, 255, 255]
    # -0.1 + 1 needs more digits than bf16 has: summed there it would give level 114
    assert T.to_uint8(torch.tensor([-0.1], dtype=torch.bfloat16)).tolist() == [115]
    with pytest.raises(ValueError, match="NaN"):
        T.to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match="int64"):
        T.to_uint8(torch.tensor([1]))


def test_to_tensor_refuses_other_layouts() -> None:
    for bad in (np.zeros((3, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"uint8 array \[\.\.\., H, W, 3\]"):
            T.to_tensor(bad)


def test_grid_places_every_picture() -> None:
    rows = [torch.rand(3, 3, 8, 8) * 2 - 1, torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)]
    grid = np.asarray(T.make_grid(rows, separator=3, scale=2))
    assert grid.shape == (3 + 16 + 3 + 8 + 3, 3 + 3 * (16 + 3), 3)
    for n in range(3):
        tile = grid[3:19, 3 + n * 19 : 19 + n * 19]
        assert np.array_equal(tile[::2, ::2], T.to_uint8(rows[0][n]).permute(1, 2, 0).numpy())
        assert np.array_equal(tile[::2, ::2], tile[1::2, 1::2])
    assert np.array_equal(grid[22:30:2, 3 + 15 : 3 + 15 + 12 : 2], rows[1][1].permute(1, 2, 0).numpy())
    assert (grid[:3] == 255).all() and (grid[:, :3] == 255).all() and (grid[19:22] == 255).all()


def test_grid_labels_stand_to_the_left() -> None:
    rows = [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)]
    plain, labelled = T.make_grid(rows), T.make_grid(rows, ["original", "x"])
    margin = labelled.width - plain.width
    pixels = np.asarray(labelled)
    assert np.array_equal(pixels[:, margin:], np.asarray(plain))
    assert (pixels[:34, :margin] < 128).any() and (pixels[34:, :margin] < 128).any()
    assert (pixels[:, margin - 3 : margin] == 255).all()  # the longest label ends before the pictures


def test_grid_refuses_bad_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        T.make_grid([])
    with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
        T.make_grid([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="1 rows and 2 labels"):
        T.make_grid([torch.zeros(1, 3, 8, 8)], ["a", "b"])


def test_save_png_makes_the_folder_and_leaves_no_scraps(tmp_path: Path) -> None:
    path = T.save_png(torch.zeros(3, 4, 5), tmp_path / "new" / "a.png")
    assert np.asarray(Image.open(path)).tolist() == np.full((4, 5, 3), 128).tolist()
    photo().save(path)
    T.save_png(photo(seed=1), path)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(photo(seed=1)))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"\[2, 4, 5\]"):
        T.save_png(torch.zeros(2, 4, 5), path)
    with pytest.raises(OSError, match="CMYK"):  # fails in the midst of writing
        T.save_png(Image.new("CMYK", (4, 4)), path)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(photo(seed=1)))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_batches_go_to_a_card_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sources hand over by one function; the host waits for a copy from any other memory."""
    ways: list[tuple[str, dict[str, object]]] = []

    def pin(batch: torch.Tensor) -> torch.Tensor:
        ways.append(("pinned", {}))
        return batch.clone()

    def to(batch: torch.Tensor, device: torch.device, **how: object) -> torch.Tensor:
        ways.append((device.type, how))
        return batch

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    T.deliver(torch.zeros(2), torch.device("cuda"))
    T.deliver(torch.zeros(2), torch.device("cpu"))
    assert ways == [("pinned", {}), ("cuda", {"non_blocking": True}), ("cpu", {})]
