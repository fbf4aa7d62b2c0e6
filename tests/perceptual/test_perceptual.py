"""Structure, arithmetic, gradients and weight handling of the perceptual networks. No published weights are needed."""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flowmo.perceptual import (
    LPIPS,
    ResNet50,
    ResNetDistance,
    VGG16Features,
    WeightsInvalid,
    WeightsMissing,
    load_perceptual,
    load_resnet_distance,
    random_lpips,
    random_resnet_distance,
)
from flowmo.perceptual import lpips as lpips_module
from flowmo.perceptual import weights as weights_module

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbering of `features`


@lru_cache(maxsize=1)
def vgg_lpips() -> LPIPS:
    return random_lpips(seed=1)


@lru_cache(maxsize=1)
def resnet() -> ResNetDistance:
    return random_resnet_distance(seed=1)


def pictures(n: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def heads_file(path: Path) -> Path:
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}, path)
    return path


def vgg_state() -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in vgg_lpips().trunk.state_dict().items()}


def test_vgg_keys_shapes_and_size() -> None:
    with torch.device("meta"):
        vgg = VGG16Features()
    assert list(vgg.state_dict()) == [f"features.{i}.{part}" for i in VGG_CONVS for part in ("weight", "bias")]
    assert count(vgg) == 14_714_688
    shapes = [tuple(f.shape[1:]) for f in vgg(torch.empty(1, 3, 64, 48, device="meta"))]
    assert shapes == [(64, 64, 48), (128, 32, 24), (256, 16, 12), (512, 8, 6), (512, 4, 3)]


def test_vgg_agrees_with_the_plain_sequence_of_operations() -> None:
    state, x = vgg_state(), pictures()
    expected, h = [], x
    for i in VGG_CONVS:
        if i in (5, 10, 17, 24):
            expected.append(h)
            h = F.max_pool2d(h, 2)
        h = torch.relu(F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1))
    expected.append(h)
    for ours, plain in zip(vgg_lpips().trunk(x), expected, strict=True):
        # one fp32 convolution sums up to 4608 products in another order
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_lpips_agrees_with_its_formula_in_float64() -> None:
    net, x, y = vgg_lpips(), pictures(), pictures(seed=1)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    fx, fy = (net.trunk((img - shift) / scale) for img in (x, y))
    expected = torch.zeros(2, dtype=torch.float64)
    for f, g, w in zip(fx, fy, net.heads):
        f, g = f.double(), g.double()
        diff = f / f.norm(dim=1, keepdim=True) - g / g.norm(dim=1, keepdim=True)
        expected += torch.einsum("nchw,c->nhw", diff**2, w.flatten().double()).mean((1, 2))
    d = net(x, y)
    assert d.shape == (2,) and d.dtype == torch.float32
    assert torch.allclose(d.double(), expected, rtol=1e-5)
    assert torch.equal(d, net.distance(net.features(x), net.features(y)))
    assert torch.allclose(d, net(y, x), rtol=1e-6)
    assert torch.equal(net(x, x), torch.zeros(2))


