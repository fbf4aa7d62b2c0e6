"""What the stages that train a FlowMo have in common: pictures as data, reconstructions to draw and to measure."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, ModelConfig, from_yaml
from flowmo.data import BatchSource, build_data, make_grid
from flowmo.tiles import reconstruct_tiled
from flowmo.training import checkpoint, distributed
from flowmo.training.distributed import Processes
from flowmo.training.flops import step_flops
from flowmo.training.heldout import Reconstructions, heldout_images
from flowmo.training.optim import AdamHoldEMA, learning_rate, mup_scales, scale_readouts_
from flowmo.training.sharding import shard_
from flowmo.training.stage import Batches, Measure, Stage

logger = logging.getLogger("flowmo")


class AutoencoderStage(Stage):
    """One stage of training the autoencoder. Calling it with pictures [B, 3, S, S] in [-1, 1] gives its losses.

    Attributes:
        code_counts: int64 [vocabulary], how often each token was seen since it was last cleared, or None.
        frozen: whether the encoder learns no longer.
    """

    shown = ("flow",)
    model: FlowMo

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.code_counts: Tensor | None = None
        self.frozen = False
        self.model = FlowMo(config.model).to(device)
        for part in (self.model.encoder, self.model.decoder):
            part.gradient_checkpointing = config.trainer.gradient_checkpointing
            for parameter in part.unread_parameters():
                parameter.requires_grad_(False)
        base = config.optim.mup_base_width
        if base is not None and (config.init is None or config.init_part == "encoder"):
            scale_readouts_(self.model, base)
        self.trained = {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    @classmethod
    def check(cls, config: Config) -> None:
        if config.data.path is None:
            raise ConfigError(
                "data.path is not set: name a folder of images, a tar archive, or data.path=samples for built-in ones"
            )

    def start_from(self, path: str) -> None:
        """Take the averaged weights of a run, a model folder, a released checkpoint or a training checkpoint.

        With `init_part` "encoder" the decoder keeps its own.

        Raises:
            ConfigError: a model of other sizes than the configuration's.
            FileNotFoundError, CheckpointError, DamagedCheckpoint: as reading them raises.
        """
        mine = self.config.model
        if checkpoint.is_checkpoint(Path(path)):
            saved = checkpoint.read(path)
            _check_sizes(mine, from_yaml(saved["config"]).model, path)
            self._take({**saved["model"], **saved["optimizer"]["average"]})
            return
        sizes = {"image_size": mine.image_size, "latent_tokens": mine.latent_tokens}
        bits = mine.entropy_bits if mine.quantizer == "lfq" else None
        levels = mine.fsq_levels if mine.quantizer == "fsq" else None
        model = FlowMo.from_pretrained(path, dtype=torch.float32, entropy_bits=bits, fsq_levels=levels, **sizes)
        _check_sizes(mine, model.config, path)
        self._take(model.state_dict())

    def _take(self, weights: dict[str, Tensor]) -> None:
        if self.config.init_part == "encoder":
            self.model.encoder.load_state_dict(
                {k.removeprefix("encoder."): w for k, w in weights.items() if k.startswith("encoder.")}
            )
        else:
            self.model.load_state_dict(weights)

    def shard(self) -> None:
        shard_(self.model, self.device)
        self.trained = {k: p for k, p in self.model.named_parameters() if k in self.trained}

    def empty_model(self) -> FlowMo:
        return FlowMo(self.config.model)

    def optimizer(self) -> AdamHoldEMA:
        """Made once the weights are those of step 0: the norms that it holds are those of now."""
        base = self.config.optim.mup_base_width
        scales = mup_scales(self.trained, self.config.model, base) if base is not None else {}
        return AdamHoldEMA(self.trained, self.config.optim, scales)

    def learning_rate(self, step: int, progress: float) -> float:
        return learning_rate(self.config.optim, step, progress)

    def batches(self, processes: Processes) -> BatchSource:
        c = self.config
        self.check(c)
        assert c.data.path is not None
        return build_data(
            c.data.path,
            c.model.image_size,
            c.data.batch // (c.trainer.accumulate * processes.world),
            seed=c.trainer.seed,
            workers=c.data.workers,
            flip=c.data.flip,
            scales=c.data.scales,
            columns=c.data.columns,
            device=self.device,
            index=c.data.index,
            max_failed=c.data.max_failed,
            rank=processes.rank,
            world=processes.world,
        )

    @property
    def sequence(self) -> int:
        return self.config.model.grid**2 + self.config.model.latent_tokens

    def distance(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The stage's own perceptual distance of pictures [N, 3, S, S], [N]; None where it has none."""
        return None

    def pictures(
        self,
        model: FlowMo,
        images: Tensor,  # [N, 3, H, W] in [-1, 1], sides multiples of the model's image size
    ) -> Tensor:  # [N, 3, H, W]
        """Reconstructions with the configured sampler and always the same noise."""
        s = self.config.sampler
        return reconstruct_tiled(
            model,
            images.to(self.device),
            steps=s.steps,
            rho=s.rho,
            guidance=s.guidance,
            guidance_interval=s.guidance_interval,
            generator=torch.Generator().manual_seed(self.config.trainer.seed),
        )

    def describe_model(self) -> str:
        return self.config.model.describe_code()

    def describe(self) -> str:
        return f"perceptual loss: {self.config.loss.perceptual}"

    def statistics(self) -> dict[str, float]:
        if self.code_counts is None:
            return {}
        values = code_statistics(distributed.sum_(self.code_counts))
        self.code_counts.zero_()
        return values

    def step_flops(self) -> float:
        return step_flops(self.config, self.frozen)

    def samples(self, data: Batches) -> Tensor:
        """The first pictures of the data."""
        position = data.state_dict()
        images: Tensor = next(data)[: self.config.trainer.sample_images].clone()
        data.load_state_dict(position)
        return images

    def grid(self, model: FlowMo, samples: Tensor) -> Image.Image:
        """Originals above reconstructions."""
        pictures = self.pictures(model, samples)
        return make_grid([samples.cpu(), pictures.cpu()], ["original", "reconstruction"])

    def measure(self) -> Measure | None:
        h, c = self.config.heldout, self.config
        path = h.path or ("samples" if c.data.path == "samples" else None)
        if path is None:
            logger.info("heldout.path is not set: nothing is measured, and training does not stop early")
            return None
        return Reconstructions(h, self, heldout_images(path, c.model.image_size, h.images))


def code_statistics(counts: Tensor) -> dict[str, float]:
    """Of token counts [vocabulary]: the share of codes seen at all, and the perplexity as a share of all codes."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum()
    return {"code_usage": float((counts > 0).double().mean()), "code_perplexity": float(entropy.exp()) / len(counts)}


def _check_sizes(mine: ModelConfig, theirs: ModelConfig, path: str) -> None:
    pairs = [
        f"model.{k}={getattr(theirs, k)} there and {v} here" for k, v in vars(mine).items() if getattr(theirs, k) != v
    ]
    if pairs:
        raise ConfigError(
            f"init={path} holds a model of other sizes ({', '.join(pairs[:4])}); give the preset and the model.* "
            "settings that it was trained with"
        )
