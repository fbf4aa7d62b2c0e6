"""Two processes over gloo train as one, resume bit for bit after SIGKILL, and go on as one process."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from flowmo import FlowMo
from flowmo.config import ConfigError, parse
from flowmo.data import heldout_photographs
from flowmo.training import checkpoint, distributed
from flowmo.training.loop import Trainer
from tests.processes import together
from tests.training.test_posttrain import Distance

MEASURED = ("images_per_second", "seconds_per_step", "peak_memory_gib")

# With Adam's usual eps a gradient's sign decides, also where it is all rounding; with this one the step is smooth.
SMOOTH = "optim.eps=1e-2"


def arguments(run: Path, steps: int, accumulate: int, *more: str) -> list[str]:
    return [
        *("tiny", f"run={run}", f"trainer.steps={steps}", f"trainer.accumulate={accumulate}", "trainer.log_every=1"),
        *("trainer.precision=fp32", "trainer.threads=1", "trainer.save_every=3", "trainer.sample_images=1"),
        *("sampler.steps=1", "optim.freeze_encoder_at=4", SMOOTH, *more),
    ]


TRAIN_ALL = "import json, sys; from flowmo.train import main; [main(a) for a in json.loads(sys.argv[1])]"

# Both processes are killed in the last of the runs, 24 steps into it.
KILLED = """
import json, os, signal, sys
from flowmo.train import main
from flowmo.training.loop import Trainer
*runs, last = json.loads(sys.argv[1])
for run in runs:
    main(run)
train_step = Trainer.train_step
def dying(self):
    if self.step == 24:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self)
Trainer.train_step = dying
main(last)
"""

# Then a run in which the second process alone is asked to stop, which the same command finishes, and one in which the
# second process alone meets numbers that are not finite.
STOPPED = """
import json, math, os, signal, sys
from flowmo.config import parse
from flowmo.train import main
from flowmo.training.distributed import join
from flowmo.training.loop import Trainer

second = join().rank == 1
*runs, stopped, poisoned = json.loads(sys.argv[1])
for run in runs:
    main(run)
train_step = Trainer.train_step

def asked(self):
    if second and self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(self)

Trainer.train_step = asked
trainer = Trainer(parse(stopped))
trainer.fit()
assert trainer.step in (3, 4), trainer.step
Trainer.train_step = train_step
main(stopped)

trainer = Trainer(parse(poisoned))
loss = trainer.stage.loss

def bad(*given, **options):
    out = loss(*given, **options)
    return {**out, "total": out["total"] * math.nan} if second and trainer.step >= 2 else out

trainer.stage.loss = bad
try:
    trainer.fit()
except FloatingPointError as error:
    print("given up:", error)
"""

ENTROPY = """
import sys, torch, torch.distributed as dist
from flowmo import FlowMo
from flowmo.training.distributed import gather_rows, join, mean, sum_, from_first
me = join()
torch.manual_seed(0)
model = FlowMo("tiny")
images = torch.rand(4, 3, 32, 32) * 2 - 1
latent = model.latent(images[2 * me.rank : 2 * me.rank + 2])
entropy = model.quantize(gather_rows(latent)).codebook_entropy
entropy.backward()
gradient = model.encoder.img_in.weight.grad
dist.all_reduce(gradient)
assert mean({"rank": float(me.rank)}) == {"rank": 0.5}
assert from_first(me.rank) == 0 and me.world == 2 and me.first == (me.rank == 0)
if me.first:
    torch.save({"entropy": entropy.detach(), "gradient": gradient / 2}, sys.argv[1])
dist.destroy_process_group()
"""


def lines(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = checkpoint.path_of(run, step)
    saved = checkpoint.read(path if path.exists() else path.with_suffix(""))
    flat = {f"model.{k}": v for k, v in saved["model"].items()}
    for part in ("exp_avg", "exp_avg_sq", "average"):
        flat |= {f"{part}.{k}": v for k, v in saved["optimizer"][part].items()}
    return flat


def alone(run: Path, steps: int, accumulate: int, *more: str) -> Trainer:
    trainer = Trainer(parse(arguments(run, steps, accumulate, *more)))
    trainer.fit()
    return trainer


def close(a: Path, b: Path, step: int) -> None:
    """To rounding: gradients differ by a few units in their last place, which Adam passes on at most 1 / eps times."""
    first, second = state(a, step), state(b, step)
    assert first.keys() == second.keys()
    for key in first:
        scale = float(first[key].abs().max()) + 1e-12
        assert float((first[key] - second[key]).abs().max()) < 2e-5 * scale, key
    for one, other in zip(lines(a), lines(b)):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key] == pytest.approx(other[key], rel=2e-4, abs=2e-6), (key, one["step"])


def only(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run that ends with the checkpoint of `step`."""
    shutil.copytree(run, copy)
    for path in checkpoint.list_checkpoints(copy):
        if path.stem != f"step_{step:08d}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


