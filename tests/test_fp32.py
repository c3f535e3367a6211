"""The FP32 engines that speed-ups are stated against answer as eager FP32 does."""

import argparse

import pytest
import torch

from utils import architectures, backends, checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A MobileNetV3-Small whose logits are of the size that trained ones have: drawn as it is, they are about 1e-15."""
    torch.manual_seed(0)
    model = architectures.build("mobilenetv3")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_var.uniform_(0.01, 0.05)
    path = tmp_path_factory.mktemp("fp32") / "mobilenetv3_fp32_seed0.pt"
    images = argparse.Namespace(describe=lambda: {"sha256": "none"})
    checkpoints.save(path, "mobilenetv3", model, images, {"fingerprint": ""})
    return path


@pytest.mark.parametrize("name", ["frozen", "onnxruntime", pytest.param("compile", marks=pytest.mark.slow)])
def test_an_engine_answers_as_eager_fp32_for_any_batch_size(name, checkpoint):
    engine = backends.get(name)
    assert engine.problem("cpu") is None
    with torch.inference_mode():
        eager, other = backends.get("native").load(checkpoint, "cpu"), engine.load(checkpoint, "cpu")
        for batch_size in (1, 3):
            x = torch.randn(batch_size, 3, 224, 224).contiguous(memory_format=engine.layout)
            expected = eager(x)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_onnx_file_is_made_once_for_each_checkpoint(checkpoint):
    engine = backends.get("onnxruntime")
    engine.load(checkpoint, "cpu")
    (file,) = checkpoint.parent.glob("*.onnx")
    assert file.name == f"mobilenetv3_fp32_seed0.{checkpoints.sha256_of(checkpoint)[:8]}.onnx"
    before = file.stat().st_mtime_ns
    engine.load(checkpoint, "cpu")
    assert file.stat().st_mtime_ns == before


def test_an_engine_says_where_it_cannot_run(monkeypatch):
    assert backends.get("onnxruntime").problem("cuda") == "runs on the CPU only"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert backends.get("compile").problem("cpu") == "torch.compile needs a C++ compiler"
