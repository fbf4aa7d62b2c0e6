"""Checkpoints survive damage, full disks and a writer that dies at any moment."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from flowmo.data import heldout_photographs
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


# Calls to the system that change what a crash leaves behind, by the names of the functions that make them. Of the many
# writes of a file's bytes, every tenth stands for its neighbours.
CHANGING = {"open", "mkdir", "fsync", "chmod", "replace", "rename", "unlink", "rmdir", "close"}
CHANGING |= {f"BufferedWriter.{name}" for name in ("write", "flush", "close", "__exit__")}


def die_before_call(moment: int) -> None:
    """SIGKILL to this process before its `moment`-th changing call to the system from now on."""
    seen, writes = 0, 0

    def watch(frame: object, event: str, function: object) -> None:
        nonlocal seen, writes
        if event != "c_call" or getattr(function, "__qualname__", "") not in CHANGING:
            return
        if function.__qualname__ == "BufferedWriter.write":  # type: ignore[attr-defined]
            writes += 1
            if writes % 10 != 1:
                return
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.setprofile(watch)


def write_file(run: Path, step: int, keep: int = 2) -> None:
    checkpoint.save(run, step, state(step), keep=keep, keep_every=100)


def write_shards(run: Path, step: int, keep: int = 2) -> None:
    model = {"w": state(step)["w"]}
    whole = {"step": step, "model": model, "optimizer": {"step": step, "exp_avg": dict(model)}}
    checkpoint.save_sharded(run, step, whole, keep=keep, keep_every=100, first=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("save", [write_file, write_shards])
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, save):
    """SIGKILL before the n-th call to the system, for every n that there is; the writer replaces and deletes too.

    All names are of whole checkpoints at every moment, the newest is one of the last two, and scraps are cleared.
    """
    save(tmp_path, 1)
    save(tmp_path, 2)
    found: list[int] = []
    status = -1
    while status != 0:
        child = os.fork()
        if child == 0:
            die_before_call(len(found))
            save(tmp_path, 3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        for path in checkpoint.list_checkpoints(tmp_path):
            whole = checkpoint.read(path)
            weights = whole["w"] if save is write_file else whole["model"]["w"]
            assert torch.equal(weights, state(int(path.stem[-1]))["w"]), f"killed at call {len(found)}"
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        assert not list((tmp_path / "checkpoints").glob(".*")), "scraps are cleared"
        found.append(newest[1]["step"])
        three = checkpoint.path_of(tmp_path, 3)
        three.unlink(missing_ok=True)
        shutil.rmtree(three.with_suffix(""), ignore_errors=True)
        if [p.stem[-1] for p in checkpoint.list_checkpoints(tmp_path)] != ["1", "2"]:
            save(tmp_path, 1, keep=3)
        assert [p.stem[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["1", "2"]
    # It dies before the name is given, then between that and the deletion of the old one, and at last not at all.
    assert set(found) == {2, 3} and found == sorted(found) and found.count(3) >= 3
    assert len(found) >= (15 if save is write_file else 30), "calls were not seen"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_full_disk_of_a_sharded_checkpoint_is_said_and_leaves_what_was_there(tmp_path, monkeypatch):
    write_shards(tmp_path, 1)

    @contextlib.contextmanager
    def full(self, path, mode):
        with open("/dev/full", mode) as stream:
            yield stream

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(OSError, match=r"disk is full .* step_00000001 before it is whole.*same command") as raised:
            write_shards(tmp_path, 2)
    assert raised.value.errno == errno.ENOSPC
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest[1]["step"] == 1
    for _ in range(2):  # a step that is saved again takes the place of what was there
        write_shards(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert checkpoint.read(checkpoint.path_of(tmp_path, 2).with_suffix(""))["step"] == 2


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
def test_a_job_told_to_end_saves_although_its_workers_are_told_too(tmp_path):
    """Schedulers signal every process of a job; worker processes that die of it would take the training along."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name, picture in heldout_photographs().items():
        picture.resize((48, 48)).save(photographs / f"{name}.png")
    more = (f"data.path={photographs}", "data.workers=2")
    process = subprocess.Popen(
        command(tmp_path / "run", 100_000, *more), env=environment(), cwd=tmp_path, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(lines(tmp_path / "run")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    newest = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest[1]["step"] == lines(tmp_path / "run")[-1]["step"]


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
