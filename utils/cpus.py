"""CPUs that this process may use, by affinity, quota, Slurm and OpenMP. No torch."""

import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
REQUESTS = ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS")  # of users and clusters, in the environment


def usable() -> int:
    """Return how many CPUs the system lets this process use, at least 1.

    That is the size of its affinity mask, or a container's quota if it is smaller. A quota of 1.5
    CPUs counts as 1: two threads would be stopped during a quarter of the time.
    """
    limit = quota()
    return max(1, _allowed() if limit is None else min(_allowed(), int(limit)))


def default_threads() -> int:
    """Return the default of `--threads`: `usable`, or fewer if the environment says so.

    Slurm and OpenMP ask by SLURM_CPUS_PER_TASK and OMP_NUM_THREADS.
    """
    return min([usable(), *filter(None, requests().values())])


def describe() -> dict:
    """Return every limit, None where there is none; JSON-serializable."""
    return {"affinity": _allowed(), "quota": quota(), **requests()}


def requests() -> dict[str, int | None]:
    """Return the numbers of threads that the environment asks for, by variable.

    OMP_NUM_THREADS may be a list for nested regions, "4,2". The first number counts.
    """
    asked = {}
    for name in REQUESTS:
        number = re.fullmatch(r"\s*([1-9]\d*)\s*(,.*)?", os.environ.get(name, ""))
        asked[name] = int(number[1]) if number else None
    return asked


def quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Return the CPU time that control groups grant per time, in CPUs; None if it is unlimited.

    Reads `cpu.max` (cgroup v2) and `cpu.cfs_quota_us` (v1) of this process's group and of all
    groups above it; the smallest counts. In a container, its group may be mounted as the root.
    Linux kernel documentation: admin-guide/cgroup-v2, and scheduler/sched-bwc for v1.
    """
    limits = []
    for folder in _groups(cgroups, membership):
        limits.append(_ratio(*_words(folder / "cpu.max", 2)))
        v1 = (_words(folder / name, 1) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        limits.append(_ratio(*(words[0] for words in v1)))
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(cgroups: Path, membership: Path) -> list[Path]:
    """Return the folders of this process's control groups and of the groups above them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (cgroups, cgroups / "cpu", cgroups / (controllers or "unified")):
            below = root / group.lstrip("/")
            folders += [below, *(path for path in below.parents if path.is_relative_to(root))]
    return list(dict.fromkeys(folders))


def _words(path: Path, count: int) -> list[str]:
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    return words if len(words) == count else [""] * count


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None  # "max" in v2 and -1 in v1: unlimited
    return int(quota) / int(period)


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
