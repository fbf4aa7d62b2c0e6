"""Fully sharded training (FSDP2): every process holds its rows of each weight, and checkpoints are written in shards.

The functions here take plain tensors as well, which are whole everywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowmo.autoencoder import FlowMo


def shard_(model: FlowMo, device: torch.device) -> None:
    """Shard a model over all processes, in place: each block a unit, so that one block at a time is whole."""
    # Blocks return views of the joint sequence; nothing works in place on them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.encoder, model.decoder):
        for block in part.double_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(part, mesh=mesh)


def exchange_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward pass of a sharded model ends in the exchange of gradients."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This process's rows, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(
    rows: Tensor,  # [rows], whole in every process
    parameter: Tensor,  # [rows, ...]
) -> Tensor:
    """One number to a row of a parameter, each beside its row."""
    if not isinstance(parameter, DTensor):
        return rows
    return distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def fill_(target: Tensor, whole: Tensor) -> None:
    """Copy this process's rows of a tensor that every process has whole."""
    if isinstance(target, DTensor):
        whole = whole.to(target.device, target.dtype)
        # src_data_rank=None: nobody sends, each cuts its own rows
        rows = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(rows.to_local())
    else:
        target.copy_(whole)


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors with torch.distributed.checkpoint; all processes call it.

    Raises:
        OSError: in all processes, when one cannot write its part: what the system said there.
    """
    try:
        dcp.save(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    except CheckpointException as failed:
        raise _system_error(failed) from failed


def _system_error(failed: CheckpointException) -> OSError:
    for error, _ in failed.failures.values():
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                return OSError(cause.errno, cause.strerror)
            cause = cause.__cause__ or cause.__context__
    return OSError(errno.EIO, str(failed).splitlines()[-1])


def load_shards_(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read into tensors in place, whatever number of processes wrote them; all processes call it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is what is meant
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a sharded checkpoint, whole, on the CPU, in this process alone."""
    metadata = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {
        k: torch.empty(m.size, dtype=m.properties.dtype)
        for k, m in metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is what is meant
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a sharded checkpoint by name, flushing each to the disk on the way."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".distcp" and path.name != ".metadata":
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of model and optimizer by dotted names, everything else) of a training state."""
    tensors = {f"model.{k}": v.detach() for k, v in state["model"].items()}
    rest = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
    rest["optimizer"] = {}
    for part, values in state["optimizer"].items():
        if isinstance(values, dict):
            tensors |= {f"optimizer.{part}.{k}": v.detach() for k, v in values.items()}
        else:
            rest["optimizer"][part] = values
    return tensors, rest


def unflatten(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten`."""
    optimizer: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}, "average": {}, "norm": {}, **rest["optimizer"]}
    model: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            model[name] = value
        else:
            part, _, name = name.partition(".")
            optimizer[part][name] = value
    return {**rest, "model": model, "optimizer": optimizer}
