"""The folder of a `generate` run: finished batches are kept as parts until all of them are one archive.

    settings.json        what determines the pictures, and whether they are all there
    .parts/NUMBER.npy    uint8 [n, H, W, 3], a finished batch; gone once samples.npz is there
    pictures/*.png, samples.npz, grid.png

Every file appears whole or not at all, so a killed run loses the batches that it was drawing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowmo.files import atomic_write

BLOCK = 64  # pictures written at once
_NUMBERED = re.compile(r"\d{6,7}_\d{4,5}\.png")  # never 20240131_120000.png, a camera's
_WAY_OUT = "name another --out, or begin anew in this one with --overwrite"


class SampleFolder:
    """Pictures of `labels` in batches, in a folder that one run of `generate` writes, with any number of processes.

    Args:
        folder: where. labels: int64 [N], of all pictures. batch: pictures of a batch, the last one excepted.
        side: of the pictures, in pixels.
        settings: by the names of options, everything that the pictures depend on, as JSON knows it.
    """

    def __init__(self, folder: Path, labels: Tensor, batch: int, side: int, settings: dict[str, Any]) -> None:
        self.folder, self.labels, self.batch, self.side = folder, labels, batch, side
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.sizes = [len(part) for part in labels.split(batch)]
        self._parts, self._about = folder / ".parts", folder / "settings.json"

    def begin(self, overwrite: bool = False) -> list[int]:
        """Numbers of the batches that are still to be drawn; of all processes the first one asks.

        Args:
            overwrite: remove what an earlier run wrote, and begin anew.

        Raises:
            ValueError: the folder holds pictures of other settings, or of nobody knows which. OSError: as the system
                says.
        """
        if overwrite:
            self._clear()
        if self._about.exists():
            self._compare()
        elif there := self._results():
            raise ValueError(f"{there[0]} is there, and no settings.json says what of; {_WAY_OUT}")
        elif self._parts.exists():  # parts of nobody knows what: a run writes its settings first
            shutil.rmtree(self._parts)
        for pattern in (".samples.npz.*", ".grid.png.*", ".settings.json.*", "pictures/.[0-9]*_[0-9]*.png.*.png"):
            for half in self.folder.glob(pattern):  # of a run that was killed while it wrote
                half.unlink()
        if self.finished:
            shutil.rmtree(self._parts, ignore_errors=True)
            return []
        self._parts.mkdir(parents=True, exist_ok=True)
        self._say(finished=False)
        kept = {path.name for path in self._parts.iterdir()}
        return [n for n in range(len(self.sizes)) if self._part(n).name not in kept or not self._whole(n)]

    @property
    def finished(self) -> bool:
        """Whether samples.npz and the grid are those of these settings."""
        made = all((self.folder / name).is_file() for name in ("samples.npz", "grid.png"))
        return made and self._about.exists() and self._saved()[1]

    def keep(self, number: int, pictures: np.ndarray) -> None:
        """Keep a finished batch, uint8 [n, H, W, 3]."""
        atomic_write(self._part(number), lambda name: np.save(name, pictures))

    def pictures(self, indices: Sequence[int]) -> np.ndarray:
        """Some pictures, uint8 [n, H, W, 3], once all batches are kept."""
        return np.stack([self._read(i // self.batch)[i % self.batch] for i in indices])

    def write_archive(self) -> None:
        """Write samples.npz of all parts, in the order of their batches."""
        atomic_write(self.folder / "samples.npz", self._write_archive)

    def finish(self) -> None:
        """Say that samples.npz and the grid are complete, and remove the parts."""
        self._say(finished=True)
        shutil.rmtree(self._parts)

    def _write_archive(self, path: str) -> None:
        # of the same date always: the same pictures are the same file
        entries = [zipfile.ZipInfo(f"{name}.npy") for name in ("arr_0", "arr_1")]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(entries[0], "w", force_zip64=True) as entry:
                shape = (len(self.labels), self.side, self.side, 3)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)  # type: ignore[arg-type]
                for number in range(len(self.sizes)):
                    part = self._read(number)
                    for first in range(0, len(part), BLOCK):
                        entry.write(part[first : first + BLOCK].tobytes())
            with archive.open(entries[1], "w") as entry:
                np.lib.format.write_array(entry, self.labels.numpy())

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:06d}.npy"

    def _read(self, number: int) -> np.ndarray:
        """A part, memory-mapped; raises OSError or ValueError where it is missing, cut short or of another shape."""
        part = np.load(self._part(number), mmap_mode="r")
        shape = (self.sizes[number], self.side, self.side, 3)
        if part.dtype != np.uint8 or part.shape != shape:
            raise ValueError(f"{self._part(number)}: expected uint8 {list(shape)}, got {part.dtype} {list(part.shape)}")
        return np.asarray(part)

    def _whole(self, number: int) -> bool:
        try:
            self._read(number)
        except (OSError, ValueError, EOFError) as error:
            warnings.warn(f"{self._part(number)} is damaged and its batch is drawn again ({error})", stacklevel=3)
            return False
        return True

    def _say(self, finished: bool) -> None:
        text = json.dumps({"settings": self.settings, "finished": finished}, indent=2) + "\n"
        atomic_write(self._about, lambda name: Path(name).write_text(text))

    def _saved(self) -> tuple[dict[str, Any], bool]:
        """The settings of the folder, and whether their run is finished."""
        try:
            content = json.loads(self._about.read_text())
            return dict(content["settings"]), bool(content["finished"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._about}: no settings of flowmo.generate ({error}); {_WAY_OUT}") from error

    def _compare(self) -> None:
        there = self._saved()[0]
        wrong = [
            f"{name}: {_short(there.get(name))} there and {_short(self.settings.get(name))} here"
            for name in dict.fromkeys([*self.settings, *there])
            if there.get(name) != self.settings.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{self.folder} holds pictures of other settings ({'; '.join(wrong)}); repeat those to go on with "
                f"them, {_WAY_OUT}"
            )

    def _results(self) -> list[Path]:
        """What runs have written here for users, whatever their settings."""
        there = [self.folder / name for name in ("samples.npz", "grid.png") if (self.folder / name).exists()]
        return there + [p for p in sorted(self.folder.glob("pictures/*.png")) if _NUMBERED.fullmatch(p.name)]

    def _clear(self) -> None:
        if self._parts.exists():
            shutil.rmtree(self._parts)
        for path in self._results():
            path.unlink()
        self._about.unlink(missing_ok=True)  # last: until then the folder says whose rest it holds


def digest(model: nn.Module, config: object) -> str:
    """sha256 of a model's configuration and weights, as they are in memory, in hex."""
    result = hashlib.sha256(repr(config).encode())
    for name, weight in sorted(model.state_dict().items()):
        result.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        result.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
