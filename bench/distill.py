"""Few-step decoding: what each number of forward passes brings a distilled student, and its teacher as it is.

    python -m bench.distill --student runs/quickstart-distill [--student ANOTHER]

Pictures are the built-in held-out photographs in tiles of the model's size; all decoders start from the same codes and
noise, several draws of it. Two distances to two pictures stand in the table: PSNR and perceptual distance, to the
picture that the teacher makes with its 25 guided steps, and to the original. The teacher takes few steps in two ways:
with the paper's spacing and guidance, and as its student does. A perceptual distance without --lpips is that of an
untrained network (of another seed than training's), which compares edges and textures and has no learned judgement.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.solvers import crops
from bench.timing import ROOT, environment, time_on_card, time_on_cpu
from flowmo import FlowMo
from flowmo.engine import Schedule
from flowmo.metrics import psnr
from flowmo.perceptual import load_lpips, random_lpips
from flowmo.training.distill import TEACHER

PAPER = Schedule()
MEASURES = ("psnr_to_teacher", "perceptual_to_teacher", "psnr_to_original", "perceptual_to_original")


class Decoder(NamedTuple):
    """A line of the table."""

    name: str
    model: FlowMo
    schedule: Schedule


def decoders(teacher: FlowMo, students: dict[str, FlowMo], steps: list[int]) -> list[Decoder]:
    """The teacher with the paper's sampler and with each student's own, and the students."""
    rows = [Decoder("teacher", teacher, PAPER._replace(steps=n)) for n in [*steps, PAPER.steps]]
    own = sorted({(s.sampler.rho, s.sampler.guidance) for s in students.values()})
    rows += [Decoder("teacher", teacher, Schedule(n, rho, guidance)) for rho, guidance in own for n in steps]
    for name, student in students.items():
        rows += [Decoder(name, student, student.sampler._replace(steps=n)) for n in steps]
    seen: dict[tuple[str, Schedule | None], Decoder] = {}
    for row in rows:  # one pass is the same step with any spacing
        seen.setdefault((row.name, row.schedule if row.schedule.forwards > 1 else None), row)
    return list(seen.values())


@torch.no_grad()
def measure(
    rows: list[Decoder],
    teacher: FlowMo,
    images: Tensor,  # [N, 3, S, S] in [-1, 1]
    judge: nn.Module,  # (x, y) -> [N]
    draws: int,
) -> list[dict[str, Tensor]]:  # of each row, the MEASURES of every picture [N], means over the draws of the noise
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in MEASURES} for _ in rows]
    codes = teacher.encode(images)
    for draw in range(draws):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(draw)).to(images.device)
        wanted = teacher.decode(codes, noise=noise, **PAPER._asdict())
        for row, values in zip(rows, found):
            pictures = row.model.decode(codes, noise=noise, **row.schedule._asdict())
            for target, other in (("teacher", wanted), ("original", images)):
                values[f"psnr_to_{target}"].append(psnr(pictures, other))
                values[f"perceptual_to_{target}"].append(judge(pictures, other))
    return [{name: torch.stack(parts).double().mean(0) for name, parts in values.items()} for values in found]


def milliseconds(row: Decoder, batch: int, repeats: int = 9) -> float:
    """Median time of a picture, decoded `batch` at once by a plan."""
    c, device = row.model.config, row.model.device
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(batch, c.latent_tokens, c.latent_channels, generator=random).sign().to(device)
    noise = torch.randn(batch, 3, c.image_size, c.image_size, generator=random).to(device)
    s = row.schedule
    plan = row.model.decode_plan(batch, s.steps, s.rho, s.guidance, s.guidance_interval, dtype=row.model.dtype)
    timer = time_on_card if device.type == "cuda" else time_on_cpu
    return timer(plan, [(codes, noise)], repeats).p50 / batch


def verdicts(rows: list[Decoder], found: list[dict[str, Tensor]]) -> list[str]:
    """For each student and number of steps: where it is better than its teacher, with the standard error."""
    lines = []
    for i, student in enumerate(rows):
        if student.name == "teacher":
            continue
        for j, teacher in enumerate(rows):
            if teacher.name != "teacher" or teacher.schedule.steps != student.schedule.steps:
                continue
            parts = []
            for name in MEASURES:
                gain = found[i][name] - found[j][name]
                if name.startswith("perceptual"):
                    gain = -gain
                mean, error = float(gain.mean()), float(gain.std() / len(gain) ** 0.5)
                if abs(mean) < 5e-4:
                    parts.append(f"{name} the same")
                else:
                    parts.append(f"{name} {'better' if mean > 0 else 'WORSE'} by {abs(mean):.3f} (+- {error:.3f})")
            lines.append(f"{student.name} against {describe(teacher)}: {', '.join(parts)}")
    return lines


def describe(row: Decoder) -> str:
    s = row.schedule
    return f"{row.name}, {s.steps} step{'s' if s.steps > 1 else ''}, rho {s.rho:g}, guidance {s.guidance:g}"


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table for a README."""
    titles = {
        "decoder": "decoder", "steps": "steps", "rho": "rho", "guidance": "guidance", "forwards": "forwards",
        "psnr_to_teacher": "PSNR to the 25-step picture", "perceptual_to_teacher": "perceptual",
        "psnr_to_original": "PSNR to the original", "perceptual_to_original": "perceptual",
        "ms_batch_1": "ms, one picture", "ms_batch_16": "ms a picture of 16",
    }  # fmt: skip
    rows = [titles.values(), ["---"] * len(titles), *([str(line[key]) for key in titles] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, action="append", required=True, help="a run of stage=distill")
    parser.add_argument("--teacher", help="run or model; default: the one in the first student's run folder")
    out = ROOT / "bench" / "results" / "distill.csv"
    parser.add_argument("--out", type=Path, default=out, help="the table; a .md of the same name beside it")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--side", type=int, default=128, help="of the photographs, in pixels; cut into tiles")
    parser.add_argument("--draws", type=int, default=4, help="of the starting noise")
    parser.add_argument("--lpips", help="weights of the VGG-16 of LPIPS; default: an untrained network")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(path: str | Path) -> FlowMo:
        return FlowMo.from_pretrained(path, device=device, dtype=torch.float32)

    teacher = load(options.teacher or options.student[0] / TEACHER)
    students = {path.name: load(path) for path in options.student}
    weights = teacher.encoder.state_dict()
    for name, student in students.items():
        if any(not torch.equal(v, weights[k]) for k, v in student.encoder.state_dict().items()):
            parser.error(f"{name} is no student of this teacher: its encoder is another")
    if options.lpips:
        judge: nn.Module = load_lpips("vgg", options.lpips, options=("--lpips", "--lpips-heads"))
    else:
        judge = random_lpips(seed=1)
    size = teacher.config.image_size
    images = crops(teacher, max(options.side // size, 1) * size).to(device)
    rows = decoders(teacher, students, options.steps)
    found = measure(rows, teacher, images, judge.to(device), options.draws)
    lines = []
    for row, values in zip(rows, found):
        s = row.schedule
        line = {"decoder": row.name, "steps": s.steps, "rho": s.rho, "guidance": s.guidance, "forwards": s.forwards}
        for name in MEASURES:
            line[name] = f"{float(values[name].mean()):.{2 if name.startswith('psnr') else 4}f}"
        for batch in (1, 16):
            line[f"ms_batch_{batch}"] = f"{milliseconds(row, batch):.1f}"
        lines.append(line)
    judged = "LPIPS (VGG-16)" if options.lpips else "an untrained VGG-16"
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    surroundings = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "pictures", "draws", "judge", "command", *surroundings])
        writer.writeheader()
        extra = {"pictures": len(images), "draws": options.draws, "judge": judged, "command": given, **surroundings}
        writer.writerows(line | extra for line in lines)
    table = markdown(lines)
    about = f"{len(images)} held-out tiles of {size} x {size}, {options.draws} draws of noise; perceptual: {judged}."
    judgement = "\n".join(f"- {line}" for line in verdicts(rows, found))
    where = ", ".join(f"{k} {v}" for k, v in surroundings.items() if v not in ("", "None", "none"))
    text = f"`python -m bench.distill {given}`\n\n{about} {where}.\n\n{table}\n{judgement}\n"
    options.out.with_suffix(".md").write_text(text)
    print(text + f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
