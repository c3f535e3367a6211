"""What a network costs besides time: bytes, operations, memory."""

import copy
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20  # the dissertation's "MB": AlexNet's 57,012,034 parameters of 4 bytes are its 217.5


def macs(model: nn.Module) -> int:
    """Multiply-accumulates of one 224x224 image: half the floating-point operations that torch counts."""
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        copy.deepcopy(model).cpu().eval()(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops() // 2


def size_mb(path: Path) -> float:
    """Size of a file in MiB."""
    return path.stat().st_size / MIB


def peak_memory_mb(device: str) -> float:
    """Peak memory of this process so far in MiB: resident set on a CPU, allocated by torch on a GPU.

    `ru_maxrss` is not used where there is better: Linux hands the parent's peak on to a child process.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) / 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / MIB
    import resource  # macOS, where the unit is bytes and a child starts from nothing

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
