"""The plans by the Triton kernels: they read the plans' strided views as the references do."""

from __future__ import annotations

import pytest
import torch

from flowmo import model_config
from flowmo_kernels import KernelUnavailableError, use
from tests.engine.conftest import inputs, make

# 4 image and 3 latent tokens: rows that fill no block of any kernel.
SMALL = model_config("tiny", image_size=8, latent_tokens=3)


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_plans_by_triton(device):
    try:
        with use("triton"):
            pass
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    model = make(SMALL)
    codes, noise = inputs(model, 3)
    expected = model.decode(codes, noise=noise, steps=3, guidance_interval=(0.1, 2.0), plan=False)
    assert (expected.abs() < 1).float().mean() > 0.25
    codes_expected = model.encode(noise.clamp(-1, 1), plan=False)
    model.to(device)
    with use("triton"):
        pictures = model.decode(codes.to(device), noise=noise.to(device), steps=3, guidance_interval=(0.1, 2.0)).cpu()
        encoded = model.encode(noise.clamp(-1, 1).to(device)).cpu()
    # fp32 in another order, through a few blocks and steps.
    assert (pictures - expected).abs().max() <= (1e-5 if device.type == "cpu" else 1e-3)
    assert torch.equal(encoded, codes_expected)
