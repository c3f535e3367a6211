"""On what a number was measured: processor, versions, code and time. No torch: figures and `--help` stay instant.

hashlib, importlib.metadata and subprocess are imported by what needs them: together they take longer than the rest of `--help`.
"""

import functools
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from utils import paths

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "pillow",
)
ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "asimddp",
    "asimdhp",
)
CODE = ("models", "quantization", "utils", "figures/*.py", "reproduce.py", "requirements.txt")


@functools.cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's name and those of its instruction sets that decide how quantized kernels compute."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in ISA if flag in flags)


def has_vnni() -> bool:
    """Whether u8 x s8 products accumulate in 32 bits. Older x86 adds pairs in 16 bits first, which saturates."""
    return any("vnni" in flag or flag in ("amx_int8", "asimddp") for flag in cpu()[1])


def group() -> tuple[int, int]:
    """Number of this process, from 0, and how many train together: what `torchrun` tells, else (0, 1)."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ["RANK"]), size) if size > 1 and "RANK" in os.environ else (0, 1)


def versions() -> dict[str, str]:
    """Versions of Python and of those packages of the study that are installed."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    import subprocess

    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def git() -> tuple[str, bool | None]:
    """Commit of the code, and whether the code (not its results) differs from it; ("", None) outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    return commit, bool(_git("status", "--porcelain", "--", *CODE)) if commit else None


@functools.cache
def code_sha256(script: str) -> str:
    """Digest of what decides a script's result: the script and everything in utils/."""
    import hashlib

    digest = hashlib.sha256()
    for path in [paths.ROOT / script, *sorted((paths.ROOT / "utils").rglob("*.py"))]:
        digest.update(path.relative_to(paths.ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def describe(threads: int) -> dict:
    """Everything about this machine and code that a measurement may depend on; no host or user name."""
    name, isa = cpu()
    commit, dirty = git()
    return {
        "cpu": name,
        "isa": list(isa),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.implementation.name,
    }
