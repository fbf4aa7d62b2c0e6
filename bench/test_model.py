"""`pytest bench/`: every model bench once, and what the engine gains on this machine in one paired run.

On a CPU the sizes are the quickstart's in fp32 and nothing is compiled: the numbers say that the benches work.
"""

from __future__ import annotations

import csv
import time

import pytest
import torch

from bench import model as model_bench
from bench import published, solvers
from bench.model_cases import PROVIDERS, TASKS, Setting, config, provide, work
from bench.solvers import Way
from bench.timing import Peaks, percentiles
from flowmo.config import LossConfig, OptimConfig
from flowmo.engine import Schedule, StepCache
from flowmo.perceptual.resnet import random_resnet_distance
from flowmo.training.optim import AdamHoldEMA, is_held

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


def test_published_optimizer_is_ours() -> None:
    """Twelve steps from the same gradients, the average of the tenth included."""
    weights = []
    for kind in ("ours", "published"):
        model = Setting.make(config("tiny"), 1, "cpu").model
        named = {k: p for k, p in model.named_parameters() if "decoder.double_blocks" in k}
        held = [k for k in named if is_held(k)]
        ours, theirs = AdamHoldEMA(named, OptimConfig(ema_decay=0.9999)), published.Optimizer(named, held)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            for p in named.values():
                p.grad = torch.randn(p.shape, generator=generator)
            ours.step(1e-4) if kind == "ours" else theirs.step()
        weights.append((named, ours.average if kind == "ours" else theirs.average))
    for a, b in zip(*weights):
        for name, x in a.items():
            # fp32 formulas in another order; 12 steps of 1e-4 change every weight by about 1e-3.
            torch.testing.assert_close(x, b[name], rtol=1e-5, atol=1e-6)


def test_published_chain_trains_the_decoder_alone() -> None:
    s = Setting.make(config("tiny"), 1, "cpu")
    s.model.encoder.requires_grad_(False)
    loss = published.posttrain_loss_of(s.model, lambda f: f, random_resnet_distance(), steps=2)(s.images)
    loss.backward()
    gradient = s.model.decoder.img_in.weight.grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert all(p.grad is None for p in s.model.encoder.parameters())


def test_work_of_a_forward_pass_of_the_published_model() -> None:
    w = work("forward", config("lo"), 1, 2)
    # 2.218 T linear and 1.396 T attention FLOPs; 12 row tensors of 10.03 MB in each of 16 blocks.
    assert w.matmul_flops == pytest.approx(3.614e12, rel=1e-3)
    assert w.memory_bytes == pytest.approx(12 * 16 * 10.03e6, rel=1e-3)
    assert work("decode", config("lo"), 3, 2).matmul_flops == pytest.approx(3 * 31 * w.matmul_flops)


def test_what_hoisting_gains_here() -> None:
    """Published and plain execution against the plan, least of turns: prints the ratios, asserts the direction."""
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
    published_ms, eager_ms, plan_ms = (min(t) for t in times)  # other work on the machine only adds
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


def test_providers_in_turns(tmp_path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "model.csv"
    words = ["--tasks", "decode", "--model", "tiny", "--batch", "2", "--paired", "3", "--note", "a test"]
    plans = ["plan", "plan+tail6", "plan+cache", "plan+attention8", "plan+graph"]
    assert model_bench.main([*words, "--providers", "published", *plans, "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = {r["provider"]: r for r in csv.DictReader(file)}
    assert list(rows) == ["published", *plans[: 5 if ON_CARD else 4]]
    for r in rows.values():
        assert float(r["ms_min"]) <= float(r["ms_p50"]) and r["note"].startswith("a test")
        ratio = float(rows["published"]["ms_p50"]) / float(r["ms_p50"])
        assert float(r["speedup_published"]) == pytest.approx(ratio, abs=0.006)
    # Work that is left out is not counted, and what changes the picture says how much.
    assert [rows[p]["forwards"] for p in plans[:3]] == ["31", "26", "27"]
    assert [bool(r["psnr_to_exact"]) for r in rows.values()][:5] == [False, False, True, True, True]
    with pytest.raises(SystemExit):
        model_bench.main([*words, "--providers", "plan+tial6"])


def test_peak_memory_is_that_of_the_timed_calls(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Not of the plans that the picture is compared with."""
    compared: list[int] = []
    monkeypatch.setattr(model_bench, "psnr_to_exact", lambda *a, **k: compared.append(1) or torch.ones(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 * (1 + len(compared)))
    row = {"task": "decode", "batch": 1, "provider": "plan+tail6"}
    s = Setting.make(config("tiny"), 1, "cpu")
    filled = model_bench.filled(row, s, percentiles([1.0], False), "cpu", Peaks(1e12, 1e12))
    assert compared and filled["peak_gib"] == "1.00"


def test_each_call_takes_its_turn() -> None:
    order: list[str] = []
    times = model_bench.time_in_turns([lambda: order.append("a"), lambda: order.append("b")], 3, "cpu")
    assert order == ["a", "b"] * 4 and len(times) == 2


def test_solver_table() -> None:
    model = Setting.make(config("tiny"), 1, "cpu").model
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    todo = [Way(Schedule(n, guidance=1.0, solver=name)) for n in (2, 8) for name in ("euler", "heun")]
    paper = Schedule(25, guidance=1.0)
    todo += [Way(paper._replace(tail_merge=6)), Way(paper, StepCache((22, 24))), Way(paper, attention="int8")]
    todo += [Way(paper, fp8=True)]
    rows = solvers.table(model, images, todo, 40)
    assert [r["forwards"] for r in rows] == ["2", "3", "8", "15", "20", "24", "25", "25"]
    by = {(r["solver"], r["steps"], r["forwards"]): float(r["psnr_to_converged"]) for r in rows}
    assert by["euler", 8, "8"] > by["euler", 2, "2"] and by["heun", 8, "15"] > by["euler", 8, "8"]
    assert [bool(r["psnr_to_exact"]) for r in rows] == [False] * 4 + [True] * 4
    assert all(way.schedule.steps in (2, 25) for way in solvers.ways(1.5, 4.0, 3, [2]))
