"""The API reference is built from the docstrings without a warning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("pdoc", reason="the API reference needs the extra `docs`")


def test_reference(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "docs/api.py", str(tmp_path / "api"), "--no-source"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for page, words in (
        ("flowmo/autoencoder.html", ["detokenize", "guidance_interval", "a continuous model, which has no tokens"]),
        ("flowmo/tiles.html", ["TileDecoder"]),
        ("flowmo_kernels/lfq.html", ["lfq_ref"]),
    ):
        text = (tmp_path / "api" / page).read_text(encoding="utf-8")
        assert all(word in text for word in words), page
        assert ":class:`" not in text and ":meth:`" not in text
    assert (tmp_path / "api" / "index.html").is_file()
