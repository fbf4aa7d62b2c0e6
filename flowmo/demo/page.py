"""The page: three columns (photograph, setting A, setting B), above what goes in, below what comes out."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.data_classes import ImageData
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowmo.cli import EXPECTED
from flowmo.data import to_pil
from flowmo.demo.work import SQUARE, WHOLE, Code, Result, Settings, Studio, strip
from flowmo.solvers import SOLVERS

VISITORS = 20  # whose pictures are kept for the step sliders
KEPT_SECONDS = 3600
WAITING = 16  # visitors in the queue before others are turned away
LARGEST_FILE = "64mb"

# The page's own server and nothing else, whatever a component would like to load.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:"
)

CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important; padding: 28px 24px 40px !important}
.html-container, .html-container .prose {padding: 0 !important; margin: 0 !important}
#head h1 {font-size: 26px; font-weight: 650; letter-spacing: -0.02em; margin: 0}
#head p {margin: 4px 0 0; color: var(--body-text-color-subdued); font-size: 14px}
.prose.section {font-size: 12px; font-weight: 600; letter-spacing: 0.04em; text-transform: uppercase; line-height: 16px;
  color: var(--body-text-color-subdued)}
.prose.figures {font-size: 14px; min-height: 48px; line-height: 1.5; font-variant-numeric: tabular-nums}
.figures b {font-size: 18px; font-weight: 650; letter-spacing: -0.01em}
.figures span {color: var(--body-text-color-subdued)}
#status .prose {min-height: 22px; font-size: 14px; color: var(--body-text-color-subdued)}
#status .fault {color: #b42318; font-weight: 500}
.dark #status .fault {color: #fda29b}
.block.picture:not(:has(img)) {min-height: 230px}
.block.squares:not(:has(img)), .block.strip:not(:has(img)) {min-height: 120px}
.block:is(.picture, .squares, .strip) :is(.image-container, .image-frame, button:has(img)) {width: 100% !important}
.block:is(.picture, .squares, .strip) img {width: 100% !important; height: auto !important; object-fit: fill !important;
  display: block}
.block.squares img {image-rendering: pixelated}
.gallery {flex-wrap: nowrap !important}
.gallery-item, .gallery-item .container {width: 100% !important}
.gallery-item img {width: 100% !important; height: 48px !important; object-fit: cover}
#head {margin-bottom: 8px}
#extent .wrap {flex-wrap: nowrap}
#extent label {flex: 1}
footer {display: none !important}
"""


class Controls(NamedTuple):
    """Of one setting, in the order of Settings."""

    steps: gr.Slider
    rho: gr.Slider
    guidance: gr.Slider
    solver: gr.Dropdown
    seed: gr.Number


class Outputs(NamedTuple):
    """Of one setting."""

    picture: gr.Image
    step: gr.Slider
    figures: gr.HTML
    strip: gr.Image
    result: gr.State


