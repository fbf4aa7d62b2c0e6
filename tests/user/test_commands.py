"""The commands, called in this process: their list, their help, token files from pictures and back, mistakes."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowmo import FlowMo, cli, detokenize, export, reconstruct, tokenize
from flowmo.__main__ import commands
from flowmo.__main__ import main as flowmo
from flowmo.data import heldout_photographs, load_image, to_tensor
from flowmo.format import TokenFile
from flowmo.metrics import psnr
from flowmo.pretrained import shipped_weights
from flowmo.tiles import encode_tiles, reconstruct_blended

COMMANDS = commands()


def test_the_list_names_every_command(capsys):
    assert flowmo([]) == 0
    out = capsys.readouterr().out
    for name in ("train", "tokenize", "detokenize", "reconstruct", "likelihood", "evaluate", "generate", "data.index"):
        assert re.search(rf"^  {re.escape(name)} +\S", out, re.MULTILINE), name
    for name, said in COMMANDS.items():
        assert 10 < len(said) < 130 and "\n" not in said, name
    assert flowmo(["--help"]) == 0


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_examples(name, capsys):
    main = importlib.import_module(f"flowmo.{name}").main
    try:
        code = main(["--help"])
    except SystemExit as end:
        code = end.code
    assert not code
    out = capsys.readouterr().out
    examples = [line for line in out.splitlines() if f"-m flowmo.{name} " in line and not line.startswith("usage:")]
    assert examples, f"no example in the help of flowmo.{name}"


def test_commands_run_by_their_names(capsys):
    with pytest.raises(SystemExit):
        flowmo(["detokenize", "--help"])
    assert "usage: python -m flowmo.detokenize" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean tokenize"):
        flowmo(["tokenise"])


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def photo(path: Path, name: str = "coffee", size: tuple[int, int] = (75, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    heldout_photographs()[name].resize(size).save(path)
    return path


def run(main, *arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def test_a_photograph_to_a_file_and_back(tiny, model, tmp_path, capsys):
    source = photo(tmp_path / "photo.png")
    assert run(tokenize.main, source, "--out", tmp_path / "photo.flowmo", "--checkpoint", model) == 0
    file = TokenFile.read(tmp_path / "photo.flowmo")
    assert (file.width, file.height, file.grid.count) == (75, 50, 6)
    image = to_tensor(load_image(source))
    assert torch.equal(file.codes(tokenize.layout_of(tiny)), encode_tiles(tiny, image, file.grid))
    out = capsys.readouterr().out
    assert "75 x 50, 6 tiles, 216 bytes of payload" in out

    steps = ("--steps", 3, "--seed", 7)
    assert run(detokenize.main, tmp_path / "photo.flowmo", "--out", tmp_path / "a" / "photo.png", "--checkpoint", model,
               *steps) == 0  # fmt: skip
    picture = to_tensor(load_image(tmp_path / "a" / "photo.png"))
    expected = reconstruct_blended(tiny, [image], seed=7, steps=3)[0]
    # PNG rounds to the nearest of 256 levels, 1 / 127.5 apart; 1e-3 for ties after sums in another order.
    assert float((picture - expected).abs().max()) <= 0.5 / 127.5 + 1e-3

    capsys.readouterr()
    assert detokenize.main([str(tmp_path / "photo.flowmo"), "--show"]) == 0
    assert "75 x 50 pixels, 6 tiles of 32 that overlap by 8, 32 tokens of 9 bits" in capsys.readouterr().out


def test_one_tile_is_the_square_of_that_size(model, tmp_path):
    source = photo(tmp_path / "photo.png")
    assert run(tokenize.main, source, "--out", tmp_path / "photo.flowmo", "--checkpoint", model, "--size", 32) == 0
    file = TokenFile.read(tmp_path / "photo.flowmo")
    assert (file.width, file.height, len(file.payload)) == (32, 32, 36)


def test_folders(model, tmp_path, capsys):
    for name in ("deep/one.png", "deep/one.jpg", "two.png"):
        photo(tmp_path / "photos" / name, size=(40, 33))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    tokens = tmp_path / "tokens"
    assert run(tokenize.main, tmp_path / "photos", "--files", "--out", tokens, "--checkpoint", model) == 1
    assert "broken.png" in capsys.readouterr().err
    files = sorted(p.relative_to(tokens).as_posix() for p in tokens.rglob("*") if p.is_file())
    assert files == ["deep/one.jpg.flowmo", "deep/one.png.flowmo", "two.flowmo"]

    data = bytearray((tokens / "two.flowmo").read_bytes())
    data[70] ^= 1
    (tokens / "damaged.flowmo").write_bytes(data)
    arguments = (tokens, "--out", tmp_path / "back", "--checkpoint", model, "--steps", 1, "--batch", 5)
    assert run(detokenize.main, *arguments) == 1
    assert "damaged.flowmo: damaged" in capsys.readouterr().err
    pictures = sorted(p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*.png"))
    assert pictures == ["deep/one.jpg.png", "deep/one.png.png", "two.png"]
    with Image.open(tmp_path / "back" / "two.png") as picture:
        assert picture.size == (40, 33)


def test_reconstruct_at_any_size(tiny, model, tmp_path, capsys):
    source = photo(tmp_path / "photo.png", size=(50, 41))
    arguments = (source, "--out", tmp_path / "out", "--checkpoint", model, "--any-size", "--steps", 2)
    assert run(reconstruct.main, *arguments) == 0
    picture, image = (to_tensor(load_image(p)) for p in (tmp_path / "out" / "photo.png", source))
    expected = reconstruct_blended(tiny, [image], steps=2)[0]
    assert float((picture - expected).abs().max()) <= 0.5 / 127.5 + 1e-3
    assert f"{float(psnr(expected[None], image[None])):.2f} dB" in capsys.readouterr().out


def test_a_folder_of_any_size_prepares_one_sampler(model, tmp_path, monkeypatch, capsys):
    """One for each picture would be one CUDA graph for each picture."""
    made: list[reconstruct.TileDecoder] = []
    kind = reconstruct.TileDecoder
    monkeypatch.setattr(reconstruct, "TileDecoder", lambda *a, **k: made.append(kind(*a, **k)) or made[-1])
    for name in ("one", "two"):
        photo(tmp_path / "photos" / f"{name}.png", size=(40, 40))
    arguments = (tmp_path / "photos", "--out", tmp_path / "out", "--checkpoint", model, "--any-size", "--steps", 1)
    assert run(reconstruct.main, *arguments) == 0
    assert len(made) == 1 and "over 2 pictures" in capsys.readouterr().out


def test_help_says_defaults(capsys):
    with pytest.raises(SystemExit):
        reconstruct.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "tiles (default: 8)" in out and "folder for the PNG files (default: reconstructions)" in out
    assert out.count("default: the model's own, 25") == 1 and "default: None" not in out


def test_progress_without_a_terminal_is_a_line_at_every_tenth(capsys):
    bar = cli.Progress(25, " of this process")
    for n in [1] * 24 + [6]:  # more than there are: several processes count for each other
        bar.update(n)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and lines[0] == "3 of 25 pictures of this process" and lines[-1].startswith("25 of 25")
    quiet = cli.Progress(2, shown=False)
    quiet.update(2)
    assert not capsys.readouterr().out


def test_an_exported_file_of_other_sizes_is_read_as_what_it_is(tiny, model, tmp_path, capsys):
    """Picture size and latent tokens show in no weight's shape."""
    assert export.main([str(model), str(tmp_path / "tiny.pth")]) == 0
    loaded = FlowMo.from_pretrained(tmp_path / "tiny.pth")
    assert loaded.config == tiny.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tiny.state_dict().values()))


