"""Few-step decoding by distillation: a student that takes 1, 2 or 4 steps where its teacher takes 25 guided ones.

The paper (section 5) names distillation as the way to a fast decoder and leaves it open. The teacher is the model that
training starts from, with its own guided sampler. Teacher and student start from the same noise and the same code, so
the teacher's picture y is a fixed target, and guidance is folded into the student, which decodes without. A chain of n
steps is the plain sampler's with times ((n - i) / n)^rho: from t = 1,

    D = x_t - t v(x_t, t),    x_t' = D + (t' / t) (x_t - D)

so at every time the student foresees a picture D at the end of the teacher's path, and goes on from what it foresaw.
Chains of all lengths want the same D of the same x_t, so one student learns all of them: consistency (Song et al.
2023) along the chains that the sampler will take, with gradients through the whole chain, so that later steps make
good what earlier ones left.

    loss = mean over n of (1 - a_n) |x_n - y|^2 + a_n |x_n - x|^2 + perceptual terms of (x_n, x)

x_n is the end of the chain and x the original. Each a_n is a choice: at 0 the student copies its teacher; at 1 it
decodes to the mean of what the code allows, which has the highest PSNR and the least detail. The perceptual terms are
Stage 1B's ResNet-50 logits and, if asked for, LPIPS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, DistillConfig
from flowmo.data import make_grid
from flowmo.engine import Schedule
from flowmo.layers import patchify, unpatchify
from flowmo.metrics import psnr
from flowmo.perceptual import LPIPS, ResNetDistance, load_perceptual, load_resnet_distance
from flowmo.sampling import time_grid
from flowmo.tiles import merge_tiles, split_tiles
from flowmo.training import checkpoint, distributed
from flowmo.training.autoencoder import AutoencoderStage
from flowmo.training.heldout import Reconstructions
from flowmo.training.posttrain import Call, remembering
from flowmo.training.precision import resolve_precision
from flowmo.training.stage import Measure

TEACHER = "teacher"  # folder of a run that holds the teacher
_AT_ONCE = 64  # pictures, where nothing is learned

Judge = tuple[float, LPIPS | ResNetDistance]  # weight and network of a perceptual term


def schedules(config: DistillConfig) -> list[Schedule]:
    """The student's samplers, of as many steps as it learns to take, without guidance."""
    return [Schedule(n, config.rho, guidance=1.0) for n in config.steps]


def chain_ends(
    call: Call,
    noise: Tensor,  # [B, N, 3 p^2], standard normal
    condition: Tensor,  # [B, T, C + 1]
    steps: Sequence[int],
    rho: float,
) -> list[Tensor]:  # each [B, N, 3 p^2], fp32
    """Ends of the Euler chains of so many steps from the same noise; all share their evaluation at t = 1."""
    first = call(noise, noise.new_ones(len(noise)), condition).float()
    ends = []
    for n in steps:
        times = time_grid(n, rho)
        x = noise - (times[0] - times[1]) * first
        for here, there in pairwise(times[1:]):
            x = x - (here - there) * call(x, x.new_full((len(x),), here), condition).float()
        ends.append(x)
    return ends


