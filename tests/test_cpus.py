"""The CPUs that a process may use, from control groups and environments as systems write them."""

import os
import subprocess
import sys

import pytest

from utils import cpus, paths

V2, V1 = "0::{}", "3:cpu,cpuacct:{}"
SYSTEMS = {
    # name: (/proc/self/cgroup, files below /sys/fs/cgroup, quota)
    "no groups": ("", {}, None),
    "v2 in a container": (V2.format("/"), {"cpu.max": "100000 100000"}, 1.0),
    "v2, a CPU and a half": (V2.format("/"), {"cpu.max": "150000 100000"}, 1.5),
    "v2, unlimited": (V2.format("/a"), {"a/cpu.max": "max 100000"}, None),
    "v2, a limit above": (
        V2.format("/job/step"), {"job/step/cpu.max": "max 100000", "job/cpu.max": "300000 100000"},
        3.0,
    ),
    "v2, the smallest of two": (
        V2.format("/a/b"), {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0,
    ),
    "v2, seen from inside": (V2.format("/../other"), {"cpu.max": "50000 100000"}, 0.5),
    "v1 in a container": (
        V1.format("/docker/1f"),
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0,
    ),
    "v1 of its group": (
        V1.format("/docker/1f"),
        {
            "cpu,cpuacct/docker/1f/cpu.cfs_quota_us": "50000",
            "cpu,cpuacct/docker/1f/cpu.cfs_period_us": "100000",
        }, 0.5,
    ),
    "v1, unlimited": (
        V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None,
    ),
    "damaged": (V2.format("/"), {"cpu.max": "many"}, None),
    "other controllers": ("5:memory:/a", {"a/cpu.max": "100000 100000"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_quota_of_control_groups(tmp_path, name):
    membership, files, quota = SYSTEMS[name]
    (tmp_path / "cgroup").write_text(membership + "\n" if membership else "")
    for file, content in files.items():
        path = tmp_path / "sys" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cpus.quota(tmp_path / "sys", tmp_path / "cgroup") == quota


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 8), (0.5, 1), (1.0, 1), (1.9, 1), (3.0, 3), (64.0, 8)]
)
def test_a_quota_is_rounded_down_to_whole_cpus(monkeypatch, quota, expected):
    monkeypatch.setattr(cpus, "_allowed", lambda: 8)
    monkeypatch.setattr(cpus, "quota", lambda: quota)
    assert cpus.usable() == expected


@pytest.mark.parametrize(
    ("slurm", "openmp", "expected"),
    [
        (None, None, 8), ("4", None, 4), (None, "2", 2), ("4", "2", 2), ("1", "4", 1),
        (None, "3,2", 3), ("16", None, 8), ("", "", 8), ("many", "0", 8),
    ],
)  # fmt: skip
def test_the_default_obeys_slurm_and_openmp(monkeypatch, slurm, openmp, expected):
    monkeypatch.setattr(cpus, "_allowed", lambda: 8)
    monkeypatch.setattr(cpus, "quota", lambda: None)
    for name, value in (("SLURM_CPUS_PER_TASK", slurm), ("OMP_NUM_THREADS", openmp)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cpus.default_threads() == expected
    assert cpus.usable() == 8  # what `--threads` may still ask for


def test_a_script_takes_its_default_from_the_environment():
    code = (
        "from utils import cli, cpus; from utils.catalog import Run;"
        "options = cli.parse('', Run('resnet18', 'fp32', 'fp32'), []);"
        "print(options.threads, cpus.describe()['OMP_NUM_THREADS'])"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1", "1"], done.stderr
