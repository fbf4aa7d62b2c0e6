"""Functions that torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def untraced(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`torch.compiler.disable` that does not import the tracer, which takes as long as all else, until it is in use.

    For what ends a graph anyway, such as draws from a torch.Generator: called first, they leave one graph of the rest.
    """

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if "torch._dynamo" in sys.modules:
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # the mark that the tracer looks for
    return run
