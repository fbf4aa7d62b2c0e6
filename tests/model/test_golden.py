"""The model against the released implementation, fp32 on the CPU (numbers of tests/data/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flowmo.config import LossConfig
from flowmo.layers import patchify, unpatchify
from flowmo.sampling import euler_chain, euler_sample
from flowmo.training.pretrain import flow_loss
from tests.model import golden as golden_file

# The released implementation ran in fp32 with its own order of sums; 2e-4 is the bound of the project's charter.
RELATIVE = 2e-4


@pytest.fixture(scope="module")
def golden():
    return golden_file.load()


@pytest.fixture(scope="module")
def model(golden):
    return golden_file.model(golden)


def close(actual: Tensor, expected: np.ndarray) -> None:
    expected_tensor = torch.from_numpy(np.asarray(expected)).double()
    error = (actual.detach().double() - expected_tensor).norm() / expected_tensor.norm().clamp_min(1e-12)
    assert error < RELATIVE, f"relative error {error:.2e}"


def tensors(golden, *names):
    return [torch.from_numpy(golden[n]) for n in names]


def test_codes_tokens_and_entropies(golden, model):
    (x,) = tensors(golden, "x")
    with torch.no_grad():
        latent = model.latent(x)
        quantized = model.quantize(latent)
    close(latent, golden["code"])
    assert torch.equal(quantized.codes, torch.from_numpy(golden["quantized"]))
    assert torch.equal(quantized.tokens.flatten(), torch.from_numpy(golden["indices"]))
    close(quantized.per_sample_entropy, golden["per_sample_entropy"])
    close(quantized.codebook_entropy, golden["codebook_entropy"])
    close(quantized.commitment, golden["commitment"])
    close(quantized.loss(LossConfig()), golden["quantizer_loss_train"])


def check_gradient(prefix: str, golden, gradient: Tensor | None) -> None:
    norm = float(golden[f"{prefix}/norm"])
    if norm == 0:  # a weight of a stream whose output nobody reads: never computed here
        assert gradient is None or float(gradient.norm()) == 0
        return
    assert gradient is not None
    assert float(gradient.norm()) == pytest.approx(norm, rel=RELATIVE)
    direction = np.random.RandomState(123).standard_normal(tuple(gradient.shape))
    projection = float((gradient.double().numpy() * direction).sum())
    # The projection of a vector of this norm is itself of the norm's size: that is its scale of error.
    assert projection == pytest.approx(float(golden[f"{prefix}/projection"]), abs=RELATIVE * norm)
    close(gradient.flatten()[:64], golden[f"{prefix}/head"])


def test_velocity_losses_and_gradients(golden, model):
    x, z, t = tensors(golden, "x", "z1", "t")
    model.zero_grad()
    quantized = model.quantize(model.latent(x))
    x_t = t[:, None, None, None] * z + (1 - t[:, None, None, None]) * x
    tokens = patchify(x_t, 4)
    velocity = model.velocity(tokens, t, model.condition(quantized.codes))
    null = model.velocity(tokens, t, model.condition(quantized.codes, keep=False))
    close(unpatchify(velocity, 4, 32), golden["velocity"])
    close(unpatchify(null, 4, 32), golden["velocity_null"])
    flow = flow_loss(velocity, patchify(x, 4), patchify(z, 4))
    close(flow, golden["flow_loss"])
    loss = flow + quantized.loss(LossConfig())
    close(loss, golden["train_loss"])
    loss.backward()
    parameters = dict(model.named_parameters())
    names = sorted({k.split("/")[1] for k in golden if k.startswith("grad/")})
    assert len(names) == 6
    for name in names:
        check_gradient(f"grad/{name}", golden, parameters[name].grad)


def test_guided_sample(golden, model):
    (z,) = tensors(golden, "z")
    codes = torch.from_numpy(golden["quantized"])
    trace: list[Tensor] = []
    conditions = {c: model.condition(codes, keep=c) for c in (True, False)}
    sample = euler_sample(lambda x, t, c: model.velocity(x, t, conditions[c]), patchify(z, 4), trace=trace)
    close(unpatchify(trace[0], 4, 32), golden["sample_step0"])
    close(unpatchify(sample, 4, 32), golden["sample"])
    # The public call clips.
    close(model.decode(codes, noise=z), golden["sample"].clip(-1, 1))


def test_chain_of_stage_1b_and_its_gradient(golden, model):
    z, times = tensors(golden, "z", "chain_ts")
    model.zero_grad()
    condition = model.condition(torch.from_numpy(golden["quantized"]))
    sample = euler_chain(lambda x, t, _: model.velocity(x, t, condition), patchify(z, 4), times)
    close(unpatchify(sample, 4, 32), golden["chain_sample"])
    sample.square().mean().backward()
    check_gradient("chain_grad/decoder.img_in.weight", golden, model.decoder.img_in.weight.grad)
