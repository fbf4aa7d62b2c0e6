"""The generator's structure, against a second writing of it in plain PyTorch, and its files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowmo import FlowMo
from flowmo.config import ConfigError
from flowmo.data.tokens import TokenLayout
from flowmo.generator import Generator, NetworkConfig
from flowmo.pretrained import CheckpointError
from flowmo_kernels import use

SMALL = NetworkConfig(tokens=6, bits=3, classes=4, hidden=32, depth=4, heads=2)


def small(config: NetworkConfig = SMALL) -> Generator:
    """A generator whose norms, biases and everything else are away from their initial values."""
    torch.manual_seed(0)
    model = Generator(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL.mask_id + 1, (3, SMALL.tokens), generator=source)
    return ids, torch.tensor([0, 3, SMALL.null_class])


def reference(model: Generator, ids: Tensor, labels: Tensor) -> Tensor:
    """The U-ViT written once more: its own loops, softmax attention by hand, LayerNorm of PyTorch."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    c = model.config

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (c.hidden,), 1 + w[f"{name}.scale"], w[f"{name}.shift"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def block(x: Tensor, name: str) -> Tensor:
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.qkv")
        heads = []
        d = c.hidden // c.heads
        for h in range(c.heads):
            q, k, v = (qkv[..., i * c.hidden + h * d : i * c.hidden + (h + 1) * d] for i in range(3))
            heads.append(torch.softmax(q @ k.mT / d**0.5, dim=-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{name}.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.fc1")
        gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        return x + linear(gelu, f"{name}.fc2")

    table = w["embedding.weight"]
    first = torch.stack([table[2**c.bits + 1 + int(y)] for y in labels])[:, None]
    x = torch.cat([first, table[ids]], 1) + w["position_embedding"]
    stack = []
    for i in range(c.depth // 2):
        x = block(x, f"in_blocks.{i}")
        stack.append(x)
    x = block(x, "mid_block")
    for i in range(c.depth // 2):
        x = block(linear(torch.cat([x, stack.pop()], -1), f"out_blocks.{i}.skip"), f"out_blocks.{i}")
    return linear(norm(x, "norm"), "head")[:, 1:]


def test_parameters_of_the_published_size():
    with torch.device("meta"):
        model = Generator()
        shorter = Generator(NetworkConfig(tokens=256))
    assert sum(p.numel() for p in model.parameters()) == 397_178_368
    assert sum(p.numel() for p in shorter.parameters()) == 396_916_224
    assert len(model.in_blocks) + 1 + len(model.out_blocks) == 29
    assert model.embedding.num_embeddings == 1514 and model.head.out_features == 512
    parts = {
        "embedding": 1_550_336,
        "in_blocks": 176_304_128,
        "mid_block": 12_593_152,
        "out_blocks": 205_678_592,
        "norm": 2_048,
        "head": 524_800,
    }
    for name, count in parts.items():
        assert sum(p.numel() for p in getattr(model, name).parameters()) == count, name


def test_forward_is_the_u_vit():
    model = small()
    ids, labels = batch()
    logits = model(ids, labels)
    assert logits.shape == (3, SMALL.tokens, 8) and logits.dtype == torch.float32
    # fp32 against fp64 over 5 blocks of widths up to 128: a few dozen roundings of 6e-8 on numbers of order 10
    torch.testing.assert_close(logits.double(), reference(model, ids, labels), rtol=1e-4, atol=1e-4)


def test_fused_kernels_give_the_same_numbers_and_gradients():
    """The kernels, interpreted on a CPU: their modulation is one row for all pictures, with stride 0."""
    ids, labels = batch()
    results = []
    for choice in ("ref", "triton"):
        model = small(replace(SMALL, depth=2))
        with use(choice):
            logits = model(ids, labels)
            logits.square().mean().backward()
        results.append((logits.detach(), {k: p.grad for k, p in model.named_parameters()}))
    (plain, plain_grads), (fused, fused_grads) = results
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_initial_weights():
    torch.manual_seed(0)
    model = Generator(NetworkConfig(tokens=16, bits=6, classes=10, hidden=64, depth=2, heads=2))
    for name, p in model.named_parameters():
        if name.endswith(("bias", "scale", "shift")):
            assert not p.any(), name
        else:  # 5 standard errors of a standard deviation from n samples
            assert abs(float(p.detach().std()) - 0.02) < 5 * 0.02 / (2 * p.numel()) ** 0.5, name


def test_checkpointing_changes_no_gradient_and_every_parameter_has_one():
    ids, labels = batch()
    grads = []
    for checkpointing in (False, True):
        model = small()
        model.gradient_checkpointing = checkpointing
        source = torch.Generator().manual_seed(2)
        (model(ids, labels) * torch.randn(3, SMALL.tokens, 8, generator=source)).sum().backward()
        grads.append({k: p.grad for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        assert torch.equal(grad, grads[1][name]), name
    touched = grads[0]["embedding.weight"].abs().sum(1) > 0
    used = set(ids.flatten().tolist()) | {8 + 1 + int(y) for y in labels}
    assert set(touched.nonzero().flatten().tolist()) == used
    assert (grads[0]["position_embedding"].abs().sum(1) > 0).all()


def test_bf16_logits_come_in_fp32():
    model = small().bfloat16()
    logits = model(*batch())
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9  # not a bf16 product in wider clothes
    with torch.autocast("cpu", torch.bfloat16):
        assert small()(*batch()).dtype == torch.float32


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ({"depth": 3}, "depth=3"),
        ({"hidden": 30, "heads": 4}, "heads=4"),
        ({"tokens": 0}, "tokens=0"),
        ({"bits": 18}, "bits"),
    ],
)
def test_impossible_sizes(sizes, word):
    with pytest.raises(ConfigError, match=word):
        Generator(NetworkConfig(**sizes))


def test_saved_and_loaded(tmp_path):
    model = small()
    model.layout, model.class_names = TokenLayout(6, 3, 6, tokenizer="ab" * 32), ["a", "b", "c", "d"]
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = Generator.from_pretrained(tmp_path / "run")
    assert loaded.config == model.config and loaded.layout == model.layout and loaded.class_names == model.class_names
    assert not loaded.training
    assert torch.equal(loaded(*batch()), model(*batch()))
    assert Generator.from_pretrained(tmp_path / "run", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_what_is_no_generator(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Generator.from_pretrained(tmp_path / "nowhere")
    FlowMo("tiny").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="a tokenizer perhaps"):
        Generator.from_pretrained(tmp_path / "tokenizer")
    small().save_pretrained(tmp_path / "other")
    content = json.loads((tmp_path / "other" / "config.json").read_text())
    content["generator"]["depth"] = 2
    (tmp_path / "other" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="unexpected"):
        Generator.from_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save it again"):
        Generator.from_pretrained(tmp_path / "other")


def test_norm_is_the_affine_layer_norm():
    from flowmo.generator.network import Norm

    torch.manual_seed(0)
    norm, twin = Norm(16), nn.LayerNorm(16)
    with torch.no_grad():
        norm.scale.normal_()
        norm.shift.normal_()
        twin.weight.copy_(1 + norm.scale)
        twin.bias.copy_(norm.shift)
    x, branch = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(norm(x), twin(x))
    total, normed = norm.after(x, branch)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(normed, twin(x + branch))
