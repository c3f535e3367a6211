"""BatchNorm over the batch of a whole group of processes, on CPUs and GPUs.

Without it, each process normalises by the statistics of its part of a batch, and two processes
train another network than one. torch.nn.SyncBatchNorm does the same, but only on GPUs.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


class GroupBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d whose training statistics are those of all processes' images together.

    Input and output are (n, channels, height, width); n may differ between processes. In evaluation
    mode it is a BatchNorm2d.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        values = x.float()  # sums of FP16 would overflow
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        shape = (1, -1, 1, 1)
        mean = all_reduce(values.sum((0, 2, 3))) / count
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        gain = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * gain.view(shape) + self.bias.view(shape)).to(x.dtype)


def synchronize(model: nn.Module) -> None:
    """Make every BatchNorm2d of `model` a `GroupBatchNorm2d`, in place.

    Names, parameters and buffers stay, so the state dict is the one of the plain network.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupBatchNorm2d
