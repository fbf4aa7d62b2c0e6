"""FID, sFID, Inception Score, precision and recall of sets of pictures: sources, statistics, protocol, command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowmo import evaluate
from flowmo.data import save_png
from flowmo.evaluation import FolderPictures, NpzPictures, open_pictures, score_generation
from flowmo.evaluation.pictures import read_batches
from flowmo.metrics import Moments, frechet_distance, inception_score, precision_recall
from flowmo.perceptual.inception import InceptionOutput


class MeanColours(nn.Module):
    """In place of Inception: mean colours of two halves, and half of them as spatial features."""

    resize = "tf1"

    def __init__(self, published: bool = True) -> None:
        super().__init__()
        self.published = published
        self.count = 0

    def forward(self, images: Tensor) -> InceptionOutput:
        self.count += len(images)
        pool = nn.functional.adaptive_avg_pool2d(images.float() / 255, (1, 2)).flatten(1)
        return InceptionOutput(pool, pool[:, :3].square())

    def logits(self, pool: Tensor) -> Tensor:
        return 10 * pool[:, :4]


def images(n: int, seed: int = 0, size: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(100 + 30 * seed, 60, (n, size, size, 3)), 0, 255).astype(np.uint8)


def npz(path: Path, n: int, seed: int = 0, compressed: bool = False, **arrays: np.ndarray) -> NpzPictures:
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images(n, seed), **arrays)
    return NpzPictures(path)


def moments(rows: Tensor) -> Moments:
    result = Moments()
    result.add(rows)
    return result


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_pictures_are_read_in_any_order(tmp_path: Path, compressed: bool) -> None:
    source = npz(tmp_path / "s.npz", 9, compressed=compressed, arr_1=np.arange(9))
    expected = torch.from_numpy(images(9)).permute(0, 3, 1, 2)
    assert len(source) == 9 and source.labels is not None and source.labels.tolist() == list(range(9))
    for index in (0, 4, 4, 2, 8, 0):
        assert torch.equal(source.read(index), expected[index])
    batches = list(read_batches(source, [1, 3, 4, 8], 3, []))
    assert [b[0] for b in batches] == [[1, 3, 4], [8]] and torch.equal(batches[0][1], expected[[1, 3, 4]])


def test_other_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for arrays, words in (
        ({"images": images(2)}, r"key arr_0, found images\.npy"),
        ({"arr_0": images(2).astype(np.float32)}, r"uint8 pictures .* got float32 \[2, 12, 12, 3\]"),
        ({"arr_0": images(2).transpose(0, 3, 1, 2).copy()}, r"got uint8 \[2, 3, 12, 12\]"),
        ({"arr_0": np.asfortranarray(images(2))}, "C order"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=words):
            NpzPictures(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"not an \.npz"):
        NpzPictures(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_pictures(tmp_path / "nowhere.npz", None)


def test_numbers_are_those_of_the_features(tmp_path: Path) -> None:
    reference, samples = npz(tmp_path / "r.npz", 21), npz(tmp_path / "s.npz", 17, seed=1)
    net = MeanColours()
    with pytest.warns(UserWarning, match="17 samples are fewer than"):
        result = score_generation(samples, reference, net, batch=4)  # type: ignore[arg-type]
    assert result is not None and net.count == 38
    numbers, protocol = result
    ours, theirs = (net(torch.from_numpy(images(n, s)).permute(0, 3, 1, 2)) for n, s in ((17, 1), (21, 0)))
    assert numbers["fid"] == pytest.approx(frechet_distance(moments(ours.pool), moments(theirs.pool)), rel=1e-6)
    assert numbers["sfid"] == pytest.approx(frechet_distance(moments(ours.spatial), moments(theirs.spatial)), rel=1e-6)
    assert numbers["inception_score"] == pytest.approx(inception_score(net.logits(ours.pool)), rel=1e-6)
    assert (numbers["precision"], numbers["recall"]) == precision_recall(theirs.pool, ours.pool)
    assert numbers["samples"] == 17 and protocol["fid and sfid"] == "reference pictures"
    assert "21 reference pictures" in protocol["precision and recall"]


@pytest.mark.filterwarnings("ignore:.*fewer than")
def test_stored_statistics_are_the_reference_of_fid_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    mu, mu_s = rng.normal(size=6), rng.normal(size=3)
    statistics = {"mu": mu, "sigma": 2 * np.eye(6), "mu_s": mu_s, "sigma_s": 3 * np.eye(3)}
    reference, samples = npz(tmp_path / "r.npz", 12, **statistics), npz(tmp_path / "s.npz", 9, seed=1)
    net = MeanColours()
    result = score_generation(samples, reference, net)  # type: ignore[arg-type]
    assert result is not None
    ours, theirs = (net(torch.from_numpy(images(n, s)).permute(0, 3, 1, 2)) for n, s in ((9, 1), (12, 0)))
    stored = Moments.from_statistics(torch.from_numpy(mu), 2 * torch.eye(6))
    assert result[0]["fid"] == pytest.approx(frechet_distance(moments(ours.pool), stored), rel=1e-6)
    stored = Moments.from_statistics(torch.from_numpy(mu_s), 3 * torch.eye(3))
    assert result[0]["sfid"] == pytest.approx(frechet_distance(moments(ours.spatial), stored), rel=1e-6)
    assert result[0]["precision"] == precision_recall(theirs.pool, ours.pool).precision
    assert result[1]["fid and sfid"].startswith("stored statistics")

    net = MeanColours()  # nothing needs the reference's pictures then
    result = score_generation(samples, reference, net, skip=["precision_recall"], limit=5)  # type: ignore[arg-type]
    assert result is not None and net.count == 5 and set(result[0]) == {"samples", "inception_score", "fid", "sfid"}

    untrained = MeanColours(published=False)  # stored statistics belong to the published network
    result = score_generation(samples, reference, untrained)  # type: ignore[arg-type]
    assert result is not None and result[0]["fid"] == pytest.approx(
        frechet_distance(moments(ours.pool), moments(theirs.pool)), rel=1e-6
    )
    partial = npz(tmp_path / "p.npz", 5, mu=mu, sigma=np.eye(6))
    with pytest.raises(ValueError, match="holds mu, sigma but not all"):
        score_generation(samples, partial, net)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*fewer than")
def test_identical_sets_and_folders(tmp_path: Path) -> None:
    samples = npz(tmp_path / "s.npz", 11)
    for i in range(11):
        save_png(samples.read(i), tmp_path / "folder" / f"{i:04d}.png")
    from_folder = open_pictures(tmp_path / "folder", None)
    assert isinstance(from_folder, FolderPictures)
    result = score_generation(samples, from_folder, MeanColours(), batch=3)  # type: ignore[arg-type]
    assert result is not None
    numbers = result[0]
    assert numbers["fid"] == pytest.approx(0, abs=1e-6) and numbers["sfid"] == pytest.approx(0, abs=1e-6)
    assert numbers["precision"] == numbers["recall"] == 1
    save_png(torch.zeros(3, 9, 12, dtype=torch.uint8), tmp_path / "folder" / "0011.png")
    with pytest.raises(ValueError, match=r"12 x 12, 12 x 9; give one with --size"):
        score_generation(samples, open_pictures(tmp_path / "folder", None), MeanColours())  # type: ignore[arg-type]
    square = open_pictures(tmp_path / "folder", 8)
    assert len(square) == 12 and square.read(11).shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore:.*fewer than")
def test_samples_sorted_by_class_are_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    labels = np.repeat([0, 1, 2], 4)
    reference = npz(tmp_path / "r.npz", 8)
    shuffled = npz(tmp_path / "a.npz", 12, arr_1=labels[[3, 7, 1, 0, 11, 4, 2, 5, 9, 8, 6, 10]])
    score_generation(shuffled, reference, MeanColours())  # type: ignore[arg-type]
    assert not [w for w in recwarn if "sorted by class" in str(w.message)]
    with pytest.warns(UserWarning, match="sorted by class"):
        score_generation(npz(tmp_path / "b.npz", 12, arr_1=labels), reference, MeanColours())  # type: ignore[arg-type]


def test_command_with_an_untrained_inception_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, reference, out = (str(tmp_path / name) for name in ("s.npz", "r.npz", "result.json"))
    npz(Path(samples), 4)
    npz(Path(reference), 5)
    arguments = ["--samples", samples, "--reference", reference, "--inception", "random", "--skip", "fid,sfid"]
    with pytest.warns(UserWarning):
        evaluate.main([*arguments, "--batch", "5", "--device", "cpu", "--out", out])
    saved = json.loads(Path(out).read_text())
    assert set(saved["metrics"]) == {"samples", "inception_score_random", "precision_random", "recall_random"}
    assert saved["metrics"]["precision_random"] == 1  # the samples are the first four of the reference
    assert saved["protocol"]["untrained networks"] == ["inception"]
    assert "no published number compares" in capsys.readouterr().out
