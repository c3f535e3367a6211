"""The process that loads an artifact and answers calls, until it ends or is killed."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import deployed_on, small_depthwise, split_of, uneven_images

from utils.errors import UserError
from utils.recipes import Int8
from utils.timing import cores
from utils.timing.worker import Worker


@pytest.fixture(scope="module")
def deployed():
    recipe = Int8(ranges="minmax", calibration_images=8)
    return deployed_on("fbgemm", small_depthwise(), uneven_images(8), recipe)


@torch.inference_mode()
def answer(deployed, x):
    torch.backends.quantized.engine = "fbgemm"
    return deployed.predict(x)


@pytest.fixture
def split(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)
    return split_of(tmp_path / "images", pixels, [0, 1, 0, 1, 0, 1, 0])


@pytest.fixture
def artifact(tmp_path, deployed):
    deployed.save(tmp_path / "small.torchscript")
    return tmp_path / "small.torchscript"


def kill(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()


def test_a_worker_answers_like_this_process_until_it_is_killed(artifact, split, deployed):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        expected = torch.cat([answer(deployed, x) for x, _ in split.batches(3)]).numpy()
        logits = worker.call("logits", split, 3)
        assert logits.dtype == np.float32 and np.array_equal(logits, expected)
        x = next(split.batches(7))[0]
        assert np.array_equal(worker.call("run", x), answer(deployed, x).numpy())
        worker.call("hold", split, 20)  # more images than the split has: they repeat
        times = worker.call("time", 3)
        assert len(times) == 3 and min(times) > 0
        cost = worker.call("cost")
        assert 0 < cost["load_s"] < 60 and 20 < cost["peak_memory_mb"] < 20_000
        with pytest.raises(RuntimeError, match=r"in the measuring process:\n.*Traceback"):
            worker.call("time", "many")
        assert len(worker.call("time", 1)) == 1  # the error did not end the process
        worker.send("time", 10**9)
        time.sleep(0.3)
        kill(worker)  # as the system does when memory runs out
        with pytest.raises(UserError, match=r"exit status -9.*smaller --batch-sizes"):
            worker.receive()
        with pytest.raises(UserError, match="exit status -9"):  # killed between two calls
            worker.call("time", 1)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux can pin a thread to a CPU"
)
def test_all_workers_time_on_the_same_cpu(artifact, split):
    cpus = os.sched_getaffinity(0)
    with (
        Worker("fbgemm", artifact, "cpu", 2) as worker,
        Worker("fbgemm", artifact, "cpu", 1) as other,
    ):
        pid = worker.process.pid
        for size in (1, 4):
            for side in (worker, other):
                side.call("hold", split, size)
            pinned = os.sched_getaffinity(pid)
            assert len(pinned) == 1 and pinned == os.sched_getaffinity(other.process.pid)
            threads = {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()} - {pid}
            assert threads  # these may run on any CPU
            assert all(os.sched_getaffinity(thread) == cpus for thread in threads)
    assert os.sched_getaffinity(0) == cpus


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux can pin a thread to a CPU"
)
def test_a_worker_and_its_threads_stay_on_the_cpus_that_it_gets(artifact, split):
    with cores.reserved(1) as cpus, Worker("fbgemm", artifact, "cpu", 2) as worker:
        worker.call("hold", split, 4)
        tasks = Path(f"/proc/{worker.process.pid}/task").iterdir()
        assert {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks} == {cpus}
    assert cores.current() == frozenset()


def test_runs_before_the_timed_ones_are_not_timed(artifact, split):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        worker.call("hold", split, 1)
        assert len(worker.call("time", 3, 2)) == 3


def test_a_worker_killed_while_it_loads_gives_the_same_message(artifact, split):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        worker.send("hold", split, 1)
        kill(worker)
        with pytest.raises(UserError, match="exit status -9"):
            worker.receive()


def test_a_worker_that_cannot_load_says_so(tmp_path):
    (tmp_path / "empty.pt").touch()
    with (
        Worker("native", tmp_path / "empty.pt", "cpu", 1) as worker,
        pytest.raises(RuntimeError, match="damaged"),
    ):
        worker.call("cost")


def test_a_worker_ends_with_its_block(artifact):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        assert worker.process.is_alive()
    assert not worker.process.is_alive()
