"""Files that are never seen half written."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def atomic_write(path: str | os.PathLike[str], write: Callable[[str], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to the disk, and put it in place in one step."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes the file private; the result gets the usual rights
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a `.safetensors` file atomically.

    Raises:
        OSError: what the system says where it refuses; the library itself wraps a full disk into an error of its own.
    """
    try:
        atomic_write(path, lambda name: save_file(tensors, name, metadata=metadata))
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))  # in two versions of the library
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
