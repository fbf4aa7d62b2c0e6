"""Order, exact continuation, worker processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowmo.data.folder import ImageFolder
from flowmo.data.loader import TooManyFailures, TrainingBatches, build_data, epoch_order
from flowmo.data.samples import CropSampler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures; picture i has red level 30 * i everywhere."""
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        pixels[..., 0] = 30 * i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def which(images: Tensor) -> list[int]:
    """Picture numbers of a batch."""
    return ((images[:, 0, 0, 0] + 1) * 127.5 / 30).round().int().tolist()


def take(batches: TrainingBatches, count: int) -> list[Tensor]:
    return [next(batches) for _ in range(count)]


def test_every_epoch_shows_every_picture_once_in_a_new_order(folder: Path) -> None:
    batches = TrainingBatches(ImageFolder(folder, 16), 3, seed=5)
    images = take(batches, 7)
    assert all(x.shape == (3, 3, 16, 16) and x.dtype == torch.float32 for x in images)
    shown = [i for x in images for i in which(x)]
    epochs = [shown[0:7], shown[7:14], shown[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs == [epoch_order(7, 5, e).tolist() for e in range(3)] and epochs[0] != epochs[1]
    assert batches.position == 21 and batches.epoch == 3.0


def test_batches_larger_than_the_data_set_are_full(folder: Path) -> None:
    shown = which(next(TrainingBatches(ImageFolder(folder, 16), 20)))
    assert len(shown) == 20 and {shown.count(i) for i in range(7)} <= {2, 3}


def test_crops_change_from_epoch_to_epoch(folder: Path) -> None:
    first, second = take(TrainingBatches(ImageFolder(folder, 16), 7), 2)
    by_picture = [dict(zip(which(x), x)) for x in (first, second)]
    same = sum(torch.equal(by_picture[0][i], by_picture[1][i]) for i in range(7))
    assert same <= 4  # 9 positions each: seven coincidences of one in nine


@pytest.mark.parametrize("workers", [0, 2])
def test_continuation_is_exact_with_and_without_workers(folder: Path, workers: int) -> None:
    straight = take(TrainingBatches(ImageFolder(folder, 16, seed=1), 4, 1), 6)
    first = TrainingBatches(ImageFolder(folder, 16, seed=1), 4, 1, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(take(first, 3), straight[:3]))
    second = TrainingBatches(ImageFolder(folder, 16, seed=1), 4, 1, workers=workers)
    next(second)  # reads ahead from the wrong place
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(take(second, 3), straight[3:]))
    third = TrainingBatches(ImageFolder(folder, 16, seed=1), 2, 1, start_position=12)
    assert torch.equal(torch.cat(take(third, 2)), straight[3])


@pytest.mark.parametrize("kind", ["folder", "photographs"])
def test_processes_take_the_batches_of_one_stream_in_turn(folder: Path, kind: str) -> None:
    def make(batch: int, **options: int) -> TrainingBatches | CropSampler:
        if kind == "folder":
            return TrainingBatches(ImageFolder(folder, 16, seed=1), batch, 1, **options)
        return CropSampler([Image.open(folder / f"{i}.png") for i in range(7)], 16, batch, 1, **options)

    alone = make(2)
    straight = [next(alone) for _ in range(6)]
    ranks = [make(2, rank=r, world=2) for r in range(2)]
    shared = [next(ranks[i % 2]) for i in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(straight, shared))
    state = ranks[0].state_dict()
    assert state == ranks[1].state_dict() == alone.state_dict()
    expected = next(alone)
    for rank in range(3):  # another number of processes goes on at the same place
        more = make(2, rank=rank, world=3)
        more.load_state_dict(state)
        assert torch.equal(next(more), expected) == (rank == 0)
    other = make(3)  # and so does another size of batches, by pictures
    other.load_state_dict(state)
    assert other.position == (12 if kind == "folder" else 4)


def test_too_many_failures_stop_training(folder: Path) -> None:
    for i in (1, 3):
        damaged = folder / f"{i}.png"
        damaged.write_bytes(damaged.read_bytes()[:-300])
    patient = TrainingBatches(ImageFolder(folder, 16), 7, max_failed=0.6)
    strict = TrainingBatches(ImageFolder(folder, 16), 7, max_failed=0.2)
    with pytest.warns(UserWarning, match=r"\.png"):
        take(patient, 8)
    with pytest.warns(UserWarning), pytest.raises(TooManyFailures, match=r"of 35 pictures .*data\.max_failed=0\.2"):
        take(strict, 8)


def test_state_of_other_data_is_refused(folder: Path) -> None:
    state = TrainingBatches(ImageFolder(folder, 16), 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1, this run has 2"):
        TrainingBatches(ImageFolder(folder, 16), 2, seed=2).load_state_dict(state)
    (folder / "6.png").unlink()
    with pytest.raises(ValueError, match="pictures=7, this run has 6"):
        TrainingBatches(ImageFolder(folder, 16), 2, seed=1).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_failures_while_decoding_are_named_once_in_the_main_process(folder: Path, workers: int) -> None:
    damaged = folder / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    data = ImageFolder(folder, 16)
    batches = TrainingBatches(data, 7, workers=workers)
    with pytest.warns(UserWarning, match=r"3\.png"):
        shown = which(next(batches))
    assert sorted(shown) == [0, 1, 2, 4, 4, 5, 6]
    next(batches)
    assert [Path(s.path).name for s in data.skipped] == ["3.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_states_are_untouched(folder: Path, workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(TrainingBatches(ImageFolder(folder, 16, flip=True), 2, workers=workers))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_build_data_takes_a_folder_or_the_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_data(folder, 16, 2, seed=3, start_position=4)
    assert isinstance(data, TrainingBatches) and data.position == 4 and "7 pictures" in data.describe()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_data(str(folder / "nowhere"), 16, 2)
    (folder / "samples").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "samples" / "x.png")
    monkeypatch.chdir(folder)
    assert "1 pictures" in build_data("./samples", 16, 2).describe()
    if importlib.util.find_spec("skimage") and importlib.util.find_spec("sklearn"):
        sampler = build_data("samples", 16, 2, start_position=5, scales=(16, 32))
        assert isinstance(sampler, CropSampler) and sampler.position == 5
        assert next(sampler).shape == (2, 3, 16, 16) and "7 photographs (astronaut" in sampler.describe()


def test_bad_arguments_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch=0"):
        TrainingBatches(ImageFolder(folder, 16), 0)
    with pytest.raises(ValueError, match="workers=-1"):
        TrainingBatches(ImageFolder(folder, 16), 1, workers=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_batches_are_delivered_on_the_card(folder: Path) -> None:
    for workers in (0, 1):
        on_card = next(TrainingBatches(ImageFolder(folder, 16), 3, workers=workers, device="cuda"))
        assert on_card.is_cuda
        assert torch.equal(on_card.cpu(), next(TrainingBatches(ImageFolder(folder, 16), 3)))
