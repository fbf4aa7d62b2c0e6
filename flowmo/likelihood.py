"""How likely a model finds pictures, given their codes: python -m flowmo.likelihood INPUT... [--checkpoint C]

    python -m flowmo.likelihood photo.jpg                        with the small weights that come along
    python -m flowmo.likelihood photos/ --checkpoint flowmo_lo.pth --steps 32 --probes 8

Prints -log2 p(picture | code) in bits per dimension (one dimension is one colour of one pixel), with the standard error
of the trace estimate. The code itself takes further bits, which are printed beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowmo import FlowMo, cli
from flowmo.engine import Schedule
from flowmo.layers import patchify
from flowmo.sampling import guided_steps, time_grid
from flowmo.solvers import combine

LEVEL = 1 / 127.5  # distance of neighbouring 8-bit levels on [-1, 1]

Field = Callable[[Tensor, float], Tensor]  # (x [B, ...], t) -> velocity of x's shape, images independent


class Density(NamedTuple):
    log_density: Tensor  # [B] nats
    standard_error: Tensor  # [B] nats, of the trace estimate; 0 with one probe, which cannot tell
    noise: Tensor  # x's shape, where the flow takes x to at t = 1


class Likelihood(NamedTuple):
    bits_per_dim: Tensor  # [B], of 8-bit levels
    standard_error: Tensor  # [B] bits per dimension, of the trace estimate; 0 with one probe
    noise: Tensor  # [B, N, 3 p^2] patch tokens, where the flow takes the pictures to


def log_density(
    velocity: Field,
    x: Tensor,  # [B, ...] data
    steps: int = 25,
    rho: float = 4.0,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Density:
    """Log-density of data under a flow dx/dt = v(x, t) from data at t = 0 to standard normal noise at t = 1.

    Instantaneous change of variables (Chen et al. 2018): log p(x_0) = log N(x_1; 0, 1) + integral over t from 0 to 1 of
    div v(x_t, t). The divergence is Hutchinson's estimate e . (dv/dx) e with entries of e random signs, the same ones
    along the whole path (Grathwohl et al. 2019), so the estimate is unbiased for the path that the solver takes; it is
    exact where dv/dx is diagonal. Solved backwards in the sampler's sense, by the classical Runge-Kutta rule of order 4
    over the sampler's times ((n - i) / n)^rho, four evaluations a step.

    Args:
        velocity: must be differentiable in x.
        probes: vectors e; each costs one backward pass an evaluation.

    Raises:
        ValueError: steps, rho or probes out of range.
    """
    if probes < 1:
        raise ValueError(f"probes={probes}: expected at least 1")
    times = time_grid(steps, rho)[::-1]
    shape = (probes, *x.shape)
    device = generator.device if generator is not None else x.device
    signs = torch.randint(0, 2, shape, generator=generator, device=device).to(x.device, x.dtype) * 2 - 1

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Velocity, and its divergence by each probe [probes, B]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            v = velocity(x, t)
            pulled = [torch.autograd.grad(v, x, e, retain_graph=i + 1 < probes)[0] for i, e in enumerate(signs)]
        traces = [(g * e).flatten(1).double().sum(1) for g, e in zip(pulled, signs)]
        return v.detach(), torch.stack(traces)

    x = x.detach()
    integral = torch.zeros(probes, x.shape[0], dtype=torch.float64, device=x.device)
    for t, to in pairwise(times):
        h = to - t
        v1, d1 = both(x, t)
        v2, d2 = both(x + 0.5 * h * v1, t + 0.5 * h)
        v3, d3 = both(x + 0.5 * h * v2, t + 0.5 * h)
        v4, d4 = both(x + h * v3, to)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        integral += h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    noise = x.flatten(1).double()
    normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
    error = integral.std(0) / math.sqrt(probes) if probes > 1 else torch.zeros_like(normal)
    return Density(normal + integral.mean(0), error, x)


def bits_per_dim(
    log_density: Tensor,  # nats, of pictures on [-1, 1]
    dimensions: int,
) -> Tensor:
    """-log2 of the probability of 8-bit levels, for each dimension: the density times the volume of a level."""
    return -log_density / (dimensions * math.log(2)) - math.log2(LEVEL)


def likelihood(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1], of 8-bit levels
    codes: Tensor | None = None,  # [B, T, C]; None: those of the images
    steps: int = 25,
    rho: float = 4.0,
    probes: int = 1,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = (0.17, 1.02),
    generator: torch.Generator | None = None,
    dequantize: bool = True,
) -> Likelihood:
    """Bits per dimension of pictures given their codes, under the decoder's flow.

    Uniform noise of one level's width makes a density of 8-bit pictures (Theis et al. 2016); the expected result
    is then an upper bound of the true bits per dimension. Without it, the density on the exact levels is taken.

    Args:
        guidance: 1, the conditional flow itself, or the weight of a guided sampler, whose law it then is.
        generator: draws the dequantization noise and the probes.

    Raises:
        TypeError, ValueError: as `FlowMo.encode`, options out of range, or a distilled model.
    """
    c = model.config
    if model.sampler != Schedule():  # only distilled models carry a sampler of their own
        raise ValueError(
            f"model: distilled to decode in {model.sampler.steps} steps, so its velocities are no flow; "
            "take its teacher (RUN/teacher of its training run)"
        )
    if codes is None:
        codes = model.encode(images)
    images = images.to(model.device, torch.float32)
    if dequantize:
        device = generator.device if generator is not None else model.device
        images = images + LEVEL * (torch.rand(images.shape, generator=generator, device=device) - 0.5).to(model.device)
    codes = codes.to(model.device, model.dtype)
    condition, null = model.condition(codes).detach(), model.condition(codes, keep=False).detach()

    def velocity(x: Tensor, t: float) -> Tensor:
        moment = torch.full((x.shape[0],), t, device=x.device)
        v = model.velocity(x.to(model.dtype), moment, condition).float()
        if guided_steps([t, 0.0], guidance, guidance_interval)[0]:
            v = combine(v, model.velocity(x.to(model.dtype), moment, null), guidance)
        return v

    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:  # no gradient of theirs is wanted, and none is kept in memory
            p.requires_grad_(False)
        density = log_density(velocity, patchify(images, c.patch), steps, rho, probes, generator)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    dimensions = 3 * c.image_size**2
    error = density.standard_error / (dimensions * math.log(2))
    return Likelihood(bits_per_dim(density.log_density, dimensions), error, density.noise)


def main(arguments: list[str]) -> int:
    from flowmo.reconstruct import batches, collect
    from flowmo.tokenize import open_model

    options = parser().parse_args(arguments)
    cli.at_least(1, options, "batch", "steps", "probes")
    inputs = collect(options.inputs)
    model = open_model(options.checkpoint, options.device, "fp32")
    c = model.config
    print(
        f"{len(inputs)} pictures at {c.image_size} x {c.image_size}, {options.steps} steps, {options.probes} probes, "
        f"on {model.device}; {cli.kernels()}",
        flush=True,
    )
    generator = torch.Generator().manual_seed(options.seed)
    results: list[float] = []
    for paths, images in batches(inputs, c.image_size, options.batch):
        found = likelihood(
            model, images, steps=options.steps, rho=options.rho, probes=options.probes, guidance=options.guidance,
            generator=generator,
        )  # fmt: skip
        for path, bits, error in zip(paths, found.bits_per_dim.tolist(), found.standard_error.tolist()):
            results.append(bits)
            print(f"{path}  {bits:.4f} bits per dimension" + (f" +- {error:.4f}" if options.probes > 1 else ""))
        sys.stdout.flush()
    if not results:
        raise ValueError("none of the inputs could be read as a picture")
    code = "" if c.bits_per_pixel is None else f"; the code takes {c.bits_per_pixel / 3:.4f} more"
    print(
        f"mean {sum(results) / len(results):.4f} bits per dimension over {len(results)} pictures, given the code{code}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.likelihood", description=__doc__, formatter_class=cli.Help)
    p.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help="pictures, or folders searched for them")
    p.add_argument(
        "--checkpoint", help="released .pth, model folder or run; default: the small weights that come along"
    )
    p.add_argument("--steps", type=int, default=25, help="of the solver, four evaluations each")
    p.add_argument("--rho", type=float, default=4.0, help="time spacing; 1 is even")
    p.add_argument("--probes", type=int, default=4, help="random vectors of the trace estimate")
    p.add_argument("--guidance", type=float, default=1.0, help="weight; 1 is the conditional flow itself")
    p.add_argument("--batch", type=int, default=8, help="pictures at once")
    p.add_argument("--seed", type=int, default=0, help="of dequantization noise and probes")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return p


if __name__ == "__main__":
    cli.run(main)
