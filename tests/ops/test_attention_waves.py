"""Attention whose last row tiles are split over the keys: how tiles are shared out, and the same numbers as unsplit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from flowmo_kernels import joint_attention, joint_attention_ref
from flowmo_kernels.attention_waves import COMBINE, LEAST_GAIN, START, Waves, waves

from .oracle import compare, random, sliced

module = import_module("flowmo_kernels.attention_triton")
# B, L, queries, H, d and (whole tiles, parts of the others), with tiles of 32 rows and 16 keys
CASES = [
    ((2, 45, slice(None), 2, 12), (5, 3)),  # a short last tile, of rows and of keys; one part a block
    ((1, 70, slice(7, None), 2, 96), (0, 2)),  # 64 + 32 channels; 5 blocks in 2 parts; every tile split
    ((1, 64, slice(0, 40), 3, 64), (4, 4)),  # whole blocks; fewer queries
    ((1, 80, slice(None), 1, 40), (2, 4)),  # 5 blocks of keys in 4 parts of 2: the last part is empty
    ((2, 33, slice(30, None), 1, 96), (1, 3)),  # one tile a head
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.blocks
    monkeypatch.setattr(module, "blocks", lambda *a: whole(*a)._replace(m=32, n=16, warps=4, stages=1))


def make(shape: tuple[int, int, slice, int, int], dtype: torch.dtype, device: str, sequence: bool) -> list[Tensor]:
    """Some queries, keys and values with numbers of unit RMS, as views of one image- or sequence-major buffer."""
    b, length, queries, h, d = shape
    qkv = random(b, length, 3, h, d, device=device)
    qkv[:, :, :2] *= qkv[:, :, :2].square().mean(-1, keepdim=True).rsqrt()
    rows = qkv.transpose(0, 1) if sequence else qkv
    buffer = sliced(rows.to(dtype), margin=2)
    q, k, v = (buffer.transpose(0, 1) if sequence else buffer).unbind(2)
    return [q[:, queries], k, v]


def attend(monkeypatch: pytest.MonkeyPatch, shares: Waves, inputs: list[Tensor], scale: float) -> Tensor:
    """Attention by Triton with its tiles shared out like that; parts, if there are any, must have been added up."""
    calls = []
    combine = module.combine

    def spy(po: Tensor, pl: Tensor, o: Tensor, whole: int) -> None:
        tiles = o.shape[0] * o.shape[2] * -(-o.shape[1] // po.shape[2])
        assert po.shape[:2] == (tiles - whole, shares.parts) and pl.shape == po.shape[:3]
        calls.append(whole)
        combine(po, pl, o, whole)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "waves", lambda *a: shares)
        patch.setattr(module, "combine", spy)
        o = joint_attention(*inputs, scale, backend="triton", logit_bound=60.0, contiguous=False)
    assert calls == [shares.whole] * (shares.parts > 1)
    return o


@pytest.mark.parametrize(("dtype", "sequence"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("shape", "shares"), CASES)
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # an empty part has l = 0; its quotient is not stored
def test_split_is_unsplit_is_reference(
    shape: tuple[int, int, slice, int, int],
    shares: tuple[int, int],
    sequence: bool,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (b, length, _, h, d), scale = shape, 8 / shape[4]
    inputs = make(shape, dtype, device, sequence)
    o = attend(monkeypatch, Waves(*shares), inputs, scale)
    assert o.shape == inputs[0].shape and o.transpose(0, 1).is_contiguous() >= sequence
    oracle = joint_attention_ref(*(t.double() for t in inputs), scale)
    compare("split", o, joint_attention_ref(*inputs, scale), oracle, 2.0, terms=length + d)
    assert torch.equal(o, attend(monkeypatch, Waves(*shares), inputs, scale))

    unsplit = attend(monkeypatch, Waves(10**6, 1), inputs, scale)
    rows, tiles = o.shape[1], -(-o.shape[1] // 32)
    number = torch.arange(b * h).view(b, 1, h) * tiles + torch.arange(rows).view(1, rows, 1) // 32
    whole = (number < shares[0]).to(device)
    assert whole.any() == (shares[0] > 0) and not whole.all()
    if device == "cpu":  # two compiled kernels may differ in their last bits
        assert torch.equal(o[whole], unsplit[whole])
    # The same p in other partial sums of fp32, then perhaps another neighbour in bf16.
    unit = 2.0**-23 * length**0.5 * oracle.abs().max() + (2.0**-7 * oracle.abs() if dtype == torch.bfloat16 else 0)
    assert ((o.double() - unsplit.double()).abs() <= unit).all()


@pytest.mark.usefixtures("small_tiles")
def test_logits_at_the_bound(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's largest p may be e^60 in one part and nothing of weight in the others, or e^-60."""
    q, k, v = make((1, 64, slice(None), 1, 16), torch.float32, device, sequence=False)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    q, k = q.contiguous(), torch.cat((k[:, :32], q[:, :16], -q[:, 32:48]), 1)
    logits = 60 * q[0, :, 0] @ k[0, :, 0].t()
    assert logits.max() > 59.99 and logits.min() < -59.99
    o = attend(monkeypatch, Waves(0, 4), [q, k, v], 60.0)
    oracle = joint_attention_ref(q.double(), k.double(), v.double(), 60.0)
    # fp32 logits of up to 60 are off by one or two of their last bits, 60 2^-24 each, and p / l by twice as much.
    assert ((o - oracle).abs() <= 60 * 2**-22 * v.abs().max()).all()


