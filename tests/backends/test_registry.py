"""The lookup of backends by name, and the reasons given for those that cannot run here."""

import pytest

from utils.backends import registry, torch_ao
from utils.catalog import BACKENDS
from utils.cli import Options
from utils.errors import UserError


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_of_the_catalog_is_there_under_its_name(name):
    engine = registry.get(name)
    assert engine.name == name
    assert engine is registry.get(name)


def test_backends_run_on_the_devices_of_the_catalog():
    assert registry.problem("fbgemm", "cuda") == "does not run on cuda"
    assert registry.problem("onnxruntime", "cuda") == "does not run on cuda"
    assert registry.problem("native", "cuda") is None
    assert "this build of torch has only" in torch_ao.TorchAO("no such engine").problem()


def test_an_engine_that_is_missing_neither_stops_the_others_nor_goes_unsaid(monkeypatch, capsys):
    monkeypatch.setattr(
        torch_ao.TorchAO, "problem", lambda self: "not today" if self.name == "qnnpack" else None
    )
    names = [backend.name for backend in registry.select(Options(("qnnpack", "fbgemm")))]
    assert names == ["fbgemm"] and "qnnpack: not today" in capsys.readouterr().out
    with pytest.raises(UserError, match="qnnpack: not today"):
        list(registry.select(Options(("qnnpack",))))


def test_an_engine_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else name)
    assert (
        registry.problem("onnxruntime", "cpu")
        == "not installed: onnx (pip install -r requirements.txt)"
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert registry.problem("compile", "cpu") == "torch.compile needs a C++ compiler"
