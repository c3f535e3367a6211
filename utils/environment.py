"""Circumstances of a measurement: processor, versions, code and time.

This module does not import torch, so figures and `--help` stay quick. The functions that need ast,
hashlib, importlib.metadata or subprocess import them: together they take longer than the rest of
`--help`.
"""

import functools
import os
import platform
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from utils import cpus, paths

STARTED = time.monotonic()  # in seconds; scripts import this module among the first
# The dissertation's "MB", in bytes: it gives 217.5 for AlexNet's 57,012,034 parameters of 4 bytes.
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
# Environment variables by which users keep libraries from instruction sets of the processor.
ISA_LIMITS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "FBGEMM_ENABLE_INSTRUCTIONS",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
# Values of these variables, upper case, that leave a library without VNNI.
ONEDNN_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
ONEDNN_AVX_VNNI = ("AVX2_VNNI", "AVX2_VNNI_2")  # not the VNNI of AVX-512
FBGEMM_WITHOUT_VNNI = ("AVX2", "AVX512", "AVX512_256")
CODE = ("models", "quantization", "utils", "figures/*.py", "reproduce.py", "requirements.txt")
# Modules and packages of utils/ that compute nothing: they name, print, parse or store.
UNINVOLVED = (
    "utils.catalog",
    "utils.caveats",
    "utils.checksums",
    "utils.cli",
    "utils.columns",
    "utils.errors",
    "utils.paths",
    "utils.progress",
    "utils.results",
    "utils.schema",
    "utils.studies",
)


@functools.cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """Name of the processor, and its instruction sets that matter to quantized kernels."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(flag for flag in ISA if flag in flags)


def isa_limits() -> str:
    """The `ISA_LIMITS` that are set, such as "ONEDNN_MAX_CPU_ISA=AVX2", or "none"."""
    given = [f"{name}={value}" for name in ISA_LIMITS if (value := os.environ.get(name))]
    return " ".join(given) or "none"


def has_vnni(*libraries: str) -> bool:
    """Whether all `libraries` accumulate u8 x s8 products in 32 bits on this processor.

    Older x86 processors first add pairs of products in 16 bits, which can saturate. `libraries` are
    "fbgemm", "onednn" (OpenVINO has its copy) or "mlas", the kernels of ONNX Runtime. Environment
    variables can keep the first two from instruction sets that the processor has.
    """
    return all(_has_vnni(library) for library in libraries)


def _has_vnni(library: str) -> bool:
    flags = set(cpu()[1])
    if "asimddp" in flags:
        return True
    wide = bool(flags & {"avx512_vnni", "amx_int8"})
    if library == "fbgemm":  # it has no kernels for the VNNI of AVX2
        return wide and _limit("FBGEMM_ENABLE_INSTRUCTIONS") not in FBGEMM_WITHOUT_VNNI
    if library == "onednn":
        limit = _limit("ONEDNN_MAX_CPU_ISA") or _limit("DNNL_MAX_CPU_ISA")
        if limit in ONEDNN_WITHOUT_VNNI:
            return False
        if limit in ONEDNN_AVX_VNNI:
            return "avx_vnni" in flags
    return wide or "avx_vnni" in flags


def _limit(name: str) -> str:
    return os.environ.get(name, "").upper()


def group() -> tuple[int, int]:
    """Rank of this process and number of processes that train together; (0, 1) for one process.

    `torchrun` sets both in the environment.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    return (int(os.environ["RANK"]), size) if size > 1 and "RANK" in os.environ else (0, 1)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of those `PACKAGES` that are installed."""
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
    """Commit of the checkout, and whether its code (not its results) differs from the commit.

    Returns ("", None) outside a git checkout.
    """
    commit = _git("rev-parse", "HEAD")
    return commit, bool(_git("status", "--porcelain", "--", *CODE)) if commit else None


@functools.cache
def syntax_sha256(path: Path) -> str:
    """SHA-256 of a Python file's syntax tree, without docstrings, comments and layout.

    Files with equal digests behave the same.
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
    """Digests of the code behind a result, as {path: `syntax_sha256`}.

    This covers the script and the modules of utils/ that this process has loaded, without those in
    `UNINVOLVED`.
    """
    loaded = [name for name, module in list(sys.modules.items()) if hasattr(module, "__file__")]
    names = [name for name in loaded if name.startswith("utils.")]
    return _digests([paths.ROOT / script, *_involved_files(names)])


