"""Real photographs without a download, and a sampler that cuts training crops from them in memory.

The photographs are files inside the scikit-image and scikit-learn packages; they are read directly, so
neither package is imported and nothing is fetched. A dozen pictures are enough to see the tokenizer learn,
and no quality benchmark.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmo.data.transforms import deliver, load_image, normalize, resize_shorter

_PACKAGE_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

# name -> (import name of the package, path inside it)
_TRAIN = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "stereo_motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
_HELDOUT = {
    "coffee": ("skimage", "data/coffee.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "stereo_motorcycle_right": ("skimage", "data/motorcycle_right.png"),
}


class SamplePhotographsMissing(RuntimeError):
    """The packages that carry the sample photographs are not installed, or came without them."""


def train_photographs() -> OrderedDict[str, Image.Image]:
    """The seven photographs to train on, name -> PIL RGB, always in the same order.

    Raises SamplePhotographsMissing when scikit-image or scikit-learn is absent.
    """
    return OrderedDict((name, _photograph(name, *where)) for name, where in _TRAIN.items())


def heldout_photographs() -> OrderedDict[str, Image.Image]:
    """The four photographs never trained on, name -> PIL RGB, always in the same order.

    stereo_motorcycle_right shows the scene of a training picture from a second camera; the others are new.
    Raises SamplePhotographsMissing when scikit-image or scikit-learn is absent.
    """
    return OrderedDict((name, _photograph(name, *where)) for name, where in _HELDOUT.items())


def _photograph(name: str, package: str, inside: str) -> Image.Image:
    path = _package_folder(package) / inside
    if not path.is_file():
        raise SamplePhotographsMissing(
            f"the sample photograph {name!r} is not in the installed {_PACKAGE_NAMES[package]} "
            f"(looked for {path}). Reinstall that package from its wheel (it belongs to the `quickstart` "
            "extra), or train on a folder of your own pictures"
        )
    return load_image(path)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SamplePhotographsMissing(
            f"the sample photographs come inside the package {_PACKAGE_NAMES[package]}, which is not "
            "installed. Install the `quickstart` extra (in a clone: pip install -e '.[quickstart]'), "
            "or train on a folder of your own pictures"
        )
    return Path(next(iter(spec.submodule_search_locations)))


class CropSampler:
    """Endless batches of random crops from a few photographs held in memory.

    Each picture is resized beforehand so that its shorter side has each of the lengths in `scales`. A crop is
    drawn as picture first, then scale, then position, each uniformly: large pictures do not dominate. Every
    batch has its own random generator made from (seed, position), so that restoring the position repeats the
    batches exactly.

    Args:
        images: the pictures, PIL RGB, or a mapping of names to them.
        size: side of the crops in pixels.
        batch: crops a batch.
        seed: non-negative integer.
        scales: shorter sides in pixels, at least `size` each; by default 1, 2 and 4 times `size` (a picture
            is never enlarged for a scale unless it would have none otherwise).
        flip: mirror half of the crops left to right.
        columns: the part of each picture's width that crops may lie in, as fractions. Training on (0, 0.75)
            and looking at (0.75, 1) shows crops that no training step has seen. Scales at which a crop does
            not fit into that part are left out.
        device: where batches are delivered; the bytes travel as uint8.
        rank, world: this process and the number of processes, which take the batches in turn.

    Yields float32 [batch, 3, size, size] in [-1, 1]. `position` counts the batches of all processes.
    """

    def __init__(
        self,
        images: Mapping[str, Image.Image] | Sequence[Image.Image],
        size: int,
        batch: int,
        seed: int = 0,
        *,
        scales: Sequence[int] | None = None,
        flip: bool = False,
        columns: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        named = images if isinstance(images, Mapping) else {str(i): img for i, img in enumerate(images)}
        pictures = dict(named)
        if not pictures:
            raise ValueError("CropSampler needs at least one picture")
        if size < 1 or batch < 1 or seed < 0:
            raise ValueError(
                f"CropSampler expects size >= 1, batch >= 1 and seed >= 0; got size={size}, batch={batch}, seed={seed}"
            )
        if not 0.0 <= columns[0] < columns[1] <= 1.0:
            raise ValueError(f"columns must be two fractions 0 <= left < right <= 1, got {columns}")
        scales = tuple(scales) if scales is not None else (size, 2 * size, 4 * size)
        if not scales or min(scales) < size:
            raise ValueError(f"every scale must be at least the crop size {size}, got {scales}")
        self.size, self.batch, self.seed, self.flip, self.columns = size, batch, seed, flip, columns
        self.scales = scales
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self.names = list(pictures)
        self.rank, self.world = rank, world
        self.position = 0
        self._levels = [self._pyramid(name, img) for name, img in pictures.items()]
        self._level_counts = np.array([len(levels) for levels in self._levels])

    def _pyramid(self, name: str, img: Image.Image) -> list[np.ndarray]:
        short = min(img.size)
        levels = []
        for scale in [s for s in self.scales if s <= short] or [min(self.scales)]:
            pixels = np.asarray(resize_shorter(img.convert("RGB"), scale)).transpose(2, 0, 1)  # [3, h, w]
            left, right = (round(edge * pixels.shape[2]) for edge in self.columns)
            if right - left >= self.size:
                levels.append(np.ascontiguousarray(pixels[:, :, left:right]))
        if not levels:
            raise ValueError(
                f"picture {name!r} of {img.width} x {img.height} holds no {self.size} x {self.size} crop "
                f"between columns {self.columns} at the scales {self.scales}; widen the columns or add a "
                "larger scale"
            )
        return levels

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The batch at the current position, float32 [batch, 3, size, size] in [-1, 1]."""
        rng = np.random.default_rng((self.seed, self.position + self.rank))
        pictures = rng.integers(0, len(self._levels), self.batch)
        levels = rng.integers(0, self._level_counts[pictures])
        where = rng.random((self.batch, 2))
        mirrored = rng.random(self.batch) < 0.5 if self.flip else np.zeros(self.batch, bool)
        size = self.size
        out = np.empty((self.batch, 3, size, size), np.uint8)
        for i in range(self.batch):
            pixels = self._levels[pictures[i]][levels[i]]
            top = int(where[i, 0] * (pixels.shape[1] - size + 1))
            left = int(where[i, 1] * (pixels.shape[2] - size + 1))
            crop = pixels[:, top : top + size, left : left + size]
            out[i] = crop[:, :, ::-1] if mirrored[i] else crop
        self.position += self.world
        return normalize(deliver(torch.from_numpy(out), self.device))

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs: the position, and what must agree for it to mean the same."""
        return {"position": self.position, "seed": self.seed, "batch": self.batch, "names": list(self.names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["position"]` batches; raises ValueError if seed or pictures differ.

        With another batch size the same number of pictures counts as delivered; crops drawn so far do not repeat.
        """
        for key, mine in (("seed", self.seed), ("names", self.names)):
            if state[key] != mine:
                raise ValueError(f"the saved data position was made with {key}={state[key]!r}, this run has {mine!r}")
        self.position = -(-int(state["position"]) * int(state["batch"]) // self.batch)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.names)} photographs ({', '.join(self.names)}), crops of {self.size} x {self.size} at "
            f"shorter sides {', '.join(map(str, self.scales))}"
        )
