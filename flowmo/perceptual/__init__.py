"""Fixed networks that judge pictures: VGG-16 with LPIPS heads, and ResNet-50 logits."""

from __future__ import annotations

from flowmo.perceptual.lpips import LPIPS, load_perceptual, random_lpips
from flowmo.perceptual.resnet import ResNet50, ResNetDistance, load_resnet_distance, random_resnet_distance
from flowmo.perceptual.vgg import VGG16Features
from flowmo.perceptual.weights import WeightsInvalid, WeightsMissing

__all__ = [
    "LPIPS",
    "ResNet50",
    "ResNetDistance",
    "VGG16Features",
    "WeightsInvalid",
    "WeightsMissing",
    "load_perceptual",
    "load_resnet_distance",
    "random_lpips",
    "random_resnet_distance",
]
