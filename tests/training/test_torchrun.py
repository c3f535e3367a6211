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


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_and_one_measures(tmp_path_factory, script):
    done = trained_scripts(tmp_path_factory)[1][script]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("training: saved") == 1
    (written,) = re.findall(r"written: (.*\.json)", done.stdout)
    training = json.loads(Path(written).read_text())["training"]
    assert training["processes"] == 2
