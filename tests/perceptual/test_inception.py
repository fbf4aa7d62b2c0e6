"""Inception: keys, arithmetic against the plain sequence of operations, resizing, features. No weights are needed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowmo.data import to_uint8
from flowmo.perceptual import (
    AlexNetFeatures,
    InceptionFeatures,
    InceptionV3,
    WeightsInvalid,
    WeightsMissing,
    load_inception,
    load_lpips,
    random_inception,
    random_lpips,
)
from flowmo.perceptual import inception as module
from flowmo.perceptual.inception import resize_tf1


@lru_cache(maxsize=1)
def network() -> InceptionFeatures:
    return random_inception(seed=1)


def pictures(n: int = 1, size: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_keys_shapes_and_size() -> None:
    with torch.device("meta"):
        net = InceptionV3()
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    state = net.state_dict()
    assert len(state) == 94 * 6 + 2  # convolutions with their batch statistics, and the classifier
    for name, shape in (
        ("Conv2d_4a_3x3.conv.weight", (192, 80, 3, 3)),
        ("Mixed_5b.branch_pool.conv.weight", (32, 192, 1, 1)),
        ("Mixed_6a.branch3x3dbl_3.bn.running_var", (96,)),
        ("Mixed_6c.branch7x7dbl_5.conv.weight", (192, 160, 1, 7)),
        ("Mixed_7a.branch7x7x3_4.conv.weight", (192, 192, 3, 3)),
        ("Mixed_7c.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)),
        ("fc.weight", (1008, 2048)),
    ):
        assert tuple(state[name].shape) == shape, name
    pool, one = net.eval()(torch.empty(2, 3, 299, 299, device="meta"))
    assert pool.shape == (2, 2048) and one.shape == (2, 192, 17, 17)


def test_agrees_with_the_plain_sequence_of_operations() -> None:
    state = {name: t.double().contiguous() for name, t in network().network.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    for name, t in state.items():  # statistics that are not the identity, so that each of them counts
        if "running" in name or ".bn." in name:
            t.copy_(torch.rand(t.shape, generator=generator) * 0.5 + (0 if name.endswith(("mean", "bias")) else 0.75))

    def unit(x: Tensor, name: str, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, gain, bias = (state[f"{name}.bn.{part}"].view(-1, 1, 1) for part in names)
        return ((x - mean) / (var + 1e-3).sqrt() * gain + bias).relu()

    def chain(x: Tensor, block: str, *steps: tuple[str, int, tuple[int, int]]) -> Tensor:
        for name, stride, padding in steps:
            x = unit(x, f"{block}.{name}", stride, padding)
        return x

    def mean3(x: Tensor) -> Tensor:
        ones = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / ones  # over the pixels that exist

    def b35(x: Tensor, b: str) -> Tensor:
        return torch.cat(
            [
                unit(x, f"{b}.branch1x1"),
                chain(x, b, ("branch5x5_1", 1, (0, 0)), ("branch5x5_2", 1, (2, 2))),
                chain(x, b, *((f"branch3x3dbl_{i}", 1, (int(i > 1),) * 2) for i in (1, 2, 3))),
                unit(mean3(x), f"{b}.branch_pool"),
            ],
            1,
        )

    def b17(x: Tensor, b: str) -> Tensor:
        flat, tall = (0, 3), (3, 0)
        double = [
            ("branch7x7dbl_1", (0, 0)),
            *((f"branch7x7dbl_{i}", tall if i % 2 == 0 else flat) for i in range(2, 6)),
        ]
        return torch.cat(
            [
                unit(x, f"{b}.branch1x1"),
                chain(x, b, ("branch7x7_1", 1, (0, 0)), ("branch7x7_2", 1, flat), ("branch7x7_3", 1, tall)),
                chain(x, b, *((name, 1, padding) for name, padding in double)),
                unit(mean3(x), f"{b}.branch_pool"),
            ],
            1,
        )

    def b8(x: Tensor, b: str) -> Tensor:
        three = unit(x, f"{b}.branch3x3_1")
        double = chain(x, b, ("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, (1, 1)))
        pooled = F.max_pool2d(x, 3, 1, 1) if b == "Mixed_7c" else mean3(x)
        return torch.cat(
            [
                unit(x, f"{b}.branch1x1"),
                unit(three, f"{b}.branch3x3_2a", 1, (0, 1)),
                unit(three, f"{b}.branch3x3_2b", 1, (1, 0)),
                unit(double, f"{b}.branch3x3dbl_3a", 1, (0, 1)),
                unit(double, f"{b}.branch3x3dbl_3b", 1, (1, 0)),
                unit(pooled, f"{b}.branch_pool"),
            ],
            1,
        )

    picture = pictures(1, 139).double()  # the convolutions take any size
    x = unit(unit(unit(picture, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, (1, 1))
    x = F.max_pool2d(unit(unit(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = b35(x, b)
    double = (("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, (1, 1)), ("branch3x3dbl_3", 2, (0, 0)))
    three = unit(x, "Mixed_6a.branch3x3", 2)
    x = torch.cat([three, chain(x, "Mixed_6a", *double), F.max_pool2d(x, 3, 2)], 1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if b == "Mixed_6d":
            spatial = unit(x, "Mixed_6d.branch1x1")
        x = b17(x, b)
    three = chain(x, "Mixed_7a", ("branch3x3_1", 1, (0, 0)), ("branch3x3_2", 2, (0, 0)))
    seven = (("1", 1, (0, 0)), ("2", 1, (0, 3)), ("3", 1, (3, 0)), ("4", 2, (0, 0)))
    seven = chain(x, "Mixed_7a", *((f"branch7x7x3_{i}", stride, padding) for i, stride, padding in seven))
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    x = b8(b8(x, "Mixed_7b"), "Mixed_7c")

    with torch.device("meta"):
        net = InceptionV3()
    net.to_empty(device="cpu").load_state_dict(state, assign=True)
    with torch.no_grad():
        pool, one = net.eval()(picture)
    # float64 on both sides: only the order of sums differs
    assert torch.allclose(one, spatial, rtol=1e-9, atol=1e-12)
    assert torch.allclose(pool, x.mean((2, 3)), rtol=1e-9, atol=1e-12)


def test_features_resize_levels_and_channels_last() -> None:
    net, x = network(), pictures(1, 40)
    seen: list[Tensor] = []
    ones: list[Tensor] = []
    hooks = [
        net.network.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        net.network.Mixed_6d.branch1x1.register_forward_hook(lambda m, args, out: ones.append(out)),
    ]
    out = net(x)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[0], (resize_tf1(to_uint8(x).float(), 299) - 128) / 128)
    assert out.pool.shape == (1, 2048) and out.spatial.shape == (1, 2023)
    # the first 7 channels, position by position
    assert torch.equal(out.spatial[0, :7], ones[0][0, :7, 0, 0])
    assert torch.equal(out.spatial[0, 7 * 17 + 3], ones[0][0, 3, 1, 0])
    logits = net.logits(out.pool)
    assert torch.allclose(logits, F.linear(out.pool, net.network.fc.weight)) and logits.shape == (1, 1008)

    half = InceptionFeatures(net.network, "half_pixel")
    hook = net.network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    half.network.forward = lambda x: (torch.zeros(1, 2048), torch.zeros(1, 192, 17, 17))  # type: ignore[method-assign]
    half(x)
    hook.remove()
    del half.network.forward
    assert torch.allclose(seen[1], F.interpolate(x, size=(299, 299), mode="bilinear"))  # unrounded


def test_tf1_resize_by_its_definition() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 13, 8)).astype(np.float32))

    def at(i: int, before: int, after: int) -> tuple[int, int, float]:
        position = i * before / after
        low = int(position)
        return low, min(low + 1, before - 1), position - low

    out = resize_tf1(x, 11)
    assert out.shape == (2, 3, 11, 11)
    for i in range(11):
        for j in range(11):
            (y0, y1, v), (x0, x1, u) = at(i, 13, 11), at(j, 8, 11)
            top = x[..., y0, x0] * (1 - u) + x[..., y0, x1] * u
            bottom = x[..., y1, x0] * (1 - u) + x[..., y1, x1] * u
            # fp32 weights of values up to 255
            assert torch.allclose(out[..., i, j], top * (1 - v) + bottom * v, atol=2e-4)
    assert torch.equal(out[..., 0, 0], x[..., 0, 0])  # no half-pixel centres: the corners coincide
    assert torch.equal(resize_tf1(x[..., :8, :], 8), x[..., :8, :])


def test_random_network_is_seeded_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="untrained Inception and compare with no published number"):
        net = load_inception("random", seed=1)
    assert torch.equal(before, torch.get_rng_state()) and not net.published
    assert torch.equal(net.network.fc.weight, network().network.fc.weight)
    assert not torch.equal(net.network.fc.weight, random_inception(seed=2).network.fc.weight)


def test_missing_weights_get_one_message_with_every_way_on(tmp_path: Path) -> None:
    for path in (None, tmp_path / "nowhere.pth"):
        with pytest.raises(WeightsMissing) as error:
            load_inception(path)
        for part in (module.INCEPTION.name, "6726825d", "pytorch-fid", "--inception=PATH", "--inception=random"):
            assert part in str(error.value), part
    assert "nowhere.pth is no file" in str(error.value)


def test_weights_are_read_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / module.INCEPTION.name
    state = {k: v.contiguous() for k, v in network().network.state_dict().items() if "num_batches" not in k}
    torch.save(state, path)
    with pytest.raises(WeightsInvalid, match="damaged or altered"):
        load_inception(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "INCEPTION", module.INCEPTION._replace(sha256=digest[:8]))
    net = load_inception(path, resize="half_pixel")
    assert net.published and net.resize == "half_pixel"
    assert torch.equal(net.network.Mixed_7c.branch1x1.conv.weight, network().network.Mixed_7c.branch1x1.conv.weight)
    del state["fc.bias"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.warns(UserWarning), pytest.raises(WeightsInvalid, match=r"missing fc\.bias"):
        load_inception(tmp_path / "other.pth")


def test_bad_pictures_and_words_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
        network()(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="tf1, half_pixel, got 'tf2'"):
        InceptionFeatures(network().network, "tf2")


def test_alexnet_keys_and_arithmetic() -> None:
    net = random_lpips(seed=3, net="alex")
    trunk, x = net.trunk, pictures(1, 40)
    assert isinstance(trunk, AlexNetFeatures) and sum(p.numel() for p in trunk.parameters()) == 2_469_696
    state = {k: v.contiguous() for k, v in trunk.state_dict().items()}
    assert list(state) == [f"features.{i}.{part}" for i in (0, 3, 6, 8, 10) for part in ("weight", "bias")]
    expected, h = [], x
    for i, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        if i in (3, 6):
            h = F.max_pool2d(h, 3, 2)
        h = F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], stride, padding).relu()
        expected.append(h)
    for ours, plain in zip(trunk(x), expected, strict=True):
        # one fp32 convolution sums up to 3456 products in another order
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert torch.equal(net(x, x), torch.zeros(1)) and net(x, pictures(1, 40, seed=1)).item() > 0.1
    with pytest.raises(ValueError, match="at least 32 pixels"):
        net(x[..., :31], x[..., :31])


def test_alex_lpips_is_read_and_missing_files_are_named(tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in random_lpips(seed=3, net="alex").trunk.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(1)}, tmp_path / "trunk.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(heads, tmp_path / "heads.pth")
    options = ("--lpips-alex", "--lpips-alex-heads")
    with pytest.warns(UserWarning, match="not those of the published network"):
        net = load_lpips("alex", tmp_path / "trunk.pth", tmp_path / "heads.pth", options=options)
    assert torch.equal(net.heads[1].flatten(), heads["lin1.model.1.weight"].flatten())
    assert torch.equal(net.trunk.state_dict()["features.3.weight"], state["features.3.weight"])
    with pytest.raises(WeightsMissing) as error:
        load_lpips("alex", None, tmp_path / "no.pth", options=options)
    for part in ("alexnet-owt-7be5be79.pth", "7be5be79", "--lpips-alex=PATH", "df73285e", "--lpips-alex-heads=PATH"):
        assert part in str(error.value), part


def test_installed_alex_heads_have_the_published_digest(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    torch.save(random_lpips(seed=3, net="alex").trunk.state_dict(), tmp_path / "trunk.pth")
    with pytest.warns(UserWarning, match="alexnet"):  # of the trunk alone: other heads would be refused
        net = load_lpips("alex", tmp_path / "trunk.pth", options=("a", "b"))
    assert [h.numel() for h in net.heads] == [64, 192, 384, 256, 256] and all((h >= 0).all() for h in net.heads)
