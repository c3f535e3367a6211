"""Training scripts under torchrun with two processes: FP32 and QAT INT8 of one model.

With --slow, this covers all training scripts. Scripts of one kind have equal syntax trees, so one
model shows the effect of torchrun.

The processes share the machine's threads while they train. The first process then measures with
all threads, like the processes that load its artifact. With another number of threads, sums are
added in another order, and the loaded network would seem to differ from the saved one.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import torchrun

from utils import catalog, paths

RUNS = [run for run in catalog.runs() if run.method in ("fp32", "qat")]
QUICK = [run for run in RUNS if run.model == "mobilenetv3" and run.dtype in ("fp32", "int8")]
SCRIPTS = [pytest.param(run.script, marks=[] if run in QUICK else pytest.mark.slow) for run in RUNS]


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """The finished launchers by script. Baselines run first; two scripts run at a time."""
    home, finished = tmp_path_factory.mktemp("trained"), {}
    chosen = RUNS if request.config.getoption("--slow") else QUICK

    def trained(script):
        options = "--smoke", "--batch-sizes", "1", "--results", "out", "--checkpoints", "weights"
        return torchrun(2, paths.ROOT / script, *options, cwd=home)

    with ThreadPoolExecutor(2) as pool:
        for method in ("fp32", "qat"):
            scripts = [run.script for run in chosen if run.method == method]
            finished |= zip(scripts, pool.map(trained, scripts), strict=True)
    return finished


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_and_one_measures(finished, script):
    done = finished[script]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("training: saved") == 1
    (written,) = re.findall(r"written: (.*\.json)", done.stdout)
    record = json.loads(Path(written).read_text())
    threads = max(1, record["environment"]["threads"] // 2)  # shared by the two
    assert (record["training"]["processes"], record["training"]["threads"]) == (2, threads)


def test_each_script_writes_one_result_with_its_name(finished):
    for script, done in finished.items():
        (name,) = re.findall(r"written: .*/(\w+)\.json", done.stdout)
        assert name.startswith(f"{Path(script).stem}_")
