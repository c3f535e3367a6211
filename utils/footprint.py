"""What a network costs besides time: bytes, operations, memory."""

import copy
import weakref
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make while this is entered: `now` alive, and their `peak`.

    Views count once, with what they look at; `known` tensors, such as weights, not at all. Scratch space within an operator
    cannot be seen.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def activation_mb(predict, network: nn.Module, x: torch.Tensor) -> float:
    """Peak MiB of the activations alive at once while `predict`, which runs `network`, answers `x`; `x` itself not counted."""
    with torch.inference_mode(), LiveBytes([x, *network.parameters(), *network.buffers()]) as live:
        predict(x)
    return live.peak / MIB


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
