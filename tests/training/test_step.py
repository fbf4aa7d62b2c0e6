"""What a training step asks of the device: no answers, each weight cast once, and the same graph at every step."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowmo import FlowMo
from flowmo.config import LossConfig, NoiseConfig, OptimConfig, PosttrainConfig, parse
from flowmo.perceptual.lpips import LPIPS
from flowmo.perceptual.resnet import ResNet50, ResNetDistance
from flowmo.perceptual.vgg import CHANNELS, VGG16Features
from flowmo.training.loop import Trainer
from flowmo.training.optim import AdamHoldEMA
from flowmo.training.posttrain import posttrain_loss
from flowmo.training.pretrain import pretrain_loss
from flowmo.training.verdict import Verdict
from tests.training.test_posttrain import Distance

# What makes the host wait for a number or a size that only the device knows.
ASKING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique2", "_unique2", "item", "equal"}


class Watch(TorchDispatchMode):
    """Counts questions to the device, and casts of given tensors to bf16."""

    def __init__(self, watched: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.names = {t.data_ptr(): name for name, t in (watched or {}).items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in ASKING or boolean_index:
            self.asked[name] += 1
        if name == "_to_copy" and kwargs.get("dtype") is torch.bfloat16 and args[0].data_ptr() in self.names:
            self.casts[self.names[args[0].data_ptr()]] += 1
        return func(*args, **kwargs)


def trainer_of(tmp_path: Path, *more: str) -> Trainer:
    shared = ["tiny", "trainer.threads=1", "trainer.accumulate=2", "loss.perceptual=random", "optim.ema_every=2"]
    options = [*shared, f"run={tmp_path / 'run'}", "trainer.precision=fp32", *more]
    if "stage=posttrain" in more:
        pretrained = Trainer(parse([*shared, f"run={tmp_path / 'init'}", "trainer.precision=fp32"]))
        options.append(f"init={pretrained.save()}")
        options += ["posttrain.resnet=none", "posttrain.steps=3"]
    trainer = Trainer(parse([o for o in options if not (o.startswith("loss.") and "stage=posttrain" in more)]))
    if "stage=posttrain" in more:
        trainer.stage.resnet = Distance()
    return trainer


STAGES = [
    ("stage=pretrain",),
    ("stage=pretrain", "optim.hold_norms=channel", "optim.freeze_encoder_at=1", "loss.codebook_entropy=world"),
    ("stage=posttrain", "checkpoint=full", "trainer.precision=bf16"),
    ("stage=posttrain", "checkpoint=save10"),
]


@pytest.mark.filterwarnings("ignore:loss.perceptual=random")
@pytest.mark.parametrize("options", STAGES, ids=lambda o: " ".join(o[:2]))
def test_a_step_asks_the_device_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Its numbers stay where they are until the log wants them, on steps with and without an average."""
    trainer = trainer_of(tmp_path, *options)
    trainer.train_step()
    with Watch() as watch:
        trainer.train_step()
        trainer.train_step()
    assert not watch.asked
    with Watch() as watch:
        float(trainer.train_step()["total"])
    assert watch.asked == {"_local_scalar_dense": 1}, "the watch sees questions"


@pytest.mark.filterwarnings("ignore:loss.perceptual=random")
@pytest.mark.parametrize("options", [STAGES[0], *STAGES[2:]], ids=lambda o: " ".join(o))
def test_learning_weights_are_cast_once_a_step(tmp_path: Path, options: tuple[str, ...]) -> None:
    """For two micro-batches, with a chain of calls each, and parts that are computed again in the backward pass."""
    trainer = trainer_of(tmp_path, *options, "trainer.precision=bf16")
    with Watch(dict(trainer.stage.trained)) as watch:
        trainer.train_step()
    matrices = {k for k in trainer.stage.trained if k.endswith(".weight") and "norm" not in k}
    assert matrices <= watch.casts.keys() and set(watch.casts.values()) == {1}


@pytest.mark.filterwarnings("ignore:loss.perceptual=random")
def test_gradients_through_kept_casts_are_those_of_fresh_ones(tmp_path: Path) -> None:
    """The second micro-batch goes back through the casts of the first: the bits of two casts."""
    gradients = []
    for fresh in (False, True):
        trainer = trainer_of(tmp_path / str(fresh), "trainer.precision=bf16")
        forward = trainer.stage.forward

        def again(*given, forward=forward, fresh=fresh):  # type: ignore[no-untyped-def]
            if fresh:
                torch.clear_autocast_cache()
            return forward(*given)

        trainer.stage.forward = again  # type: ignore[method-assign]
        kept: dict[str, Tensor] = {}
        trainer.optimizer = SimpleNamespace(  # type: ignore[assignment]
            step=lambda lr, found_inf, t=trainer, kept=kept: kept.update(
                {k: p.grad.clone() for k, p in t.stage.trained.items() if p.grad is not None}
            )
        )
        trainer.train_step()
        gradients.append(kept)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(g, gradients[1][k]) for k, g in gradients[0].items())


class OnTheDevice(TorchDispatchMode):
    """Refuses operations that see a tensor of the host, but for empty ones, which carry nothing (checkpoint's own)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        seen = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        assert all(t.device.type != "cpu" or t.numel() == 0 for t in seen), f"{func} sees a tensor on the host"
        return out


@pytest.mark.parametrize("hold", ["matrix", "channel"])
def test_nothing_goes_to_the_device_or_comes_back(monkeypatch: pytest.MonkeyPatch, hold: str) -> None:
    """Losses, gradients and update where no value can be read and no table copied from: what a CUDA graph asks for.

    The meta device computes nothing, so whatever needed a number, or made a constant on the host, would fail.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    model = FlowMo("tiny").to("meta")
    with torch.device("meta"):
        perceptual = LPIPS(VGG16Features(), [torch.ones(c) for c in CHANNELS])
        resnet = ResNetDistance(ResNet50())
        images = torch.empty(2, 3, 32, 32)
        counts = torch.empty(2**model.config.entropy_bits, dtype=torch.int64)
    optimizer = AdamHoldEMA(dict(model.named_parameters()), OptimConfig(hold_norms=hold, ema_every=1))
    noise = NoiseConfig()
    with OnTheDevice():
        losses = LossConfig(noise_sync=0.5)
        out = pretrain_loss(model, images, losses, noise, perceptual, code_counts=counts)
        out["total"].backward()
        for memory in ("none", "save10", "full"):
            chain = PosttrainConfig(steps=2)
            posttrain_loss(model, images, chain, LossConfig(), noise, resnet, None, memory)["total"].backward()
        verdict = Verdict(0, [], out["total"], False, 1.0, [out["flow"].detach()])
        optimizer.step(1e-4, verdict.found_inf)


@pytest.mark.gpu
def test_loss_and_gradients_are_captured_in_a_cuda_graph() -> None:
    """A replay draws other numbers and gives finite gradients of the same size."""
    torch.manual_seed(0)
    model = FlowMo("tiny").cuda()
    images = torch.rand(4, 3, 32, 32, device="cuda") * 2 - 1

    def gradients() -> Tensor:
        losses = pretrain_loss(model, images, LossConfig(), NoiseConfig())["total"]
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses, list(model.decoder.img_in.parameters()))])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager = gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    results = []
    for _ in range(2):
        graph.replay()
        results.append(captured.clone())
    assert not torch.equal(*results)
    assert all(0.2 < float(r.norm() / eager.norm()) < 5 for r in results)
