"""The demo page in a real browser. Neither the page nor its server may reach anything but this machine."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowmo import FlowMo
from flowmo.data import center_crop, heldout_photographs, resize_shorter, to_tensor
from flowmo.metrics import psnr
from flowmo.pretrained import shipped_weights
from flowmo.tiles import reconstruct_blended

gradio = pytest.importorskip("gradio", reason="the demo page needs the extra `demo`")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and none is on the PATH")

ROOT = Path(__file__).parents[2]
WAIT = 60_000  # milliseconds that a loaded machine may need

# The command itself, with every attempt to reach another machine refused and told.
GUARDED = """
import runpy, socket, sys
connect, look_up = socket.socket.connect, socket.getaddrinfo
HERE = ("127.0.0.1", "localhost", "::1", "0.0.0.0", None, "")
def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
        print("LEFT FOR", address, flush=True)
        raise OSError("refused by the test")
    return connect(self, address)
def guarded_look_up(host, *rest, **options):
    if host not in HERE:
        print("LOOKED UP", host, flush=True)
        raise socket.gaierror("refused by the test")
    return look_up(host, *rest, **options)
socket.socket.connect, socket.getaddrinfo = guarded, guarded_look_up
runpy.run_module("flowmo.demo", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path, Path]]:
    """Address of a running demo, its log, and the folder that it keeps pictures in."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TMPDIR": str(folder)}
    environment.update(OMP_NUM_THREADS="1", no_proxy="*", PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TRITON_INTERPRET", None)
    log = folder / "log"
    with open(log, "w") as out:
        arguments = [sys.executable, "-c", GUARDED, "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + WAIT / 1000
        while True:
            try:
                urllib.request.urlopen(address, timeout=10).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address, log, folder
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert not list(folder.glob("flowmo-demo-*")), "pictures stayed after the demo ended"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield opened
        opened.close()


class Visitor:
    """One page, what it asked for and from whom."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.page = browser.new_page(viewport={"width": 1280, "height": 1240})
        self.page.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.goto(address)
        self.page.wait_for_selector("#run")

    def choose(self, name: str) -> None:
        """The square in the middle of a built-in photograph."""
        self.page.locator(f".gallery-item:has(img[src*='{name}.png'])").click()
        self.page.wait_for_selector(f"#photograph img[src*='{name}.png']")
        self.page.locator("#extent label").first.click()

    def set(self, name: str, value: float) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def picture(self, name: str) -> np.ndarray:
        """Pixels of a picture as the server sent it, [H, W, 3]."""
        source = self.page.locator(f"#{name} img").get_attribute("src")
        with Image.open(io.BytesIO(self.page.request.get(source).body())) as picture:
            return np.asarray(picture.convert("RGB"))

    def wait_for(self, name: str, words: str) -> None:
        expect = playwright.expect
        expect(self.page.locator(f"#{name}")).to_contain_text(re.compile(words), timeout=WAIT)

    def run(self) -> None:
        """Press the button and wait until other results are there than before."""
        before = [self.page.locator(f"#{name} img").get_attribute("src") for name in ("picture-a",) if self.has(name)]
        self.page.locator("#run").click()
        old = before[0] if before else ""
        self.page.wait_for_function(
            "old => { const i = document.querySelector('#picture-a img'); return i && i.complete && i.src !== old }",
            arg=old,
        )

    def has(self, name: str) -> bool:
        return self.page.locator(f"#{name} img").count() > 0


def decibels(text: str) -> float:
    found = re.search(r"([\d.]+) dB", text)
    assert found, text
    return float(found[1])


def test_the_page(server, browser, tmp_path):
    """One test, so that several test processes do not start several servers."""
    address, log, _ = server
    visitor = Visitor(browser, address)
    one_visit(visitor, tmp_path)
    two_visitors_get_their_own_pictures(visitor, browser)
    nothing_left_the_machine(visitor, log)


