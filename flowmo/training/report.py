"""One page about a run: python -m flowmo.training.report RUN [--out FILE]

Writes RUN/report.html: settings that differ from the defaults, curves of everything that was logged and of the
held-out measurements, and the sample grids. The file stands alone; no browser or network is needed to write it.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from flowmo import cli
from flowmo.config import Config, from_yaml
from flowmo.files import atomic_write
from flowmo.training import checkpoint
from flowmo.training.heldout import CURVE, read_curve

GRIDS = 6  # of the sample pictures, first and last among them
_WIDTH, _HEIGHT, _LEFT = 420, 150, 62  # of a curve, in pixels

_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1350px}svg{margin:4px}td{padding:1px 12px 1px 0}img{max-width:100%}"
)

Point = tuple[float, float]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flowmo.training.report",
        description=__doc__,
        formatter_class=cli.Help,
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="file to write; by default RUN/report.html")
    options = parser.parse_args(arguments)
    out = options.out or options.run / "report.html"
    page = report(options.run)
    atomic_write(out, lambda name: Path(name).write_text(page))
    print(f"wrote {out}")
    return 0


def report(run: Path) -> str:
    """The page, as HTML.

    Raises:
        FileNotFoundError: no run folder, or nothing was logged in it yet.
    """
    if not (run / "config.yaml").is_file() or not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{run}: no training run with config.yaml and metrics.jsonl; name a run folder")
    config = from_yaml((run / "config.yaml").read_text(), str(run / "config.yaml"))
    records = list(_records(run / "metrics.jsonl"))
    if not records:
        raise FileNotFoundError(f"{run}: nothing is logged yet; trainer.log_every={config.trainer.log_every} steps")
    measured = read_curve(run / CURVE)
    last = records[-1]
    seconds = sum(r["seconds_per_step"] * config.trainer.log_every for r in records if "seconds_per_step" in r)
    facts = {
        "steps": f"{last['step']:,.0f} of {config.trainer.steps:,}",
        "images seen": f"{last['step'] * config.data.batch:,.0f}",
        "time, about": f"{seconds / 3600:.2f} h",
        "steps skipped": f"{last.get('skipped_steps', 0):.0f}",
        "checkpoints": ", ".join(p.stem[5:].lstrip("0") for p in checkpoint.list_checkpoints(run)) or "none",
    }
    best = [r for r in measured if r["best"]]
    if best:
        facts["best held out"] = f"step {best[-1]['step']}: " + _numbers(best[-1])
    parts = [f"<h1>{html.escape(run.name)}: {config.preset}, {config.stage}</h1>", _table(facts)]
    if measured:
        parts += ["<h2>Held out</h2>", *_curves(measured)]
    parts += ["<h2>Training</h2>", *_curves(records)]
    pictures = sorted((run / "samples").glob("step_*.png"))
    if pictures:
        chosen = sorted({round(i * (len(pictures) - 1) / (GRIDS - 1)) for i in range(GRIDS)})
        parts.append("<h2>Samples</h2>")
        parts += [_picture(pictures[i]) for i in chosen]
    parts += ["<h2>Settings that differ from the defaults</h2>", _table(dict(differences(config)))]
    head = f"<meta charset='utf-8'><title>{html.escape(run.name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def differences(config: Config) -> Iterable[tuple[str, str]]:
    """Dotted keys and values that are not the defaults'."""

    def walk(node: Any, default: Any, prefix: str) -> Iterable[tuple[str, str]]:
        for f in fields(node):
            value, usual = getattr(node, f.name), getattr(default, f.name)
            if is_dataclass(value):
                yield from walk(value, usual, f"{prefix}{f.name}.")
            elif value != usual and not (isinstance(usual, tuple) and tuple(value) == usual):
                yield f"{prefix}{f.name}", str(value)

    return walk(config, Config(), "")


def _records(path: Path) -> Iterable[dict[str, float]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # a line cut short by a kill


def _curves(records: Sequence[dict[str, Any]]) -> list[str]:
    names = [k for k in records[-1] if k not in ("step", "best")]
    series = {n: [(float(r["step"]), float(r[n])) for r in records if math.isfinite(r.get(n, math.nan))] for n in names}
    return [curve(name, points) for name, points in series.items() if points]


def curve(name: str, points: Sequence[Point]) -> str:
    """An SVG of one curve, thinned to at most 400 points, with the ends of its axes and its last value."""
    step = max(1, len(points) // 400)
    points = [*points[:-1:step], points[-1]]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    spread, length = (high - low) or 1.0, (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> str:
        right = _LEFT + (x - xs[0]) / length * (_WIDTH - _LEFT - 8)
        return f"{right:.1f},{20 + (high - y) / spread * (_HEIGHT - 42):.1f}"

    def label(x: float, y: float, text: str, anchor: str) -> str:
        return f"<text x='{x}' y='{y}' text-anchor='{anchor}' font-size='11'>{text}</text>"

    line = " ".join(place(x, y) for x, y in points)
    return (
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' font-family='sans-serif'>"
        f"<polyline points='{line}' fill='none' stroke='#2563eb' stroke-width='1.4'/>"
        + label(_LEFT, 13, f"<tspan font-weight='bold'>{html.escape(name)}</tspan> {ys[-1]:.5g}", "start")
        + label(_LEFT - 5, 25, f"{high:.4g}", "end")
        + label(_LEFT - 5, _HEIGHT - 20, f"{low:.4g}", "end")
        + label(_LEFT, _HEIGHT - 5, f"{xs[0]:.0f}", "start")
        + label(_WIDTH - 8, _HEIGHT - 5, f"step {xs[-1]:.0f}", "end")
        + "</svg>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    step = int(path.stem.removeprefix("step_"))
    return f"<p>step {step}<br><img alt='step {step}' src='data:image/png;base64,{data}'></p>"


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _numbers(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("step", "best"))


if __name__ == "__main__":
    cli.run(main)
