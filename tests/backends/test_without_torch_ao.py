"""Which engines work without torch.ao: each in a fresh process that cannot import it.

torch 2.13 imports parts of torch.ao when it starts. The processes forget these modules before any
code of the study is imported, and find none of torch.ao again.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch

from utils import paths

# The arguments are a command, the engine, whether torch.ao is missing, and the folder for files.
PROCESS = """
import importlib.abc, pathlib, sys
import torch

class NoTorchAO(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch.ao" or name.startswith("torch.ao."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

command, engine, without, folder = sys.argv[1:]
if without == "without":
    sys.meta_path.insert(0, NoTorchAO())
    for name in [name for name in sys.modules if (name + ".").startswith("torch.ao.")]:
        del sys.modules[name]
    del torch.ao

from small_networks import RECIPE, images, mixed, quantized
from utils.backends import registry
from utils.quantize import decomposed_ops

torch.set_num_threads(1)
assert (decomposed_ops.LIBRARY is not None) == (without == "without")
engine, folder = registry.get(engine), pathlib.Path(folder)
if command == "lower":
    network = quantized(mixed(), engine.qdq_config(RECIPE), images())
    engine.lower(network, folder / f"network{engine.suffix}")
torch.save(engine.load(folder / f"network{engine.suffix}", "cpu")(images()), folder / "logits.pt")
assert (without == "without") != any(name.startswith("torch.ao.") for name in sys.modules)
"""
PACKAGES = {
    "onnxruntime": "onnxruntime", "openvino": "openvino", "xnnpack": "executorch",
    "inductor": "torchao",
}  # fmt: skip


def process(*arguments) -> subprocess.CompletedProcess:
    """Run PROCESS with `arguments`."""
    folders = os.pathsep.join(str(paths.ROOT / name) for name in ("", "tests", "tests/backends"))
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": folders}
    return subprocess.run(
        command, env=environment, cwd=paths.ROOT, capture_output=True, text=True, check=False
    )


def logits(folder) -> torch.Tensor:
    return torch.load(folder / "logits.pt")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The folder of an engine's file and logits, made with torch.ao."""

    @functools.cache
    def folder_of(engine: str):
        pytest.importorskip(PACKAGES[engine])
        folder = tmp_path_factory.mktemp(engine)
        result = process("lower", engine, "with", folder)
        assert result.returncode == 0, result.stderr
        return folder

    return folder_of


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_networks_are_quantized_and_run_with_the_same_logits(engine, lowered, tmp_path):
    expected = logits(lowered(engine))
    result = process("lower", engine, "without", tmp_path)
    assert result.returncode == 0, result.stderr
    assert expected.abs().min() > 0 and torch.equal(logits(tmp_path), expected)
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize(
    ("engine", "importer"),
    [("xnnpack", "executorch/exir/"), ("inductor", "torch/_inductor/")],
)
def test_the_compilers_of_these_engines_need_it(engine, importer, tmp_path):
    """ExecuTorch 1.5 and the Inductor of torch 2.13 import torch.ao themselves."""
    pytest.importorskip(PACKAGES[engine])
    result = process("lower", engine, "without", tmp_path)
    lines = result.stderr.splitlines()
    assert lines[-1] == "ModuleNotFoundError: No module named 'torch.ao'"
    calls = [
        line for line in lines if line.lstrip().startswith("File ") and "site-packages" in line
    ]
    assert importer in calls[-1]


@pytest.mark.parametrize("engine", PACKAGES)
def test_files_that_exist_run_without_it(engine, lowered):
    folder = lowered(engine)
    expected = logits(folder)
    result = process("load", engine, "without", folder)
    assert result.returncode == 0, result.stderr
    assert torch.equal(logits(folder), expected)


def test_definitions_of_another_package_that_come_later_are_refused():
    """The case that remains: see utils/quantize/decomposed_ops.py."""
    code = """
from utils.quantize.decomposed_ops import DEFINITIONS
other = torch.library.Library("quantized_decomposed", "FRAGMENT")
other.define("choose_qparams(Tensor input) -> Tensor")  # no clash
other.define("quantize_per_tensor" + DEFINITIONS["quantize_per_tensor"][0])
"""
    blocked = PROCESS.split("from small_networks")[0]
    result = subprocess.run(
        [sys.executable, "-c", blocked + code, "", "", "without", ""],
        cwd=paths.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (
        "Tried to register an operator (quantized_decomposed::quantize_per_tensor(" in result.stderr
    )
