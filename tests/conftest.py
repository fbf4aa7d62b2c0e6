"""Without a CUDA card the Triton kernels run interpreted; Triton reads the variable when kernels are decorated."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
