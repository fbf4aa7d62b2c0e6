"""What the demo computes, without gradio and without a browser."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowmo import FlowMo, model_config
from flowmo.__main__ import commands
from flowmo.data import ImageReadError, heldout_photographs, to_tensor
from flowmo.demo import command, main
from flowmo.demo.work import SQUARE, WHOLE, Settings, Studio, draw_latents, draw_tokens, strip, usual
from flowmo.engine import Schedule
from flowmo.metrics import psnr
from flowmo.tiles import TileGrid, reconstruct_blended, reconstruct_tiled
from tests.model import golden


@pytest.fixture(scope="module")
def studio() -> Studio:
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", decoder_depth=1)).eval()
    golden.fill(model.named_parameters())
    return Studio(model)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "coffee.png"
    heldout_photographs()["coffee"].save(path)
    return path


def pixels(picture: np.ndarray) -> Tensor:  # [1, 3, H, W] uint8
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


def levels_apart(a: np.ndarray, b: Tensor) -> int:
    """Largest difference of 8-bit levels of a picture and of floating ones in [-1, 1]."""
    expected = (b + 1).mul(127.5).round().clamp(0, 255).to(torch.int16)
    return int((pixels(a).to(torch.int16) - expected).abs().max())


def test_a_square_is_what_the_library_makes_of_it(photo):
    """A model of large pictures sees the centre as one tile: then the demo must show FlowMo.reconstruct's picture."""
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", decoder_depth=1, image_size=128, patch=16)).eval()
    golden.fill(model.named_parameters())
    studio = Studio(model)
    assert (studio.side, studio.tiled, studio.max_side) == (128, False, 256)
    code = studio.encode(photo, SQUARE)
    assert code.source == (600, 400) and code.grid.count == 1
    result = studio.decode(code, Settings(steps=3, rho=2.0, guidance=2.0, seed=5))
    generator = torch.Generator().manual_seed(5)
    expected = model.reconstruct(code.original[None], steps=3, rho=2.0, guidance=2.0, generator=generator)
    # fp32 in another order may turn the rounding to one of 256 levels, by one
    assert levels_apart(result.pixels, expected) <= 1
    assert result.psnr == pytest.approx(float(psnr(expected, code.original[None])), abs=0.01)
    assert studio.bits(code) == 288


def test_small_models_take_tiles(studio, photo):
    square = studio.encode(photo, SQUARE)
    assert square.original.shape == (3, 128, 128) and square.grid.count == 16
    noise = torch.Generator().manual_seed(0)
    # without overlap the tiles are on their own, and guidance 1 needs no null pass
    expected = reconstruct_tiled(studio.model, square.original[None], steps=2, guidance=1.0, generator=noise)
    result = studio.decode(square, Settings(steps=2, guidance=1.0))
    assert expected.shape[-2:] == result.pixels.shape[:2] and result.forwards == 2
    whole = studio.encode(photo, WHOLE)
    assert whole.original.shape == (3, 170, 256)
    blended = reconstruct_blended(studio.model, [whole.original], steps=2, seed=3)[0]
    assert levels_apart(studio.decode(whole, Settings(steps=2, seed=3)).pixels, blended[None]) <= 1


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_a_frame_for_every_evaluation(studio, photo, solver):
    code = studio.encode(photo)
    told = []
    result = studio.decode(code, Settings(steps=4, solver=solver), lambda *what: told.append(what))
    schedule = Schedule(4, solver=solver)
    assert [f.time for f in result.frames] == schedule.evaluations and result.forwards == schedule.forwards
    assert told == [(i + 1, len(result.frames)) for i in range(len(result.frames))]
    for frame in result.frames:
        expected = float(psnr(pixels(frame.pixels), to_uint8_batch(code.original)))
        assert frame.psnr == pytest.approx(expected, abs=1e-9)
    assert len({frame.psnr for frame in result.frames}) > 1
    assert result.pixels is result.frames[-1].pixels and result.psnr == result.frames[-1].psnr


def to_uint8_batch(image: Tensor) -> Tensor:
    return (image + 1).mul(127.5).round().to(torch.uint8)[None]


def test_settings_change_the_picture(studio, photo):
    code = studio.encode(photo)
    settings = [Settings(steps=3), Settings(steps=4), Settings(steps=3, rho=1.0), Settings(steps=3, guidance=3.0)]
    settings += [Settings(steps=3, seed=1), Settings(steps=3, solver="ab2")]
    pictures = [studio.decode(code, s).pixels.tobytes() for s in settings]
    assert len(set(pictures)) == len(settings)
    assert studio.decode(code, settings[0]).pixels.tobytes() == pictures[0]