def one_visit(visitor: Visitor, tmp_path: Path) -> None:
    """A mistake, an example, a run; other settings, another run; the steps; then only one setting."""
    page = visitor.page
    page.locator("#run").click()
    visitor.wait_for("status", "no photograph yet")
    assert not visitor.has("picture-a")

    damaged = tmp_path / "holiday.png"
    damaged.write_bytes(b"no picture at all")
    page.locator("#photograph input[type=file]").set_input_files(damaged)
    page.wait_for_selector("#photograph img")
    page.locator("#run").click()
    visitor.wait_for("status", r"cannot read holiday\.png as a picture")
    visitor.choose("coffee")
    visitor.set("steps-a", 3)
    visitor.set("steps-b", 2)
    visitor.run()
    visitor.wait_for("status", "600 × 400 pixels, seen as 128 × 128")
    assert "0.2812 bits per pixel" in visitor.text("code") and "576 bytes of tokens, 16 tiles" in visitor.text("code")

    # What the page says is what the library computes.
    weights = shipped_weights("quickstart")
    assert weights is not None
    model = FlowMo.from_pretrained(weights, dtype=torch.float32)
    image = to_tensor(center_crop(resize_shorter(heldout_photographs()["coffee"], 128), 128))
    for name, steps in (("a", 3), ("b", 2)):
        expected = reconstruct_blended(model, [image], overlap=0, steps=steps)[0]
        score = float(psnr(expected[None], image[None]))
        assert decibels(visitor.text(f"figures-{name}")) == pytest.approx(score, abs=0.011)  # two decimals
        levels = (expected + 1).mul(127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(visitor.picture(f"picture-{name}") - levels).max() <= 1
    assert np.abs(visitor.picture("original") - (image + 1).mul(127.5).round().permute(1, 2, 0).numpy()).max() == 0
    assert visitor.has("tokens") and visitor.has("strip-a") and visitor.has("strip-b")

    # The picture after another step.
    last, said = visitor.picture("picture-a"), visitor.text("figures-a")
    visitor.set("shown-a", 1)
    visitor.wait_for("figures-a", "evaluation 1 of 3")
    first = visitor.picture("picture-a")
    assert np.abs(first.astype(int) - last).mean() > 1
    first_score = psnr(
        *(torch.from_numpy(p.copy()).permute(2, 0, 1)[None] for p in (first, visitor.picture("original")))
    )
    assert decibels(visitor.text("figures-a")) == pytest.approx(float(first_score), abs=0.006)
    visitor.set("shown-a", 3)
    visitor.wait_for("figures-a", "forward passes")
    assert np.array_equal(visitor.picture("picture-a"), last) and visitor.text("figures-a") == said

    # Other settings give other pictures; without the comparison there is one.
    second = visitor.picture("picture-b")
    visitor.set("steps-a", 5)
    page.locator("#seed-b input").fill("7")
    page.locator("#seed-b input").press("Tab")
    visitor.run()
    assert np.abs(visitor.picture("picture-a").astype(int) - last).mean() > 0.5
    assert np.abs(visitor.picture("picture-b").astype(int) - second).mean() > 0.5
    page.locator("#compare input").uncheck()
    visitor.set("steps-a", 1)
    visitor.run()
    page.wait_for_function("() => !document.querySelector('#picture-b img')")
    assert visitor.text("figures-b").strip() == ""


def two_visitors_get_their_own_pictures(visitor: Visitor, browser: Any) -> None:
    other = Visitor(browser, visitor.address)
    visits = ((visitor, "china"), (other, "rocket"))
    for someone, name in visits:
        someone.choose(name)
        someone.set("steps-a", 4)
        someone.set("steps-b", 1)
    visitor.page.locator("#run").click()
    other.run()
    visitor.wait_for("status", "640 × 427 pixels")
    for someone, name in visits:
        square = center_crop(resize_shorter(heldout_photographs()[name], 128), 128)
        assert np.array_equal(someone.picture("original"), np.asarray(square))
    other.page.close()


def nothing_left_the_machine(visitor: Visitor, log: Path) -> None:
    outside = [url for url in visitor.requests if not url.startswith((visitor.address, "data:", "blob:"))]
    assert len(visitor.requests) > 20 and not outside
    assert "LEFT FOR" not in log.read_text() and "LOOKED UP" not in log.read_text(), log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not [fault for fault in visitor.faults], visitor.faults
    policy = urllib.request.urlopen(visitor.address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
