"""A fresh process that loads one deployed artifact and does nothing else, so that nothing else is measured."""

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

from utils import architectures, backends, footprint, paths, progress, watch
from utils.data import Split
from utils.errors import UserError

EVAL_BATCH = 32
architectures.torchvision_models()  # seconds of importing are not part of loading an artifact


class Worker:
    """A process with the artifact at `path` loaded; use as a context manager. Calls run there and return their results."""

    def __init__(self, backend: str, path: Path, device: str, threads: int, cuda_graph: bool = False):
        context = _context()
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, backend, path, device, threads, cuda_graph), daemon=True)
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
        """Start a call without waiting for it; raises `UserError` when the process was killed, as it is without memory."""
        try:
            self.connection.send((name, arguments))
        except ConnectionError:
            raise self._died() from None

    def receive(self):
        """The result of the call that was sent; raises `UserError` when the process was killed."""
        try:
            failed, result = self.connection.recv()
        except (EOFError, ConnectionError):  # the latter when it was killed before it had read the call
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
        """Run a method of `_Server` there and wait for its result."""
        self.send(name, *arguments)
        return self.receive()


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """How processes are started: with the modules imported, so that many can be started, and nothing else in them.

    Not by a plain fork: thread pools do not survive it. On Linux a server that has imported this module and computed nothing
    is forked; elsewhere forking is not safe, and every process imports for itself.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(paths.ROOT), old)))  # Python 3.11 gives it no sys.path
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
        engine = backends.get(backend)
        self.layout = engine.layout
        started = time.perf_counter()
        self.predict = engine.load(path, device)
        self.load_s = time.perf_counter() - started
        self.first_s: float | None = None
        self.held: Callable[[], object] | None = None
        self.cpus = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()

    def logits(self, split: Split, batch_size: int) -> np.ndarray:
        """Logits of a split in order, float32 (len(split), 2)."""
        with progress.Bar("test images", len(split), "images") as bar:
            found = []
            for x, _ in split.batches(batch_size, self.device):
                found.append(self.run(x))
                bar.step(len(x))
        return np.concatenate(found)

    def watched(self, split: Split, batch_size: int) -> tuple[np.ndarray, dict]:
        """The same, and the `extremes` of all layers' outputs on the way."""
        with watch.extremes(self.predict.network) as found:
            logits = self.logits(split, batch_size)
        return logits, found

    def run(self, x: torch.Tensor) -> np.ndarray:
        """Logits of a batch, float32 (n, 2)."""
        with torch.inference_mode():
            return self.predict(x.to(self.device)).float().cpu().numpy()

    def hold(self, split: Split, batch_size: int) -> None:
        """Keep a batch of images of `split`, repeated where there are too few, for `time` to run on.

        From then on the thread that calls the network stays on one CPU, the same for every side. Left to the scheduler, processes
        settle on different CPUs, which are not equally fast, least of all those of a virtual machine with busy neighbours: of
        two equal processes one was up to 1.5 times as fast as the other for as long as both lived.
        """
        self._stay(self.cpus)  # the threads that a first run starts inherit this
        positions = np.arange(batch_size) % len(split)
        chosen = Split(split.images, split.labels, split.names, split.index[positions])
        batch = next(chosen.batches(batch_size, self.device))[0].contiguous(memory_format=self.layout)
        self.held = functools.partial(self.predict, batch)
        first_s = self.time(1)[0]
        self.first_s = self.first_s or first_s
        if self.cuda_graph:
            self.held = _captured(self.held)
        self._stay({fastest_cpu(self.cpus)} if self.cpus else set())

    def _stay(self, cpus: set[int]) -> None:
        """Let this thread run on `cpus` only; nothing where the system has no such call."""
        if cpus:
            os.sched_setaffinity(0, cpus)

    def time(self, repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs over the held batch; the GPU's own clock tells those of a GPU."""
        watch = _cuda_seconds if self.device == "cuda" else _seconds
        with torch.inference_mode():
            return [watch(self.held) for _ in range(repeats)]

    def cost(self) -> dict[str, float]:
        """Seconds of loading, of that and the first run together, and peak memory of this process in MiB."""
        cold = {"load_s": self.load_s, "cold_start_s": self.load_s + self.first_s}
        return cold | {"peak_memory_mb": footprint.peak_memory_mb(self.device)}


def fastest_cpu(cpus: set[int], folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The last of those of `cpus` whose clock may go highest: hybrid processors have slow ones, too."""

    def clock(cpu: int) -> int:
        path = folder / f"cpu{cpu}/cpufreq/cpuinfo_max_freq"  # kHz; virtual machines have no such file
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
    """`work` as a CUDA graph: its kernels are launched together, without Python and without the driver's part for each.

    It has to have run on a side stream before it is captured (torch's notes on CUDA graphs).
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
