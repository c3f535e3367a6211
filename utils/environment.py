"""Circumstances of a measurement: processor, versions, code and time.

No torch, so that figures and `--help` are quick. ast, hashlib, importlib.metadata and subprocess
are imported by the functions that need them: together they take longer than the rest of `--help`.
"""

import functools
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from utils import paths

STARTED = time.monotonic()  # in seconds: this module is among the first that a script imports
# In bytes. It is the dissertation's "MB": AlexNet's 57,012,034 parameters of 4 bytes are its 217.5.
MIB = 2**20
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "torchao",
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
    "bf16",
)
CODE = ("models", "quantization", "utils", "figures/*.py", "reproduce.py", "requirements.txt")
# Modules that every script loads and that compute nothing: they name, print, parse and store.
UNINVOLVED = ("__init__", "catalog", "cli", "errors", "paths", "progress", "results")


@functools.cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and its instruction sets that matter to quantized kernels."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in ISA if flag in flags)


def has_vnni() -> bool:
    """Whether the processor accumulates u8 x s8 products in 32 bits.

    Older x86 processors add pairs of products in 16 bits first, which can saturate.
    """
    return any("vnni" in flag or flag in ("amx_int8", "asimddp") for flag in cpu()[1])


def group() -> tuple[int, int]:
    """Rank of this process and number of processes that train together; (0, 1) if alone.

    `torchrun` sets both in the environment.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ["RANK"]), size) if size > 1 and "RANK" in os.environ else (0, 1)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the study's packages that are installed."""
    from importlib import metadata

    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _git(*arguments: str) -> str:
    import subprocess

    try:
        done = subprocess.run(
            ["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def git() -> tuple[str, bool | None]:
    """Commit of the code, and whether the code (not its results) differs from it.

    Returns ("", None) outside a git checkout.
    """
    commit = _git("rev-parse", "HEAD")
    return commit, bool(_git("status", "--porcelain", "--", *CODE)) if commit else None


@functools.cache
def syntax_sha256(path: Path) -> str:
    """SHA-256 of a Python file's syntax tree, without docstrings, comments and layout.

    Files with equal digests do the same.
    """
    import ast
    import hashlib

    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def code(script: str) -> dict[str, str]:
    """Digests of the code that decides a result, as {path: `syntax_sha256`}.

    These are the script and the modules of utils/ that this process has loaded, without those that
    only name, print, parse or store (`UNINVOLVED`).
    """
    loaded = {script}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("utils.") and file and Path(file).stem not in UNINVOLVED:
            loaded.add(Path(file).resolve().relative_to(paths.ROOT).as_posix())
    return {path: syntax_sha256(paths.ROOT / path) for path in sorted(loaded)}


def code_sha256(digests: dict[str, str]) -> str:
    """Combine the digests that `code` returns into one."""
    import hashlib

    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def is_code(digests: dict[str, str]) -> bool:
    """Whether the files here still have the `digests` of an earlier run."""
    files = {path: paths.ROOT / path for path in digests}
    return all(
        file.is_file() and syntax_sha256(file) == digests[path] for path, file in files.items()
    )


def describe(threads: int) -> dict:
    """Describe the machine and the code, on which a measurement may depend, and how long this process has run.

    The names of host and user are left out.
    """
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
        "script_s": round(time.monotonic() - STARTED, 1),
        "python": sys.implementation.name,
    }
