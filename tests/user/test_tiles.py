"""Overlapping tiles: where they lie, joint decoding against a plain loop, seams, batches, memory."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowmo import FlowMo, model_config
from flowmo.data import heldout_photographs, to_tensor
from flowmo.pretrained import shipped_weights
from flowmo.sampling import guided_steps, time_grid
from flowmo.tiles import (
    TileDecoder,
    TileGrid,
    encode_tiles,
    grid_for,
    merge_tiles,
    reconstruct_blended,
    reconstruct_tiled,
    split_tiles,
)
from tests.model import golden


def photograph(name: str, width: int, height: int) -> Tensor:
    return to_tensor(heldout_photographs()[name].resize((width, height)))


def test_tiles_side_by_side_are_those_of_the_picture_row_by_row():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    tiles = split_tiles(images, 4)
    expected = [x[:, y : y + 4, z : z + 4] for x in images for y in (0, 4) for z in (0, 4, 8)]
    assert torch.equal(tiles, torch.stack(expected)) and torch.equal(merge_tiles(tiles, 8, 12), images)
    for sides in ((8, 10), (10, 8)):
        with pytest.raises(ValueError, match="multiples of the tile size 4"):
            split_tiles(torch.zeros(1, 3, *sides), 4)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_tiles_cover_every_picture_and_overlap(size):
    for overlap in {0, 1, size // 8, size // 4, size // 2}:
        for length in [*range(1, 3 * size, max(1, size // 7)), size, size + 1, 2 * size, 427, 512, 640, 4000]:
            starts = TileGrid(length, 1, size, overlap).rows
            assert len(starts) == TileGrid(length, 1, size, overlap).count
            assert starts[0] == 0 and starts[-1] == max(length - size, 0)
            gaps = [b - a for a, b in pairwise(starts)]
            moved = 3 if overlap >= 8 else 0
            assert all(0 < gap <= size - overlap + moved for gap in gaps), (length, overlap, starts)
            if len(starts) > 1:  # one tile fewer could not do
                assert (len(starts) - 1) * (size - overlap) + overlap < length
            if moved and len(starts) > 2:  # no patch of 4 pixels lies under one of the neighbour's
                assert all(gap % 4 for gap in gaps)


def test_known_grids():
    assert TileGrid(512, 640, 256, 64).columns == [0, 190, 384]
    assert TileGrid(512, 640, 256, 64).rows == [0, 126, 256]
    assert TileGrid(427, 256, 256, 64).rows == [0, 171]
    assert TileGrid(200, 200, 256, 64).padded == (256, 256)
    assert TileGrid(100, 7, 32, 1).rows == [0, 22, 45, 68]  # 22.67 and 45.33 round down


@pytest.mark.parametrize(("length", "overlap"), [(32, 8), (20, 8), (75, 8), (128, 16), (128, 0), (131, 1)])
def test_windows_add_up_to_one_and_have_no_step(length, overlap):
    grid = TileGrid(length, 1, 32, overlap)
    rows, _ = grid.windows()
    total = torch.zeros(grid.padded[0])
    placed = torch.zeros(len(grid.rows), grid.padded[0])
    for i, start in enumerate(grid.rows):
        total[start : start + 32] += rows[i]
        placed[i, start : start + 32] = rows[i]
    # Each weight is rounded once to fp32, and at most three tiles meet at a pixel.
    assert float((total - 1).abs().max()) <= 4 * torch.finfo(torch.float32).eps
    if overlap >= 8:
        # Between two windows sin^2 of slope pi / S each, over an overlap of 5 or more pixels (8 less the 3 of moving),
        # a weight rises from 0 to 1; no single pixel may take half of it.
        inner = placed[:, 1:] - placed[:, :-1]
        assert float(inner.abs().max()) < 0.5


@pytest.mark.parametrize(("height", "width", "overlap"), [(0, 5, 0), (5, 5, 17), (5, 5, -1)])
def test_impossible_grids_are_refused(height, width, overlap):
    with pytest.raises(ValueError, match="expected"):
        TileGrid(height, width, 32, overlap)


def blended_by_hand(model: FlowMo, grid: TileGrid, codes: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Joint decoding as a formula: the model's own modules, one tile at a time, two-dimensional window sums."""
    c, times = model.config, time_grid(steps)
    side = torch.arange(grid.size, dtype=torch.float64)
    bump = torch.sin(math.pi * (side + 0.5) / grid.size) ** 2
    window = bump[:, None] * bump
    places = [(y, x) for y in grid.rows for x in grid.columns]
    z = noise.double()
    for i, guided in enumerate(guided_steps(times, 1.5, (0.17, 1.02))):
        above, below = torch.zeros_like(z), torch.zeros(z.shape[1:], dtype=torch.float64)
        for (y, x), code in zip(places, codes.float()):
            seen = z[None, :, y : y + grid.size, x : x + grid.size].float()
            n, p = c.grid, c.patch
            tokens = seen.reshape(1, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(1, n * n, p * p * 3)
            t = torch.tensor([times[i]])
            v = model.velocity(tokens, t, model.condition(code[None]))
            if guided:
                v_null = model.velocity(tokens, t, model.condition(code[None], keep=False))
                v = v_null + 1.5 * (v - v_null)
            v = v.reshape(n, n, p, p, 3).permute(4, 0, 2, 1, 3).reshape(3, grid.size, grid.size)
            above[:, y : y + grid.size, x : x + grid.size] += window * v
            below[y : y + grid.size, x : x + grid.size] += window
        z = z - (times[i] - times[i + 1]) * above / below
    return z[:, : grid.height, : grid.width].clamp(-1, 1)


@torch.no_grad()
def test_joint_decoding_is_the_blended_sampler(tiny):
    image = photograph("coffee", 50, 41)
    grid = grid_for(tiny, 41, 50)
    codes = encode_tiles(tiny, image, grid)
    noise = torch.randn(3, *grid.padded, generator=torch.Generator().manual_seed(3))
    picture = TileDecoder(tiny, batch=3, steps=6)([(grid, codes)], [noise])[0]
    assert any(guided_steps(time_grid(6), 1.5, (0.17, 1.02)))
    expected = blended_by_hand(tiny, grid, codes, noise, steps=6)
    assert float(expected.abs().lt(1).float().mean()) > 0.5  # the clipping does not hide a difference
    # fp32 through a network of some 100 rounded operations a step, in another order: errors of random sign, 10 eps of
    # values of size 4 or less, over steps whose lengths add up to 1, twice as much with guidance.
    assert float((picture - expected).abs().max()) < 80 * torch.finfo(torch.float32).eps


def test_the_overlap_asked_for_is_the_one_taken(tiny):
    image = photograph("coffee", 60, 32)
    pictures = [reconstruct_blended(tiny, [image], overlap=overlap, steps=1)[0] for overlap in (None, 8, 0)]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    assert len(grid_for(tiny, 32, 60, 0).columns) == 2 < len(grid_for(tiny, 32, 60).columns)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dpm"])
def test_one_tile_is_the_decoder(tiny, solver):
    image = photograph("china", 32, 32)
    grid = grid_for(tiny, 32, 32)
    codes = encode_tiles(tiny, image, grid)
    assert torch.equal(codes.float(), tiny.encode(image[None]))
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    picture = TileDecoder(tiny, steps=5, solver=solver)([(grid, codes)], [noise[0]])[0]
    expected = tiny.decode(codes.float(), steps=5, solver=solver, noise=noise)[0]
    assert float((picture - expected).abs().max()) < 80 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("solver", ["euler", "ab2"])  # one without and one with a memory
def test_batches_and_company_do_not_change_a_picture(tiny, solver):
    images = [photograph("coffee", 75, 32), photograph("rocket", 20, 40), photograph("china", 32, 32)]
    together = reconstruct_blended(tiny, images, batch=4, seed=5, steps=3, solver=solver)
    for image, picture in zip(images, together):
        alone = reconstruct_blended(tiny, [image], batch=64, seed=5, steps=3, solver=solver)[0]
        assert picture.shape == image.shape
        # Another batch shape may sum matrix products in another order: as above.
        assert float((picture - alone).abs().max()) < 80 * torch.finfo(torch.float32).eps
    other = reconstruct_blended(tiny, images[:1], seed=6, steps=3, solver=solver)[0]
    assert float((other - together[0]).abs().max()) > 0.1


def test_watching_shows_every_state_and_changes_nothing(tiny):
    images = [photograph("coffee", 40, 33), photograph("china", 32, 20)]
    work = [(grid := grid_for(tiny, *image.shape[1:]), encode_tiles(tiny, image, grid)) for image in images]
    seen: list[tuple[float, int, Tensor, Tensor]] = []
    decoder = TileDecoder(tiny, steps=4)
    watched = decoder(work, seed=2, watch=lambda *what: seen.append(what))
    for picture, same in zip(watched, decoder(work, seed=2)):
        assert torch.equal(picture, same)
    times = time_grid(4)
    for k, (grid, _) in enumerate(work):
        mine = [(t, x, v) for t, picture, x, v in seen if picture == k]
        assert [t for t, _, _ in mine] == times[:-1]
        for (t, x, v), (later, after, _) in pairwise(mine):
            assert x.shape == v.shape == (3, *grid.padded) and torch.equal(after, x - (t - later) * v)
        t, x, v = mine[-1]
        assert torch.equal((x - t * v)[:, : grid.height, : grid.width].clamp(-1, 1), watched[k])


def test_small_pictures_and_continuous_codes():
    torch.manual_seed(0)
    model = FlowMo(model_config("tiny", decoder_depth=1, latent_channels=16, quantizer="none")).eval()
    golden.fill(model.named_parameters())
    image = photograph("coffee", 40, 5)
    grid = grid_for(model, 5, 40)
    codes = encode_tiles(model, image, grid)
    assert codes.is_floating_point() and codes.shape[0] == 2
    padded = torch.cat([image, image[:, -1:].expand(-1, 27, -1)], dim=1)
    assert torch.equal(codes[0], model.encode(padded[None, :, :, :32])[0])
    picture = TileDecoder(model, steps=2)([(grid, codes)])[0]
    assert picture.shape == (3, 5, 40) and bool(picture.isfinite().all())


def test_what_does_not_fit_is_refused(tiny):
    grid = grid_for(tiny, 40, 40)
    codes = encode_tiles(tiny, torch.zeros(3, 40, 40), grid)
    with pytest.raises(ValueError, match="another grid"):
        TileDecoder(tiny)([(grid, codes[1:])])
    with pytest.raises(ValueError, match="tiles of 16; they belong"):
        TileDecoder(tiny)([(TileGrid(16, 16, 16, 4), codes[:1])])
    with pytest.raises(ValueError, match="noise: expected shapes"):
        TileDecoder(tiny)([(grid, codes)], [torch.zeros(3, 32, 40)])
    with pytest.raises(ValueError, match="expected shape"):
        encode_tiles(tiny, torch.zeros(3, 40, 41), grid)
    with pytest.raises(ValueError, match="batch=0"):
        TileDecoder(tiny, batch=0)


@pytest.mark.gpu
def test_captured_graphs_follow_the_time(tiny):
    """The first call runs its kernels one by one, the later ones replay graphs, which must not keep the first time."""
    model = copy.deepcopy(tiny).cuda()
    image = photograph("coffee", 75, 50)
    grid = grid_for(model, 50, 75)
    codes = encode_tiles(model, image, grid)
    decoder = TileDecoder(model, batch=4, steps=6)
    first, again = (decoder([(grid, codes)])[0].cpu() for _ in range(2))
    on_cpu = TileDecoder(tiny, batch=4, steps=6)([(grid, codes.cpu())])[0]
    # The same kernels on the same numbers; and other kernels, whose matrix products may keep 10 bits of mantissa.
    assert float((first - again).abs().max()) < 1e-5
    assert float((first - on_cpu).abs().mean()) < 100 * 2**-11


class Largest(TorchDispatchMode):
    """The most elements that any tensor has had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_memory_does_not_grow_with_the_tiles(tiny):
    """A picture of six times the tiles makes no larger tensor, as long as the picture itself is the smaller thing."""
    largest = {}
    for side in (56, 128):
        grid = grid_for(tiny, side, side)
        with Largest() as watch:
            codes = encode_tiles(tiny, torch.zeros(3, side, side), grid, batch=4)
            TileDecoder(tiny, batch=4, steps=1, guidance=1.0)([(grid, codes)])
        largest[grid.count] = watch.elements
    assert set(largest) == {4, 25}
    assert largest[4] == largest[25] > 3 * 128 * 128


def gradient_energies(difference: Tensor, grid: TileGrid) -> tuple[Tensor, Tensor]:
    """Mean squared step across each line of pixels between tiles, and across all other lines."""
    across, inside = [], []
    for steps, starts in (
        (difference.diff(dim=2).square().mean((0, 1)), grid.columns),
        (difference.diff(dim=1).square().mean((0, 2)), grid.rows),
    ):
        edges = {p - 1 for s in starts for p in (s, s + grid.size) if 0 < p <= len(steps)}
        chosen = torch.tensor([i in edges for i in range(len(steps))])
        across.append(steps[chosen])
        inside.append(steps[~chosen])
    return torch.cat(across), torch.cat(inside)


SIZES = [(128, 128), (160, 107)]  # a quarter of 512 x 512 and of 640 x 427


def seams(model: FlowMo, blended: bool, steps: int) -> tuple[float, float]:
    """Mean gradient energy across tile borders relative to inside, over the photographs, and its standard error."""
    ratios = []
    for name in heldout_photographs():
        for width, height in SIZES:
            image = photograph(name, width, height)
            if blended:
                grid = grid_for(model, height, width)
                picture = reconstruct_blended(model, [image], batch=32, steps=steps)[0]
            else:
                height, width = height // 32 * 32, width // 32 * 32
                image = image[:, :height, :width]
                grid = TileGrid(height, width, 32, 0)
                noise = torch.Generator().manual_seed(0)
                picture = reconstruct_tiled(model, image[None], steps=steps, generator=noise)[0]
            across, inside = gradient_energies(picture, grid)
            ratios.append(across / inside.mean())
    lines = torch.cat(ratios)
    return float(lines.mean()), float(lines.std() / math.sqrt(len(lines)))


class OwnColours(TileDecoder):
    """A decoder whose every tile heads for its part of one photograph in a colour cast of the tile's own."""

    def __init__(self, model: FlowMo, image: Tensor, grid: TileGrid, steps: int) -> None:
        super().__init__(model, batch=4, steps=steps)
        casts = 0.4 * torch.rand(grid.count, 3, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.2
        places = [(y, x) for y in grid.rows for x in grid.columns]
        tiles = torch.stack([image[:, y : y + grid.size, x : x + grid.size] for y, x in places])
        self.targets = tiles + casts

    def _check(self, pictures, noise) -> None:
        pass

    def _plan(self, guided: bool, tiles: int) -> OwnColours:
        return self

    def velocity(self, j: int, codes: Tensor, seen: Tensor) -> Tensor:
        return (seen - self.targets[codes.flatten()]) / self.schedule.evaluations[j]


@pytest.mark.parametrize(("width", "height"), [(512, 512), (640, 427)])
def test_no_seams_between_tiles_that_disagree(tiny, width, height):
    """At full size: borders of tiles of different colours vanish, and stand out where nothing is blended."""
    image = 0.75 * photograph("coffee", width, height)  # far enough from -1 and 1 that no cast is clipped
    for overlap in (64, 32):
        grid = TileGrid(height, width, 256, overlap)
        picture = OwnColours(tiny, image, grid, steps=3)([(grid, torch.arange(grid.count)[:, None])])[0]
        error = picture - image
        assert float(error.abs().mean()) > 0.02  # they do disagree
        across, inside = gradient_energies(error, grid)
        assert float(across.mean()) <= float(inside.mean())
    grid = TileGrid(height // 256 * 256, width // 256 * 256, 256, 0)
    image = image[:, : grid.height, : grid.width]
    picture = OwnColours(tiny, image, grid, steps=3)([(grid, torch.arange(grid.count)[:, None])])[0]
    across, inside = gradient_energies(picture - image, grid)
    assert float(across.mean()) > 100 * float(inside.mean())


def test_no_seams_with_the_shipped_weights():
    weights = shipped_weights("quickstart")
    if weights is None:
        pytest.skip("this copy ships no quickstart weights")
    model = FlowMo.from_pretrained(weights, dtype=torch.float32)
    ratio, error = seams(model, blended=True, steps=3)
    assert ratio <= 1 + 2 * error
    ratio, error = seams(model, blended=False, steps=3)
    assert ratio > 2
