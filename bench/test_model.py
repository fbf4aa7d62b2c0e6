"""`pytest bench/`: every model bench once, and what the engine gains on this machine in one paired run.

On a CPU the sizes are the quickstart's in fp32 and nothing is compiled: the numbers say that the benches work.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench import model as model_bench
from bench import published, solvers
from bench.model_cases import PROVIDERS, TASKS, Setting, config, provide, work
from bench.timing import percentiles
from flowmo.config import LossConfig
from flowmo.engine import Schedule

ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"
HERE = PROVIDERS if ON_CARD else ("published", "eager", "plan")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("provider", HERE)
def test_task(task: str, provider: str, benchmark) -> None:  # type: ignore[no-untyped-def]
    call = provide(provider, task, Setting.make(config("lo" if ON_CARD else "quickstart"), 1, DEVICE), DEVICE)
    if call is None:
        pytest.skip(f"{provider} has no {task}")

    def run() -> None:
        call()
        if ON_CARD:
            torch.cuda.synchronize()

    benchmark.extra_info["note"] = "card, FlowMo-Lo" if ON_CARD else "CPU, quickstart sizes: no performance claim"
    benchmark.pedantic(run, rounds=2, iterations=1, warmup_rounds=1)


def test_published_execution_gives_our_pictures() -> None:
    s = Setting.make(config("tiny"), 2, "cpu")
    ours = s.model.decode(s.codes, noise=s.noise, plan=False)
    theirs = published.decode(s.model, published.velocity_of(s.model), s.codes, s.noise)
    # fp32 in another order of sums, through 31 passes.
    assert (ours - theirs).abs().max() < 1e-4
    with torch.no_grad():
        assert torch.equal(published.encode_of(s.model)(s.images), s.model.encode(s.images, plan=False))


def test_published_quantizer_is_ours() -> None:
    s = Setting.make(config("tiny"), 2, "cpu")
    latent = torch.randn(2, 16, 18, generator=torch.Generator().manual_seed(0)) * 0.1
    codes, penalty = published.quantize(latent, 9)
    ours = s.model.quantize(latent)
    assert torch.equal(codes.sign(), ours.codes)
    assert float(penalty) == pytest.approx(float(ours.loss(LossConfig())), rel=1e-4)
    loss = published.loss_of(s.model, lambda f: f)(s.images)
    loss.backward()
    assert s.model.encoder.img_in.weight.grad is not None and torch.isfinite(loss)


def test_work_of_a_forward_pass_of_the_published_model() -> None:
    w = work("forward", config("lo"), 1, 2)
    # 2.218 T linear and 1.396 T attention FLOPs; 12 row tensors of 10.03 MB in each of 16 blocks.
    assert w.matmul_flops == pytest.approx(3.614e12, rel=1e-3)
    assert w.memory_bytes == pytest.approx(12 * 16 * 10.03e6, rel=1e-3)
    assert work("decode", config("lo"), 3, 2).matmul_flops == pytest.approx(3 * 31 * w.matmul_flops)


def test_what_hoisting_gains_here() -> None:
    """Published and plain execution against the plan, runs interleaved: prints the ratios, asserts the direction."""
    threads = torch.get_num_threads()
    if not ON_CARD:
        torch.set_num_threads(1)
    s = Setting.make(config("lo" if ON_CARD else "quickstart"), 1, DEVICE)
    names = ("published", "eager", "plan+graph" if ON_CARD else "plan")
    calls = [provide(name, "decode", s, DEVICE) for name in names]
    times: list[list[float]] = [[] for _ in calls]
    for i in range(6):
        for call, samples in zip(calls, times):
            assert call is not None
            start = time.perf_counter()
            call()
            if ON_CARD:
                torch.cuda.synchronize()
            if i:
                samples.append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    published_ms, eager_ms, plan_ms = (percentiles(t, False).p50 for t in times)
    print(f"\ndecode, batch 1, {names[2]} on {DEVICE}: {plan_ms:.1f} ms; "
          f"{published_ms / plan_ms:.2f} x published, {eager_ms / plan_ms:.2f} x plain sampler")  # fmt: skip
    assert plan_ms < eager_ms


def test_command_writes_rows(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "model.csv"
    words = ["--tasks", "forward", "--providers", "published", "plan", "--model", "tiny", "--seconds", "0.01"]
    assert model_bench.main([*words, "--batch", "2", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == 3 and lines[0].split(",") == model_bench.FIELDS
    if not ON_CARD:
        assert "say nothing about a card" in capsys.readouterr().out


def test_solver_table() -> None:
    model = Setting.make(config("tiny"), 1, "cpu").model
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    todo = [Schedule(n, guidance=1.0, solver=name) for n in (2, 8) for name in ("euler", "heun")]
    rows = solvers.table(model, images, [*todo, Schedule(25, guidance=1.0, tail_merge=6)], 40)
    assert [r["forwards"] for r in rows] == [2, 3, 8, 15, 20]
    by = {(r["solver"], r["steps"]): float(r["psnr_to_converged"]) for r in rows}
    assert by["euler", 8] > by["euler", 2] and by["heun", 8] > by["euler", 8]