def build(studio: Studio, usual: Settings, examples: list[Path]) -> gr.Blocks:
    """The page of a studio. Setting A is the usual one at first, B the same with a third of the steps."""
    with gr.Blocks(title="FlowMo", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.HTML(f"<h1>FlowMo</h1><p>{html.escape(studio.describe())}</p>", elem_id="head", padding=False)
        with gr.Row():
            with gr.Column(min_width=300):
                heading("Photograph")
                photograph = upload()
                if examples:
                    gr.Examples([[str(path)] for path in examples], photograph, label="Built-in photographs")
            with gr.Column(min_width=300):
                heading("Setting A")
                first = controls("a", usual)
            with gr.Column(min_width=300):
                heading("Setting B")
                second = controls("b", replace(usual, steps=max(1, round(usual.steps / 3))))
        with gr.Row(equal_height=True):
            with gr.Column(min_width=300):
                extent = gr.Radio(
                    [(f"Square of {studio.side}", SQUARE), ("Whole picture", WHOLE)],
                    value=WHOLE if studio.tiled else SQUARE, show_label=False, container=False, elem_id="extent",
                )  # fmt: skip
            with gr.Column(min_width=300):
                compare = gr.Checkbox(True, label="Compare with setting B", container=False, elem_id="compare")
            with gr.Column(min_width=300):
                button = gr.Button("Reconstruct", variant="primary", elem_id="run")
        status = gr.HTML("Choose a photograph and press Reconstruct.", elem_id="status", padding=False)
        with gr.Row():
            with gr.Column(min_width=300):
                heading("Original, as the model sees it")
                original = shown("original")
                figures = gr.HTML("", elem_id="code", elem_classes="figures", padding=False)
                heading("Tokens")
                tokens = shown("tokens", "squares")
            outputs = []
            for name in ("a", "b"):
                with gr.Column(min_width=300):
                    heading(f"Reconstruction {name.upper()}")
                    outputs.append(results(name))

        everything = [status, original, tokens, figures, *outputs[0], *outputs[1]]
        button.click(
            running(studio), [photograph, extent, compare, *first, *second], everything,
            concurrency_id="model", concurrency_limit=1, show_progress_on=[out.picture for out in outputs],
            api_visibility="private",
        )  # fmt: skip
        for out in outputs:
            out.step.input(
                frame, [out.result, out.step], [out.picture, out.figures],
                queue=False, show_progress="hidden", trigger_mode="always_last", api_visibility="private",
            )  # fmt: skip
    return page


def upload() -> gr.Image:
    """A photograph, handed over as the path of the file as it came.

    gr.Image would open it and answer a damaged one without a word; `flowmo.data.load_image` has words.
    """
    picture = gr.Image(
        type="filepath", sources=["upload", "clipboard"], show_label=False, height=250, buttons=[], elem_id="photograph"
    )

    def path_of(payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    picture.preprocess = path_of  # type: ignore[method-assign]
    return picture


def heading(text: str) -> gr.HTML:
    return gr.HTML(text, elem_classes="section", padding=False)


def controls(name: str, default: Settings) -> Controls:
    return Controls(
        slider(1, 50, default.steps, 1, "Steps", f"steps-{name}"),
        slider(0.5, 8, default.rho, 0.5, "Spacing of the steps, ρ (1: even)", f"rho-{name}"),
        slider(1, 4, default.guidance, 0.1, "Guidance (1: none)", f"guidance-{name}"),
        gr.Dropdown(list(SOLVERS), value=default.solver, label="Solver", elem_id=f"solver-{name}"),
        gr.Number(default.seed, precision=0, label="Seed of the noise", elem_id=f"seed-{name}"),
    )


def slider(low: float, high: float, value: float, step: float, label: str, name: str) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, label=label, buttons=[], elem_id=name)


def shown(name: str, kind: str = "picture") -> gr.Image:
    buttons: list[Any] = ["download", "fullscreen"] if kind == "picture" else []
    return gr.Image(format="png", interactive=False, show_label=False, buttons=buttons, elem_id=name, elem_classes=kind)


def results(name: str) -> Outputs:
    picture = shown(f"picture-{name}")
    figures = gr.HTML("", elem_id=f"figures-{name}", elem_classes="figures", padding=False)
    step = gr.Slider(
        1, 2, 1, step=1, label="Shown: after evaluation", buttons=[], interactive=False, elem_id=f"shown-{name}"
    )
    small = shown(f"strip-{name}", "strip")
    return Outputs(picture, step, figures, small, gr.State(None, time_to_live=KEPT_SECONDS))


def running(studio: Studio) -> Callable[..., list[Any]]:
    """What the button does."""

    def run(
        photograph: str | None,
        extent: str,
        compare: bool,
        *values: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio finds it as a default
    ) -> list[Any]:
        fields = len(Settings.__dataclass_fields__)
        try:
            if photograph is None:
                raise ValueError("no photograph yet: upload one, or pick one of the built-in ones")
            settings = [read(values[:fields])] + ([read(values[fields:])] if compare else [])
            progress(0, desc="encoding")
            code = studio.encode(photograph, extent)
            results = []
            for name, setting in zip("AB", settings):
                results.append(studio.decode(code, setting, partial(tell, progress, f"setting {name}")))
        except EXPECTED as error:
            return [say(error), *[gr.skip()] * (3 + 2 * len(Outputs._fields))]
        blank = [None, gr.Slider(interactive=False), "", None, None]
        outputs = [part for result in results for part in present(result)] + ([] if compare else blank)
        width, height = code.source
        seen = f"{code.grid.width} × {code.grid.height}"
        done = f"{width} × {height} pixels, seen as {seen}; encoded in {code.seconds:.2f} s."
        return [done, to_pil(code.original), studio.tokens(code), describe(studio, code), *outputs]

    return run


def tell(progress: gr.Progress, what: str, done: int, total: int) -> None:
    progress((done, total), desc=what)


def read(values: tuple[Any, ...]) -> Settings:
    """Settings from the values of their controls.

    Raises:
        ValueError: an empty field, or a number out of range.
    """
    for name, value in zip(Settings.__dataclass_fields__, values):
        if value is None:
            raise ValueError(f"{name}: no number")
    steps, rho, guidance, solver, seed = values
    if seed < 0:
        raise ValueError(f"seed {seed}: expected 0 or more")
    return Settings(int(steps), float(rho), float(guidance), str(solver), int(seed))


def frame(result: Result | None, number: int) -> list[Any]:
    """Picture and figures after one evaluation."""
    if result is None:
        return [gr.skip(), gr.skip()]
    number = min(max(1, int(number)), len(result.frames))
    return [result.frames[number - 1].pixels, figures_of(result, number)]


def present(result: Result) -> list[Any]:
    """Values for Outputs."""
    count = len(result.frames)
    slider = gr.Slider(minimum=1, maximum=max(2, count), value=count, interactive=count > 1)
    return [result.pixels, slider, figures_of(result, count), strip(result.frames), result]


def figures_of(result: Result, number: int) -> str:
    frame = result.frames[number - 1]
    if number < len(result.frames):
        return (
            f"<b>{frame.psnr:.2f} dB</b> PSNR<br><span>what evaluation {number} of {len(result.frames)} foresees, at "
            f"t = {frame.time:.3f}</span>"
        )
    passes = f"{result.forwards} forward pass{'es' if result.forwards > 1 else ''}"
    return f"<b>{frame.psnr:.2f} dB</b> PSNR<br><span>{passes}, {result.seconds:.2f} s</span>"


def describe(studio: Studio, code: Code) -> str:
    bits = studio.bits(code)
    tiles = f"{code.grid.count} tile{'s' if code.grid.count > 1 else ''}"
    if bits is None:
        return f"<b>{code.codes.numel():,} numbers</b><br><span>{tiles}, no tokens</span>"
    pixels = code.grid.width * code.grid.height
    return f"<b>{bits / pixels:.4f} bits per pixel</b><br><span>{(bits + 7) // 8:,} bytes of tokens, {tiles}</span>"


def say(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "out of memory" in text.lower():
        text = "out of memory; choose the centre instead of the whole picture, or start the demo with --device cpu"
    return f'<span class="fault">{html.escape(text.splitlines()[0])}</span>'


def theme() -> gr.themes.Base:
    """Greys, one blue, and the fonts of the reader's own system."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="gray",
        radius_size="sm",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


class OwnServerOnly:
    """Tells the browser to load from this server alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(studio: Studio, usual: Settings, examples: list[Path], host: str, port: int) -> None:
    """Show the page until the process is interrupted.

    Raises:
        OSError: the port is taken.
    """
    page = build(studio, usual, examples).queue(max_size=WAITING)
    try:
        launch(page, examples, host, port)
    except OSError as error:
        raise OSError(f"--port {port}: cannot listen there on {host}, is another program? Choose another") from error


def launch(page: gr.Blocks, examples: list[Path], host: str, port: int) -> None:
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        theme=theme(),
        css=CSS,
        max_file_size=LARGEST_FILE,
        state_session_capacity=VISITORS,
        allowed_paths=sorted({str(path.parent) for path in examples}),
        app_kwargs={"middleware": [Middleware(OwnServerOnly)]},
    )
