"""The peak memory of this process."""

from pathlib import Path

import psutil
import torch

from utils.environment import MIB


def peak_memory_mb(device: str) -> float:
    """Peak memory of this process so far, in MiB.

    On a CPU it is the resident set size, on a GPU the memory allocated by torch. A Linux process
    inherits its parent's `ru_maxrss`, so that value is used only where nothing better exists.
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
    import resource  # macOS: in bytes, and a child process starts from zero

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
