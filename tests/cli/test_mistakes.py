"""Every command answers a mistake with one paragraph, and with the traceback where --debug asks for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from flowmo import cli
from flowmo.__main__ import commands

# By command: arguments with a mistake, and what the answer has to say.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "analyse": (["steps", "--checkpoint", "nowhere.pth", "--data", "samples"], "Inception weights are not here"),
    "data.index": (["nowhere.tar"], "no tar archive at nowhere.tar"),
    "demo": (["--port", "70000"], "expected 1 to 65535"),
    "detokenize": (["nowhere.flowmo", "--out", "x.png"], "no such token file or folder: nowhere.flowmo"),
    "evaluate": (["--checkpoint", "nowhere.pth", "--data", "samples", "--skip", "fid,lpips"], "nowhere.pth"),
    "export": (["nowhere.pth", "x.safetensors"], "nowhere.pth: no such file or folder"),
    "generate": (["--tokenizer", "nowhere.pth", "--generator", "nowhere", "--out", "x"], "nowhere"),
    "generator.quickstart": (["--tokenizer", "nowhere.pth", "--out", "x"], "nowhere.pth: no such file or folder"),
    "likelihood": (["nowhere.jpg"], "nowhere.jpg"),
    "reconstruct": (["nowhere.jpg"], "nowhere.jpg"),
    "tokenize": (["nowhere.jpg", "--out", "x.flowmo"], "no such file or folder: nowhere.jpg"),
    "train": (["tiny", "data.pth=IMAGES"], "did you mean data.path?"),
    "training.report": (["nowhere"], "nowhere"),
}


def test_there_is_a_mistake_for_every_command():
    assert set(MISTAKES) == set(commands())


@pytest.mark.parametrize("name", MISTAKES)
def test_one_paragraph_or_a_traceback(name, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[name]
    main = importlib.import_module(f"flowmo.{name}").main
    for debug in (False, True):
        monkeypatch.setattr(sys, "argv", [name, *arguments, *(["--debug"] if debug else [])])
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        told = capsys.readouterr().err
        assert ended.value.code == 1 and words in told, told
        if debug:
            assert "Traceback (most recent call last)" in told
        else:
            assert told.startswith("error: ") and told.endswith("(--debug shows where)\n"), told
            assert "Traceback" not in told and "\n\n" not in told, told
    assert not [path for path in tmp_path.iterdir() if path.is_file()], "a mistake left a file behind"
