"""Scoring tokenizers and generators: pictures in a fixed order, any number of processes, protocol with the numbers."""

from __future__ import annotations

from flowmo.evaluation.generation import score_generation
from flowmo.evaluation.pictures import (
    ArchivePictures,
    FolderPictures,
    NpzPictures,
    SamplePictures,
    open_images,
    open_pictures,
    spaced,
)
from flowmo.evaluation.processes import Processes
from flowmo.evaluation.reconstruction import Judges, Scores, score_reconstruction
from flowmo.evaluation.tokenizers import FlowMoTokenizer, ForeignTokenizer, Reconstruction

__all__ = [
    "ArchivePictures",
    "FlowMoTokenizer",
    "FolderPictures",
    "ForeignTokenizer",
    "Judges",
    "NpzPictures",
    "Processes",
    "Reconstruction",
    "SamplePictures",
    "Scores",
    "open_images",
    "open_pictures",
    "score_generation",
    "score_reconstruction",
    "spaced",
]
