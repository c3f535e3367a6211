"""The FP32 engines that speed-ups are stated against answer as eager FP32 does."""

import copy

import pytest
import torch
from helpers import mobilenet_checkpoint

from utils import checksums
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.quantize.layers import weighted
from utils.training.checkpoints import Checkpoint


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return mobilenet_checkpoint(tmp_path_factory.mktemp("fp32") / "mobilenetv3_fp32_seed0.pt")


@pytest.fixture(scope="module")
def checkpoint(baseline):
    return baseline.path


@pytest.mark.parametrize(
    "name", ["frozen", "onnxruntime", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_an_engine_answers_as_eager_fp32_for_any_batch_size(name, checkpoint):
    engine = registry.get(name)
    assert engine.problem() is None
    with torch.inference_mode():
        eager, other = (
            registry.get("native").load(checkpoint, "cpu"),
            engine.load(checkpoint, "cpu"),
        )
        for batch_size in (1, 3):
            x = torch.randn(batch_size, 3, 224, 224).contiguous(memory_format=engine.layout)
            expected = eager(x)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(
                other(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
            )


def test_the_onnx_file_is_made_once_for_each_checkpoint(checkpoint):
    engine = registry.get("onnxruntime")
    engine.load(checkpoint, "cpu")
    (file,) = checkpoint.parent.glob("*.onnx")
    assert file.name == f"mobilenetv3_fp32_seed0.{checksums.sha256_of(checkpoint)[:8]}.onnx"
    before = file.stat().st_mtime_ns
    engine.load(checkpoint, "cpu")
    assert file.stat().st_mtime_ns == before


def test_engines_that_may_be_the_fastest_fp32_are_those_of_the_catalog():
    assert {name for name, backend in BACKENDS.items() if backend.fp32} == {
        "native", "frozen", "compile", "onnxruntime", "openvino", "xnnpack", "tensorrt",
    }  # fmt: skip


def test_the_artifact_of_eager_fp32_is_the_checkpoint_itself(baseline):
    before = copy.deepcopy(baseline.model.state_dict())
    deployed = registry.get("native").deploy(baseline)
    assert deployed.save == baseline.path and deployed.fp32 is None and deployed.fake_quant is None
    assert deployed.network is deployed.predict is not baseline.model
    loaded = registry.get("native").load(baseline.path, "cpu")
    assert list(deployed.layers) == list(weighted(baseline.model))
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(deployed.predict(x), loaded(x))
    assert all(
        torch.equal(before[name], value) for name, value in baseline.model.state_dict().items()
    )


def test_the_control_becomes_a_checkpoint_of_the_plain_architecture(baseline, tmp_path):
    native, images = registry.get("native"), torch.randn(4, 3, 64, 64)
    network = native.prepare(baseline.model, images, {})
    with torch.no_grad():
        network.get_submodule("classifier.0").bias.fill_(300.0)
    deployed = native.convert(
        Checkpoint(baseline.path, network.eval(), "", {}), baseline.model, images, {}
    )
    deployed.save(tmp_path / "control.pt")
    with torch.inference_mode():
        answers = native.load(tmp_path / "control.pt", "cpu")(images)
        assert torch.equal(answers, deployed.predict(images))
        torch.testing.assert_close(answers, network(images), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(answers, baseline.model(images), atol=1e-3)
