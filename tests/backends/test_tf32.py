"""FP32 on a GPU is FP32: no TF32 while the study's networks run. Needs no GPU."""

import pytest
import torch
from helpers import mobilenet_checkpoint

from utils.backends import registry, tf32
from utils.measure import record


@pytest.fixture(autouse=True)
def defaults():
    before = tf32.allowed()
    tf32.allow(True, True)
    yield
    tf32.allow(*before)


@pytest.fixture
def on_paper(monkeypatch):
    """Modules stay where they are when they are moved to a device."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)


@pytest.mark.parametrize("device, allowed", [("cpu", (True, True)), ("cuda", (False, False))])
@pytest.mark.parametrize("name", ["native", "compile"])
def test_loading_an_fp32_network_on_a_gpu_forbids_tf32(name, device, allowed, tmp_path, on_paper):
    path = mobilenet_checkpoint(tmp_path / "x.pt").path
    registry.get(name).load(path, device)
    assert tf32.allowed() == allowed


@pytest.mark.parametrize("name", ["amp", "half", "simulated"])
def test_what_other_formats_leave_in_fp32_runs_without_tf32(name, monkeypatch, on_paper):
    class Loaded:
        network = torch.nn.Identity()

    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {})
    monkeypatch.setattr("utils.architectures.rebuild", lambda content: torch.nn.Identity())
    monkeypatch.setattr("utils.quantize.network.Quantized.load", lambda path: Loaded)
    registry.get(name).load("x.pt", "cuda")
    assert tf32.allowed() == (False, False)


def test_a_context_restores_the_setting_of_training():
    tf32.allow(True, False)
    with pytest.raises(KeyError), tf32.forbidden("cuda"):
        assert tf32.allowed() == (False, False)
        raise KeyError
    assert tf32.allowed() == (True, False)
    with tf32.forbidden("cpu"):
        assert tf32.allowed() == (True, False)


class Options:
    device, threads = "cuda", 1


class OnGpu:
    options = Options


def test_a_run_on_a_gpu_measures_without_tf32_and_records_it(monkeypatch):
    monkeypatch.setattr(record, "gpu", lambda device: "a GPU")
    seen = []

    def measure(experiment, recipe, deployed, trained):
        run = type("Run", (), {"dtype": "fp32"})
        seen.append(record._environment(run, experiment)["tf32"])

    monkeypatch.setattr(record, "_measure", measure)
    record.run(OnGpu, None, None)
    assert seen == [False] and tf32.allowed() == (True, True)
    Options.device = "cpu"
    record.run(OnGpu, None, None)
    assert seen == [False, None]
