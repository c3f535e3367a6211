"""What the documents promise exists: commands, files, options, columns."""

import csv
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from records import write_run

from utils import catalog, cli

ROOT = Path(__file__).resolve().parents[1]
RUNS = {run.script: run for run in catalog.runs()}
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()
]
PYTHON = [
    shlex.split(command.split("|")[0])[1:]
    for command in COMMANDS
    if command.startswith("python ") and ".py" in command
]


def test_the_readme_has_commands_of_every_kind():
    scripts = {words[0] for words in PYTHON}
    assert {
        f"models/{model}_fp32.py" for model in ("alexnet", "resnet18", "mobilenetv3")
    } <= scripts
    for kind in (
        "ptq_int8",
        "ptq_fp16",
        "ptq_bf16",
        "ptq_int16",
        "qat_int8",
        "qat_fp16",
        "qat_int16",
    ):
        models = ("alexnet", "resnet18", "mobilenetv3")
        assert {f"quantization/{kind[:3]}/{model}_{kind}.py" for model in models} <= scripts
    assert {"reproduce.py", "figures/tables.py"} <= scripts


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_a_command_of_the_readme_is_accepted(words, tmp_path, monkeypatch):
    script, options = words[0], [str(tmp_path) if word == "PATH" else word for word in words[1:]]
    assert (ROOT / script).is_file()
    if re.search(r"_(fp32|(ptq|qat)_\w+)\.py$", script):
        cli.parse("", RUNS[script], options)
    else:
        monkeypatch.setattr(sys, "argv", [script, *options, "--help"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_snippet_that_reads_results_csv_prints_its_numbers():
    (snippet,) = re.findall(r"```python\n(import pandas.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # Every model on every engine; none is left out for the width of a terminal.
    assert len(done.stdout.splitlines()) == 2 + 3 * 8
    assert done.stdout.split()[:3] == ["method", "ptq", "qat"]
    assert re.search(r"alexnet\s+fbgemm\s+3\.36\s+3\.27", done.stdout)


def test_the_line_that_joins_runs_of_several_machines_makes_one_table(tmp_path):
    (program,) = re.findall(r"python -c '(from pathlib.*?)'", README)
    for machine, backend in (("one", "fbgemm"), ("another", "x86")):
        write_run(tmp_path / machine, "alexnet", "ptq", "int8", backend)
    for file in (tmp_path / "another/cats_and_dogs/runs").iterdir():
        shutil.copy(file, tmp_path / "one/cats_and_dogs/runs")
    program = program.replace("results/STUDY", f"{tmp_path}/one/cats_and_dogs")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    rows = list(csv.DictReader((tmp_path / "one/cats_and_dogs/results.csv").open()))
    assert {row["backend"] for row in rows} == {"fbgemm", "x86"} and len(rows) == 8


def test_the_citation_has_what_a_citation_needs():
    entry = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {
        "cff-version",
        "message",
        "title",
        "authors",
        "license",
        "version",
        "date-released",
    } <= entry.keys()
    assert entry["license"] == "MIT" and README.startswith(f"# {entry['title']}\n")
    (dissertation,) = entry["references"]
    title, address = dissertation["title"], dissertation["repository-code"]
    link = f"[{title}]({address}) ({dissertation['institution']['name']})"
    assert link in " ".join(README.split())


def test_reproduce_lists_each_script_of_the_readme():
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {
        Path(shlex.split(line)[1]).relative_to(ROOT).as_posix() for line in done.stdout.splitlines()
    }
    scripts = {
        path.relative_to(ROOT).as_posix()
        for folder in ("models", "quantization")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert scripts == {
        words[0] for words in PYTHON if words[0].startswith(("models", "quantization"))
    }
    assert listed == scripts - {"quantization/ablation.py"}  # it deploys nothing


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command.startswith("make ")]
)
def test_a_make_target_of_the_readme_exists(command):
    done = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_layout_names_every_module():
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    names = {path.stem for path in (ROOT / "utils").rglob("*.py")} - {"__init__"}
    assert names <= set(re.findall(r"\w+", layout))


@pytest.mark.parametrize(
    ("version", "accepted"), [("3, 10", False), ("3, 11", True), ("3, 14", True), ("3, 15", False)]
)
def test_make_names_the_pythons_that_torch_has_packages_for(tmp_path, version, accepted):
    """A Python without packages of torch would end in many lines of pip."""
    for name in ("Makefile", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "python"
    change = f"import sys; sys.version_info = ({version}, 0)"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 9\nexec {sys.executable} -c \'{change}\'"\n$2"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0  # at the latest, no virtual environment is made here
    assert ("Python 3.11 to 3.14 is needed" in done.stderr) != accepted, done.stderr
