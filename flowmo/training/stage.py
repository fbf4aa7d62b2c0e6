"""What a training stage brings to the loop: its model, its loss, its data, its pictures, and what of it is frozen.

The loop (`flowmo.training.loop.Trainer`) knows nothing else of a stage. The stages of the autoencoder share this class;
another kind of model overrides more of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowmo.autoencoder import FlowMo
from flowmo.config import Config, ConfigError, ModelConfig, from_yaml
from flowmo.data import BatchSource, build_data
from flowmo.tiles import reconstruct_tiled
from flowmo.training import checkpoint
from flowmo.training.distributed import Processes
from flowmo.training.optim import AdamHoldEMA, mup_scales, scale_readouts_
from flowmo.training.sharding import full, shard_


class Stage(nn.Module):
    """One stage of training the autoencoder. Calling it with a batch gives its losses.

    Args:
        config: a checked configuration.
        device: of model and batches.

    Attributes:
        model: whose state dict goes into checkpoints. trained: the parameters that learn, by name.
        code_counts: int64 [2^bits], how often each token was seen since it was last cleared, or None.
    """

    name: ClassVar[str]
    model: FlowMo

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.device = device
        self.code_counts: Tensor | None = None
        self.model = FlowMo(config.model).to(device)
        for part in (self.model.encoder, self.model.decoder):
            part.gradient_checkpointing = config.trainer.gradient_checkpointing
            for parameter in part.unread_parameters():
                parameter.requires_grad_(False)
        base = config.optim.mup_base_width
        if base is not None and config.init is None:
            scale_readouts_(self.model, base)
        self.trained = {k: p for k, p in self.model.named_parameters() if p.requires_grad}

    def start_from(self, path: str) -> None:
        """Take the averaged weights of a run, a model folder, a released checkpoint or a training checkpoint.

        Raises:
            ConfigError: a model of other sizes than the configuration's.
            FileNotFoundError, CheckpointError, DamagedCheckpoint: as reading them raises.
        """
        mine = self.config.model
        if checkpoint.is_checkpoint(Path(path)):
            saved = checkpoint.read(path)
            _check_sizes(mine, from_yaml(saved["config"]).model, path)
            self.model.load_state_dict({**saved["model"], **saved["optimizer"]["average"]})
            return
        sizes = {"image_size": mine.image_size, "latent_tokens": mine.latent_tokens}
        bits = mine.entropy_bits if mine.quantizer == "lfq" else None
        model = FlowMo.from_pretrained(path, dtype=torch.float32, entropy_bits=bits, **sizes)
        _check_sizes(mine, model.config, path)
        self.model.load_state_dict(model.state_dict())

    def shard(self) -> None:
        """Spread the weights over all processes (FSDP)."""
        shard_(self.model, self.device)
        self.trained = {k: p for k, p in self.model.named_parameters() if k in self.trained}

    def optimizer(self) -> AdamHoldEMA:
        """Made once the weights are those of step 0: the norms that it holds are those of now."""
        base = self.config.optim.mup_base_width
        scales = mup_scales(self.trained, self.config.model, base) if base is not None else {}
        return AdamHoldEMA(self.trained, self.config.optim, scales)

    def batches(self, processes: Processes) -> BatchSource:
        """This process's share of the training data."""
        c = self.config
        if c.data.path is None:
            raise ConfigError(
                "data.path is not set: name a folder of images, a tar archive, or data.path=samples for built-in ones"
            )
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

    def update(self, step: int) -> bool:
        """Freeze or release parts for the step after `step` steps; True when what learns has changed."""
        return False

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar losses of a batch; "total" carries the gradient, "flow" is the flow loss."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def averaged(self, average: dict[str, Tensor]) -> FlowMo:
        """A copy of the model with averaged weights, in evaluation mode; of sharded weights all processes make it."""
        with torch.device("meta"):  # no initial weights: they would cost time and the global random state
            model = FlowMo(self.config.model)
        weights = {k: full(v.detach()).clone() for k, v in {**self.model.state_dict(), **average}.items()}
        model.load_state_dict(weights, assign=True)
        return model.to(self.device).eval()

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

    def describe(self) -> str:
        """One line for the log."""
        return f"perceptual loss: {self.config.loss.perceptual}"


def _check_sizes(mine: ModelConfig, theirs: ModelConfig, path: str) -> None:
    pairs = [
        f"model.{k}={getattr(theirs, k)} there and {v} here" for k, v in vars(mine).items() if getattr(theirs, k) != v
    ]
    if pairs:
        raise ConfigError(
            f"init={path} holds a model of other sizes ({', '.join(pairs[:4])}); give the preset and the model.* "
            "settings that it was trained with"
        )