@pytest.fixture
def photographs(tmp_path: Path) -> str:
    """Photographs as files, 64 pixels high; the option that trains on them."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, picture in heldout_photographs().items():
        picture.resize((64 * picture.width // picture.height, 64)).save(folder / f"{name}.png")
    return f"data.path={folder}"


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_from_each_others_checkpoints(tmp_path: Path, photographs: str) -> None:
    """2 x 2 micro-batches against 4, past the freeze of the encoder: the same global batches, to rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone(one, 7, 4, photographs)
    from_one = only(one, 3, tmp_path / "from_one")
    stopped, poisoned = tmp_path / "stopped", tmp_path / "poisoned"
    given = [arguments(run, 7, 2, photographs) for run in (two, from_one, stopped)]
    given.append(arguments(poisoned, 7, 2, photographs, "trainer.max_skipped=2"))
    printed = together(STOPPED, json.dumps(given))
    close(one, two, 7)
    a, b = state(two, 7), state(stopped, 7)
    assert all(torch.equal(v, b[k]) for k, v in a.items()), "both processes stopped after the same step"
    assert lines(two) == lines(stopped)
    assert all("given up: 2 steps in a row, up to step 4" in text for text in printed)
    assert sorted(p.name for p in (poisoned / "nonfinite").iterdir()) == [
        f"step_00000004_rank_{r}.pt" for r in range(2)
    ]
    close(one, from_one, 7)
    assert len(lines(two)) == 7, "one process writes"
    from_two = only(two, 3, tmp_path / "from_two")
    alone(from_two, 7, 4, photographs)
    close(two, from_two, 7)


@pytest.mark.slow
def test_two_processes_survive_kill_9_bit_for_bit(tmp_path: Path, photographs: str) -> None:
    """40 steps straight equal 20, SIGKILL within the next ten, and 20 more, the encoder freezing on the way."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    more = ["trainer.save_every=10", "trainer.sample_every=100", "optim.freeze_encoder_at=25", photographs]
    given = [arguments(run, 40, 2, *more) for run in (straight, broken)]
    together(KILLED, json.dumps(given), exit_codes=(-signal.SIGKILL, -signal.SIGKILL))
    assert [p.stem[-2:] for p in checkpoint.list_checkpoints(broken)] == ["10", "20"]
    assert len(lines(straight)) == 40 and len(lines(broken)) == 24
    together(TRAIN_ALL, json.dumps(given[1:]))
    assert lines(straight) == lines(broken)
    a, b = (checkpoint.read(checkpoint.path_of(run, 40)) for run in (straight, broken))
    for part in ("exp_avg", "exp_avg_sq", "average", "norm"):
        assert all(torch.equal(v, b["optimizer"][part][k]) for k, v in a["optimizer"][part].items()), part
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert a["data"] == b["data"] and torch.equal(a["random"]["torch"], b["random"]["torch"])


TAKES_THE_PORT = """
import errno, os, socket, sys
try:
    socket.create_server(("", int(os.environ["MASTER_PORT"])))
except OSError as error:
    print("rank", os.environ["RANK"], errno.errorcode[error.errno])
sys.exit(int(sys.argv[1]))
"""


def test_nobody_can_take_the_rendezvous_and_a_failure_shows_all_that_was_printed() -> None:
    """A port that is picked and not yet bound can be taken by any other connection, in a parallel suite by a test's."""
    assert together(TAKES_THE_PORT, "0") == ["rank 0 EADDRINUSE\n", "rank 1 EADDRINUSE\n"]
    with pytest.raises(AssertionError, match=r"with 3:\nrank 0 EADDRINUSE\n\nprocess 1 exited with 3:\nrank 1 EADDR"):
        together(TAKES_THE_PORT, "3")


WAITING = """
import time, torch.distributed as dist
from datetime import timedelta
from flowmo.training import distributed
me = distributed.join()
dist.barrier()
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
for wait in (distributed.barrier, lambda: distributed.from_first(me.rank)):
    if me.first:
        time.sleep(1.5)
    wait()
"""


def test_the_first_process_may_take_its_time() -> None:
    """To measure held-out pictures, say: longer than PyTorch lets processes wait for each other."""
    together(WAITING)


LEAVES_NO_THREAD = """
import atexit, os
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from flowmo.training import distributed, loop  # imported when there is a group, PyTorch's own functions would hold it

def serving():
    return sum((t / "comm").read_text().startswith("pt_gloo") for t in Path("/proc/self/task").iterdir())

atexit.register(lambda: print("serving at the end:", serving()))  # runs after what join registers
distributed.join()
model = DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
model.cycle = model
del model
distributed.barrier()
print("serving:", serving())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_no_thread_of_gloo_outlives_the_run() -> None:
    """One that asks for Python's lock when Python has begun to end aborts the process, now and then, under load."""
    for printed in together(LEAVES_NO_THREAD):
        assert re.search(r"^serving: [1-9]", printed, re.M) and "serving at the end: 0\n" in printed


def test_entropy_over_all_processes_and_its_gradient(tmp_path):
    together(ENTROPY, str(tmp_path / "out.pt"))
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.manual_seed(0)
    model = FlowMo("tiny")
    entropy = model.quantize(model.latent(torch.rand(4, 3, 32, 32) * 2 - 1)).codebook_entropy
    entropy.backward()
    torch.testing.assert_close(found["entropy"], entropy.detach())
    torch.testing.assert_close(found["gradient"], model.encoder.img_in.weight.grad, rtol=1e-3, atol=1e-7)


