"""A model, backend, method and figure can be added by the steps of README.md, and run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.search(r"## Adding a model.*?(?=\n## )", (ROOT / "README.md").read_text(), re.DOTALL)[
    0
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A copy of the code, to which everything has been added."""
    home = tmp_path_factory.mktemp("adding")
    for name in ("models", "quantization", "utils", "figures", "results"):
        made = shutil.ignore_patterns("__pycache__", "cats_and_dogs*", "drawn", "drawn_*")
        shutil.copytree(ROOT / name, home / name, ignore=made)
    for name in ("reproduce.py", "README.md"):
        shutil.copy2(ROOT / name, home / name)
    catalog = home / "utils/catalog.py"
    for place, code in re.findall(r"```python\n# ([^\n]*)\n(.*?)```", SECTION, re.DOTALL):
        path, _, registry = place.partition(", ")
        if registry:
            text = catalog.read_text()
            start = re.search(rf"^{registry} = \{{[^\n]*$", text, re.MULTILINE).end()
            end = text.index("\n}", start)
            catalog.write_text(text[:end] + "\n" + code.rstrip() + text[end:])
        else:
            (home / path).write_text(code)
    for commands in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL):
        subprocess.run(["sh", "-e", "-c", commands], cwd=home, check=True)
    return home


def run(home, script, *options):
    command = [sys.executable, script, *options]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_derives_from_the_catalog(home):
    listed = run(home, "reproduce.py", "--list", "--smoke").splitlines()
    folders = home / "models", home / "quantization"
    scripts = {
        path.relative_to(home).as_posix() for folder in folders for path in folder.rglob("*.py")
    }
    scripts.remove("quantization/ablation.py")  # it deploys nothing
    assert {Path(line.split()[1]).relative_to(home).as_posix() for line in listed} == scripts
    assert (
        len([script for script in scripts if "resnet34" in script]) == 9
    )  # eight, and one of the new method
    assert len([script for script in scripts if "_rtn_" in script]) == 4
    assert "exact" in run(home, "quantization/qat/resnet34_qat_int8.py", "--help")


def test_the_scripts_run_and_the_tables_and_figures_show_them(home):
    options = ("--smoke", "--threads", "1", "--batch-sizes", "1")
    said = run(home, "quantization/rtn/resnet34_rtn_int8.py", *options)  # makes its baseline, too
    assert "resnet34_rtn_int8_exact_cpu_seed0: accuracy" in said
    assert "the engine adds nothing and agrees on 100.00 %" in said
    said = run(home, "quantization/qat/resnet34_qat_int8.py", "--backend", "exact", *options)
    assert "resnet34_qat_int8_exact_cpu_seed0: accuracy" in said
    assert "the engine adds nothing and agrees on 100.00 %" in said
    run(home, "figures/all.py", "--study", "drawn_smoke")
    table = (home / "results/drawn_smoke/tables.md").read_text()
    assert (
        "ResNet-34: round to nearest" in table
        and "INT8 RTN exact" in table
        and "INT8 QAT exact" in table
    )
    assert (home / "figures/drawn_smoke/activations.png").stat().st_size > 5000
    assert (
        "Memory that the activations take."
        in (home / "figures/drawn_smoke/report.html").read_text()
    )
