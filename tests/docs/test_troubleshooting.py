"""Every message that docs/troubleshooting.md quotes is one that the code says: each is provoked here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.config import parse
from flowmo.data import ImageReadError, load_image
from flowmo.data.archive import find_archives
from flowmo.data.tokens import layout_of
from flowmo.demo import command as demo
from flowmo.format import TokenFile
from flowmo.generator.samples import SampleFolder
from flowmo.perceptual import load_perceptual
from flowmo.tiles import encode_tiles, grid_for
from flowmo.training import checkpoint
from flowmo.training.loop import Trainer
from flowmo_kernels import use
from flowmo_kernels._dispatch import why_no_triton
from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"


@pytest.fixture(scope="module")
def model() -> FlowMo:
    torch.manual_seed(0)
    return FlowMo(model_config("tiny"))


def short(run: Path, *more: str) -> Trainer:
    quick = ["trainer.device=cpu", "trainer.threads=1", "trainer.sample_every=50", "trainer.log_every=1"]
    return Trainer(parse(["tiny", f"run={run}", *quick, *more]))


def no_card() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a card")


def cuda_kernels(model: FlowMo, tmp: Path) -> None:
    no_card()
    with use("cuda"):
        pass


def not_interpreted(model: FlowMo, tmp: Path) -> None:
    no_card()
    import flowmo_kernels._dispatch as dispatch

    before, dispatch.INTERPRETED = dispatch.INTERPRETED, False
    try:
        raise RuntimeError(why_no_triton())
    finally:
        dispatch.INTERPRETED = before


def wrong_weights(model: FlowMo, tmp: Path) -> None:
    model.save_pretrained(tmp / "model")
    config = tmp / "model" / "config.json"
    config.write_text(re.sub(r'"decoder_depth": \d+', '"decoder_depth": 5', config.read_text()))
    FlowMo.from_pretrained(tmp / "model")


def unsafe(model: FlowMo, tmp: Path) -> None:
    torch.save({"model_ema_state_dict": Path("anything")}, tmp / "unsafe.pth")
    FlowMo.from_pretrained(tmp / "unsafe.pth")


def foreign_tokens(model: FlowMo, tmp: Path) -> None:
    torch.manual_seed(1)
    other = FlowMo(model_config("tiny"))
    grid = grid_for(other, 32, 32)
    file = TokenFile.pack(grid, encode_tiles(other, torch.zeros(3, 32, 32), grid), layout_of(other))
    file.check(model, layout_of(model))


def finished_or_other(model: FlowMo, tmp: Path) -> None:
    short(tmp / "run", "trainer.steps=1").fit()
    short(tmp / "run", "trainer.steps=1", "optim.lr=1e-5")


def finished(model: FlowMo, tmp: Path) -> None:
    said: list[str] = []
    trainer = short(tmp / "run", "trainer.steps=1")
    trainer.fit()
    again = short(tmp / "run", "trainer.steps=1")
    again._say = lambda text, *values: said.append(text % values)  # type: ignore[method-assign]
    again.fit()
    raise ValueError(" ".join(said))


def damaged(model: FlowMo, tmp: Path) -> None:
    path = tmp / "step.pt"
    checkpoint.write({"a": torch.zeros(100)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    checkpoint.read(path)


def not_finite(model: FlowMo, tmp: Path) -> None:
    trainer = short(tmp / "run", "trainer.steps=3", "trainer.max_skipped=1")
    with torch.no_grad():
        trainer.model.decoder.img_in.weight.fill_(torch.nan)
    trainer.fit()


def not_a_picture(model: FlowMo, tmp: Path) -> None:
    (tmp / "a.png").write_bytes(b"nothing")
    load_image(tmp / "a.png")


def compressed(model: FlowMo, tmp: Path) -> None:
    (tmp / "val.tar.gz").write_bytes(b"")
    find_archives(tmp / "val.tar.gz")


def other_samples(model: FlowMo, tmp: Path) -> None:
    for seed in (0, 1):
        SampleFolder(tmp, torch.zeros(2, dtype=torch.int64), 2, 32, {"seed": seed}).begin()


def no_gradio(model: FlowMo, tmp: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.importlib.util, "find_spec", lambda name: None)
        demo.main([])


def port_taken(model: FlowMo, tmp: Path) -> None:
    page = pytest.importorskip("flowmo.demo.page", reason="needs the extra `demo`")
    import socket

    from flowmo.demo.work import Settings, Studio

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        page.serve(Studio(model), Settings(), [], "127.0.0.1", taken.getsockname()[1])


CAUSES: dict[str, Callable[[FlowMo, Path], object]] = {
    "cuda was asked for, but": cuda_kernels,
    "TRITON_INTERPRET=1 was not set before flowmo_kernels was imported": not_interpreted,
    "no such file or folder; expected a released .pth file, a model folder or a run": lambda m, t: (
        FlowMo.from_pretrained(t / "nothing.pth")
    ),
    "not a checkpoint that can be read safely": unsafe,
    "the weights do not fit the model": wrong_weights,
    "vgg16-397923af.pth (sha256 begins 397923af), published by the torchvision project": lambda m, t: load_perceptual(
        "lpips", None
    ),
    "convert uint8 by x / 127.5 - 1": lambda m, t: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
    "scale [0, 255] by x / 127.5 - 1, [0, 1] by 2 x - 1": lambda m, t: m.encode(torch.full((1, 3, 32, 32), 200.0)),
    "bring a photograph to 32 x 32": lambda m, t: m.encode(torch.zeros(1, 3, 48, 32)),
    "as a picture: Pillow knows no such format, or the file is damaged at its start": not_a_picture,
    "a compressed archive cannot be read in place": compressed,
    "made by tokenizer": foreign_tokens,
    "did you mean optim.lr?": lambda m, t: parse(["tiny", "optim.rl=1"]),
    "data.path is not set": lambda m, t: Trainer(parse(["lo", "loss.perceptual=none", f"run={t}/run"])),
    "holds another run": finished_or_other,
    "is finished at step": finished,
    "its bytes do not agree with its checksum": damaged,
    "this PyTorch sees no CUDA device": lambda m, t: (no_card(), short(t / "run", "trainer.device=cuda")),
    "had a loss or gradient that is not finite": not_finite,
    "holds pictures of other settings": other_samples,
    "the demo page needs gradio": no_gradio,
    "cannot listen there": port_taken,
}


def test_the_page_and_this_table_agree():
    quoted = re.findall(r"^> (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert quoted == list(CAUSES)


@pytest.mark.parametrize("message", CAUSES)
def test_the_message_is_said(message, model, tmp_path):
    expected = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImageReadError)
    with pytest.raises(expected, match=re.escape(message)):
        CAUSES[message](model, tmp_path)