def distill_loss(
    model: FlowMo,
    images: Tensor,  # [B, 3, S, S] in [-1, 1], fp32
    codes: Tensor,  # [B, T, C]
    noise: Tensor,  # [B, 3, S, S], standard normal
    target: Tensor,  # [B, 3, S, S], the teacher's pictures from these codes and this noise
    config: DistillConfig,
    judges: Sequence[Judge] = (),
    memory: str = "full",
) -> dict[str, Tensor]:  # scalars, fp32; "total" carries the gradient
    """The loss of the module's first lines; the distances to teacher and original are means over elements.

    "match" and "original" are means over the chains, "match_N" the distance to the teacher of the chain of N steps.
    """
    c = model.config
    wanted, data = patchify(target, c.patch), patchify(images, c.patch)
    condition = model.condition(codes)
    call = remembering(model.velocity, memory)
    ends = chain_ends(call, patchify(noise, c.patch), condition, config.steps, config.rho)
    with torch.no_grad():
        seen = [network.features(images) for _, network in judges]
    shares = config.original * (len(ends) if len(config.original) == 1 else 1)
    parts: dict[str, list[Tensor]] = {"total": [], "match": [], "original": []}
    for end, share in zip(ends, shares):
        match, original = (end - wanted).square().mean(), (end - data).square().mean()
        total = (1 - share) * match + share * original
        if judges:
            picture = unpatchify(end, c.patch, c.image_size)
            for (weight, network), features in zip(judges, seen):
                distance = network.distance(network.features(picture), features).mean()  # type: ignore[arg-type]
                parts.setdefault(type(network).__name__.lower(), []).append(distance)
                total = total + weight * distance
        parts["total"].append(total)
        parts["match"].append(match)
        parts["original"].append(original)
    means = {name: torch.stack(values).mean() for name, values in parts.items()}
    return means | {f"match_{n}": m for n, m in zip(config.steps, parts["match"])}


