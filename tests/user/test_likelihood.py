"""Log-likelihood by the reverse flow against distributions whose density has a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowmo import FlowMo
from flowmo import likelihood as command
from flowmo.data import heldout_photographs, to_tensor
from flowmo.engine import Schedule
from flowmo.likelihood import Field, bits_per_dim, likelihood, log_density


def gaussian_flow(mean: Tensor, covariance: Tensor) -> Field:
    """The velocity from N(mean, covariance) at t = 0 to N(0, 1) at t = 1: E[z - x | x_t] with x_t = t z + (1 - t) x.

    With K = t^2 + (1 - t)^2 covariance and r = x_t - (1 - t) mean: E[z | x_t] = t K^-1 r, E[x | x_t] = mean +
    (1 - t) covariance K^-1 r.
    """
    one = torch.eye(len(mean), dtype=mean.dtype)

    def velocity(x: Tensor, t: float) -> Tensor:
        k = t**2 * one + (1 - t) ** 2 * covariance
        solved = torch.linalg.solve(k, (x - (1 - t) * mean).T)
        return ((t * one - (1 - t) * covariance) @ solved).T - mean

    return velocity


def example(diagonal: bool, dimensions: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, covariance, points, and their log-density."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(dimensions, generator=g, dtype=torch.float64)
    scales = torch.linspace(0.3, 1.5, dimensions, dtype=torch.float64)
    turn = torch.eye(dimensions, dtype=torch.float64)
    if not diagonal:
        turn = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=g, dtype=torch.float64)).Q
    covariance = turn @ (scales**2).diag() @ turn.T
    law = torch.distributions.MultivariateNormal(mean, covariance)
    points = mean + torch.randn(5, dimensions, generator=g, dtype=torch.float64) @ (turn @ scales.diag()).T
    return mean, covariance, points, law.log_prob(points)


def test_the_density_of_a_linear_gaussian_flow_and_its_order():
    """With a diagonal covariance dv/dx is diagonal and the trace estimate exact: only the solver's error is left."""
    mean, covariance, points, expected = example(diagonal=True)
    errors = []
    for steps in (8, 16, 32):
        found = log_density(gaussian_flow(mean, covariance), points, steps, generator=torch.Generator().manual_seed(1))
        errors.append(float((found.log_density - expected).abs().max()))
        assert found.noise.shape == points.shape
    # Runge-Kutta of order 4: each halving of the steps divides the error by 16, less what higher orders add.
    assert errors[0] / errors[1] > 8 and errors[1] / errors[2] > 8
    assert errors[2] < 1e-4


def test_where_the_flow_takes_the_data():
    """In one dimension the flow is monotone and keeps quantiles: (x - mean) / scale is where x arrives."""
    mean, scale = torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)
    points = torch.tensor([[-0.3], [0.7], [1.9]], dtype=torch.float64)
    found = log_density(gaussian_flow(mean, scale), points, steps=64)
    assert torch.allclose(found.noise, (points - mean) / 0.5, atol=1e-6)


def test_hutchinson_estimate_is_unbiased_and_knows_its_error():
    mean, covariance, points, expected = example(diagonal=False)
    probes = 256
    found = log_density(
        gaussian_flow(mean, covariance), points, 8, probes=probes, generator=torch.Generator().manual_seed(2)
    )
    distance = (found.log_density - expected).abs()
    assert bool((found.standard_error > 0.001).all())
    # 5 points at 4.5 standard errors: wrong by chance once in 30,000 seeds; the solver's error is far below.
    assert bool((distance < 4.5 * found.standard_error).all())
    again = log_density(
        gaussian_flow(mean, covariance), points, 8, probes=4, generator=torch.Generator().manual_seed(2)
    )
    # The standard error falls as the root of the number of probes; four probes tell it to within a factor of a few.
    assert 3 < float((again.standard_error / found.standard_error).mean()) < 40


def test_bits_per_dimension_of_uniform_levels():
    """A density of 1/2 for each dimension of [-1, 1] makes 255 levels' widths: log2 255 bits."""
    flat = torch.tensor([12 * math.log(0.5)])
    assert float(bits_per_dim(flat, 12)) == pytest.approx(math.log2(255), abs=1e-6)


