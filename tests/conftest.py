"""Without a CUDA card the Triton kernels run interpreted, and tests marked `gpu` are skipped with the reason."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# Triton reads the variable when kernels are decorated, so it must be there before flowmo_kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Several test processes with as many threads each wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def end_if_the_card_is_lost(test: str) -> None:
    """End the process after a test that broke the card's context, since every later one in it would fail.

    A kernel's bad access shows at the next synchronization, so there is one after every test.  With several test
    processes another one takes over; without, the run ends with the name of the test.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        text = f"{test} left the card unusable: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(text, returncode=1)
        print(text, file=sys.__stderr__, flush=True)
        os._exit(1)


if torch.cuda.is_available():

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(item: pytest.Item) -> None:
        end_if_the_card_is_lost(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card, and torch finds none"))
