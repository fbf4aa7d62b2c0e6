"""The guard of the other tests sees a kernel that reaches beyond its tensors."""

from __future__ import annotations

import pytest
import torch

from flowmo_kernels._dispatch import why_no_triton
from flowmo_kernels._triton import INTERPRETED, jit, tl


@jit
def _copy_kernel(p_x, p_y, n_read, n_written, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n_read, other=0.0), mask=o < n_written)


@pytest.mark.skipif(not INTERPRETED or why_no_triton() is not None, reason="of interpreted kernels")
@pytest.mark.parametrize(("read", "written", "what"), [(5, 5, None), (6, 5, "loads 1 of 6"), (0, 7, "stores 2 of 7")])
def test_kernels_that_reach_beyond_their_tensors_are_seen(read: int, written: int, what: str | None) -> None:
    x, y = torch.ones(9)[:5], torch.zeros(9)[:5]
    if what is None:
        _copy_kernel[(1,)](x, y, read, written, N=8)
        assert torch.equal(x, y)
    else:
        with pytest.raises(Exception, match=f"a kernel {what} numbers outside of its tensors"):
            _copy_kernel[(1,)](x, y, read, written, N=8)
