"""Solvers on a flow with a known solution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmo.sampling import euler_sample
from flowmo.solvers import SOLVERS, make_solver, sample, solver_times

MEAN, STD = 0.3, 0.4


def velocity(x: Tensor, t: float) -> Tensor:
    """E[z - data | x_t = x] for data ~ N(MEAN, STD^2): x_t has mean m, deviation s, and v = m' + (x - m) s' / s."""
    variance = t**2 + (1 - t) ** 2 * STD**2
    return -MEAN + (x - (1 - t) * MEAN) * (t - (1 - t) * STD**2) / variance


def error(name: str, steps: int, rho: float) -> float:
    solver = make_solver(name, solver_times(steps, rho))
    solver.restart()
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x = start
    for j, t in enumerate(solver.evaluations):
        x = solver.advance(j, x, velocity(x, t))
    return float((x - (MEAN + STD * start)).abs().max())  # the flow maps z to MEAN + STD z


@pytest.mark.parametrize("rho", [1.0, 4.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, rho):
    coarse, fine = error(name, 640, rho), error(name, 1280, rho)
    order = math.log2(coarse / fine)
    # The next term of the error's expansion is smaller by about 1 / steps; dpm's leading one has a factor log(steps),
    # since its first steps are long in log SNR: 1 / log(steps) less of apparent order.
    assert order == pytest.approx(SOLVERS[name].order, abs=0.25)


def test_second_order_is_worth_it_at_equal_forwards():
    for rho in (1.0, 4.0):
        euler = error("euler", 32, rho)
        assert error("heun", 16, rho) < euler and error("ab2", 32, rho) < euler and error("dpm", 32, rho) < euler


@pytest.mark.parametrize(("name", "forwards"), [("euler", 10), ("heun", 19), ("ab2", 10), ("dpm", 10)])
def test_evaluations(name, forwards):
    times = solver_times(10)
    solver = make_solver(name, times)
    assert len(solver.evaluations) == forwards
    assert set(solver.evaluations) == set(times[:-1])


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_of_any_solver_is_euler(name):
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    solver = make_solver(name, [1.0, 0.0])
    assert torch.allclose(solver.advance(0, x, 2 * x), -x)


UNEVEN = [0.9, 0.85, 0.6, 0.5, 0.1]  # orders of convergence do not see a wrong ratio of step sizes


@pytest.mark.parametrize("name", ["heun", "ab2"])
def test_linear_velocities_on_an_uneven_grid_are_integrated_exactly(name):
    solver = make_solver(name, UNEVEN)
    x = torch.zeros(1, dtype=torch.float64)
    states = []
    for j, t in enumerate(solver.evaluations):
        x = solver.advance(j, x, torch.full_like(x, 1 + 3 * t))
        states.append(float(x))

    def integral(a: float, b: float) -> float:
        return (b + 1.5 * b**2) - (a + 1.5 * a**2)

    # From after ab2's first step (Euler) to the end, and to before heun's last step (Euler).
    first, last, span = (0, -1, (0.85, 0.1)) if name == "ab2" else (1, -2, (0.85, 0.5))
    assert states[last] - states[first] == pytest.approx(integral(*span), abs=1e-12)


def test_dpm_step_in_the_form_of_its_paper():
    solver = make_solver("dpm", UNEVEN)
    x0, v0, v1 = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    x1 = solver.advance(0, x0, v0)
    clean0, clean1 = x0 - 0.9 * v0, x1 - 0.85 * v1

    def snr(t: float) -> float:
        return math.log((1 - t) / t)

    h_last, h = snr(0.85) - snr(0.9), snr(0.6) - snr(0.85)
    r = h_last / h
    extrapolated = (1 + 1 / (2 * r)) * clean1 - 1 / (2 * r) * clean0
    expected = (0.6 / 0.85) * x1 - (1 - 0.6) * math.expm1(-h) * extrapolated
    assert torch.allclose(solver.advance(1, x1, v1), expected, rtol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_restart_forgets(name):
    solver = make_solver(name, solver_times(4))
    x, v = torch.ones(2), torch.full((2,), 0.5)
    results = []
    for _ in range(2):
        solver.restart()
        results.append([solver.advance(j, x, (j + 1) * v) for j in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_default_is_the_paper_s_sampler():
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        return x * t[:, None, None] + (1.0 if conditional else 0.5)

    assert torch.equal(sample(model, noise), euler_sample(model, noise))
