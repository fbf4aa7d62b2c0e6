"""Checkpoints survive damage, full disks and a writer that dies at any moment."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flowmo.training import checkpoint
from tests.processes import environment, run


def state(step: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "w": torch.randn(4096, generator=generator)}


def same(found, step: int) -> bool:
    path, content = found
    return path == checkpoint.path_of(path.parents[1], step) and torch.equal(content["w"], state(step)["w"])


def test_checkpoints_are_kept_by_rule(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, state(step), keep=2, keep_every=2)
    assert [p.stem[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["2", "4", "5"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_0000000{n}.pt" for n in (2, 4, 5)]
    # Plain PyTorch reads them as well, checksum and all.
    assert torch.load(checkpoint.path_of(tmp_path, 5), weights_only=True)["step"] == 5


@pytest.mark.parametrize("damage", ["cut", "cut within the checksum", "one bit", "empty", "other", "no pickle"])
def test_damage_falls_back_loudly(tmp_path, caplog, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=2, keep_every=100)
    path = checkpoint.path_of(tmp_path, 2)
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1  # among the tensor's numbers, where unpickling would notice nothing
    kept = {"cut": data[:-500], "cut within the checksum": data[:-20], "empty": b"", "other": b"no checkpoint " * 50}
    path.write_bytes(kept.get(damage, data))
    if damage == "no pickle":
        path.write_bytes(b"PK" + bytes(500))
    assert same(checkpoint.newest(tmp_path), 1)
    assert "DAMAGED CHECKPOINT" in caplog.text and "step_00000002.pt" in caplog.text


def test_nothing_whole_is_an_error_and_nothing_at_all_is_not(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, state(1), keep=2, keep_every=100)
    checkpoint.path_of(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RuntimeError, match="none of its 1 checkpoints"):
        checkpoint.newest(tmp_path)


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """SIGKILL before the n-th call to the system, for every n that there is; the writer replaces and deletes too."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=2, keep_every=100)
    count = [0]

    def deadly(call):
        def wrapped(*arguments, **options):
            if count[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] -= 1
            return call(*arguments, **options)

        return wrapped

    found = []
    for moment in range(200):
        child = os.fork()
        if child == 0:
            count[0] = moment
            for module, name in ((os, "replace"), (os, "fsync"), (os, "chmod"), (os, "open")):
                setattr(module, name, deadly(getattr(module, name)))
            pathlib.Path.unlink = deadly(pathlib.Path.unlink)  # type: ignore[method-assign]
            checkpoint._DigestingFile.write = deadly(checkpoint._DigestingFile.write)  # type: ignore[method-assign]
            checkpoint.save(tmp_path, 3, state(3), keep=2, keep_every=100)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert all(checkpoint.read(p) for p in checkpoint.list_checkpoints(tmp_path)), "every name is of a whole one"
        newest = checkpoint.newest(tmp_path)
        assert same(newest, 2) or same(newest, 3), f"killed at call {moment}"
        assert not list((tmp_path / "checkpoints").glob(".*")), "scraps are cleared"
        found.append(newest[1]["step"])
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        checkpoint.path_of(tmp_path, 3).unlink(missing_ok=True)
        if not checkpoint.path_of(tmp_path, 1).exists():
            checkpoint.save(tmp_path, 1, state(1), keep=3, keep_every=100)
    assert status == 0, "more calls than tried"
    # It dies before the name is given, between that and the deletion of the old one, and at last not at all.
    assert moment >= 8 and found[0] == 2 and found.count(3) >= 3


@pytest.mark.parametrize("at", [0, 2])
def test_full_disk_is_said_and_leaves_what_was_there(tmp_path, monkeypatch, at):
    checkpoint.save(tmp_path, 1, state(1), keep=2, keep_every=100)
    writes = []

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            writes.append(len(data))
            if len(writes) > at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    digesting = checkpoint._DigestingFile
    monkeypatch.setattr(checkpoint, "_DigestingFile", lambda file: digesting(FullDisk(file)))
    with pytest.raises(OSError, match=r"disk is full .* step_00000001\.pt before it is whole.*same command"):
        checkpoint.save(tmp_path, 2, state(2), keep=2, keep_every=100)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001.pt"]
    assert same(checkpoint.newest(tmp_path), 1)


def test_random_states_return():
    before = checkpoint.random_states()
    first = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_random_states(before)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2] == again[2]


def command(run: Path, steps: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "flowmo.train", "tiny", f"run={run}", f"trainer.steps={steps}", "data.batch=4"),
        *("trainer.precision=fp32", "trainer.threads=1", "trainer.log_every=1", "trainer.save_every=10"),
        *("trainer.sample_every=1000", "trainer.sample_images=1", "sampler.steps=1", *more),
    ]


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_kill_9_and_the_same_command_equal_a_straight_run(tmp_path):
    """40 steps straight; 20 and some, SIGKILL, and the same command again: the same losses and the same state."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(command(straight, 40), cwd=tmp_path)
    process = subprocess.Popen(command(broken, 40), env=environment(), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (found := lines(broken)) or found[-1]["step"] < 24:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = checkpoint.newest(broken)
    assert newest is not None and newest[1]["step"] in (20, 30)
    run(command(broken, 40), cwd=tmp_path)

    measured = ("images_per_second", "seconds_per_step", "peak_memory_gib")
    numbers = [[{k: v for k, v in line.items() if k not in measured} for line in lines(r)] for r in (straight, broken)]
    assert [line["step"] for line in numbers[0]] == list(range(1, 41))
    assert numbers[0] == numbers[1]
    a, b = (checkpoint.read(checkpoint.path_of(r, 40)) for r in (straight, broken))
    for part in ("exp_avg", "exp_avg_sq", "average", "norm"):
        assert all(torch.equal(v, b["optimizer"][part][k]) for k, v in a["optimizer"][part].items()), part
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert a["data"] == b["data"] and a["git_commit"] == b["git_commit"]
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])
