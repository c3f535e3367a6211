"""Kill a process around every disk operation: no file is torn, and a rerun ends the same."""

import itertools
import os
import signal
import tempfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.records import LOGITS, Y, record
from utils import checksums, paths, results
from utils.errors import UserError
from utils.training import checkpoints, loop

# The process is killed before and after each of these calls.
CALLS = (
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "unlink"),
    (tempfile, "mkstemp"),
)
DATA = SimpleNamespace(describe=dict)


def model():
    network = nn.Linear(2, 2)
    nn.init.constant_(network.weight, 0.5)
    nn.init.constant_(network.bias, 0.25)
    return network


def work(folder):
    """Write one of everything that a run writes, and write it a second time.

    That is: state to resume, weights, cached values and results.
    """
    for value in (b"first", b"second"):
        paths.probe(folder)
        loop.Resume(folder / "a.resume", "f").write({"weight": torch.zeros(3)})
        checkpoints.save(folder / "a.pt", "alexnet", model(), DATA, {"fingerprint": value.decode()})
        checksums.write(folder / "a.logits", value)
        results.write(record(seed=len(value), batches=(1,)), LOGITS, Y, folder)


def forked(body):
    """Run `body` in a fork of this process; return the status from `os.waitpid`."""
    if (child := os.fork()) == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_at(number):
    """Make this process kill itself at moment `number`, counted from 0."""
    moments = itertools.count()

    def tick():
        if next(moments) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function):
        def call(*arguments, **named):
            tick()
            result = function(*arguments, **named)
            tick()
            return result

        return call

    for module, name in CALLS:
        setattr(module, name, deadly(getattr(module, name)))


def contents(folder):
    """Bytes of all files except locks; empty for NumPy archives, which contain the time of day."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {
        path.relative_to(folder): b"" if path.suffix == ".npz" else path.read_bytes()
        for path in files
    }


def check_whole(folder):
    """Read every file as its reader does; none may be torn."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            checkpoints.read(path)
        elif path.suffix in (".logits", ".resume"):
            assert checksums.read(path) is not None
        elif path.suffix == ".json" and path.parent.name == "runs":
            results.read(path)
        elif path.name == "results.csv":
            assert path.read_text().splitlines()[0].split(",") == list(results.COLUMNS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_killed_at_every_write_no_file_is_torn_and_a_rerun_ends_the_same(tmp_path):
    assert forked(lambda: work(tmp_path / "whole")) == 0
    expected = contents(tmp_path / "whole")
    assert len(expected) == 9, sorted(expected)
    for number in itertools.count():
        folder = tmp_path / str(number)

        def body(folder=folder, number=number):
            kill_at(number)
            work(folder)

        if (status := forked(body)) == 0:
            break
        assert status == signal.SIGKILL
        check_whole(folder)
        assert forked(lambda folder=folder: work(folder)) == 0
        after = contents(folder)
        kept = {path for path in after if path.suffix == ".pt"} - expected.keys()
        assert {path: content for path, content in after.items() if path not in kept} == expected, (
            number
        )
    assert number > 80


def test_a_torn_file_would_be_noticed(tmp_path):
    """The checks above can fail."""
    work(tmp_path)
    for name, error in (
        ("a.pt", UserError),
        ("a.logits", AssertionError),
        ("drawn/runs/*.json", UserError),
    ):
        path = next(tmp_path.glob(name))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(error):
            check_whole(tmp_path)
        path.write_bytes(whole)
    check_whole(tmp_path)
