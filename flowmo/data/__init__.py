"""Pictures: reading files, folders of them, the built-in sample photographs, and training batches."""

from __future__ import annotations

from flowmo.data.archive import ArchiveError, ArchiveImages
from flowmo.data.folder import Example, ImageFolder, Skipped, find_images
from flowmo.data.loader import BatchSource, TooManyFailures, TrainingBatches, build_data
from flowmo.data.samples import CropSampler, SamplePhotographsMissing, heldout_photographs, train_photographs
from flowmo.data.transforms import (
    ImageReadError,
    center_crop,
    load_image,
    make_grid,
    normalize,
    random_crop,
    resize_shorter,
    save_png,
    to_pil,
    to_tensor,
    to_uint8,
)

__all__ = [
    "ArchiveError",
    "ArchiveImages",
    "BatchSource",
    "CropSampler",
    "Example",
    "ImageFolder",
    "ImageReadError",
    "SamplePhotographsMissing",
    "Skipped",
    "TooManyFailures",
    "TrainingBatches",
    "build_data",
    "center_crop",
    "find_images",
    "heldout_photographs",
    "load_image",
    "make_grid",
    "normalize",
    "random_crop",
    "resize_shorter",
    "save_png",
    "to_pil",
    "to_tensor",
    "to_uint8",
    "train_photographs",
]