@pytest.mark.parametrize("parts", [2, 3])
def test_combine_writes_the_rows_of_its_tiles_alone(parts: int, device: str) -> None:
    """2 images, 2 heads, 5 rows of 24 channels in tiles of 4: two tiles a head, the last three of all are split."""
    buffer = torch.full((4, 5, 2, 24), torch.nan, device=device)
    po, pl = random(3, parts, 4, 24, device=device), random(3, parts, 4, device=device, seed=1).abs() + 1
    module.combine(po, pl, buffer[1:3], 5)
    expected = torch.full_like(buffer, torch.nan)
    o = po.double().sum(1) / pl.double().sum(1)[..., None]
    expected[2, 4, 0] = o[0, 0].float()
    expected[2, :4, 1], expected[2, 4, 1] = o[1].float(), o[2, 0].float()
    # Sums of two or three and a quotient, half a unit each.
    torch.testing.assert_close(buffer, expected, rtol=2**-21, atol=2**-22, equal_nan=True)


def test_real_shapes_are_shared_out_as_by_hand() -> None:
    # 4352 tokens, 12 heads, tiles of 128 rows and 64 keys, the 132 processors of a Hopper card
    assert waves(408, 68, 132) == Waves(396, 10)  # parts of 7 blocks; 11 would have no other length
    assert waves(2 * 408, 68, 132) == Waves(792, 5)  # 24 tiles: 120 programs of 14 blocks
    assert waves(8 * 408, 68, 132) == Waves(3264, 1)  # 24.7 waves: little to gain
    assert waves(12 * 32, 68, 132) == Waves(384, 1)  # only the image's queries: 2.91 waves
    assert waves(12 * 2, 68, 132) == Waves(0, 5)  # only the latent queries: less than a wave, all of it split
    assert waves(4, 2, 132) == Waves(4, 1)  # short sequences: the second kernel costs more
    assert waves(396, 68, 132) == Waves(396, 1) and waves(408, 1, 132) == Waves(408, 1)
    assert waves(408, 68, 1) == Waves(408, 1) and waves(0, 68, 132) == Waves(0, 1)
    assert waves(408, 0, 132) == Waves(408, 1)  # no keys


def test_sharing_out_never_loses() -> None:
    """By the estimate: never slower than unsplit, full waves stay whole, and no part is empty."""

    def time(shares: Waves, tiles: int, steps: int, processors: int) -> float:
        split = (tiles - shares.whole) * shares.parts
        parts = -(-split // processors) * (START + -(-steps // shares.parts))
        return -(-shares.whole // processors) * (START + steps) + (parts + COMBINE if split else 0)

    split = 0
    for processors in (16, 108, 132):
        for tiles in range(1, 5 * processors, 7):
            for steps in (1, 2, 5, 20, 68):
                shares = waves(tiles, steps, processors)
                plain = time(Waves(tiles, 1), tiles, steps, processors)
                if shares.parts == 1:
                    assert shares.whole == tiles
                    continue
                split += 1
                assert shares.whole == tiles // processors * processors < tiles
                assert (shares.parts - 1) * -(-steps // shares.parts) < steps
                assert time(shares, tiles, steps, processors) < (1 - LEAST_GAIN) * plain
    assert split > 100


@pytest.mark.usefixtures("small_tiles")
def test_only_inference_with_bounded_logits_splits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make((1, 80, slice(None), 2, 16), torch.float32, device, sequence=False)
    calls = []
    combine = module.combine
    monkeypatch.setattr(module, "combine", lambda *a: calls.append(a) or combine(*a))
    monkeypatch.setattr(module, "processors", lambda x: 4)
    monkeypatch.setattr(module, "waves", lambda tiles, steps, processors: Waves(4, 5) if processors == 4 else None)
    leaf = q.clone().requires_grad_()
    for queries, bound, expected in ((leaf, 8.0, 0), (q, None, 0), (q, 61.0, 0), (q, 8.0, 1)):
        joint_attention(queries, k, v, 0.5, backend="triton", logit_bound=bound)
        assert len(calls) == expected
    op = torch.ops.flowmo_kernels.attention_triton_inference.default
    torch.library.opcheck(op, (q, k, v, 0.5, True), test_utils=("test_schema", "test_faketensor"))


def test_processors() -> None:
    assert module.processors(torch.zeros(1)) == 1
    if torch.cuda.is_available():
        count = torch.cuda.get_device_properties(0).multi_processor_count
        assert module.processors(torch.zeros(1, device="cuda:0")) == count


@pytest.mark.gpu
@pytest.mark.parametrize("d", [96, 64])
def test_real_shape_in_a_graph(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 1 as the engine calls it: near unsplit, the same bits in a graph, and no memory is kept."""
    inputs = make((1, 4352, slice(None), 12, d), torch.bfloat16, "cuda", sequence=True)
    scale, shares = 8 / d, Waves(396, 10)
    o = attend(monkeypatch, shares, inputs, scale)
    unsplit = attend(monkeypatch, Waves(408, 1), inputs, scale)
    oracle = joint_attention_ref(*(t.double() for t in inputs), scale)
    compare("split", o, unsplit, oracle, 1.5, terms=4352)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(monkeypatch, shares, inputs, scale)
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, o)
        attend(monkeypatch, shares, inputs, scale)
    assert torch.cuda.memory_allocated() == held
