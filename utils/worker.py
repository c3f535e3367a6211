"""A fresh process that loads one deployed artifact and does nothing else, so that nothing else is measured."""

import multiprocessing
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from utils import backends, footprint, progress, watch
from utils.data import Split
from utils.errors import UserError

EVAL_BATCH = 32


class Worker:
    """A process with the artifact at `path` loaded; use as a context manager. Calls run there and return their results."""

    def __init__(self, backend: str, path: Path, device: str, threads: int):
        context = multiprocessing.get_context("spawn")  # not fork: torch's thread pools do not survive it
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, backend, path, device, threads), daemon=True)
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


class _Server:
    def __init__(self, backend: str, path: Path, device: str, threads: int):
        torch.set_num_threads(threads)
        self.device = device
        started = time.perf_counter()
        self.predict = backends.get(backend).load(path, device)
        self.load_s = time.perf_counter() - started
        self.batch: torch.Tensor | None = None

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
        """Keep a batch of images of `split`, repeated where there are too few, for `time` to run on."""
        positions = np.arange(batch_size) % len(split)
        chosen = Split(split.images, split.labels, split.names, split.index[positions])
        self.batch = next(chosen.batches(batch_size, self.device))[0]

    def time(self, repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs over the held batch."""
        seconds = []
        with torch.inference_mode():
            for _ in range(repeats):
                started = time.perf_counter()
                self.predict(self.batch)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        return seconds

    def cost(self) -> dict[str, float]:
        """Seconds that loading took, and peak memory of this process in MiB."""
        return {"load_s": self.load_s, "peak_memory_mb": footprint.peak_memory_mb(self.device)}


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
