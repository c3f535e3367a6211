"""A fresh process for one deployed artifact, so that nothing else is measured."""

import functools
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils import architectures, checksums, paths, progress
from utils.backends import registry
from utils.backends.operator_times import Timed
from utils.data.dataset import Split
from utils.errors import UserError
from utils.quantize import layers
from utils.timing import memory

EVAL_BATCH = 32
architectures.torchvision_models()  # takes seconds to import, which `load_s` must not include


class Worker:
    """A process that has loaded the artifact at `path`; use it as a context manager.

    Calls run in that process and return their results. Raises `UserError` if the file was replaced
    since it was noted, see `checksums.check`.
    """

    def __init__(
        self, backend: str, path: Path, device: str, threads: int, cuda_graph: bool = False
    ):
        checksums.check(path)
        context = _context()
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, backend, path, device, threads, cuda_graph), daemon=True
        )
        self.process.start()
        other.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def send(self, name: str, *arguments) -> None:
        """Start a call without waiting for it.

        Raises `UserError` if the process has been killed, for example for lack of memory.
        """
        try:
            self.connection.send((name, arguments))
        except ConnectionError:
            raise self._died() from None

    def receive(self):
        """Wait for the call that was sent and return its result.

        Raises `UserError` if the process has been killed, and `RuntimeError` with the traceback if
        the call failed.
        """
        try:
            failed, result = self.connection.recv()
        except (EOFError, ConnectionError):  # ConnectionError: killed before it read the call
            raise self._died() from None
        if failed:
            raise RuntimeError(f"in the measuring process:\n{result}")
        return result

    def _died(self) -> UserError:
        self.process.join()
        return UserError(
            f"a measuring process died (exit status {self.process.exitcode}); if memory ran out, give smaller --batch-sizes."
        )

    def call(self, name: str, *arguments):
        """Run a method of `_Server` in the process and return its result."""
        self.send(name, *arguments)
        return self.receive()


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Multiprocessing context whose processes start quickly, with all modules imported.

    A plain fork would not do: thread pools do not survive it. On Linux, workers are forked from a
    server that has imported this module and computed nothing. Elsewhere forking is not safe, and
    every process does its imports.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    old = os.environ.get("PYTHONPATH")
    # Python 3.11 does not pass sys.path on to the server.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(paths.ROOT), old)))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if old is not None:
            os.environ["PYTHONPATH"] = old
    return context


class _Server:
    def __init__(self, backend: str, path: Path, device: str, threads: int, cuda_graph: bool):
        torch.set_num_threads(threads)
        self.device, self.cuda_graph = device, cuda_graph
        self.engine, self.path = registry.get(backend), path
        self.layout = self.engine.layout
        started = time.perf_counter()
        self.predict = self.engine.load(path, device)
        self.load_s = time.perf_counter() - started
        self.first_s: float | None = None
        self.held: Callable[[], object] | None = None
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()

    def logits(self, split: Split, batch_size: int) -> np.ndarray:
        """Logits of all images of a split in order, float32 (len(split), 2)."""
        with progress.Bar("test images", len(split), "images") as bar:
            logits = []
            for x, _ in split.batches(batch_size, self.device):
                logits.append(self.run(x))
                bar.step(len(x))
        return np.concatenate(logits)

    def watched(self, split: Split, batch_size: int) -> tuple[np.ndarray, dict]:
        """The same logits, and the `extremes` of all layers' outputs."""
        with layers.extremes(self.predict.network) as report:
            logits = self.logits(split, batch_size)
        return logits, report

    def run(self, x: torch.Tensor) -> np.ndarray:
        """Logits of a batch, float32 (n, 2)."""
        with torch.inference_mode():
            return self.predict(x.to(self.device)).float().cpu().numpy()

    def hold(self, split: Split, batch_size: int) -> None:
        """Keep a batch of images for `time` to run on, and pin this thread to one CPU.

        The images are the first of `split`, repeated if there are too few. The CPU is the same for
        every side. Left to the scheduler, processes settle on different CPUs, which are not equally
        fast, least of all on a virtual machine with busy neighbours: of two equal processes one was
        up to 1.5 times as fast as the other for as long as both lived.
        """
        self._stay(self.cpus)  # the threads that a first run starts inherit this
        batch = self._batch(split, batch_size).contiguous(memory_format=self.layout)
        self.held = functools.partial(self.predict, batch)
        first_s = self.time(1)[0]
        self.first_s = self.first_s or first_s
        if self.cuda_graph:
            self.held = _captured(self.held)
        self._stay({fastest_cpu(self.cpus)} if self.cpus else set())

    def _batch(self, split: Split, batch_size: int) -> torch.Tensor:
        positions = np.arange(batch_size) % len(split)
        chosen = Split(split.images, split.labels, split.names, split.index[positions])
        return next(chosen.batches(batch_size, self.device))[0]

    def profile(self, split: Split, batch_size: int, runs: int) -> list[Timed] | None:
        """Times of the operators on a batch like that of `hold`; None if the engine does not tell."""
        if self.device != "cpu" or not hasattr(self.engine, "profile"):
            return None
        return self.engine.profile(self.path, self._batch(split, batch_size), runs)

    def _stay(self, cpus: set[int]) -> None:
        """Pin this thread to `cpus`; an empty set, on a system that cannot pin, changes nothing."""
        if cpus:
            os.sched_setaffinity(0, cpus)

    def time(self, repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs on the held batch; on a GPU, from CUDA events."""
        watch = _cuda_seconds if self.device == "cuda" else _seconds
        with torch.inference_mode():
            return [watch(self.held) for _ in range(repeats)]

    def cost(self) -> dict[str, float]:
        """Load time and cold start (loading and first run) in seconds, and peak memory in MiB."""
        cold = {"load_s": self.load_s, "cold_start_s": self.load_s + self.first_s}
        return cold | {"peak_memory_mb": memory.peak_memory_mb(self.device)}


def fastest_cpu(cpus: set[int], folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Choose the CPU among `cpus` with the highest maximum clock; the last one in a tie.

    Hybrid processors also have slow cores.
    """

    def clock(cpu: int) -> int:
        path = folder / f"cpu{cpu}/cpufreq/cpuinfo_max_freq"  # kHz; absent in virtual machines
        return int(path.read_text()) if path.exists() else 0

    return max(cpus, key=lambda cpu: (clock(cpu), cpu))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cuda_seconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@torch.inference_mode()
def _captured(work: Callable[[], object]) -> Callable[[], object]:
    """Capture `work` as a CUDA graph, and return the call that replays it.

    A replay launches all kernels together, without Python and without a driver call for each.
    Before the capture, `work` has to run on a side stream (torch's notes on CUDA graphs).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _serve(connection, *arguments) -> None:
    server = None
    while True:
        try:
            name, parameters = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            server = server or _Server(*arguments)
            connection.send((False, getattr(server, name)(*parameters)))
        except KeyboardInterrupt:
            return
        except Exception:
            connection.send((True, traceback.format_exc()))
