"""CPUs that a timing reserves: the fastest ones that no other timing holds."""

import contextlib
import os
import subprocess
import sys

import pytest

from utils import paths
from utils.timing import cores

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its CPUs"
)


@pytest.fixture
def four(monkeypatch, tmp_path):
    """Four CPUs, with 0 and 1 the fastest, and an empty folder of locks."""
    for cpu, clock in enumerate((5_200_000, 5_200_000, 3_900_000, 3_900_000)):
        (tmp_path / f"cpu{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/cpufreq/cpuinfo_max_freq").write_text(f"{clock}\n")
    speed = cores.speed
    monkeypatch.setattr(cores, "speed", lambda cpu: speed(cpu, tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores.tempfile, "gettempdir", lambda: str(tmp_path))


def test_timings_at_once_get_different_cpus_the_fastest_first(four):
    with cores.reserved(1) as first, cores.reserved(2) as second, cores.reserved(1) as third:
        assert (first, second, third) == ({1}, {0, 3}, {2})
    with cores.reserved(4) as every:
        assert every == {0, 1, 2, 3}


def test_more_cpus_than_there_are_means_all(four):
    with cores.reserved(9) as taken:
        assert len(taken) == 4


def test_a_timing_waits_for_another_holding_nothing_and_says_so(four, monkeypatch, capsys):
    waits = []

    def sleep(seconds):
        with cores.reserved(1):  # the fourth CPU is free, so two that wait cannot block each other
            waits.append(seconds)
        if len(waits) == 3:
            other.close()

    monkeypatch.setattr(cores.time, "sleep", sleep)
    with contextlib.ExitStack() as other:
        other.enter_context(cores.reserved(3))
        with cores.reserved(3) as taken:
            assert len(taken) == len(waits) == 3
    assert capsys.readouterr().out.count("waiting for 3 free CPUs") == 1


HOLD = """
import sys, time
from utils.timing import cores
with cores.reserved(1) as taken:
    print(*taken, flush=True)
    sys.stdin.read()
"""


def test_another_process_keeps_its_cpu_until_it_dies(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT)
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, env=environment, **how) as first:
        theirs = first.stdout.readline().split()
        rest = os.sched_getaffinity(0) - {int(theirs[0])}
        if rest:
            with subprocess.Popen(command, env=environment, **how) as second:
                assert int(second.stdout.readline()) in rest
                second.kill()
        first.kill()
    with subprocess.Popen(command, env=environment, **how) as third:
        assert third.stdout.readline().split() == theirs
        third.kill()
