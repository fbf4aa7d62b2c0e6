"""The model on its kernels: the same losses and weights as on the plain path, whichever implementation runs."""

from __future__ import annotations

import pytest
import torch

from flowmo import FlowMo, model_config
from flowmo.config import LossConfig, NoiseConfig, OptimConfig
from flowmo.training.optim import AdamHoldEMA
from flowmo.training.pretrain import pretrain_loss
from flowmo_kernels import use
from tests.model import golden


def train(implementation: str, device: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = model_config("tiny", image_size=8, latent_tokens=2, decoder_depth=1, heads=1)
    with use(implementation):
        model = FlowMo(config)
        golden.fill(model.named_parameters())
        model.to(device)
        for part in (model.encoder, model.decoder):
            for parameter in part.unread_parameters():
                parameter.requires_grad_(False)
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        optimizer = AdamHoldEMA(named, OptimConfig(ema_every=2, ema_decay=0.9))
        random = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(steps):
            images = (torch.rand(2, 3, 8, 8, generator=random) * 2 - 1).to(device)
            noise = torch.Generator(device).manual_seed(len(losses))
            out = pretrain_loss(model, images, LossConfig(), NoiseConfig(), generator=noise)
            out["total"].backward()
            losses.append(float(out["total"].detach()))
            optimizer.step(1e-3)
    return losses, {k: p.detach().cpu() for k, p in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ten_training_steps_on_triton_follow_the_reference(device):
    reference, reference_weights = train("ref", device, 10)
    losses, weights = train("triton", device, 10)
    # fp32 sums in another order differ by about 1e-7; an update of Adam turns that into lr times the relative error
    # of a gradient, and ten of them add up. A wrong gradient shows at once in the first updates (1e-3 each).
    assert losses == pytest.approx(reference, rel=2e-5)
    for key, weight in weights.items():
        error = (weight - reference_weights[key]).norm() / reference_weights[key].norm()
        assert error < 1e-4, f"{key}: {error:.1e}"
