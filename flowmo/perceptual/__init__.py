"""Fixed networks that judge pictures: LPIPS on VGG-16 and AlexNet, ResNet-50 logits, Inception features."""

from __future__ import annotations

from flowmo.perceptual.alexnet import AlexNetFeatures
from flowmo.perceptual.inception import InceptionFeatures, InceptionV3, load_inception, random_inception
from flowmo.perceptual.lpips import LPIPS, load_lpips, load_perceptual, random_lpips
from flowmo.perceptual.resnet import ResNet50, ResNetDistance, load_resnet_distance, random_resnet_distance
from flowmo.perceptual.vgg import VGG16Features
from flowmo.perceptual.weights import WeightsInvalid, WeightsMissing

__all__ = [
    "LPIPS",
    "AlexNetFeatures",
    "InceptionFeatures",
    "InceptionV3",
    "ResNet50",
    "ResNetDistance",
    "VGG16Features",
    "WeightsInvalid",
    "WeightsMissing",
    "load_inception",
    "load_lpips",
    "load_perceptual",
    "load_resnet_distance",
    "random_inception",
    "random_lpips",
    "random_resnet_distance",
]
