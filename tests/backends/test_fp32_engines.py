"""The FP32 engines that speed-ups refer to answer as eager FP32 does."""

import copy
import importlib.metadata
import re

import pytest
import torch
from helpers import mobilenet_checkpoint

from utils import environment
from utils.backends import onnx_export, registry
from utils.backends.base import Converted, Lowered
from utils.catalog import BACKENDS
from utils.training import checkpoints


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return mobilenet_checkpoint(tmp_path_factory.mktemp("fp32") / "mobilenetv3_fp32_seed0.pt")


@pytest.fixture(scope="module")
def checkpoint(baseline):
    return baseline.path


@pytest.mark.parametrize(
    "name",
    [
        "frozen",
        "onnxruntime",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("compile", "inductor")),
    ],
)
def test_an_engine_answers_as_eager_fp32_for_any_batch_size(name, checkpoint):
    engine = registry.get(name)
    assert engine.problem() is None
    with torch.inference_mode():
        eager = registry.get("native").load(checkpoint, "cpu")
        other = engine.load(checkpoint, "cpu")
        for batch_size in (1, 3):
            x = torch.randn(batch_size, 3, 224, 224).contiguous(memory_format=engine.layout)
            expected = eager(x)
            assert expected.abs().max() > 1e-3
            atol = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=atol)


def test_the_onnx_file_is_made_once_for_each_checkpoint(checkpoint):
    engine = registry.get("onnxruntime")
    engine.load(checkpoint, "cpu")
    (file,) = checkpoint.parent.glob("*.onnx")
    assert re.fullmatch(r"mobilenetv3_fp32_seed0\.[0-9a-f]{8}\.onnx", file.name)
    before = file.stat().st_mtime_ns
    engine.load(checkpoint, "cpu")
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("changed", ["torch", "onnx", "onnxscript", "code"])
def test_the_onnx_file_is_made_again_for_other_versions_and_code(changed, tmp_path, monkeypatch):
    (path := tmp_path / "x.pt").write_bytes(b"weights")
    monkeypatch.setattr(checkpoints, "read", lambda path: None)
    monkeypatch.setattr("utils.architectures.rebuild", lambda content: torch.nn.Identity())
    monkeypatch.setattr(onnx_export, "export", lambda network, target: target.write_bytes(b""))
    before = onnx_export.of_checkpoint(path)
    assert onnx_export.of_checkpoint(path) == before
    if changed == "code":
        monkeypatch.setattr(environment, "code_of", lambda *modules: {"a file": "its digest"})
    else:
        version = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0" if name == changed else version(name)
        )
    assert onnx_export.of_checkpoint(path) != before


def test_the_catalog_names_the_engines_that_compete_for_the_fastest_fp32():
    assert {name for name, backend in BACKENDS.items() if backend.fp32} == {
        "native", "frozen", "compile", "onnxruntime", "openvino", "xnnpack", "inductor",
        "tensorrt",
    }  # fmt: skip


def test_the_artifact_of_eager_fp32_is_the_checkpoint_itself(baseline):
    before = copy.deepcopy(baseline.model.state_dict())
    deployed = registry.get("native").deploy_fp32(baseline)
    assert deployed.file == baseline.path and deployed.save is None
    assert not isinstance(deployed, Lowered | Converted)  # nothing was converted
    assert deployed.network is deployed.predict is not baseline.model
    loaded = registry.get("native").load(baseline.path, "cpu")
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(deployed.predict(x), loaded(x))
    for name, value in baseline.model.state_dict().items():
        assert torch.equal(before[name], value)


def test_the_control_becomes_a_checkpoint_of_the_plain_architecture(baseline, tmp_path):
    native, images = registry.get("native"), torch.randn(4, 3, 64, 64)
    network = native.prepare(baseline.model, images, None)
    with torch.no_grad():
        network.get_submodule("classifier.0").bias.fill_(300.0)
    deployed = native.convert(network.eval(), baseline.model, None)
    deployed.save(tmp_path / "control.pt")
    with torch.inference_mode():
        answers = native.load(tmp_path / "control.pt", "cpu")(images)
        assert torch.equal(answers, deployed.predict(images))
        torch.testing.assert_close(answers, network(images), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(answers, baseline.model(images), atol=1e-3)
