"""Every training script of every model, run by two processes at once.

The processes share the machine's threads while they train. The first then measures on all of them, as the processes that load
its artifact do: with another number of threads, sums are added in another order, and the loaded network would seem to answer
differently from the one that was saved.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import trained_scripts

from utils import catalog

SCRIPTS = [run.script for run in catalog.runs() if run.method in ("fp32", "qat")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained_scripts(tmp_path_factory.getbasetemp())[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_and_one_measures(finished, script):
    done = finished[script]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("training: saved") == 1
    (written,) = re.findall(r"written: (.*\.json)", done.stdout)
    assert json.loads(Path(written).read_text())["training"]["processes"] == 2


def test_each_writes_a_result_of_its_name(finished):
    written = {script: re.findall(r"written: .*/(\w+)\.json", done.stdout) for script, done in finished.items()}
    assert all(name.startswith(f"{Path(script).stem}_") for script, names in written.items() for name in names)
    assert len({name for names in written.values() for name in names}) == len(SCRIPTS)
