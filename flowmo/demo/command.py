"""A page in the browser that tokenizes photographs and compares settings: python -m flowmo.demo [--checkpoint C]

    python -m flowmo.demo                                      with the small weights that come along
    python -m flowmo.demo --checkpoint flowmo_lo.pth --device cuda
    python -m flowmo.demo --checkpoint runs/lo --port 8000 --max-side 1024

It needs the extra `demo`: pip install -e ".[demo]" -c constraints.txt. The page loads nothing from elsewhere and sends
nothing away; pictures live in a temporary folder that is gone when the command ends. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import tempfile
from pathlib import Path

from flowmo import cli
from flowmo.data import SamplePhotographsMissing, heldout_photographs, save_png
from flowmo.demo.work import Studio, usual
from flowmo.pretrained import shipped_weights
from flowmo.tokenize import open_model


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if not 0 < options.port < 2**16:
        raise ValueError(f"--port {options.port}: expected 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise RuntimeError('the demo page needs gradio: pip install -e ".[demo]" -c constraints.txt')
    logging.getLogger("flowmo.engine").setLevel(logging.WARNING)  # every picture size may make a plan
    logging.getLogger("httpx").setLevel(logging.WARNING)
    model = open_model(options.checkpoint, options.device, "auto")
    studio = Studio(model, options.max_side)
    settings = usual(model, options.checkpoint or shipped_weights("quickstart"))
    with tempfile.TemporaryDirectory(prefix="flowmo-demo-") as folder:
        # Both are read when gradio is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "pictures")
        from flowmo.demo.page import serve

        examples = write_examples(Path(folder))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as by Ctrl-C: the pictures go too
        print(f"model on {model.device}; {cli.kernels()}")
        print(f"open http://{options.host}:{options.port}/ in a browser; Ctrl-C ends the demo", flush=True)
        serve(studio, settings, examples, options.host, options.port)
    return 0


def write_examples(folder: Path) -> list[Path]:
    """The built-in photographs that the shipped weights never saw, as files; none where their packages are absent."""
    try:
        photographs = heldout_photographs()
    except SamplePhotographsMissing as error:
        print(f"no example photographs: {error}")
        return []
    return [save_png(picture, folder / "examples" / f"{name}.png") for name, picture in photographs.items()]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.demo", description=__doc__, formatter_class=cli.Help)
    p.add_argument(
        "--checkpoint", help="released .pth, model folder or run; default: the small weights that come along"
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    p.add_argument("--port", type=int, default=7860, help="of the page")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument(
        "--max-side", type=int, help="longer sides of whole pictures are scaled down to this; default: twice a square's"
    )
    return p
