"""What each preset and each stage changes of the defaults of :mod:`flowmo.config`: tables, and nothing else."""

from __future__ import annotations

from typing import Any

# What each preset changes of the defaults, which are FlowMo-Lo's.
PRESETS: dict[str, dict[str, Any]] = {
    "lo": {},
    "hi": {
        "model": {"latent_channels": 56, "entropy_bits": 14},
        "trainer": {"steps": 800_000},
    },
    "small": {
        "model": {"patch": 8, "decoder_width": 4},
        "trainer": {"steps": 400_000},
    },
    "continuous": {
        "model": {"patch": 8, "decoder_width": 4, "latent_channels": 16, "quantizer": "none"},
        "loss": {"noise_sync": 0.1},
        "trainer": {"steps": 400_000},
    },
    "tiny": {
        "model": {
            "image_size": 32,
            "heads": 2,
            "encoder_width": 2,
            "decoder_width": 2,
            "encoder_depth": 1,
            "decoder_depth": 2,
            "latent_tokens": 16,
        },
        "loss": {"perceptual": "none"},
        "optim": {"lr": 2e-3, "ema_decay": 0.99, "freeze_encoder_at": None},
        "data": {"path": "samples", "batch": 8, "workers": 0},
        "trainer": {"steps": 300, "sample_every": 100, "save_every": 100, "sample_images": 4},
    },
    "quickstart": {
        "model": {
            "image_size": 32,
            "heads": 6,
            "encoder_width": 2,
            "decoder_width": 2,
            "encoder_depth": 1,
            "decoder_depth": 3,
            "latent_tokens": 16,
        },
        "loss": {"perceptual": "none", "entropy": 0.005, "commitment": 0.0025},
        "noise": {"mean": 2.0},
        "optim": {
            "lr": 2e-3,
            "schedule": "cosine",
            "warmup": 100,
            "ema_decay": 0.995,
            "freeze_encoder_at": None,
        },
        "data": {
            "path": "samples",
            "batch": 16,
            "workers": 0,
            "flip": True,
            "scales": [32, 64, 128, 256],
            "columns": [0.0, 0.7],
        },
        # Trained for minutes, mostly at high noise: few steps stay near the mean, many add noise.
        "sampler": {"steps": 3},
        "trainer": {"steps": 20_000, "minutes": 4.0, "sample_every": 1000, "save_every": 1000},
    },
    # Stage 2; its settings are in the table of stages below.
    "maskgit": {"stage": "maskgit"},
    "maskgit-quickstart": {"stage": "maskgit"},
}

# What a stage changes of its preset: for every preset, and for one.
STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "pretrain": {},
    "posttrain": {
        "": {
            "run": "runs/${preset}-posttrain",
            "optim": {"lr": 5e-5, "schedule": "constant", "warmup": 0, "freeze_encoder_at": None},
            "data": {"batch": 64},
            "trainer": {"steps": 20_018, "minutes": None, "accumulate": 2},  # one epoch of ImageNet
            "heldout": {"every": 5_000},
        },
        "tiny": {
            "data": {"batch": 8},
            "trainer": {"steps": 40, "sample_every": 20, "save_every": 20},
            "posttrain": {"resnet": "random"},
            "heldout": {"every": 10},
        },
        "quickstart": {
            "data": {"batch": 16},
            "trainer": {"steps": 200, "sample_every": 100, "save_every": 50},
            "posttrain": {"resnet": "random"},
            "heldout": {"every": 25},
        },
    },
    "distill": {
        "": {
            "run": "runs/${preset}-distill",
            "loss": {"perceptual": "none"},
            "optim": {"lr": 5e-5, "schedule": "cosine", "warmup": 0, "freeze_encoder_at": None},
            "data": {"batch": 64},
            "trainer": {"steps": 20_018, "minutes": None, "accumulate": 2},  # one epoch of ImageNet
            "heldout": {"every": 5_000},
        },
        "tiny": {
            "checkpoint": "none",
            "data": {"batch": 8},
            "trainer": {"steps": 40, "sample_every": 20, "save_every": 20},
            "optim": {"lr": 1e-3},
            "posttrain": {"resnet": "none"},
            "heldout": {"every": 20, "metric": "teacher"},
        },
        # Its best pictures are near the mean of what a code allows: so the fewer the steps, the more of the original,
        # and the paper's spacing, by which two steps stay near that mean.
        "quickstart": {
            "checkpoint": "none",
            "distill": {"rho": 4.0, "original": [0.8, 0.8, 0.5]},
            "loss": {"perceptual": "random", "perceptual_weight": 0.05},
            "optim": {"lr": 3e-4},  # a few photographs are soon learned by heart
            "data": {"batch": 16},
            "sampler": {"steps": 25},
            "trainer": {"steps": 20_000, "minutes": 13.0, "accumulate": 1, "sample_every": 500, "save_every": 100},
            "posttrain": {"resnet": "none"},
            "heldout": {"every": 100, "metric": "teacher", "patience": 0},
        },
    },
    "maskgit": {
        "": {
            "trainer": {"steps": 3_002_735, "sample_images": 32},  # 300 epochs of ImageNet
            "heldout": {"metric": "masked", "images": 5_000, "patience": 0},
        },
        # For a handful of pictures and the tokens of the quickstart preset.
        "maskgit-quickstart": {
            "generator": {
                "network": {"tokens": 32, "classes": 10, "hidden": 128, "depth": 4, "heads": 4},
                "optim": {"lr": 2e-3, "warmup": 20, "ema_decay": 0.99},
                # The published temperature is for many tokens: of 32, each misdrawn early one spoils the rest.
                "sampler": {"randomize_temperature": 1.0},
            },
            "data": {"batch": 32},
            "sampler": {"steps": 8},
            "trainer": {"steps": 400, "log_every": 100, "sample_every": 400, "save_every": 200, "sample_images": 8},
        },
    },
}

# Beginnings of the keys that a stage does not read: to give one is a mistake.
_OF_PICTURES = ("path", "index", "workers", "max_failed", "flip", "scales", "columns")
UNREAD: dict[str, tuple[str, ...]] = {stage: ("generator.", "data.tokens", "distill.") for stage in STAGES} | {
    "distill": ("generator.", "data.tokens", "noise.", "posttrain.steps"),
    "maskgit": (
        *("model.", "loss.", "noise.", "optim.", "posttrain.", "distill.", "checkpoint", "init_part"),
        *(f"data.{key}" for key in _OF_PICTURES),
    ),
}
