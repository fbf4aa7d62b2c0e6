"""Pictures larger than a model's images: tiles side by side, or overlapping tiles that are decoded jointly.

Joint decoding is the patch-wise diffusion and blending that the paper uses for other resolutions (supplement C.2):
every tile has a code of its own, all tiles share one noisy picture, and at every step of the sampler the velocities of
the tiles are blended in pixel space with smooth windows. A tile thus sees what its neighbours made of their common
part, and there is no step across its border.

Legend: n tiles, S tile side, H x W the picture, T latent tokens, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.engine import DecodePlan, Execution, Schedule
from flowmo.engine.weights import Modulation
from flowmo.layers import patchify, unpatchify
from flowmo.solvers import combine, make_solver

Item = TypeVar("Item")

# Faint edges of patches add up where the patches of overlapping tiles coincide, and average out where they do not:
# tiles are moved by up to 3 pixels until their neighbour's patches, of 4 pixels or a multiple, lie half a patch off.
PATCH_PERIOD = 4
MOVED_FROM = 2 * PATCH_PERIOD  # pixels of overlap; less is left as it is

KEPT_PLANS = 4  # of a decoder: guided and not, for parts of two lengths


def split_tiles(
    images: Tensor,  # [B, 3, H, W], H and W multiples of size
    size: int,
) -> Tensor:  # [B (H / size) (W / size), 3, size, size]
    """Cut pictures into square tiles, row by row."""
    b, c, height, width = images.shape
    if height % size or width % size:
        raise ValueError(f"images: expected sides that are multiples of the tile size {size}, got {height} x {width}")
    x = images.reshape(b, c, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, size, size)


def merge_tiles(
    tiles: Tensor,  # [B (H / size) (W / size), 3, size, size]
    height: int,
    width: int,
) -> Tensor:  # [B, 3, height, width]
    """Inverse of :func:`split_tiles`."""
    c, size = tiles.shape[1], tiles.shape[-1]
    x = tiles.reshape(-1, height // size, width // size, c, size, size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, c, height, width)


def reconstruct_tiled(
    model: FlowMo,
    images: Tensor,  # [B, 3, H, W] in [-1, 1], H and W multiples of the model's image size
    batch: int = 64,
    **sampler: Any,
) -> Tensor:  # [B, 3, H, W] in [-1, 1]
    """Encode and decode every tile on its own, `batch` tiles at a time; options as for `FlowMo.decode`."""
    tiles = split_tiles(images, model.config.image_size)
    done = [model.reconstruct(part, **sampler) for part in tiles.split(batch)]
    return merge_tiles(torch.cat(done), *images.shape[-2:])


@dataclass(frozen=True)
class TileGrid:
    """Overlapping square tiles that cover a picture of any size.

    Along each side there are as few tiles as overlap by at least `overlap` pixels when spread evenly from edge to edge;
    inner ones are then moved by up to 3 pixels (see PATCH_PERIOD). A side shorter than a tile has one, which reaches
    beyond the picture. docs/format.md states the rule: token files depend on it.

    Attributes:
        height, width: of the picture in pixels.
        size: side of a tile.
        overlap: of neighbours, 0 to half a tile.

    Raises:
        ValueError: a size or overlap out of range.
    """

    height: int
    width: int
    size: int
    overlap: int

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.size) < 1:
            raise ValueError(f"tiles of {self.size} on {self.width} x {self.height}: expected at least 1 pixel a side")
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(f"overlap={self.overlap}: expected 0 to {self.size // 2}, half a tile")

    @property
    def count(self) -> int:
        return self._number(self.height) * self._number(self.width)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of what the tiles cover."""
        return max(self.height, self.size), max(self.width, self.size)

    @property
    def rows(self) -> list[int]:
        """Upper edges of the tiles."""
        return self._starts(self.height)

    @property
    def columns(self) -> list[int]:
        """Left edges of the tiles."""
        return self._starts(self.width)

    def windows(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Weights of the tiles along the height [rows, S] and along the width [columns, S], fp32.

        A tile's weight at a pixel is the product of the two. They are squared sines over the tile, zero with zero slope
        at its edges, divided by their sum over the tiles, so that the weights of all tiles add up to 1 at every pixel.
        """
        rows, columns = (self._windows(starts).to(device) for starts in (self.rows, self.columns))
        return rows, columns

    def _number(self, length: int) -> int:
        return 1 if length <= self.size else -((self.overlap - length) // (self.size - self.overlap))

    def _starts(self, length: int) -> list[int]:
        last = self._number(length) - 1
        if last == 0:
            return [0]
        starts = [i * (length - self.size) // last for i in range(last + 1)]
        if self.overlap >= MOVED_FROM:
            for i in range(1, last):
                starts[i] -= (starts[i] - starts[i - 1] - PATCH_PERIOD // 2) % PATCH_PERIOD
            if last > 1 and (starts[last] - starts[last - 1]) % PATCH_PERIOD == 0:
                starts[last - 1] -= 1
        return starts

    def _windows(self, starts: list[int]) -> Tensor:
        middle = torch.arange(self.size, dtype=torch.float64) + 0.5
        bump = (math.pi * middle / self.size).sin().square()
        total = torch.zeros(starts[-1] + self.size, dtype=torch.float64)
        for start in starts:
            total[start : start + self.size] += bump
        return torch.stack([bump / total[start : start + self.size] for start in starts]).float()


def grid_for(model: FlowMo, height: int, width: int, overlap: int | None = None) -> TileGrid:
    """Tiles of the model's image size; by default they overlap by a quarter."""
    size = model.config.image_size
    return TileGrid(height, width, size, size // 4 if overlap is None else overlap)


@torch.no_grad()
def encode_tiles(
    model: FlowMo,
    image: Tensor,  # [3, H, W] in [-1, 1], on any device
    grid: TileGrid,
    batch: int = 16,
) -> Tensor:  # [n, T, C], int8 for codes of +-1
    """Codes of a picture's tiles, row by row, `batch` tiles at a time.

    Beyond the edges of a picture smaller than a tile, its last row and column are repeated.

    Raises:
        TypeError, ValueError: a picture of another dtype, shape or range.
    """
    if image.ndim != 3 or image.shape[0] != 3 or tuple(image.shape[1:]) != (grid.height, grid.width):
        raise ValueError(f"image: expected shape [3, {grid.height}, {grid.width}], got {list(image.shape)}")
    height, width = grid.padded
    if (height, width) != (grid.height, grid.width):
        image = F.pad(image[None], (0, width - grid.width, 0, height - grid.height), mode="replicate")[0]
    places = [(y, x) for y in grid.rows for x in grid.columns]
    codes = []
    for part in _even_parts(places, batch):
        tiles = torch.stack([image[:, y : y + grid.size, x : x + grid.size] for y, x in part])
        done = model.encode(tiles.to(model.device))
        codes.append(done.to(torch.int8) if model.config.quantizer == "lfq" else done)
    return torch.cat(codes)


class TileDecoder:
    """The sampler over overlapping tiles: `decoder([(grid, codes), ...]) -> [picture, ...]`.

    Tiles go through the decode engine `batch` at a time, those of several pictures together. Beside the engine's own
    buffers, whose size the batch sets, memory holds two fp32 copies of the pictures (three with a solver that
    remembers), for a moment two more of one of them, and the codes. Make one decoder for many calls.

    Args:
        batch: tiles at once.
        steps, rho, guidance, guidance_interval, solver, tail_merge: as `FlowMo.decode`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: FlowMo,
        batch: int = 16,
        steps: int | None = None,
        rho: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = (0.17, 1.02),
        solver: str = "euler",
        tail_merge: int | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: expected at least 1 tile")
        self.model, self.batch = model, batch
        self.schedule = model.schedule(steps, rho, guidance, guidance_interval, solver, tail_merge)
        self._guided = self.schedule.guided
        self._plans: dict[tuple[bool, int], _VelocityPlan] = {}

    @torch.no_grad()
    def __call__(
        self,
        pictures: Sequence[tuple[TileGrid, Tensor]],  # codes [n, T, C] of each
        noise: Sequence[Tensor] | None = None,  # [3, H, W] of each grid's padded size
        seed: int = 0,
        watch: Callable[[float, int, Tensor, Tensor], None] | None = None,
    ) -> list[Tensor]:  # [3, H, W] fp32 in [-1, 1] of each, on the model's device
        """Without `noise`, that of every picture is drawn by itself from `seed`: company does not change a picture.

        Args:
            watch: called as watch(t, k, x, v) at every evaluation with the time, the number of the picture, its state
                x and blended velocity v, [3, H, W] fp32 of its grid's padded size; x - t v is the picture foreseen.

        Raises:
            ValueError: grids, codes or noise that do not fit together or not the model.
        """
        self._check(pictures, noise)
        if noise is None:
            drawn = (
                torch.randn(3, *grid.padded, generator=torch.Generator().manual_seed(seed)) for grid, _ in pictures
            )
            noise = list(drawn)
        device, schedule = self.model.device, self.schedule
        states = [z.to(device, torch.float32) for z in noise]
        del noise  # or a second copy of what was drawn here would stay to the end
        windows = [grid.windows(device) for grid, _ in pictures]
        solvers = [make_solver(schedule.solver, schedule.times) for _ in pictures]
        tiles = list(_tiles([grid for grid, _ in pictures]))
        parts = list(_even_parts(tiles, self.batch))
        captured = device.type == "cuda"  # then one graph for all parts, of which the shorter run padded
        for j, guided in enumerate(self._guided):
            blended = [torch.zeros_like(z) for z in states]
            for part in parts:
                codes = torch.stack([pictures[t.picture][1][t.number] for t in part])
                seen = torch.stack([states[t.picture][t.area] for t in part])
                with self.model.engine.lock:  # a plan's time and buffers are one evaluation's
                    plan = self._plan(guided, len(parts[-1]) if captured else len(part))
                    velocity = plan.velocity(j, codes, seen)
                for tile, v in zip(part, velocity):
                    rows, columns = windows[tile.picture]
                    window = rows[tile.row][:, None] * columns[tile.column]
                    blended[tile.picture][tile.area].addcmul_(v, window)
            for k, rule in enumerate(solvers):
                if watch is not None:
                    watch(rule.evaluations[j], k, states[k], blended[0])
                states[k] = rule.advance(j, states[k], blended.pop(0))
        return [z[:, : grid.height, : grid.width].clamp(-1, 1) for (grid, _), z in zip(pictures, states)]

    def _plan(self, guided: bool, tiles: int) -> _VelocityPlan:
        plan = self._plans.pop((guided, tiles), None)
        if plan is None:
            while len(self._plans) >= KEPT_PLANS:
                self._plans.pop(next(iter(self._plans)))
            plan = _VelocityPlan(self.model, tiles, self.schedule, guided)
        self._plans[guided, tiles] = plan  # the last used one last
        return plan

    def _check(self, pictures: Sequence[tuple[TileGrid, Tensor]], noise: Sequence[Tensor] | None) -> None:
        c = self.model.config
        for grid, codes in pictures:
            expected = [grid.count, c.latent_tokens, c.latent_channels]
            if grid.size != c.image_size or list(codes.shape) != expected:
                raise ValueError(
                    f"codes: expected shape {expected} for tiles of {c.image_size} pixels, got {list(codes.shape)} for "
                    f"tiles of {grid.size}; they belong to another model or another grid"
                )
        if noise is not None and [tuple(z.shape) for z in noise] != [(3, *grid.padded) for grid, _ in pictures]:
            raise ValueError(
                f"noise: expected shapes {[[3, *grid.padded] for grid, _ in pictures]}, "
                f"got {[list(z.shape) for z in noise]}"
            )


def reconstruct_blended(
    model: FlowMo,
    images: Sequence[Tensor],  # each [3, H, W] in [-1, 1], of any size
    overlap: int | None = None,
    batch: int = 16,
    seed: int = 0,
    **sampler: Any,
) -> list[Tensor]:  # each [3, H, W] in [-1, 1]
    """Encode and decode pictures by overlapping tiles; options as for :class:`TileDecoder`."""
    grids = [grid_for(model, int(image.shape[-2]), int(image.shape[-1]), overlap) for image in images]
    codes = [encode_tiles(model, image, grid, batch) for image, grid in zip(images, grids)]
    return TileDecoder(model, batch, **sampler)(list(zip(grids, codes)), seed=seed)


@dataclass(frozen=True)
class _Tile:
    picture: int
    number: int  # within the picture
    row: int
    column: int
    area: tuple[slice, slice, slice]  # of the picture [3, H, W]


def _tiles(grids: Sequence[TileGrid]) -> Iterator[_Tile]:
    for picture, grid in enumerate(grids):
        places = [(r, y, c, x) for r, y in enumerate(grid.rows) for c, x in enumerate(grid.columns)]
        for number, (row, y, column, x) in enumerate(places):
            area = slice(None), slice(y, y + grid.size), slice(x, x + grid.size)
            yield _Tile(picture, number, row, column, area)


def _even_parts(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """Parts of at most so many items, whose lengths differ by one at most: plans have few sizes, and pad little."""
    parts = -(-len(items) // most)
    for i in range(parts):
        yield items[i * len(items) // parts : (i + 1) * len(items) // parts]


class _VelocityPlan(DecodePlan):
    """One evaluation of the (guided) velocity, at any of a schedule's times, on static buffers like a whole decode."""

    def __init__(self, model: FlowMo, batch: int, schedule: Schedule, guide: bool) -> None:
        self._guide = guide
        super().__init__(model, batch, schedule, Execution(model.dtype))

    def describe(self) -> str:
        return f"{'guided ' if self._guide else ''}velocity of {self.batch} tiles, {self.dtype} on {self.device}"

    def velocity(
        self,
        j: int,  # number of the evaluation
        codes: Tensor,  # [b, T, C], b at most the plan's batch
        seen: Tensor,  # [b, 3, S, S] noisy tiles
    ) -> Tensor:  # [b, 3, S, S] fp32
        self.refresh()
        self._table.blocks.copy_(self._times.blocks[j : j + 1])
        self._table.last.copy_(self._times.last[j : j + 1])
        return self.run(codes, seen)

    def _build(self, model: FlowMo) -> None:
        self.guided = [self._guide]
        super()._build(model)
        # A captured graph reads the modulation from one place: that of the time at hand is copied there.
        self._times = self._table
        blocks, last = self._times.blocks[:1].clone(), self._times.last[:1].clone()
        self._table = Modulation(self._times.times[:1], blocks, last)

    def _run(self) -> Tensor:
        w, c = self._weights, self.config
        condition = torch.cat([self._codes, torch.ones_like(self._codes[..., :1])], -1)
        self._rows[self._guide][: w.latents, 0].copy_(F.linear(condition, w.txt_in.w, w.txt_in.b).transpose(0, 1))
        h, h_null = self._image_rows(self._embed(patchify(self._noise, c.patch)), 0, self._guide)
        shift, scale = self._table.last[0, :1], self._table.last[0, 1:]
        v = self._velocity(h, shift, scale).float()
        if h_null is not None:
            v = combine(v, self._velocity(h_null, shift, scale), self.schedule.guidance)
        return unpatchify(v, c.patch, c.image_size)
