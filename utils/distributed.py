"""Several processes that train one model together, as `torchrun` starts them. A process of its own is a group of one.

Every process sees an equal part of every batch, so a group takes the steps that one process would take. Process 0 writes.
"""

import atexit
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from utils import environment
from utils.errors import UserError

PATIENCE = timedelta(hours=24)  # how long the others wait while process 0 measures


def rank() -> int:
    """Number of this process in its group, from 0."""
    return environment.group()[0]


def size() -> int:
    """Processes in the group."""
    return environment.group()[1]


def join(device: str, threads: int, batch_size: int) -> None:
    """Enter the group that `torchrun` announced, unless done before; processes on one machine share its `threads`.

    Raises `UserError` when batches cannot be shared out evenly.
    """
    if size() == 1:
        return
    if batch_size % size():
        raise UserError(f"{size()} processes cannot share batches of {batch_size} evenly: start another number of them.")
    # DDP would rather have gradients in its own memory layout; converting them costs nothing that can be measured here.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.set_num_threads(max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)


def parallel(model: nn.Module) -> nn.Module:
    """`model` with gradients averaged over the group on every backward pass; `model` itself in a group of one."""
    return nn.parallel.DistributedDataParallel(model) if size() > 1 else model


def total(values: list[float], device: str) -> list[float]:
    """Sums over the group, computed in float64."""
    if size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def share(model: nn.Module) -> None:
    """Give every process the buffers of process 0: BatchNorm's statistics and quantization ranges are estimated apart."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait() -> None:
    """Until every process of the group is here."""
    if size() > 1:
        dist.barrier()
