"""What a training stage brings to the loop: its model, its loss, its data, what is measured, drawn and said of it.

The loop (:class:`flowmo.training.loop.Trainer`) knows nothing else of what it trains: models, batches and losses of any
kind train in it, once a subclass of :class:`Stage` stands for them in the loop's table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from flowmo.config import Config, ConfigError
from flowmo.training.distributed import Processes
from flowmo.training.sharding import full


class Batches(Protocol):
    """Endless batches, each a tensor or a tuple of tensors, with a position that can be restored."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def describe(self) -> str: ...


class Optimizer(Protocol):
    """What the loop asks of an optimizer; it keeps the average as well.

    Attributes:
        average: the averaged weights of `Stage.trained`, by name. step_count: updates so far; the loop takes one back
            when it learns that it was skipped, before the next.
    """

    average: dict[str, Tensor]
    step_count: int

    def step(self, lr: float, found_inf: Tensor | None = None) -> None:
        """One update from the gradients that are there; they are cleared.

        Where `found_inf`, fp32 [] on the device, is not zero, nothing else changes. The host does not read it.
        """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Measure = Callable[[Any], dict[str, float]]  # of an averaged model


class Stage(nn.Module, ABC):
    """One kind of training. Calling it with a batch gives its losses.

    Args:
        config: a checked configuration.
        device: of model and batches.

    Attributes:
        model: whose state dict goes into checkpoints. trained: the parameters that learn, by name.
        shown: the numbers that the progress line shows besides the loss; the first is the one that is followed.
    """

    name: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = ()
    model: nn.Module
    trained: dict[str, nn.Parameter]

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.device = device

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ConfigError where the stage cannot start, before anything is written."""

    # Weights.

    def start_from(self, path: str) -> None:
        """Take the weights that `init=` names."""
        raise ConfigError(f"init={path}: stage {self.name} starts from no other model")

    def shard(self) -> None:
        """Spread the weights over all processes (FSDP)."""
        raise ConfigError(f"trainer.parallel=fsdp: stage {self.name} trains with ddp")

    @abstractmethod
    def empty_model(self) -> nn.Module:
        """A model like `self.model` without weights, on the meta device."""

    def averaged(self, average: dict[str, Tensor]) -> Any:
        """A copy of the model with averaged weights, in evaluation mode; of sharded weights all processes make it.

        Its `save_pretrained(folder)` is what the loop saves of it.
        """
        with torch.device("meta"):  # no initial weights: they would cost time and the global random state
            model = self.empty_model()
        weights = {k: full(v.detach()).clone() for k, v in {**self.model.state_dict(), **average}.items()}
        model.load_state_dict(weights, assign=True)
        return model.to(self.device).eval()

    # Training.

    @abstractmethod
    def batches(self, processes: Processes) -> Batches:
        """This process's share of the training data."""

    @abstractmethod
    def optimizer(self) -> Optimizer:
        """Made once the weights are those of step 0."""

    @abstractmethod
    def learning_rate(self, step: int, progress: float) -> float:
        """Rate of the step after `step` steps, `progress` in [0, 1] being the part of the run that is done."""

    def update(self, step: int) -> bool:
        """Freeze or release parts for the step after `step` steps; True when what learns has changed."""
        return False

    @abstractmethod
    def forward(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar losses of a batch; "total" carries the gradient."""

    def clip_(self, norm: Tensor) -> None:
        """Shorten gradients of this norm, in place, where the stage bounds it."""

    @property
    @abstractmethod
    def sequence(self) -> int:
        """Tokens that attention sees at once."""

    # What is said, measured and drawn.

    def describe_model(self) -> str:
        """The model's sizes, for the log, after its number of parameters."""
        return type(self.model).__name__

    def describe(self) -> str:
        """The stage's own part of the log's first lines."""
        return f"stage {self.name}"

    def statistics(self) -> dict[str, float]:
        """Numbers gathered since the last call, for the log; all processes call it together."""
        return {}

    def step_flops(self) -> float | None:
        """Floating-point operations of one optimizer step over the whole batch; None where nobody has counted."""
        return None

    def samples(self, data: Batches) -> Any:
        """What the grids show: kept for the whole run, and taken without moving the position of `data`."""
        return None

    def grid(self, model: Any, samples: Any) -> Image.Image | None:
        """A picture of what the averaged model does with the samples; None where there is nothing to see."""
        return None

    def measure(self) -> Measure | None:
        """What `heldout.every` measures, made in the first process alone; None, and said, where there is no data."""
        return None