def test_likelihood_of_the_model_is_that_of_its_decoder(tiny):
    """Against the flow written out by hand from the model's own parts."""
    image = to_tensor(heldout_photographs()["coffee"].resize((32, 32)))[None]
    options = {"steps": 2, "dequantize": False}
    found = likelihood(tiny, image, probes=3, generator=torch.Generator().manual_seed(0), **options)
    assert found.bits_per_dim.shape == (1,) and float(found.standard_error) > 0
    assert all(p.requires_grad and p.grad is None for p in tiny.parameters())

    condition = tiny.condition(tiny.encode(image)).detach()
    plain = log_density(
        lambda x, t: tiny.velocity(x, torch.full((1,), t), condition),
        tokens_of(image, tiny.config.patch),
        steps=2,
        probes=3,
        generator=torch.Generator().manual_seed(0),
    )
    expected = -float(plain.log_density) / (3072 * math.log(2)) + math.log2(127.5)
    assert float(found.bits_per_dim) == pytest.approx(expected, rel=1e-6)
    assert float(found.standard_error) == pytest.approx(float(plain.standard_error) / (3072 * math.log(2)), rel=1e-6)
    outside = {"guidance": 2.0, "guidance_interval": (9.0, 9.1)}  # t = 0.9: no evaluation of two steps lies there
    same = likelihood(tiny, image, probes=3, generator=torch.Generator().manual_seed(0), **options, **outside)
    assert torch.equal(same.bits_per_dim, found.bits_per_dim)
    # A code says something about its picture, guidance and noise change the law: none of the options is without effect.
    for change in (
        {"codes": -tiny.encode(image)},
        {"guidance": 2.0, "guidance_interval": None},
        {"dequantize": True},
    ):
        other = likelihood(tiny, image, probes=3, generator=torch.Generator().manual_seed(0), **{**options, **change})
        assert float(other.bits_per_dim) != float(found.bits_per_dim)


def test_dequantization_fills_the_width_of_a_level_around_it(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "log_density", lambda v, x, *rest: seen.append(x) or log_density(v, x, *rest))
    likelihood(tiny, torch.zeros(1, 3, 32, 32), steps=1, generator=torch.Generator().manual_seed(0))
    half = 1 / 255
    assert -half <= float(seen[0].min()) < -0.99 * half and 0.99 * half < float(seen[0].max()) <= half
    assert abs(float(seen[0].mean())) < 5 * 2 * half / 12**0.5 / 3072**0.5  # of a uniform law, five standard errors


def tokens_of(image: Tensor, p: int) -> Tensor:
    n = image.shape[-1] // p
    return image.reshape(1, 3, n, p, n, p).permute(0, 2, 4, 3, 5, 1).reshape(1, n * n, 3 * p * p)


def test_bad_options_are_refused():
    field = gaussian_flow(torch.zeros(1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="probes=0"):
        log_density(field, torch.zeros(1, 1), probes=0)
    with pytest.raises(ValueError, match="steps=0"):
        log_density(field, torch.zeros(1, 1), steps=0)


def test_the_command(tiny, tmp_path, capsys):
    tiny.save_pretrained(tmp_path / "model")
    for name in ("coffee", "rocket"):
        heldout_photographs()[name].resize((40, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    arguments = [str(tmp_path), "--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--steps", "2"]
    assert command.main([*arguments, "--probes", "2"]) == 0
    out, err = capsys.readouterr()
    assert "coffee.png" in out and "rocket.png" in out and "over 2 pictures" in out and "0.0938 more" in out
    assert "broken.png" in err and out.count(" +- ") == 2 and "+- 0.0000" not in out
    assert command.main([*arguments, "--probes", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] != out.splitlines()[1:]


def test_a_distilled_decoder_has_no_likelihood():
    model = FlowMo("tiny").eval()
    model.sampler = Schedule(steps=2, rho=1.0, guidance=1.0)
    with pytest.raises(ValueError, match=r"distilled to decode in 2 steps.*RUN/teacher"):
        likelihood(model, torch.zeros(1, 3, 32, 32), steps=2)
