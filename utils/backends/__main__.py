"""List the backends: version, formats and methods, and whether they run on this machine.

python -m utils.backends
"""

import importlib.metadata

from utils.backends import registry
from utils.catalog import BACKENDS, FORMATS, METHODS, Run


def formats(name: str) -> str:
    """Return what a backend does, in words: "INT8, FP16 (PTQ, QAT); compared as FP32"."""
    backend = BACKENDS[name]
    methods: dict[str, list[str]] = {}
    for method, dtype in backend.serves:
        run = Run("", method, dtype).on(name)  # on native, QAT is the control
        methods.setdefault(FORMATS[run.dtype].label, []).append(METHODS[run.method].label)
    served: dict[str, list[str]] = {}  # formats by their methods
    for label, labels in methods.items():
        served.setdefault(", ".join(labels), []).append(label)
    parts = [f"{', '.join(labels)} ({by})" for by, labels in served.items()]
    if backend.fp32:
        parts.append("compared as FP32")
    return "; ".join(parts)


def version(name: str) -> str:
    """Return the package of a backend with its version, if it is installed."""
    package = BACKENDS[name].package
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def main() -> None:
    """Print a line for each backend."""
    for name, backend in BACKENDS.items():
        problems = {device: registry.problem(name, device) for device in backend.devices}
        able = [device for device, problem in problems.items() if problem is None]
        if able:
            here = f"runs on {', '.join(able)}"
        else:
            here = f"cannot run here: {next(iter(problems.values()))}"
        print(f"{name:14} {version(name):19} {formats(name):48} {here}")


if __name__ == "__main__":
    main()