def code_of(*modules: str) -> dict[str, str]:
    """Digests of modules of utils/ and of all they import from it, as {path: `syntax_sha256`}.

    `modules` are dotted names, for example "utils.training.loop". Imports are read from the source,
    inside functions as well, so the result does not depend on what this process has loaded. Modules
    in `UNINVOLVED` are left out, with their imports. Imports by a computed name
    (`importlib.import_module(f"...")`) are not followed: name these modules in the call.
    """
    reached, waiting = set(), list(modules)
    while waiting:
        name = waiting.pop()
        if name not in reached and not _is_uninvolved(name):
            reached.add(name)
            waiting.extend(_imports(name, _file(name)))
    return _digests(_involved_files(reached))


def _is_uninvolved(name: str) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in UNINVOLVED)


def _involved_files(names: Iterable[str]) -> list[Path]:
    """Files of the modules `names` except `UNINVOLVED` and the `__init__.py` of packages."""
    files = [_file(name) for name in names if not _is_uninvolved(name)]
    return [file for file in files if file.name != "__init__.py"]


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """Map each file's path from the repository's root to its `syntax_sha256`, sorted by path."""
    return {file.relative_to(paths.ROOT).as_posix(): syntax_sha256(file) for file in sorted(files)}


def _file(name: str) -> Path:
    """File of the module or package `name`; raises `ModuleNotFoundError` if there is none."""
    path = paths.ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise ModuleNotFoundError(f"no module {name} in {paths.ROOT}", name=name)


@functools.cache
def _imports(name: str, file: Path) -> frozenset[str]:
    """Names of the modules of utils/ that the module `name` in `file` imports anywhere."""
    import ast

    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    names, nodes = set(), [ast.parse(file.read_bytes())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)  # the rest is only for type checkers
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            names.update(_imported_from(origin, alias.name) for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))
    return frozenset(name for name in names if name.partition(".")[0] == "utils")


def _imported_from(origin: str, name: str) -> str:
    """Module that `from origin import name` reads: a submodule of `origin`, or `origin` itself."""
    path = paths.ROOT.joinpath(*origin.split("."), name)
    is_module = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    return f"{origin}.{name}" if is_module else origin


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


def moved(machine: dict) -> str | None:
    """Return how the machine of a record, its `environment`, differs from this one; None if not.

    The number of threads is not compared: it is an option.
    """
    if (machine["cpu"], tuple(machine["isa"])) != cpu():
        return f"on another processor ({machine['cpu']})"
    if machine.get("isa_limits", "none") != isa_limits():
        return "with libraries held to other instruction sets"
    return None if machine["versions"] == versions() else "with other versions of the packages"


def session() -> dict:
    """Identify a timing session: its time in UTC, and the boot of the machine (None if unknown)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "boot": boot.read_text().strip() if boot.exists() else None,
    }


def describe(threads: int) -> dict:
    """Describe the machine, the code and the run time of this process, for a record.

    The names of host and user are left out.
    """
    name, isa = cpu()
    commit, dirty = git()
    return {
        "cpu": name,
        "isa": list(isa),
        "isa_limits": isa_limits(),
        "cpu_count": os.cpu_count(),
        "cpu_limits": cpus.describe(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "git_commit": commit,
        "git_dirty": dirty,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "script_s": round(time.monotonic() - STARTED, 1),
        "python": sys.implementation.name,
    }
