"""Interpreted kernels may touch the memory of their arguments only: what a dropped mask does, a card would crash on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


class Bounds:
    """Stands in for the interpreter's C functions that load and store, and looks at every address first."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        self.first = self.end = np.empty(0, np.uint64)
        self.known = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def allow(self, tensors: list[Any], known: bool) -> None:
        """From now on addresses lie in these tensors; `known` is False where a kernel takes addresses from a table."""
        numbers = [(t, 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) for t in tensors if t.numel()]
        spans = sorted((t.data_ptr(), t.data_ptr() + n * t.element_size()) for t, n in numbers)
        joined: list[list[int]] = []
        for first, end in spans:
            if joined and first <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([first, end])
        self.first, self.end = (np.array([s[i] for s in joined], np.uint64) for i in (0, 1))
        self.known = known

    def check(self, what: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        wanted = np.asarray(addresses, np.uint64)[np.asarray(mask, bool)]
        if not self.known or not wanted.size:
            return
        if not len(self.first):
            raise AssertionError(f"a kernel {what}s memory, and all its tensors are empty")
        at = np.searchsorted(self.first, wanted, side="right") - 1
        outside = (at < 0) | (wanted + np.uint64(size) > self.end[at])
        if outside.any():
            raise AssertionError(f"a kernel {what}s {outside.sum()} of {wanted.size} numbers outside of its tensors")

    def load(self, addresses: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        self.check("load", addresses, mask, np.dtype(dtype).itemsize)
        loaded: np.ndarray = self.functions.load(addresses, mask, other, dtype)
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self.check("store", addresses, mask, values.dtype.itemsize)
        self.functions.store(addresses, values, mask)


def guard(patch: pytest.MonkeyPatch) -> None:
    """Check every load and store of interpreted kernels while `patch` lasts."""
    from triton.runtime import interpreter

    bounds = Bounds(interpreter._interpreter)
    prepare = interpreter.GridExecutor._init_args_hst

    def watched(executor: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        prepared = prepare(executor, arguments, keywords)
        given = [*prepared[0], *prepared[1].values()]
        bounds.allow([t for t in given if hasattr(t, "data_ptr")], "p_table" not in executor.arg_names)
        return prepared

    patch.setattr(interpreter, "_interpreter", bounds)
    patch.setattr(interpreter.GridExecutor, "_init_args_hst", watched)
