"""What the documents promise exists: commands, files, options, columns."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from utils import catalog, cli, results

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
PYTHON = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("python ") and ".py" in command]


def test_the_readme_has_commands_of_every_kind():
    scripts = {words[0] for words in PYTHON}
    assert {f"models/{model}_fp32.py" for model in ("alexnet", "resnet18", "mobilenetv3")} <= scripts
    for kind in ("ptq_int8", "ptq_fp16", "ptq_bf16", "ptq_int16", "qat_int8", "qat_fp16", "qat_int16"):
        models = ("alexnet", "resnet18", "mobilenetv3")
        assert {f"quantization/{kind[:3]}/{model}_{kind}.py" for model in models} <= scripts
    assert {"reproduce.py", "figures/tables.py"} <= scripts


@pytest.mark.parametrize("words", PYTHON, ids=" ".join)
def test_a_command_of_the_readme_is_accepted(words, tmp_path, monkeypatch):
    script, options = words[0], [str(tmp_path) if word == "PATH" else word for word in words[1:]]
    assert (ROOT / script).is_file()
    if re.search(r"_(fp32|(ptq|qat)_\w+)\.py$", script):
        cli.parse("", catalog.of_script(script), options)
    else:
        monkeypatch.setattr(sys, "argv", [script, *options, "--help"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def test_reproduce_lists_each_script_of_the_readme():
    done = subprocess.run([sys.executable, ROOT / "reproduce.py", "--list"], capture_output=True, text=True, check=True)
    listed = {Path(shlex.split(line)[1]).relative_to(ROOT).as_posix() for line in done.stdout.splitlines()}
    scripts = {
        path.relative_to(ROOT).as_posix() for folder in ("models", "quantization") for path in (ROOT / folder).rglob("*.py")
    }
    assert scripts == {words[0] for words in PYTHON if words[0].startswith(("models", "quantization"))}
    assert listed == scripts - {"quantization/int8_ladder.py"}  # it deploys nothing


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_a_make_target_of_the_readme_exists(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_layout_names_every_module():
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    names = {path.stem for path in (ROOT / "utils").rglob("*.py")} - {"__init__"}
    assert names <= set(re.findall(r"\w+", layout))


def test_every_column_is_explained_in_order():
    text = (ROOT / "results/README.md").read_text().partition("## Columns")[2]
    explained = []
    for line in text.splitlines():
        cells = line.split("|")
        names = re.findall(r"`(\w+)`", cells[1]) if line.startswith("| `") else []
        stem = names[0] if names else ""
        # `latency_ms_p50`, `_mean` stands for two columns that share the first one's beginning
        explained += [name if not name.startswith("_") else next(c for c in results.COLUMNS if c.endswith(name)
                      and c.startswith(re.sub(r"_(p50|ci_low)$", "", stem))) for name in names]  # fmt: skip
    assert set(explained) == set(results.COLUMNS)
    assert len(explained) == len(set(explained))