def test_batches_that_do_not_divide_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "join", lambda: distributed.Processes(0, 3, 0))
    with pytest.raises(ConfigError, match=r"data\.batch=8 does not divide among 3 processes"):
        Trainer(parse(["tiny", f"run={tmp_path}"]))


SHARDED = """
import json, os, signal, sys
from torch.distributed.checkpoint.filesystem import FileSystem
from flowmo.config import parse
from flowmo.train import main
from flowmo.training.distributed import join
from flowmo.training.loop import Trainer
from tests.training.test_posttrain import Distance

second = join().rank == 1
*pretrain, posttrain, last = json.loads(sys.argv[1])
for run in pretrain:
    main(run)
trainer = Trainer(parse(posttrain))
trainer.stage.resnet = Distance()
trainer.fit()

create_stream = FileSystem.create_stream

def full(self, path, mode):
    return create_stream(self, "/dev/full" if mode == "wb" else path, mode)

def deadly(self, path, mode):
    if mode == "wb":
        os.kill(os.getpid(), signal.SIGKILL)
    return create_stream(self, path, mode)

if second:
    FileSystem.create_stream = full
try:
    main(last)
except OSError as error:
    assert "disk is full" in str(error) and "step_00000004 before it is whole" in str(error), error
    print("both processes know")
else:
    raise AssertionError("saved")
if second:
    FileSystem.create_stream = deadly
main(last)
"""


@pytest.mark.slow
def test_sharded_training_equals_whole_and_checkpoints_go_both_ways(tmp_path: Path) -> None:
    """FSDP2 with two gloo ranks: the same training, shards that one process loads, and a file that two ranks load.

    On the way, the second rank's disk fills up, and it is killed, in the midst of its part of the checkpoint of step 6.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    by_row, by_row_two = tmp_path / "by_row", tmp_path / "by_row_two"
    rows = ["optim.hold_norms=channel", "optim.ema_every=2"]
    alone(one, 7, 4)
    alone(by_row, 7, 4, *rows)
    chain = ["stage=posttrain", f"init={one}", "posttrain.resnet=none", "posttrain.steps=3", "posttrain.weight=1"]
    bf16 = "trainer.precision=bf16"
    alone(tmp_path / "bf16", 2, 4, bf16)
    trainer = Trainer(parse(arguments(tmp_path / "chain", 3, 4, *chain)))
    trainer.stage.resnet = Distance()
    trainer.fit()

    file_to_two = only(one, 3, tmp_path / "file_to_two")
    fsdp = "trainer.parallel=fsdp"
    given = [
        arguments(two, 4, 2, fsdp), arguments(by_row_two, 4, 2, fsdp, *rows),
        arguments(tmp_path / "chain_two", 3, 2, fsdp, *chain), arguments(two, 7, 2, fsdp),
    ]  # fmt: skip
    printed = together(SHARDED, json.dumps(given), exit_codes=(1, -signal.SIGKILL))
    assert all("both processes know" in text for text in printed)
    assert [p.name for p in checkpoint.list_checkpoints(two)] == ["step_00000003", "step_00000004"]
    # The first goes on from shards, the second too, the third from a whole file.
    runs = [arguments(two, 7, 2, fsdp), arguments(by_row_two, 7, 2, fsdp, *rows), arguments(file_to_two, 7, 2, fsdp)]
    together(TRAIN_ALL, json.dumps([*runs, arguments(tmp_path / "bf16_two", 2, 2, fsdp, bf16)]))
    for a, b in zip(lines(tmp_path / "bf16"), lines(tmp_path / "bf16_two")):
        # Rounding of sums in fp32 moves few weights to another bf16 number; a micro-batch left out is half of it all.
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    close(one, two, 7)
    close(one, file_to_two, 7)
    close(by_row, by_row_two, 7)
    close(tmp_path / "chain", tmp_path / "chain_two", 3)
    assert [p.name for p in checkpoint.list_checkpoints(two)] == [f"step_0000000{n}" for n in (4, 6, 7)]
    shards = sorted(p.name for p in checkpoint.list_checkpoints(two)[0].iterdir())
    assert shards == [".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"]
    model = FlowMo.from_pretrained(two).state_dict()
    assert all(torch.equal(v, model[k.removeprefix("average.")]) for k, v in state(two, 7).items() if "average" in k)

    alone(only(two, 4, tmp_path / "shards_to_one"), 7, 4)
    close(one, tmp_path / "shards_to_one", 7)
    alone(only(by_row_two, 4, tmp_path / "rows_to_one"), 7, 4, *rows)
    close(by_row, tmp_path / "rows_to_one", 7)

    shard = checkpoint.path_of(two, 7).with_suffix("") / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"__1_0\.distcp"):
        checkpoint.read(shard.parent)
    found = checkpoint.newest(two)
    assert found is not None and found[0].name == "step_00000006"
