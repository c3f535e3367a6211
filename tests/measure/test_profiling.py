"""`--profile`: what a run stores of its operators, and FP32 beside it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.backends.operator_times import Timed
from utils.measure import profiling

CONV, ADD = Timed("conv1", "QLinearConv", "INT8", 3.0), Timed("add", "QLinearAdd", "INT8", 1.0)
FP32 = [Timed("conv1", "Conv", "FP32", 8.0)]


@pytest.fixture
def asked(monkeypatch):
    """Profile a run on a backend, with a worker that knows the answers; returns what was stored and asked."""

    def profile(backend, answers, **options):
        calls = []

        class Worker:
            def __init__(self, name, path, device, threads):
                self.name, self.path = name, path

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def call(self, method, split, batch_size, runs):
                calls.append((method, self.name, self.path.name, batch_size, runs))
                return answers[self.path.name]

        monkeypatch.setattr(profiling, "Worker", Worker)
        settings = dict(batch_sizes=(2, 8), smoke=False, device="cpu", threads=1) | options
        experiment = SimpleNamespace(
            options=SimpleNamespace(**settings),
            data=SimpleNamespace(test=None),
            baseline=SimpleNamespace(path=Path("fp32.pt")),
        )
        deployed = SimpleNamespace(backend=SimpleNamespace(name=backend))
        return profiling.profile(deployed, Path("artifact"), experiment), calls

    return profile


@pytest.mark.parametrize(
    ("backend", "beside"), [("onnxruntime", "onnxruntime"), ("fbgemm", "native")]
)
def test_operators_are_stored_with_those_of_fp32(asked, capsys, backend, beside):
    stored, calls = asked(backend, {"artifact": [CONV, ADD], "fp32.pt": FP32})
    assert calls == [("profile", backend, "artifact", 2, 30), ("profile", beside, "fp32.pt", 2, 30)]
    assert stored["operators"][0] == {
        "name": "conv1", "operator": "QLinearConv", "format": "INT8", "ms": 3.0, "kind": "convolution",
    }  # fmt: skip
    assert (stored["fp32_backend"], stored["fp32"][0]["ms"], stored["batch_size"]) == (
        beside,
        8.0,
        2,
    )
    assert (
        "profile of batch 2: convolution INT8 75%, sum or product INT8 25%"
        in capsys.readouterr().out
    )


def test_an_engine_that_does_not_tell_is_named(asked, capsys):
    assert asked("inductor", {"artifact": None, "fp32.pt": FP32}, smoke=True)[0] is None
    assert "profile: inductor on cpu does not tell" in capsys.readouterr().out
