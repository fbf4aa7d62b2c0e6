"""Step caching: exact where nothing changes between evaluations, close where little does, and its rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowmo import FlowMo, model_config
from flowmo.engine import Schedule, StepCache, psnr_to_exact
from flowmo.layers import patchify, unpatchify
from flowmo.solvers import combine
from flowmo.transformer import Residual
from tests.engine.conftest import inputs, make
from tests.engine.test_exact import EXACT


def by_modules(model: FlowMo, codes: Tensor, noise: Tensor, schedule: Schedule, cache: StepCache) -> Tensor:
    """The sampler with step caching by hooks on the modules, picture [B, 3, S, S]."""
    early: list[Tensor] = []
    rest: dict[bool, Tensor] = {}
    state: dict[str, bool] = {}

    def seen(_: object, given: tuple[Residual, ...]) -> None:
        early.append(given[0].sum())

    def last(_: object, given: tuple[Residual, Tensor]) -> tuple[Residual, Tensor] | None:
        start, keep = early.pop(), state["keep"]
        if state["cut"]:
            return Residual(start + rest[keep]), given[1]
        rest[keep] = given[0].sum() - start
        return None

    decoder: Any = model.decoder
    decoder.double_blocks[cache.blocks].register_forward_pre_hook(seen)
    decoder.final_layer_img.register_forward_pre_hook(last)
    z, times = patchify(noise, model.config.patch), schedule.times
    for j, guided in enumerate(schedule.guided):
        v = {}
        for keep in (True, False)[: 1 + guided]:
            state |= {"keep": keep, "cut": j in cache.steps}
            with torch.no_grad():
                v[keep] = model.velocity(z, torch.full((len(z),), times[j]), model.condition(codes, keep))
        velocity = combine(v[True], v[False], schedule.guidance) if guided else v[True]
        z = z - (times[j] - times[j + 1]) * velocity
    return unpatchify(z, model.config.patch, model.config.image_size).clamp(-1, 1)


@pytest.mark.parametrize(
    ("guidance", "interval", "steps"), [(1.0, None, (1, 3, 4, 7)), (1.5, None, (2, 3)), (1.5, (0.17, 1.02), (3, 7))]
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_against_the_modules(guidance, interval, steps, blocks):
    model = make(model_config("tiny", decoder_depth=3))
    codes, noise = inputs(model, 2)
    schedule, cache = Schedule(8, 4.0, guidance, interval), StepCache(steps, blocks)
    options = schedule._asdict()
    got = model.decode_plan(2, **options, cache=cache)(codes, noise)
    exact = model.decode_plan(2, **options)(codes, noise)
    expected = by_modules(model, codes, noise, schedule, cache)
    assert (got - expected).abs().max() <= EXACT
    assert (got - exact).abs().max() > 100 * EXACT


def test_no_steps_is_the_exact_sampler(lo):
    codes, noise = inputs(lo, 2)
    exact = lo.decode_plan(2, steps=5)(codes, noise)
    assert torch.equal(lo.decode_plan(2, steps=5, cache=StepCache(()))(codes, noise), exact)


def test_the_first_blocks_alone_where_the_others_repeat_themselves(lo):
    """What block 1 adds is made constant, so the whole answer is block 0's and a cached residual is the true one."""
    block = lo.decoder.double_blocks[1]
    with torch.no_grad():
        for stream in ("txt", "img"):
            for layer in (getattr(block, f"{stream}_attn").proj, getattr(block, f"{stream}_mlp")[2]):
                layer.weight.zero_()
            getattr(block, f"{stream}_mod").lin.weight.zero_()
    codes, noise = inputs(lo, 3)
    options = {"steps": 8, "cache": StepCache((1, 3, 4, 6))}
    psnr = psnr_to_exact(lo, codes, noise, **options)
    plain = lo.decode(codes, noise=noise, steps=8, plan=False)
    assert (lo.decode_plan(3, **options)(codes, noise) - plain).abs().max() <= EXACT
    assert (psnr > 100).all()


def test_more_cached_steps_move_the_picture_more(lo):
    codes, noise = inputs(lo, 2)
    few = psnr_to_exact(lo, codes, noise, steps=12, cache=StepCache((9, 11)))
    many = psnr_to_exact(lo, codes, noise, steps=12, cache=StepCache((1, 3, 6, 7, 9, 11)))
    assert (few > many).all() and torch.isfinite(few).all()


def test_forward_passes_are_counted_in_parts():
    schedule = Schedule()
    first = schedule.guided.index(True)
    cache = StepCache((first + 1, 24), blocks=4)
    assert cache.forwards(schedule.guided, 16) == 31 - 3 * 12 / 16
    assert cache.stored(25) == {first, 23}
    plan = make("tiny").decode_plan(1, cache=StepCache((24,)))
    assert plan.forwards == 30.5 and "1 with 1 of 2 blocks, 30.5 forward passes" in plan.describe()


@pytest.mark.parametrize(
    ("cache", "text"),
    [
        (StepCache((0,)), "evaluation 0 has none before it"),
        (StepCache((25,)), r"expected numbers from 1 to 24, got \[25\]"),
        (StepCache((3,), blocks=2), "cache.blocks=2: expected 1 to 1"),
        (StepCache((3,), blocks=0), "cache.blocks=0"),
        (StepCache((Schedule().guided.index(True),)), "is guided and the last full one before it is not"),
    ],
)
def test_lists_that_cannot_be_are_named(lo, cache, text):
    with pytest.raises(ValueError, match=text):
        lo.decode_plan(1, cache=cache)
