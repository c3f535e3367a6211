"""Real scripts, killed at random moments, on full disks, with damaged files. --long only."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_any_run import damaged
from test_disk import disk

from utils import paths

FP32, PTQ = "models/mobilenetv3_fp32.py", "quantization/ptq/mobilenetv3_ptq_int8.py"
RUNS = "results/drawn_smoke/runs"
ENGINES = ("fbgemm", "onnxruntime", "openvino", "xnnpack")
WRITERS = [f"{PTQ} --backend {engine}" for engine in ENGINES] + [
    "quantization/ptq/mobilenetv3_ptq_int8.py --backend qnnpack",
    "quantization/ptq/mobilenetv3_ptq_int16.py",
    "quantization/ptq/mobilenetv3_ptq_fp16.py --backend half",
    "quantization/ptq/mobilenetv3_ptq_fp16.py --backend amp",
]
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
EARLIEST = 1.0  # seconds after the start; earlier, Python does not run the script yet


def command(home, script):
    """Command that runs a script in small form on the folders in `home`."""
    folders = ["--results", home / "results", "--checkpoints", home / "checkpoints"]
    script, *options = script.split()
    return [
        sys.executable,
        script,
        *options,
        "--smoke",
        "--threads",
        "1",
        "--batch-sizes",
        "1",
        *map(str, folders),
    ]


def run(home, script, *before):
    return subprocess.run(
        [*before, *command(home, script)],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(home, script):
    environ = os.environ | {"OMP_WAIT_POLICY": "passive"}  # they share the CPUs
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(home, script), cwd=paths.ROOT, env=environ, **pipes)


def answers(home):
    """Logits of all runs, by file name."""
    return {path.name: np.load(path)["logits"] for path in sorted((home / RUNS).glob("*.npz"))}


def same(one, another):
    return one.keys() == another.keys() and all(
        np.array_equal(one[name], another[name]) for name in one
    )


def check_line(done):
    """Check that a failed script said so in one line and did not abort."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 2, done.stderr


@pytest.fixture(scope="module", autouse=True)
def only_long(request):
    if not request.config.getoption("--long"):
        pytest.skip("takes an hour: run with --long")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the FP32 network, and one to which its INT8 has been added."""
    fp32, int8 = (tmp_path_factory.mktemp(name) for name in ("fp32", "int8"))
    done = run(fp32, FP32)
    assert done.returncode == 0, done.stderr
    shutil.copytree(fp32, int8, dirs_exist_ok=True)
    done = run(int8, PTQ)
    assert done.returncode == 0, done.stderr
    assert len(answers(fp32)) == 1 and len(answers(int8)) == 2
    return fp32, int8


@pytest.mark.parametrize("seed", range(40))
def test_killed_at_any_moment_the_same_command_ends_the_same(trained, seed, tmp_path):
    rng, (fp32, int8) = random.Random(seed), trained
    script, expected = [(FP32, fp32), (PTQ, int8)][seed % 2]
    if script == PTQ:
        shutil.copytree(fp32, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        number = rng.choice(list(SIGNALS))
        process = start(tmp_path, script)
        time.sleep(rng.uniform(EARLIEST, 15))
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode in (0, SIGNALS[number]), (process.returncode, told)
        assert "Traceback" not in told and len(told.splitlines()) <= 1, told
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert same(answers(tmp_path), answers(expected))
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("seed", range(40))
def test_any_disk_takes_the_run_or_is_reported(trained, seed, tmp_path):
    rng, (fp32, _) = random.Random(seed), trained
    shutil.copytree(fp32, tmp_path / "home")
    before = answers(tmp_path / "home")
    script, size = f"{PTQ} --backend {rng.choice(ENGINES)}", int(2 ** rng.uniform(2, 16))  # KiB
    # An empty disk in place of the results, or else a limit on the size of files.
    words = disk(tmp_path / "home" / "results", f"size={size}k") if seed % 2 else None
    if words is None:
        words = ["bash", "-c", f'ulimit -f {size}; "$@"', "bash"]
    done = run(tmp_path / "home", script, *words)
    if done.returncode != 0:
        check_line(done)
        assert "cannot write" in done.stderr, done.stderr
    after = answers(tmp_path / "home")
    assert same({name: after[name] for name in before}, before)
    assert "written: " in done.stdout or done.returncode


@pytest.mark.parametrize("seed", range(60))
def test_any_damaged_file_is_repaired_or_reported(trained, seed, tmp_path):
    rng, (_, int8) = random.Random(seed), trained
    shutil.copytree(int8, tmp_path, dirs_exist_ok=True)
    files = sorted(
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    victim, how = rng.choice(files), rng.choice(["cut", "zeros", "flip", "flip", "twice", "noise"])
    victim.write_bytes(damaged(victim.read_bytes(), how, seed))
    done = run(tmp_path, PTQ)
    where = victim.relative_to(tmp_path)
    if done.returncode:
        check_line(done)
        assert victim.name in done.stderr, (where, how, done.stderr)
        remakable = victim.suffix not in (".pt", ".json")
        assert not remakable, (where, how, done.stderr)
    else:
        # Only the logits of INT8: the damaged file may hold the FP32 logits.
        name = f"{RUNS}/mobilenetv3_ptq_int8_fbgemm_cpu_seed0.npz"
        logits, expected = (np.load(home / name)["logits"] for home in (tmp_path, int8))
        assert np.array_equal(logits, expected), (where, how)


def test_eight_scripts_at_once_lose_nothing(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    running = [start(tmp_path, script) for script in WRITERS]
    told = [process.communicate(timeout=1200)[1] for process in running]
    assert not any(process.returncode for process in running), told
    runs = {path.stem for path in (tmp_path / RUNS).glob("*.json")}
    assert len(runs) == len(WRITERS) + 1
    rows = (Path(tmp_path) / "results/drawn_smoke/results.csv").read_text().splitlines()[1:]
    assert len({tuple(row.split(",")[1:5]) for row in rows}) == len(runs)