def mistakes(tmp_path: Path, model: Path) -> dict[str, tuple[str, list[object], str]]:
    """Name -> command, arguments, words of the message."""
    photo(tmp_path / "photo.png", size=(40, 40))
    (tmp_path / "foreign.flowmo").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "cut.flowmo").write_bytes(b"\x89FlowMo\n\1\0")
    (tmp_path / "empty").mkdir()
    torch.manual_seed(1)
    FlowMo("tiny").save_pretrained(tmp_path / "other")
    main = ["--checkpoint", model, "--device", "cpu"]
    run(tokenize.main, tmp_path / "photo.png", "--out", tmp_path / "good.flowmo", "--checkpoint", model)
    good, out = tmp_path / "good.flowmo", ["--out", tmp_path / "x.png"]
    return {
        "no file": ("detokenize", [tmp_path / "none.flowmo", *out, *main], "no such token file or folder"),
        "empty folder": ("detokenize", [tmp_path / "empty", *out, *main], "no .flowmo files"),
        "foreign": ("detokenize", [tmp_path / "foreign.flowmo", *out, *main], "no FlowMo token file"),
        "cut": ("detokenize", [tmp_path / "cut.flowmo", *out, *main], "cut short"),
        "no out": ("detokenize", [good, *main], "--out is not set"),
        "two into one": ("detokenize", [good, good, *out, *main], "need a folder"),
        "no model": ("detokenize", [good, *out, "--checkpoint", tmp_path / "nothing"], "nothing"),
        "another model": ("detokenize", [good, *out, "--checkpoint", tmp_path / "other"], "made by tokenizer"),
        "bad steps": ("detokenize", [good, *out, *main, "--steps", 0], "--steps 0: expected at least 1"),
        "no picture": ("tokenize", [tmp_path / "none.jpg", "--out", tmp_path / "x.flowmo", *main], "no such file"),
        "not a picture": ("tokenize", [tmp_path / "cut.flowmo", "--out", tmp_path / "x.flowmo", *main], "cannot read"),
        "wide overlap": ("tokenize", [tmp_path / "photo.png", "--out", tmp_path / "x.flowmo", "--overlap", 17, *main],
                         "half a tile"),
        "cache of no tokenizer": ("tokenize", [tmp_path / "empty", "--out", tmp_path / "cache"], "--checkpoint"),
        "empty folder to files": ("tokenize", [tmp_path / "empty", "--files", "--out", tmp_path / "t", *main],
                                  "no pictures"),
        "two sizes": ("reconstruct", [tmp_path / "photo.png", "--size", 32, "--any-size", *main], "one of them"),
        "no batch": ("reconstruct", [tmp_path / "photo.png", "--batch", 0, "--any-size", *main], "--batch 0: expected"),
        "negative size": ("reconstruct", [tmp_path / "photo.png", "--size", -32, *main], "--size -32: expected"),
        "no device": ("reconstruct", [tmp_path / "photo.png", *main[:2], "--device", "gpu"], "'gpu': expected auto"),
        "a file for a folder": ("reconstruct", [tmp_path / "photo.png", "--out", good, *main], "a file of that name"),
        "no pictures": ("reconstruct", [tmp_path / "empty", *main], "no pictures in this folder"),
        "the picture before the model": ("reconstruct", [tmp_path / "none.jpg", "--checkpoint", "nothing"], "none.jpg"),
        "not a PNG": ("detokenize", [good, "--out", tmp_path / "x.jpg", *main], "name a .png file or a folder"),
        "likelihood of nothing": ("likelihood", [tmp_path / "cut.flowmo", *main], "none of the inputs"),
        "likelihood without probes": ("likelihood", [tmp_path / "photo.png", "--probes", 0, *main], "--probes 0"),
    }  # fmt: skip