class Distill(AutoencoderStage):
    """The decoder alone, from the weights of a trained model, whose own pictures it learns to make in few steps.

    The teacher's weights are kept in RUN/teacher, so that a run goes on with the teacher that it began with. Saved
    models carry the student's sampler, and decode with it where nobody asks for another.
    """

    name = "distill"
    shown = ("match",)

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.model.encoder.requires_grad_(False).eval()
        self.frozen = True
        self.trained = {k: p for k, p in self.trained.items() if k.startswith("decoder.")}
        self.schedules = schedules(config.distill)
        p, w = config.posttrain, config.loss
        resnet = load_resnet_distance(p.resnet, p.resnet_weights, option="posttrain.resnet")  # type: ignore[arg-type]
        lpips = load_perceptual(w.perceptual, weights=w.perceptual_weights, heads=w.perceptual_heads)
        found = ((p.weight, resnet), (w.perceptual_weight, lpips))
        self.judges: list[Judge] = [(weight, n.to(device)) for weight, n in found if n is not None]
        self.loss = torch.compile(distill_loss) if config.trainer.compile else distill_loss
        self.teacher: FlowMo | None = None
        run = Path(config.run)
        if checkpoint.list_checkpoints(run):
            if not (run / TEACHER / "config.json").is_file():
                raise ConfigError(f"{run / TEACHER} is gone, and the run goes on with no other teacher; put it back")
            self._teach(FlowMo.from_pretrained(run / TEACHER))

    def start_from(self, path: str) -> None:
        super().start_from(path)
        with torch.device("meta"):
            teacher = FlowMo(self.config.model)
        teacher.load_state_dict({k: v.clone() for k, v in self.model.state_dict().items()}, assign=True)
        if distributed.join().first:
            teacher.save_pretrained(Path(self.config.run) / TEACHER)
        self._teach(teacher)

    def _teach(self, teacher: FlowMo) -> None:
        del teacher.encoder  # codes are the student's, whose encoder is the same and stays so
        exact = resolve_precision(self.config.trainer.precision, self.device) == "fp32"
        self.teacher = teacher.to(self.device, torch.float32 if exact else torch.bfloat16).requires_grad_(False).eval()

    @torch.no_grad()
    def teach(
        self,
        codes: Tensor,  # [B, T, C]
        noise: Tensor,  # [B, 3, S, S]
    ) -> Tensor:  # [B, 3, S, S] fp32 in [-1, 1]
        """The teacher's pictures, by the decode engine with the sampler of `sampler.*`."""
        assert self.teacher is not None
        s = self.config.sampler
        with torch.autocast(self.device.type, enabled=False):  # its weights say its precision
            return self.teacher.decode(codes, s.steps, s.rho, s.guidance, s.guidance_interval, noise)

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            codes = self.model.quantize(self.model.latent(images)).codes.float()
            noise = torch.randn(images.shape, generator=generator, device=images.device)
            target = self.teach(codes, noise)
        c = self.config
        return self.loss(self.model, images, codes, noise, target, c.distill, self.judges, memory=c.checkpoint)

    # What is saved, measured and drawn.

    def empty_model(self) -> FlowMo:
        model = super().empty_model()
        model.sampler = max(self.schedules)
        return model

    def distance(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.judges[0][1](x, y) if self.judges else None

    @torch.no_grad()
    def starts(
        self,
        model: FlowMo,
        images: Tensor,  # [N, 3, H, W] in [-1, 1], sides multiples of the model's image size
    ) -> Iterator[tuple[Tensor, Tensor]]:  # codes [n, T, C] and noise [n, 3, S, S] of a part of their tiles
        """What pictures to look at start from: always the same noise."""
        tiles = split_tiles(images.to(self.device), self.config.model.image_size)
        noise = torch.randn(tiles.shape, generator=torch.Generator().manual_seed(self.config.trainer.seed))
        for part, z in zip(tiles.split(_AT_ONCE), noise.split(_AT_ONCE)):
            yield model.encode(part), z.to(self.device)

    def students(self, model: FlowMo, images: Tensor) -> dict[int, Tensor]:
        """Reconstructions [N, 3, H, W] of the pictures by each number of steps."""
        parts = list(self.starts(model, images))
        return {
            s.steps: merge_tiles(
                torch.cat([model.decode(c, noise=z, **s._asdict()) for c, z in parts]), *images.shape[2:]
            )
            for s in self.schedules
        }

    def teachers(self, model: FlowMo, images: Tensor) -> Tensor:
        """The teacher's reconstructions [N, 3, H, W], of the same codes and noise."""
        return merge_tiles(torch.cat([self.teach(c, z) for c, z in self.starts(model, images)]), *images.shape[2:])

    def pictures(self, model: FlowMo, images: Tensor) -> Tensor:
        return self.students(model, images)[max(self.config.distill.steps)]

    def grid(self, model: FlowMo, samples: Tensor) -> Image.Image:
        """Originals, the teacher's pictures, and the student's by each number of steps."""
        students = self.students(model, samples)
        rows = [samples, self.teachers(model, samples), *students.values()]
        steps = [f"{n} step{'s' if n > 1 else ''}" for n in students]
        return make_grid([row.cpu() for row in rows], ["original", "teacher", *steps])

    def measure(self) -> Measure | None:
        measure = super().measure()
        return FewSteps(self, measure) if isinstance(measure, Reconstructions) else None

    def describe(self) -> str:
        d, s = self.config.distill, self.config.sampler
        terms = "".join(f", {weight} x {type(network).__name__}" for weight, network in self.judges)
        return (
            f"from {self.config.init}, {s.steps} guided steps into {', '.join(map(str, d.steps))} unguided ones with "
            f"rho {d.rho:g}, {', '.join(f'{a:g}' for a in d.original)} of the target from the original{terms}, "
            f"frozen encoder, checkpoint={self.config.checkpoint}"
        )


class FewSteps:
    """Numbers of a student's reconstructions by each number of steps, named psnr_1 and so on, and their means.

    Those of :class:`Reconstructions`, against the originals, and "teacher", PSNR in dB to the teacher's pictures.
    """

    def __init__(self, stage: Distill, originals: Reconstructions) -> None:
        self.stage, self.originals = stage, originals
        self.wanted: Tensor | None = None  # never change: encoder, noise and teacher stay

    def __call__(self, model: FlowMo) -> dict[str, float]:
        images = self.originals.images
        if self.wanted is None:
            self.wanted = self.stage.teachers(model, images)
        found: dict[str, dict[int, float]] = {}
        for n, pictures in self.stage.students(model, images).items():
            values = {"teacher": float(psnr(pictures, self.wanted).mean()), **self.originals.scores(pictures)}
            for name, value in values.items():
                found.setdefault(name, {})[n] = value
        means = {name: sum(by.values()) / len(by) for name, by in found.items()}
        return means | {f"{name}_{n}": value for name, by in found.items() for n, value in by.items()}
