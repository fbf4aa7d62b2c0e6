"""The quantizer at FlowMo-Hi size (8192 tokens of 14 bits): memory and time against the dense 2^E form.

Each form runs forward and backward in a process of its own; extra memory is how far the process's peak resident set
rises above what it held before the call. The dense form is the textbook one: a softmax over all codes for each token.
Both run on one thread: on a busy machine the many short operations of the factorized form would otherwise measure how
long threads wait for each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, resource, sys, time
import torch
from flowmo_kernels import lfq

def factorized(x):
    out = lfq(x, 14)
    return out.per_sample_entropy - out.codebook_entropy

def dense(x):
    tokens = x.reshape(-1, 14, 4).transpose(1, 2).reshape(-1, 14)
    bits = (torch.arange(2**14)[:, None] >> torch.arange(14)) & 1
    log_p = (2 * tokens @ (2.0 * bits - 1).T / 0.1).log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.manual_seed(0)
torch.set_num_threads(1)
form = {"factorized": factorized, "dense": dense}[sys.argv[1]]
warm = (0.1 * torch.randn(1, 2, 56)).requires_grad_()
form(warm).backward()
x = (0.1 * torch.randn(8, 256, 56)).requires_grad_()
before, start = peak(), time.perf_counter()
loss = form(x)
loss.backward()
seconds = time.perf_counter() - start
print(json.dumps({"extra": peak() - before, "seconds": seconds, "loss": loss.item(), "gradient": x.grad.norm().item()}))
"""


def measure(form: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form], capture_output=True, text=True, cwd=ROOT / "kernels", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists() or free_memory() < 6 * 2**30, reason="needs 6 GB of free memory")
def test_factorized_form_needs_megabytes_where_the_dense_one_needs_gigabytes() -> None:
    ours, dense = measure("factorized"), measure("dense")
    print(f"\nextra memory {ours['extra'] / 2**20:.0f} MB against {dense['extra'] / 2**20:.0f} MB, "
          f"{1e3 * ours['seconds']:.0f} ms against {1e3 * dense['seconds']:.0f} ms")  # fmt: skip
    assert ours["extra"] < 64 * 2**20
    assert dense["extra"] > 2**30
    assert dense["seconds"] > 20 * ours["seconds"]
    # The dense form sums 2^14 terms a token in fp32: 1e-4 is far above its rounding and far below any wrong formula.
    assert abs(ours["loss"] - dense["loss"]) < 1e-4 * abs(dense["loss"])
    assert abs(ours["gradient"] - dense["gradient"]) < 1e-3 * dense["gradient"]
