"""A fresh process for each deployed artifact, so that measurements do not affect each other."""

import contextlib
import functools
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch

from utils import architectures, checksums, paths, progress
from utils.backends import registry
from utils.backends.operator_times import Timed
from utils.data.dataset import Split
from utils.environment import MIB
from utils.errors import UserError
from utils.quantize import layers
from utils.timing import cores

EVAL_BATCH = 32
architectures.torchvision_models()  # the import takes seconds, which `load_s` must not include


class Worker:
    """A process that has loaded the artifact at `path`; use it as a context manager.

    It runs on the CPUs that `cores.reserved` holds, or on all that this process may use.
    Calls run in that process and return their results. Raises `UserError` if the file has been
    replaced since `checksums.note` saw it.
    """

    def __init__(
        self,
        backend: str,
        path: Path,
        device: str,
        threads: int,
        cuda_graph: bool = False,
    ):
        checksums.check(path)
        context = _context()
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(other, cores.current(), backend, path, device, threads, cuda_graph),
            daemon=True,
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

        Raises `UserError` if the process was killed, for example because memory ran out.
        """
        try:
            self.connection.send((name, arguments))
        except ConnectionError:
            raise self._died() from None

    def receive(self):
        """Wait for the call that was sent and return its result.

        Raises `UserError` if the process was killed, and `RuntimeError` with the traceback if the
        call failed.
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
            f"a measuring process died (exit status {self.process.exitcode}); if memory ran out, "
            "give smaller --batch-sizes."
        )

    def call(self, name: str, *arguments):
        """Run a method of `_Server` in the process and return its result."""
        self.send(name, *arguments)
        return self.receive()


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Return a context whose processes start quickly, with all modules imported.

    A plain fork would not work, because thread pools do not survive it. On Linux, workers are
    forked from a server that has imported this module and computed nothing. Elsewhere forking is
    not safe, and every process does its imports.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with _root_on_python_path():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _root_on_python_path() -> Iterator[None]:
    """Prepend the repository to PYTHONPATH: Python 3.11's fork server does not inherit sys.path."""
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{paths.ROOT}{os.pathsep}{old}" if old else str(paths.ROOT)
    try:
        yield
    finally:
        if old is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = old


class _Server:
    """The other end of a `Worker`: its methods run in the worker's process."""

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
        """Compute the logits of all images of a split in order, float32 (len(split), 2)."""
        with progress.Bar("test images", len(split), "images") as bar:
            logits = []
            for x, _ in split.batches(batch_size, self.device):
                logits.append(self.run(x))
                bar.step(len(x))
        return np.concatenate(logits)

    def watched(self, split: Split, batch_size: int) -> tuple[np.ndarray, dict]:
        """Compute the same logits, and the `extremes` of all layers' outputs."""
        with layers.extremes(self.predict.network) as report:
            logits = self.logits(split, batch_size)
        return logits, report

    def run(self, x: torch.Tensor) -> np.ndarray:
        """Compute the logits of a batch, float32 (n, 2)."""
        with torch.inference_mode():
            return self.predict(x.to(self.device)).float().cpu().numpy()

    def hold(self, split: Split, batch_size: int) -> None:
        """Keep a batch of images for `time` to run on, and pin this thread to one CPU.

        The images are the first of `split`, repeated if there are too few. All workers use the same
        CPU. Left to the scheduler, processes settle on different CPUs, and some CPUs are faster,
        especially on a virtual machine with busy neighbours: one of two equal processes was up to
        1.5 times as fast as the other for as long as both lived.
        """
        _pin(self.cpus)  # the first run may start threads, which inherit this
        batch = self._batch(split, batch_size).contiguous(memory_format=self.layout)
        self.held = functools.partial(self.predict, batch)
        seconds = self.time(1)[0]
        if self.first_s is None:
            self.first_s = seconds
        if self.cuda_graph:
            self.held = _captured(self.held)
        if self.cpus:
            _pin({max(self.cpus, key=cores.speed)})

    def _batch(self, split: Split, batch_size: int) -> torch.Tensor:
        positions = np.arange(batch_size) % len(split)
        chosen = Split(split.images, split.labels, split.names, split.index[positions])
        return next(chosen.batches(batch_size, self.device))[0]

    def profile(self, split: Split, batch_size: int, runs: int) -> list[Timed] | None:
        """Time each operator on the batch of `hold`; None if the engine does not report times."""
        if self.device != "cpu":
            return None
        return self.engine.profile(self.path, self._batch(split, batch_size), runs)

    def time(self, repeats: int, before: int = 0) -> list[float]:
        """Time `repeats` runs on the held batch, in seconds; on a GPU with CUDA events.

        The runs `before` them are not timed.
        """
        timer = _cuda_seconds if self.device == "cuda" else _seconds
        with torch.inference_mode():
            for _ in range(before):
                self.held()
            return [timer(self.held) for _ in range(repeats)]

    def cost(self) -> dict[str, float]:
        """Return load time and cold start (load and first run) in seconds, peak memory in MiB."""
        return {
            "load_s": self.load_s,
            "cold_start_s": self.load_s + self.first_s,
            "peak_memory_mb": peak_memory_mb(self.device),
        }


def _pin(cpus: Iterable[int]) -> None:
    """Pin this thread to `cpus`; does nothing if there are none, as on macOS and Windows."""
    if cpus:
        os.sched_setaffinity(0, cpus)


def peak_memory_mb(device: str) -> float:
    """Return the peak memory of this process so far, in MiB.

    On a CPU it is the resident set size, on a GPU the memory allocated by torch. A Linux process
    inherits `ru_maxrss` from its parent, so only macOS uses it, where a child starts from zero.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) / 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / MIB
    import resource  # Windows has no such module

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # in bytes on macOS


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

    A replay launches all kernels together, without Python and without a driver call per kernel.
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


def _serve(connection, cpus: frozenset[int], *arguments) -> None:
    """Answer calls until the connection closes; the first call loads the artifact."""
    _pin(cpus)  # threads that the engine starts inherit it
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
