"""bench/results/*.csv to bench/REPORT.md and PNG plots; only measured rows, each with its machine and commit.

    python -m bench.report [--results bench/results] [--out bench/REPORT.md]

Plots: speed-up of decoding, decode time against batch, time by component, roofline of the ops, solvers. A plot whose
rows were not measured is not drawn; without matplotlib there are tables only.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.timing import ROOT

Rows = list[dict[str, str]]

# Columns of each table, in order; what a file has besides is the same in all its rows and stands above the table.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "model": (
        "Model: block, forward, decode, encode, training step",
        ("task", "model", "batch", "provider", "dtype", "status", "ms_min", "ms_p20", "ms_p50", "ms_p80",
         "images_per_s", "forwards", "tflop_per_s", "gb_per_s", "percent_of_roofline", "speedup_published",
         "speedup_published_bf16", "psnr_to_exact", "peak_gib", "load"),
    ),
    "first": (
        "Attention and matrix products",
        ("kind", "name", "shape", "status", "ms_p20", "ms_p50", "ms_p80", "tflop_per_s", "percent_of_peak"),
    ),
    "components": (
        "Time by component, under the profiler, which slows short operations",
        ("task", "model", "batch", "provider", "component", "ms", "percent"),
    ),
    "solvers": (
        "Solvers: PSNR in dB against forward passes",
        ("solver", "steps", "tail_merge", "cached_steps", "cached_blocks", "fp8", "attention", "guidance", "forwards",
         "psnr_to_converged", "psnr_to_exact", "psnr_to_original"),
    ),
    "ops": (
        "Ops",
        ("op", "pass", "shape", "provider", "status", "error", "ms_p20", "ms_p50", "ms_p80", "gb_per_s", "tflop_per_s",
         "bound", "percent_of_peak", "extra_mb"),
    ),
}  # fmt: skip


def read(folder: Path) -> dict[str, Rows]:
    """Rows of each table: NAME.csv, and NAME-*.csv of the parts that were run by themselves."""
    found: dict[str, Rows] = {}
    for name in TABLES:
        for path in (folder / f"{name}.csv", *sorted(folder.glob(f"{name}-*.csv"))):
            if path.exists():
                with path.open(newline="") as file:
                    found.setdefault(name, []).extend(csv.DictReader(file))
    return {name: rows for name, rows in found.items() if rows}


def table(columns: tuple[str, ...], rows: Rows) -> str:
    """Markdown, without the columns that no row fills."""
    kept = [c for c in columns if any(r.get(c) for r in rows)]
    lines = ["| " + " | ".join(kept) + " |", "|" + "---|" * len(kept)]
    return "\n".join(lines + ["| " + " | ".join(r.get(c) or "" for c in kept) + " |" for r in rows])


def machine(rows: Rows) -> str:
    """Card, versions and commits that the rows carry; more than one of a kind is listed, not hidden."""
    words = []
    for name in (
        "card",
        "driver",
        "torch",
        "cuda",
        "triton",
        "commit",
        "peak_copy_gb_per_s",
        "peak_matmul_tflop_per_s",
        "note",
    ):
        values = sorted({r[name] for r in rows if r.get(name)})
        if values:
            words.append(f"{name.replace('_', ' ')} {', '.join(values)}")
    return "; ".join(words)


def machines(rows: Rows) -> list[str]:
    return sorted({r["card"] for r in rows if r.get("card")})


def on_which(rows: Rows) -> Callable[[dict[str, str]], str]:
    """What to add to the label of a row: its machine, where the rows come from more than one."""
    several = len(machines(rows)) > 1
    return lambda row: f", {row['card']}" if several else ""


def number(row: dict[str, str], column: str) -> float:
    return float(row[column])


def plot_speedup(axes: Any, results: dict[str, Rows]) -> bool:
    rows = [r for r in results.get("model", []) if r["task"] == "decode" and r.get("speedup_published")]
    where = on_which(rows)
    for r in rows:
        axes.barh(f"{r['model']}, {r['provider']}, batch {r['batch']}{where(r)}", number(r, "speedup_published"))
    axes.set_xlabel(f"times as fast as the published execution ({', '.join(machines(rows))})")
    axes.invert_yaxis()
    return bool(rows)


def plot_batches(axes: Any, results: dict[str, Rows]) -> bool:
    rows = [r for r in results.get("model", []) if r["task"] == "decode" and r["status"] == "ok"]
    where = on_which(rows)
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in rows:
        label = f"{r['model']}, {r['provider']}{where(r)}"
        lines.setdefault(label, []).append((int(r["batch"]), 1e3 / number(r, "images_per_s")))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("decode, ms an image")
    return len({r["batch"] for r in rows}) > 1


def plot_components(axes: Any, results: dict[str, Rows]) -> bool:
    rows = results.get("components", [])
    where = on_which(rows)
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["component"] for r in rows))}
    ends: dict[str, float] = {}
    unlabelled = set(colours)
    for r in rows:
        bar = f"{r['model']}, {r['provider']}, batch {r['batch']}{where(r)}"
        name, left = r["component"], ends.get(bar, 0.0)
        label = name if name in unlabelled else None
        axes.barh(bar, number(r, "ms"), left=left, color=colours[name], label=label)
        unlabelled.discard(name)
        ends[bar] = left + number(r, "ms")
    axes.set_xlabel("ms")
    return bool(rows)


def plot_roofline(axes: Any, results: dict[str, Rows]) -> bool:
    rows = [r for r in results.get("ops", []) if r["status"] == "ok" and number(r, "tflop_per_s") > 0]
    if not rows:
        return False
    copy, product = number(rows[0], "peak_copy_gb_per_s"), number(rows[0], "peak_matmul_tflop_per_s")
    reach = [0.1, 1e3 * product / copy, 1e5]
    axes.plot(reach, [min(product, x * copy / 1e3) for x in reach], color="black", label="measured copy and product")
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = [r for r in rows if r["provider"] == provider and number(r, "gb_per_s") > 0]
        x = [1e3 * number(r, "tflop_per_s") / number(r, "gb_per_s") for r in mine]
        axes.scatter(x, [number(r, "tflop_per_s") for r in mine], s=12, label=provider)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("TFLOP/s")
    return True


def plot_solvers(axes: Any, results: dict[str, Rows]) -> bool:
    rows = [r for r in results.get("solvers", []) if r["psnr_to_converged"] != "inf"]
    for solver in dict.fromkeys(r["solver"] for r in rows):
        for guidance in dict.fromkeys(r["guidance"] for r in rows):
            mine = [r for r in rows if (r["solver"], r["guidance"]) == (solver, guidance)]
            chosen = [r for r in mine if not any(r.get(c) for c in ("tail_merge", "cached_steps", "fp8", "attention"))]
            points = [(float(r["forwards"]), number(r, "psnr_to_converged")) for r in chosen]
            if points:
                axes.plot(*zip(*points), marker="o", label=f"{solver}, guidance {guidance}")
    axes.set_xlabel("forward passes")
    axes.set_ylabel("PSNR to converged, dB")
    return bool(rows)


PLOTS: dict[str, tuple[str, Callable[[Any, dict[str, Rows]], bool]]] = {
    "speedup": ("Speed-up of decoding", plot_speedup),
    "batch": ("Decode time against batch", plot_batches),
    "components": ("Time by component, under the profiler", plot_components),
    "roofline": ("Roofline", plot_roofline),
    "solvers": ("Solvers", plot_solvers),
}


def draw(results: dict[str, Rows], folder: Path) -> list[tuple[str, Path]]:
    """Title and file of every plot that has rows."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: tables only (pip install 'flowmo[bench]')")
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, (title, plot) in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        if plot(axes, results):
            path = folder / f"{name}.png"
            axes.set_title(title)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7)
            figure.savefig(path, dpi=120)
            drawn.append((title, path))
        pyplot.close(figure)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "REPORT.md")
    options = parser.parse_args(arguments)
    results = read(options.results)
    if not results:
        print(f"{options.results} has none of {', '.join(f'{n}.csv' for n in TABLES)}: run the benches first")
        return 2
    parts = ["# Measured", "", "Rendered by `python -m bench.report` from the CSV files; nothing here is an estimate."]
    for name, rows in results.items():
        title, columns = TABLES[name]
        shown = columns if len(machines(rows)) < 2 else (*columns, "card")
        parts += ["", f"## {title}", "", machine(rows), "", table(shown, rows)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plots = draw(results, options.out.parent)
    if plots:
        parts += ["", "## Plots"]
        parts += [line for title, path in plots for line in ("", f"![{title}]({path.name})")]
    options.out.write_text("\n".join(parts) + "\n")
    print(f"wrote {options.out} and {len(plots)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