@pytest.mark.parametrize("bits", [1, 9, 14])
def test_the_picture_of_tokens_holds_the_tokens(bits):
    """Squares in reading order, tiles too, and no two tokens of one colour: all of it can be read back."""
    grid = TileGrid(80, 56, 32, 8)
    per_tile = 32
    tokens = torch.randint(2**bits, (grid.count, per_tile), generator=torch.Generator().manual_seed(bits))
    rows, columns = len(grid.rows), len(grid.columns)
    assert rows * columns == grid.count == 6
    sheet = np.asarray(draw_tokens(tokens, bits, grid))
    scale = sheet.shape[0] // (rows * 5 - 1)  # blocks of 4 x 8 squares and a line between them
    assert sheet.shape == (scale * (rows * 5 - 1), scale * (columns * 9 - 1), 4) and max(sheet.shape) >= 512
    small = sheet[scale // 2 :: scale, scale // 2 :: scale]
    assert (small[4::5, :, 3] == 0).all() and (small[:, 8::9, 3] == 0).all()
    for tile in range(grid.count):
        y, x = 5 * (tile // columns), 9 * (tile % columns)
        block = small[y : y + 4, x : x + 8].reshape(per_tile, 4).astype(int)
        assert (block[:, 3] == 255).all()
        read = torch.zeros(per_tile, dtype=torch.long)
        for channel in range(3):
            own = range(channel, bits, 3)
            level = np.rint((block[:, channel] - 64) / 176 * max(1, 2 ** len(own) - 1)).astype(int)
            for i, bit in enumerate(own):
                read += torch.from_numpy((level >> i) & 1) << bit
        assert torch.equal(read, tokens[tile])


def test_levels_are_tokens_too(photo):
    torch.manual_seed(0)
    sizes = {"quantizer": "fsq", "fsq_levels": "[5,4,3]", "latent_channels": 6}
    studio = Studio(FlowMo(model_config("tiny", decoder_depth=1, **sizes)).eval())
    code = studio.encode(photo)
    assert studio.token_bits == 6 and studio.bits(code) == 16 * 32 * 6  # 60 values
    tokens = studio.model.tokenize(code.original[None, :, :32, :32])[0]
    assert len(np.unique(np.asarray(studio.tokens(code)).reshape(-1, 4), axis=0)) > 1
    first = np.asarray(draw_tokens(tokens[None], 6, TileGrid(32, 32, 32, 0)).resize((8, 4), Image.Resampling.NEAREST))
    whole = np.asarray(studio.tokens(code).resize((35, 19), Image.Resampling.NEAREST))
    assert np.array_equal(whole[:4, :8], first)


def test_pictures_of_a_continuous_code(photo):
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", quantizer="none", decoder_depth=1)).eval()
    studio = Studio(model)
    code = studio.encode(photo)
    assert studio.bits(code) is None and "real numbers" in studio.describe()
    greys = np.unique(np.asarray(studio.tokens(code).convert("L")))
    assert len(greys) > 20
    flat = draw_latents(torch.zeros(1, 4, 4), TileGrid(32, 32, 32, 8))
    assert np.unique(np.asarray(flat)[..., :3]).tolist() == [128]


def test_a_strip_runs_from_the_first_to_the_last(studio, photo):
    code = studio.encode(photo)
    frames = studio.decode(code, Settings(steps=11)).frames
    sheet = np.asarray(strip(frames))
    assert sheet.shape == (160 * 2 + 8, 160 * 4 + 3 * 8, 4)
    for place, frame in ((sheet[:160, :160], frames[0]), (sheet[-160:, -160:], frames[-1])):
        thumb = Image.fromarray(frame.pixels).resize((160, 160), Image.Resampling.BILINEAR)
        assert np.array_equal(place[..., :3], np.asarray(thumb))
    assert strip(frames[:1]).size == (160, 160)


def test_pictures_of_any_kind_or_words(studio, tmp_path):
    for size, seen in (((5, 3), (3, 5)), ((900, 60), (17, 256)), ((256, 256), (256, 256))):
        path = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size, "teal").save(path)
        assert studio.encode(path, WHOLE).original.shape[1:] == seen
        assert studio.encode(path, SQUARE).original.shape[1:] == (128, 128)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (4000, 10)).save(thin)
    with pytest.raises(ValueError, match="4000 x 10 pixels: expected sides of at most 16 to 1"):
        studio.encode(thin)
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(ImageReadError, match=r"cannot read damaged\.jpg as"):  # and not where the server keeps it
        studio.encode(damaged)
    with pytest.raises(ValueError, match="extent='half'"):
        studio.encode(thin, "half")
    with pytest.raises(ValueError, match="at least 128"):
        Studio(studio.model, 100)


def test_visitors_at_the_same_time_do_not_clash(studio, tmp_path):
    """Encode plans hold one set of buffers: without turns, one visitor's picture would end in another's code."""
    paths = []
    for name, picture in heldout_photographs().items():
        paths.append(tmp_path / f"{name}.png")
        picture.resize((160, 128)).save(paths[-1])
    alone = [studio.encode(path).codes for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: studio.encode(path).codes, paths * 6))
    for i, codes in enumerate(together):
        assert torch.equal(codes, alone[i % len(paths)])


def test_what_a_model_is_tried_with(tmp_path):
    model = FlowMo("tiny")
    assert usual(model, None) == usual(model, "flowmo_lo.pth") == Settings(25, 4.0, 1.5)
    (tmp_path / "config.yaml").write_text("sampler:\n  steps: 6\n")
    (tmp_path / "model").mkdir()
    assert usual(model, tmp_path) == usual(model, tmp_path / "model") == Settings(steps=6)
    model.sampler = Schedule(4, 1.0, 1.0)  # as distillation leaves it
    assert usual(model, tmp_path) == Settings(4, 1.0, 1.0)


def test_the_command_is_listed_and_says_what_is_missing(monkeypatch):
    assert "photographs" in commands()["demo"] and "." not in commands()
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install -e "\.\[demo\]"'):
        main([])
    with pytest.raises(ValueError, match="--port 0: expected 1 to 65535"):
        main(["--port", "0"])


def test_nothing_of_gradio_is_needed_to_import_and_nothing_is_shared(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "gradio" or name.startswith("flowmo.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("flowmo.demo").main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "python -m flowmo.demo --checkpoint" in told and "--share" not in told


def test_tensor_and_file_agree(studio, photo):
    """The original shown is the file's pixels."""
    with Image.open(photo) as picture:
        centre = picture.resize((192, 128), Image.Resampling.BILINEAR).crop((32, 0, 160, 128))
    assert torch.equal(studio.encode(photo, SQUARE).original, to_tensor(centre))
