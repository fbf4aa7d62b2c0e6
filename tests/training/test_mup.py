"""True muP by a coordinate check: how far activations move in a few steps does not depend on the width."""

from __future__ import annotations

import pytest
import torch

from flowmo import FlowMo
from flowmo.config import LossConfig, ModelConfig, NoiseConfig, OptimConfig, parse
from flowmo.training.loop import Trainer
from flowmo.training.optim import AdamHoldEMA, mup_scales, scale_readouts_
from flowmo.training.pretrain import pretrain_loss


def movement(width: int, base: int | None, hold: str) -> dict[str, float]:
    """Root mean square change of every decoder branch and of both readouts over four steps of Adam."""
    torch.manual_seed(0)
    shape = ModelConfig(
        image_size=16, patch=4, heads=2, encoder_width=width, decoder_width=width, encoder_depth=1, decoder_depth=2,
        latent_tokens=8,
    )  # fmt: skip
    model = FlowMo(shape)
    for part in (model.encoder, model.decoder):
        for parameter in part.unread_parameters():
            parameter.requires_grad_(False)
    if base is not None:
        scale_readouts_(model, base)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    scales = mup_scales(named, shape, base) if base is not None else {}
    optimizer = AdamHoldEMA(named, OptimConfig(hold_norms=hold, eps=1e-12), scales)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        branch = name.startswith("decoder.double") and name.endswith(("attn.proj", "mlp.2"))
        if branch or name.endswith("img.linear"):
            module.register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, []).append(out.detach()))
    for _ in range(5):
        random = torch.Generator().manual_seed(2)
        pretrain_loss(model, images, LossConfig(), NoiseConfig(), None, random)["total"].backward()
        optimizer.step(2e-3)
    return {k: float((v[-1] - v[0]).square().mean().sqrt()) for k, v in seen.items()}


@pytest.mark.parametrize("hold", ["none", "matrix"])
def test_coordinate_check(hold):
    narrow, wide, wide_plain = movement(2, 2, hold), movement(8, 2, hold), movement(8, None, hold)
    assert len(narrow) >= 7
    growth = {k: wide[k] / narrow[k] for k in narrow}
    plain = {k: wide_plain[k] / narrow[k] for k in narrow}
    # At four times the width, what does not depend on it stays within the noise of one draw of weights. With one rate
    # for all, a sum over the width of aligned steps is up to four times as large.
    assert all(0.6 < g < 1.4 for g in growth.values()), growth
    assert plain["decoder.final_layer_img.linear"] > 2.5 and max(plain.values()) > 2.5, plain
    assert all(plain[k] > 1.5 * growth[k] for k in plain if "img_mlp" in k), plain


def test_option_scales_the_right_weights(tmp_path):
    options = ["tiny", f"run={tmp_path}", "model.decoder_width=8", "model.encoder_width=4", "optim.mup_base_width=4"]
    trainer = Trainer(parse(options))
    scales = trainer.optimizer.rate_scales
    assert set(scales.values()) == {0.5, 1.0}
    half = {k for k, v in scales.items() if v == 0.5}
    assert all(k.startswith("decoder.") and k.endswith(".weight") for k in half)
    assert {"decoder.final_layer_img.linear.weight", "decoder.time_in.out_layer.weight"} < half
    assert {"decoder.final_layer_img.adaLN_modulation.1.weight", "decoder.double_blocks.0.img_mlp.0.weight"} < half
    for free in ("decoder.img_in.weight", "decoder.txt_in.weight", "decoder.time_in.in_layer.weight"):
        assert free not in scales
    plain = Trainer(parse([*options[:1], f"run={tmp_path / 'plain'}", *options[2:4]]))
    assert plain.optimizer.rate_scales == {}
    key = "final_layer_img.linear.weight"
    ratio = trainer.model.decoder.get_parameter(key) / plain.model.decoder.get_parameter(key)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5**0.5))
    trainer.train_step()
