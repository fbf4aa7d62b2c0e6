"""Scoring a training run's averaged model each time it is saved, and keeping the best one."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flowmo.evaluation.processes import Processes
from flowmo.files import atomic_write
from flowmo.perceptual.weights import sha256_of
from flowmo.training.checkpoint import list_checkpoints

logger = logging.getLogger("flowmo")

HIGHER_IS_BETTER = ("psnr", "psnr_pooled", "ssim", "ssim_gaussian", "codes_used", "code_entropy")


Result = dict[str, Any]  # "metrics": numbers by name, None for those that JSON does not know; "protocol"


class Candidate(NamedTuple):
    """A model taken out of a run."""

    step: int | None  # of the run's newest checkpoint, None where there is none
    digest: str
    weights: Path  # a copy: the run may replace its own at any time


class Watch:
    """The models of one run, scored one after the other.

    RUN/evaluation/scores.jsonl gets a line for each model, RUN/evaluation/best holds the best one as a model folder.
    A watch that is started again goes on: models in the file are not scored twice.

    Args:
        measure: what decides, a name among the scores.
    """

    def __init__(self, run: Path, measure: str) -> None:
        if not run.is_dir():
            raise FileNotFoundError(f"{run}: no such run folder")
        self.run, self.measure = run, measure
        self.folder = run / "evaluation"
        self.record = self.folder / "scores.jsonl"
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        self.scored = [json.loads(line) for line in lines if line.strip()]

    def next(self) -> Candidate | None:
        """The run's model, copied, if it has not been scored yet."""
        source = self.run / "model" / "model.safetensors"
        if not source.is_file():
            return None
        self.folder.mkdir(exist_ok=True)
        steps = [int(path.stem[5:]) for path in list_checkpoints(self.run)]
        copy = self.folder / "candidate.safetensors"
        # the copy is whole: a run replaces its file in one step, and an open file stays what it was
        atomic_write(copy, lambda name: shutil.copyfile(source, name))
        digest = sha256_of(copy)
        if any(line["sha256"] == digest for line in self.scored):
            return None
        return Candidate(max(steps, default=None), digest, copy)

    def best(self) -> float | None:
        """The best score so far."""
        values = [line["scores"][self.measure] for line in self.scored if line["scores"].get(self.measure) is not None]
        return None if not values else max(values) if self.measure in HIGHER_IS_BETTER else min(values)

    def add(self, candidate: Candidate, result: Result, keep: Callable[[Path, Path], None]) -> bool:
        """Record a model's result; `keep(weights, folder)` writes a model folder, called where it is the best.

        Raises ValueError where the deciding measure is not among the scores.
        """
        scores = result["metrics"]
        value = scores.get(self.measure)
        if value is None or math.isnan(value):
            raise ValueError(f"--best-by {self.measure}: not among the scores {', '.join(scores)}")
        before = self.best()
        better = before is None or (value > before if self.measure in HIGHER_IS_BETTER else value < before)
        if better:
            keep(candidate.weights, self.folder / "best")
        line = {"step": candidate.step, "sha256": candidate.digest, "best": better, "scores": scores}
        line["protocol"] = result["protocol"]
        self.scored.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self.scored)
        atomic_write(self.record, lambda name: Path(name).write_text(text))
        return better


def follow(
    watch: Watch | None,
    processes: Processes,
    score: Callable[[Path], Result],
    keep: Callable[[Path, Path], None],
    *,
    interval: float = 30.0,
    once: bool = False,
) -> None:
    """Score what appears until interrupted; `once`: what is there now.

    Args:
        watch: on the first process; None on the others.
        score: a weights file to its result; called on all processes, its result counts on the first.
        keep: (weights file, folder) writes a model folder; called on the first process.

    Raises:
        FileNotFoundError: `once`, and the run has saved no model yet.
    """
    while True:
        candidate = processes.from_main(watch.next() if watch is not None else None)
        if candidate is not None:
            result = score(candidate.weights)
            if watch is not None:
                better = watch.add(candidate, result, keep)
                where = f"step {candidate.step}" if candidate.step is not None else f"model {candidate.digest[:8]}"
                logger.info(
                    "%s: %s %.4f%s",
                    where,
                    watch.measure,
                    result["metrics"][watch.measure],
                    ", the best so far" if better else "",
                )
            continue
        if once:
            if watch is not None and not watch.scored:
                raise FileNotFoundError(f"{watch.run}/model: the run has saved no model yet")
            return
        time.sleep(interval)
