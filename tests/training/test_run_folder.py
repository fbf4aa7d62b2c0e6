"""What a run leaves and finds in its folder: the log cut at the checkpoint, whose run it is, steps that went wrong."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmo.config import ConfigError, parse
from flowmo.training import report, runfolder
from flowmo.training.log import RunLog
from flowmo.training.session import signals
from flowmo.training.verdict import Told, Verdict


def config(run, *more):
    return parse(["tiny", f"run={run}", "trainer.steps=5", *more])


def test_a_resumed_log_has_every_step_once(tmp_path):
    def log(step: int, *steps: int, loss: float) -> None:
        opened = RunLog(tmp_path, 5, step, config(tmp_path))
        for s in steps:
            opened.metrics(s, {"loss": loss, "images_per_second": 1.0})
        opened.close()

    log(0, 1, 2, 3, 4, 5, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    log(3, 4, 5, loss=2.0)  # from the checkpoint of step 3
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [(r["step"], r["loss"]) for r in records] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == expected


@pytest.fixture
def claimed(tmp_path):
    """The folder of a run with a checkpoint."""
    runfolder.claim(tmp_path, config(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.pt").touch()
    return tmp_path


@pytest.mark.parametrize(
    "changed",
    [
        *("trainer.seed=9", "trainer.precision=bf16", "data.batch=6", "data.path=elsewhere", "model.encoder_depth=3"),
        *("loss.entropy=0.5", "optim.lr=0.5", "heldout.images=3"),
    ],
)
def test_what_decides_a_runs_result_must_stay(claimed, changed):
    with pytest.raises(ConfigError, match=rf"holds another run .*{changed.split('=')[0]}="):
        runfolder.check(claimed, config(claimed, changed))


def test_the_rest_of_a_run_may_change(claimed):
    free = ("trainer.steps=9", "trainer.keep=7", "data.workers=3", "sampler.steps=3", "checkpoint=full")
    runfolder.check(claimed, config(claimed, *free))
    runfolder.check(claimed, config(claimed / "moved"))  # run= itself
    (claimed / "checkpoints" / "step_00000001.pt").unlink()
    runfolder.check(claimed, config(claimed, "data.batch=6"))  # nothing was trained: there is nothing to go on with


@pytest.mark.parametrize(("text", "words"), [("a: [1", "expected ','"), ("trainer:\n  later: 1", "'later' not in")])
def test_a_configuration_that_cannot_be_read_is_named(claimed, text, words):
    (claimed / "config.yaml").write_text(text)
    (claimed / "metrics.jsonl").write_text("{}\n")
    for read in (lambda: runfolder.check(claimed, config(claimed)), lambda: report.report(claimed)):
        with pytest.raises(ConfigError, match=rf"config\.yaml cannot be read: .*{words}.*another version\?$"):
            read()


@pytest.mark.parametrize("total", [1.0, math.nan, math.inf, -math.inf])
def test_a_verdict_tells_what_became_of_a_step(tmp_path, total):
    batch = (torch.ones(2), torch.arange(3))
    verdict = Verdict(4, [batch, torch.zeros(1)], torch.tensor(total), True, 2.5, [torch.tensor(0.5), torch.tensor(3)])
    assert bool(verdict.found_inf) == (total != 1.0) and verdict.found_inf.dtype == torch.float32
    assert verdict.read() == Told(total != 1.0, True, 2.5, [0.5, 3.0])
    for _ in range(2):  # the folder may be there
        verdict.save_batches(tmp_path / "skipped" / "4.pt", {"loss": total})
    saved = torch.load(tmp_path / "skipped" / "4.pt")
    assert saved["step"] == 4 and torch.equal(saved["batches"][0][1], batch[1]) and len(saved["batches"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_and_are_given_back(number):
    before, asked = signal.getsignal(number), []
    with signals(lambda: asked.append(1)):
        signal.raise_signal(number)
    assert asked == [1] and signal.getsignal(number) is before