def test_lpips_agrees_with_torchmetrics_heads_and_normalisation() -> None:
    path = lpips_module._installed_heads()
    if path is None:
        pytest.skip("needs torchmetrics, which carries the LPIPS heads")
    heads = lpips_module._read_heads(path)  # the digest fits, or this raises
    assert [h.numel() for h in heads] == [64, 128, 256, 512, 512] and all((h >= 0).all() for h in heads)
    from torchmetrics.functional.image import lpips as published

    f, g = (torch.randn(2, 64, 5, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    unit = [published._normalize_tensor(t) for t in (f, g)]
    expected = ((unit[0] - unit[1]) ** 2 * heads[0].view(1, -1, 1, 1)).sum(1).mean((1, 2))
    net = LPIPS(VGG16Features(), heads)
    ones = [[lpips_module._unit(t)] for t in (f, g)]
    assert torch.allclose(net.distance(*ones), expected, rtol=1e-5)


def test_features_that_are_all_zero_have_finite_gradients() -> None:
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    lpips_module._unit(f).sum().backward()
    assert f.grad is not None and torch.isfinite(f.grad).all()
    with torch.device("meta"):
        trunk = VGG16Features()
    trunk.to_empty(device="cpu").load_state_dict({name: torch.zeros_like(t) for name, t in vgg_state().items()})
    x = pictures(1).requires_grad_()
    LPIPS(trunk, [torch.ones(c) for c in (64, 128, 256, 512, 512)])(x, pictures(1, seed=1)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("make", [vgg_lpips, resnet])
def test_gradient_reaches_the_picture_and_only_it(make: object) -> None:
    net = make()  # type: ignore[operator]
    x, y = pictures(1), pictures(1, seed=1)
    moved = x.clone().requires_grad_()
    value = net(y, moved).sum()
    value.backward()
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    # a small step along the gradient changes the value by step * |grad|^2, up to curvature (second order)
    step = 1e-3 * value.item() / moved.grad.square().sum().item()
    with torch.no_grad():
        change = (net(y, x + step * moved.grad) - net(y, x - step * moved.grad)).item()
    assert change == pytest.approx(2 * step * moved.grad.square().sum().item(), rel=0.05)


@pytest.mark.parametrize("make", [vgg_lpips, resnet])
def test_networks_stay_in_evaluation_mode_and_out_of_training(make: object) -> None:
    net = make()  # type: ignore[operator]
    nn.ModuleList([net]).train()
    assert not any(module.training for module in net.modules())


def test_memory_format_changes_layout_not_results() -> None:
    x, y = pictures(), pictures(seed=1)
    for make in (random_lpips, random_resnet_distance):
        last, first = make(3, channels_last=True), make(3, channels_last=False)
        weights = [p for p in last.parameters() if p.dim() == 4 and p.shape[2] == 3]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        # another order of summation in fifty layers of fp32
        assert torch.allclose(last(x, y), first(x, y), rtol=1e-3)


@pytest.mark.parametrize("make", [vgg_lpips, lambda: ResNetDistance(ResNet50())], ids=["lpips", "resnet"])
def test_every_convolution_runs_channels_last_both_ways(make: object) -> None:
    """Pictures come contiguous; from the first convolution on, features and their gradients are channels-last."""
    net = make()  # type: ignore[operator]
    layouts: dict[str, list[bool]] = {}

    def note(name: str, t: torch.Tensor) -> None:
        layouts.setdefault(name, []).append(t.is_contiguous(memory_format=torch.channels_last))

    def watch(name: str, out: torch.Tensor) -> None:
        note(name, out)
        if out.requires_grad:
            out.register_hook(lambda g: note(f"{name}, gradient", g))

    convolutions = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    hooks = [c.register_forward_hook(lambda m, i, out, n=n: watch(n, out)) for n, c in convolutions.items()]
    net(pictures()[:1], pictures(seed=1)[:1].requires_grad_()).sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(layouts) == 2 * len(convolutions) >= 26
    assert [name for name, found in layouts.items() if not all(found)] == []


def test_a_target_is_looked_at_once_and_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two pictures of a call, one pass each; what no gradient wants keeps nothing for one."""
    net = vgg_lpips()
    calls: list[bool] = []
    features = net.features
    monkeypatch.setattr(net, "features", lambda x: calls.append(x.requires_grad) or features(x))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(pictures(), pictures(seed=1))
        assert not saved and calls == [False, False]
        net(pictures(), pictures(seed=1).requires_grad_())
    assert saved and calls[2:] == [False, True]


def test_autocast_keeps_the_distance_in_fp32() -> None:
    x, y = pictures(), pictures(seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        low = vgg_lpips()(x, y)
    assert low.dtype == torch.float32
    # bf16 features carry 2^-9 each; the distance of unrelated pictures averages thousands of them
    assert torch.allclose(low, vgg_lpips()(x, y), rtol=0.02)


def test_random_lpips_is_seeded_graded_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="randomly initialised VGG-16"):
        net = load_perceptual("random", seed=1)
    assert torch.equal(before, torch.get_rng_state()) and net is not None
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), vgg_lpips().parameters(), strict=True))
    assert not torch.equal(next(net.parameters()), next(random_lpips(seed=2).parameters()))
    x = F.interpolate(pictures(4, 8), size=32, mode="bilinear")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    near, far, other = (net(x, y).mean().item() for y in (x + 0.02 * noise, x + 0.1 * noise, x.flip(0)))
    assert 0 < 2 * near < far < other and 0.3 < other < 3


def test_every_stage_of_random_lpips_counts() -> None:
    net = vgg_lpips()
    x = F.interpolate(pictures(8, 8), size=64, mode="bilinear")
    maps = net.features(x)
    parts = [((f[:4] - f[4:]).square() * w).sum(1).mean().item() for f, w in zip(maps, net.heads)]
    assert all(0.05 < part < 0.6 for part in parts)  # a fifth each on the pictures it was scaled by


def test_none_is_none_and_other_words_are_refused() -> None:
    assert load_perceptual("none") is None and load_resnet_distance("none") is None
    with pytest.raises(ValueError, match="'lpips', 'random' or 'none', got 'vgg'"):
        load_perceptual("vgg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'resnet'"):
        load_resnet_distance("resnet")  # type: ignore[arg-type]


def test_missing_weights_get_one_message_with_every_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as without torchmetrics
    with pytest.raises(WeightsMissing) as error:
        load_perceptual("lpips", tmp_path / "nowhere.pth")
    for part in (
        "vgg16-397923af.pth", "397923af", "torchvision", "loss.perceptual_weights=PATH", "nowhere.pth is no file",
        "vgg.pth", "a78928a0", "PerceptualSimilarity", "loss.perceptual_heads=PATH",
        "loss.perceptual=none", "loss.perceptual=random",
    ):  # fmt: skip
        assert part in str(error.value), part
    with pytest.raises(WeightsMissing, match=r"resnet50-0676ba61\.pth .*begins 0676ba61.*loss\.resnet_weights=PATH"):
        load_resnet_distance("resnet50")


def test_weights_are_read_whatever_else_the_file_holds(tmp_path: Path) -> None:
    state = {**vgg_state(), "classifier.0.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "trunk.pth")
    heads = heads_file(tmp_path / "heads.pth")
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="not those of the published network"):
        net = load_perceptual("lpips", tmp_path / "trunk.pth", heads)
    assert torch.equal(before, torch.get_rng_state())
    assert net is not None and all(torch.equal(t, state[name]) for name, t in net.trunk.state_dict().items())
    assert torch.equal(net.heads[2].flatten(), torch.load(tmp_path / "heads.pth")["lin2.model.1.weight"].flatten())
    assert not any(p.is_meta or p.requires_grad for p in net.parameters())
    from safetensors.torch import save_file

    save_file(vgg_state(), tmp_path / "trunk.safetensors")
    with pytest.warns(UserWarning):
        again = load_perceptual("lpips", tmp_path / "trunk.safetensors", tmp_path / "heads.pth")
    assert again is not None and torch.equal(again(pictures(), pictures(seed=1)), net(pictures(), pictures(seed=1)))


def test_digest_is_compared(tmp_path: Path) -> None:
    trunk, heads = tmp_path / "vgg16-397923af.pth", heads_file(tmp_path / "vgg.pth")
    torch.save(vgg_state(), trunk)
    with pytest.raises(WeightsInvalid, match=r"vgg16-397923af\.pth.*damaged or altered"):
        load_perceptual("lpips", trunk, heads)
    with pytest.raises(WeightsInvalid, match=r"vgg\.pth.*damaged or altered"):
        weights_module.read_state_dict(weights_module.LPIPS_VGG_HEADS, heads)
    right = weights_module.VGG16._replace(sha256=hashlib.sha256(trunk.read_bytes()).hexdigest()[:8])
    assert set(weights_module.read_state_dict(right, trunk)) == set(vgg_state())


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    wanted = weights_module.VGG16
    (tmp_path / "text.pth").write_text("words")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.warns(UserWarning), pytest.raises(WeightsInvalid, match=r"cannot read .*text\.pth"):
        weights_module.read_state_dict(wanted, tmp_path / "text.pth")
    with pytest.warns(UserWarning), pytest.raises(WeightsInvalid, match="no plain state dict"):
        weights_module.read_state_dict(wanted, tmp_path / "list.pth")
    with pytest.warns(UserWarning), pytest.raises(WeightsInvalid, match="five LPIPS heads"):
        torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "heads.pth")
        lpips_module._read_heads(tmp_path / "heads.pth")


def test_keys_that_do_not_fit_are_named() -> None:
    state = vgg_state()
    state["features.2.weight"] = torch.zeros(3)
    state["features.99.weight"] = state.pop("features.0.bias")
    with torch.device("meta"):
        vgg = VGG16Features()
    with pytest.raises(WeightsInvalid) as error:
        weights_module.load_into(vgg, state, "x.pth")
    for part in (
        "missing features.0.bias",
        "unexpected features.99.weight",
        "features.2.weight is [3], expected [64, 64",
    ):
        assert part in str(error.value)


def test_bad_pictures_are_named() -> None:
    net, x = vgg_lpips(), pictures(1)
    with pytest.raises(ValueError, match=r"uint8 \[1, 3, 32, 32\]"):
        net(x, (x * 0).to(torch.uint8))
    with pytest.raises(ValueError, match=r"one shape, got \[1, 3, 32, 32\] and \[1, 3, 64, 64\]"):
        net(x, pictures(1, 64))
    with pytest.raises(ValueError, match="at least 16 pixels"):
        net(x[..., :8], x[..., :8])


def test_resnet_keys_shapes_and_size() -> None:
    with torch.device("meta"):
        net = ResNet50()
    assert count(net) == 25_557_032
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{part}" for part in bn}
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            for i in (1, 2, 3):
                expected |= {f"layer{stage}.{block}.conv{i}.weight"}
                expected |= {f"layer{stage}.{block}.bn{i}.{part}" for part in bn}
        expected |= {f"layer{stage}.0.downsample.0.weight"} | {f"layer{stage}.0.downsample.1.{part}" for part in bn}
    assert set(net.state_dict()) == expected
    assert net.layer2[0].conv2.stride == (2, 2) and net.layer2[0].conv1.stride == (1, 1)
    net.eval()
    assert net(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert net.layer4[2].conv3.weight.shape == (2048, 512, 1, 1)


def test_resnet_agrees_with_the_plain_sequence_of_operations() -> None:
    net = resnet().network
    state, x = {name: t.contiguous() for name, t in net.state_dict().items()}, pictures(2, 64)

    def conv_bn(h: Tensor, conv: str, bn: str, stride: int = 1, padding: int = 0) -> Tensor:
        h = F.conv2d(h, state[f"{conv}.weight"], stride=stride, padding=padding)
        mean, var, gain, bias = (
            state[f"{bn}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * gain + bias

    h = F.max_pool2d(torch.relu(conv_bn(x, "conv1", "bn1", 2, 3)), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            side = conv_bn(h, f"{name}.downsample.0", f"{name}.downsample.1", stride) if block == 0 else h
            h = torch.relu(conv_bn(h, f"{name}.conv1", f"{name}.bn1"))
            h = torch.relu(conv_bn(h, f"{name}.conv2", f"{name}.bn2", stride, 1))
            h = torch.relu(conv_bn(h, f"{name}.conv3", f"{name}.bn3") + side)
    expected = h.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        logits = net(x)
    # fifty fp32 layers, summed in another order
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_resnet_distance_prepares_pictures_and_compares_logits() -> None:
    net, x, y = resnet(), pictures(1, 40), pictures(1, 40, seed=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    logits = []
    for img in (x, y):
        img = F.interpolate((img + 1) / 2, size=224, mode="bilinear", antialias=True)
        logits.append(net.network((img - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    expected = (logits[0] - logits[1]).square().sum() / 1000
    with torch.no_grad():
        assert net(x, y).item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.equal(net(x, x), torch.zeros(1))


def test_resnet_resize_is_pillows_antialiased_bilinear() -> None:
    seen: list[Tensor] = []
    net = resnet()
    hook = net.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8))
    net.features(torch.from_numpy(np.array(img)).permute(2, 0, 1)[None] / 127.5 - 1)
    hook.remove()
    levels = (seen[0] * net.std + net.mean)[0].permute(1, 2, 0) * 255
    pillow = np.asarray(img.resize((224, 224), Image.Resampling.BILINEAR)).astype(np.float32)
    assert np.abs(levels.numpy() - pillow).max() <= 1.05  # Pillow rounds to whole levels twice


def test_resnet_weights_are_read_with_and_without_batch_counters(tmp_path: Path) -> None:
    state = {name: t.contiguous() for name, t in resnet().network.state_dict().items()}
    short = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    for name, content in (("full.pth", state), ("short.pth", short)):
        torch.save(content, tmp_path / name)
        with pytest.warns(UserWarning, match="published resnet50-0676ba61"):
            net = load_resnet_distance("resnet50", tmp_path / name)
        assert net is not None and not any(t.is_meta for t in net.state_dict().values())
        x = pictures(1)
        assert torch.equal(net.features(x), resnet().features(x))
