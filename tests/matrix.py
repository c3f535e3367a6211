"""The smoke tests on the oldest and newest torch, and on each installed supported Python.

    python tests/matrix.py

Each combination gets a virtual environment in `.venv/matrix/`, of up to 7 GB where the registry has
torch's CUDA build only. The exit status is 1 if a combination fails. A Python that is missing is
named and left out.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OLDEST = ("torch==2.7.0", "torchvision==0.22.0")  # of the README, for the GPU of the dissertation
NEWEST = ("torch", "torchvision")
TESTS = ("pytest", "pytest-xdist", "hypothesis")


@dataclass(frozen=True)
class Combination:
    """A Python and the packages that `pip` is to install for torch."""

    python: str  # "3.11"
    torch: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"python{self.python}-{self.torch[0].replace('==', '')}"


def requirements() -> tuple[list[str], list[str]]:
    """Return the pinned packages: torch and torchvision, and what else these tests need."""
    lines = [
        *(ROOT / "requirements.txt").read_text().splitlines(),
        *(ROOT / "tests/requirements.txt").read_text().splitlines(),
    ]
    pins = {line.partition("==")[0]: line for line in lines if "==" in line}
    needed = [
        line.partition("==")[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line
    ]
    torch = [pins[name] for name in NEWEST]
    return torch, [pins[name] for name in (*needed, *TESTS) if name not in NEWEST]


def interpreter(version: str) -> str | None:
    """Return a Python of that version that starts, from PATH or pyenv; None without one."""
    named = [
        shutil.which(f"python{version}"),
        *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for path in filter(None, named):
        if subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(path)
    return None


def environment(combination: Combination, python: str, others: list[str]) -> Path:
    """Make the virtual environment of a combination unless it is there; return its interpreter."""
    folder = HOME / combination.name
    inside = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *combination.torch, *others], check=True)
        (folder / "ready").touch()
    return inside


def main() -> int:
    pinned, others = requirements()
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    combinations = [Combination(ours, OLDEST), Combination(ours, NEWEST)]
    combinations += [Combination(version, tuple(pinned)) for version in PYTHONS if version != ours]
    outcomes = {}
    for combination in combinations:
        python = interpreter(combination.python)
        if python is None:
            outcomes[combination.name] = "left out: this Python is not installed"
            continue
        print(f"== {combination.name}", flush=True)
        try:
            inside = environment(combination, python, others)
            versions = (
                "import torch, torchvision as vision; "
                "print('torch', f'{torch.__version__}, torchvision {vision.__version__}')"
            )
            found = subprocess.run(
                [inside, "-c", versions], check=True, capture_output=True, text=True
            ).stdout.strip()
            done = subprocess.run(
                [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_scripts.py"],
                cwd=ROOT,
            )
            outcomes[combination.name] = (
                f"{'passed' if done.returncode == 0 else 'FAILED'}: {found}"
            )
        except subprocess.CalledProcessError as error:
            outcomes[combination.name] = f"FAILED: {error}"
    print("\n".join(f"{name:32} {outcome}" for name, outcome in outcomes.items()))
    return any(outcome.startswith("FAILED") for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