def test_mistakes_are_one_paragraph(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, (command, arguments, words) in mistakes(tmp_path, model).items():
        monkeypatch.setattr(sys, "argv", ["flowmo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(importlib.import_module(f"flowmo.{command}").main)
        err = capsys.readouterr().err
        message = [line for line in err.splitlines() if not line.startswith("skipped: ")]
        assert end.value.code == 1, name
        assert words in message[0] and message[0].startswith("error: "), (name, err)
        assert message[1:] == ["(--debug shows where)"], (name, err)
    assert not list(tmp_path.glob("x.*"))


def test_without_a_checkpoint_the_shipped_weights_do(tmp_path, capsys):
    if shipped_weights("quickstart") is None:
        pytest.skip("this copy ships no quickstart weights")
    source = photo(tmp_path / "photo.png", size=(60, 40))
    assert run(tokenize.main, source, "--out", tmp_path / "photo.flowmo") == 0
    out = tmp_path / "photo.out.png"
    assert run(detokenize.main, tmp_path / "photo.flowmo", "--out", out, "--steps", 3) == 0
    image, picture = (to_tensor(load_image(p))[None] for p in (source, out))
    grey = image.mean((2, 3), keepdim=True).expand_as(image)
    assert float(psnr(picture, image)) > float(psnr(grey, image))
