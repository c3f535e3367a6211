"""Training of one model by a group of processes that `torchrun` started.

A process that trains alone is a group of one. Every process sees an equal part of every batch, and
BatchNorm normalises by the whole batch, so a group takes the same steps as one process, up to the
order of sums. Only dropout draws other masks. Process 0 writes the files.
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
from utils.training.sync_batchnorm import synchronize

PATIENCE = timedelta(hours=24)  # for which the others wait while process 0 measures


def rank() -> int:
    """Return the number of this process in its group, from 0."""
    return environment.group()[0]


def size() -> int:
    """Return the number of processes in the group."""
    return environment.group()[1]


def join(device: str, threads: int, batch_size: int) -> None:
    """Join the group that `torchrun` announced, unless this process has already joined it.

    Processes on one machine share its `threads`. Raises `UserError` if `batch_size` is not a
    multiple of the group's size.
    """
    if size() == 1:
        return
    if batch_size % size():
        raise UserError(
            f"{size()} processes cannot share batches of {batch_size} evenly: start a number of "
            f"processes that divides {batch_size}."
        )
    # DDP warns that the memory layouts of gradients and buckets differ. The conversion takes no
    # measurable time here.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.set_num_threads(max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)


def parallel(model: nn.Module) -> nn.Module:
    """Return `model` with gradients averaged over the group on every backward pass.

    Its BatchNorm layers then normalise by the whole group's batch. In a group of one, this is
    `model` itself.
    """
    if size() == 1:
        return model
    synchronize(model)
    return nn.parallel.DistributedDataParallel(model)


def total(values: list[float], device: str) -> list[float]:
    """Sum each of `values` over the group, in float64."""
    if size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def share(model: nn.Module) -> None:
    """Copy the buffers of process 0 to every process, so that last bits do not differ."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wait() -> None:
    """Wait until every process of the group has reached this call."""
    if size() > 1:
        dist.barrier()
