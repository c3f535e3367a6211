"""`--profile`: the operator times in a run's record, next to the operator times of FP32."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.backends.operator_times import Timed
from utils.measure import profiling

CONV, ADD = Timed("conv1", "QLinearConv", "INT8", 3.0), Timed("add", "QLinearAdd", "INT8", 1.0)
FP32 = [Timed("conv1", "Conv", "FP32", 8.0)]


class Worker:
    """A worker with fixed answers, by the name of its file; it logs its calls."""

    answers: dict
    calls: list

    def __init__(self, backend, path, device, threads):
        self.backend, self.file = backend, path.name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, split, batch_size, runs):
        self.calls.append((method, self.backend, self.file, batch_size, runs))
        return self.answers[self.file]


@pytest.fixture
def profiled(monkeypatch):
    """Profile a run on a backend; returns the entry of its record and the calls of workers."""
    monkeypatch.setattr(profiling, "Worker", Worker)

    def profile(backend, answers, **options):
        Worker.answers, Worker.calls = answers, []
        settings = dict(batch_sizes=(2, 8), smoke=False, device="cpu", threads=1) | options
        experiment = SimpleNamespace(
            options=SimpleNamespace(**settings),
            data=SimpleNamespace(test=None),
            baseline=SimpleNamespace(path=Path("fp32.pt")),
        )
        deployed = SimpleNamespace(backend=SimpleNamespace(name=backend))
        return profiling.profile(deployed, Path("artifact"), experiment), Worker.calls

    return profile


@pytest.mark.parametrize(
    ("backend", "fp32_backend"), [("onnxruntime", "onnxruntime"), ("fbgemm", "native")]
)
def test_operators_are_stored_next_to_operators_of_fp32(profiled, capsys, backend, fp32_backend):
    stored, calls = profiled(backend, {"artifact": [CONV, ADD], "fp32.pt": FP32})
    ours, fp32 = (backend, "artifact"), (fp32_backend, "fp32.pt")
    assert calls == [("profile", *ours, 2, 30), ("profile", *fp32, 2, 30)]
    assert stored["operators"][0] == {
        "name": "conv1",
        "operator": "QLinearConv",
        "format": "INT8",
        "ms": 3.0,
        "kind": "convolution",
    }
    assert stored["fp32_backend"] == fp32_backend
    assert (stored["fp32"][0]["ms"], stored["batch_size"]) == (8.0, 2)
    said = capsys.readouterr().out
    assert "profile of batch 2: convolution INT8 75%, sum or product INT8 25%" in said


def test_an_engine_without_operator_times_is_named(profiled, capsys):
    assert profiled("inductor", {"artifact": None, "fp32.pt": FP32}, smoke=True)[0] is None
    assert "profile: inductor on cpu reports no operator times" in capsys.readouterr().out
