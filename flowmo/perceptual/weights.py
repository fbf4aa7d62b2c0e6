"""Weight files of the perceptual networks: where they are published, and reading them safely."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

PathLike = str | os.PathLike[str]


class PublishedFile(NamedTuple):
    """A weight file as its authors publish it."""

    name: str
    sha256: str  # all of it, or as many leading digits as the authors give
    where: str


VGG16 = PublishedFile(
    "vgg16-397923af.pth",
    "397923af",
    "by the torchvision project as VGG16_Weights.IMAGENET1K_V1 (its models documentation, page VGG-16)",
)
LPIPS_VGG_HEADS = PublishedFile(
    "vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "by the PerceptualSimilarity project in lpips/weights/v0.1, and inside the package torchmetrics (pip install it)",
)
ALEXNET = PublishedFile(
    "alexnet-owt-7be5be79.pth",
    "7be5be79",
    "by the torchvision project as AlexNet_Weights.IMAGENET1K_V1 (its models documentation, page AlexNet)",
)
LPIPS_ALEX_HEADS = PublishedFile(
    "alex.pth",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "by the PerceptualSimilarity project in lpips/weights/v0.1, and inside the package torchmetrics (pip install it)",
)
RESNET50 = PublishedFile(
    "resnet50-0676ba61.pth",
    "0676ba61",
    "by the torchvision project as ResNet50_Weights.IMAGENET1K_V1 (its models documentation, page ResNet-50)",
)


class WeightsMissing(FileNotFoundError):
    """A weight file is needed and not there; the message says which, where it is published and what to do."""


class WeightsInvalid(ValueError):
    """A weight file is damaged, altered, or of another network."""


def describe(published: PublishedFile, option: str) -> str:
    """One clause for error messages: file name, digest, publisher, option."""
    return (
        f"{published.name} (sha256 begins {published.sha256[:8]}), published {published.where}; "
        f"give its path as {option}=PATH"
    )


def read_state_dict(published: PublishedFile, path: PathLike) -> dict[str, Tensor]:
    """The tensors of a weight file, on the CPU; no pickled code is run.

    The digest is compared with the published one: a difference is an error for a file of the published name, and a
    warning for a file of another name (a conversion, say), whose keys and shapes are checked all the same.

    Raises:
        WeightsMissing: no such file.
        WeightsInvalid: damaged, altered, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsMissing(f"no such weight file: {path} (wanted: {published.name}, published {published.where})")
    digest = sha256_of(path)
    if not digest.startswith(published.sha256):
        text = f"{path} has sha256 {digest[:16]}..., the published {published.name} begins {published.sha256[:8]}"
        if path.name == published.name:
            raise WeightsInvalid(f"{text}: it is damaged or altered; fetch it again (published {published.where})")
        text += "; going on, as its name is another. Results are not those of the published network"
        warnings.warn(text, stacklevel=3)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes fails in many ways
        raise WeightsInvalid(f"cannot read {path} as a weight file: {type(error).__name__}: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsInvalid(f"{path} holds no plain state dict (names to tensors), which {published.name} does")
    return dict(state)  # a plain dict drops version metadata, which would make BatchNorm's counters compulsory


def load_into(module: nn.Module, state: Mapping[str, Tensor], path: PathLike) -> None:
    """Give `module` (made on any device, the meta device too) the tensors of `state` as float32.

    Raises WeightsInvalid naming the keys that are missing, unexpected or of another shape.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    faults = [f"missing {name}" for name in wanted if name not in state and name not in optional]
    faults += [f"unexpected {name}" for name in state if name not in wanted]
    faults += [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in state and state[name].shape != shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsInvalid(f"{path} does not fit {type(module).__name__}: " + "; ".join(faults[:5]) + more)
    # clones: a parameter must not keep a whole file's storage alive
    tensors = {name: t.clone() if name in optional else t.float().clone() for name, t in state.items()}
    module.load_state_dict(tensors, assign=True)


def he_init_(module: nn.Module, generator: torch.Generator, bias_std: float = 0.0) -> None:
    """He initialisation of all convolutions (fan-in, for ReLU), in place; biases normal with `bias_std`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            with torch.no_grad():
                layer.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(0.0, bias_std, generator=generator)


def smooth_pictures(n: int, generator: torch.Generator) -> Tensor:
    """Random colour clouds, float32 [n, 3, 64, 64] in [-1, 1], to set the scale of untrained networks by."""
    coarse = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=64, mode="bilinear")


class FrozenNetwork(nn.Module):
    """A network that is only ever looked through: evaluation mode for good, no gradients for its weights."""

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stays in evaluation mode whatever `mode` says, so that training a model around it cannot change it."""
        return super().train(False)

    def freeze_(self, channels_last: bool) -> None:
        """Fix the weights and choose their memory format; called once they are in place."""
        self.requires_grad_(False)
        self.train(False)
        if channels_last:
            for parameter in self.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def check_pair(x: Tensor, y: Tensor, name: str, least: int) -> None:
    """Raise ValueError unless x and y are floating pictures [N, 3, H, W] of one shape, sides of `least` or more."""
    for images in (x, y):
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{name} expects floating pictures [N, 3, H, W] in [-1, 1], got {images.dtype} {list(images.shape)}"
            )
        if min(images.shape[2:]) < least:
            raise ValueError(f"{name} needs sides of at least {least} pixels, got {list(images.shape)}")
    if x.shape != y.shape:
        raise ValueError(f"{name} compares pictures of one shape, got {list(x.shape)} and {list(y.shape)}")


def sha256_of(path: PathLike) -> str:
    """Digest of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
