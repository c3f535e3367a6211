"""XNNPACK: answers for any batch size, kernels in the artifact, and bounds of its scales."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import saved, small_depthwise
from small_networks import Mixed, images, quantized
from torch import nn

from utils import architectures, paths
from utils.backends import torch_export, xnnpack
from utils.backends.xnnpack_rules import violations
from utils.errors import UserError
from utils.metrics import sqnr_db
from utils.quantize.decomposed_ops import OPS
from utils.quantize.exact import execute
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig

pytest.importorskip("executorch")
ENGINE = xnnpack.ENGINES["xnnpack"]


@pytest.fixture(scope="module")
def artifact(integers, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "mixed.pte"
    ENGINE.lower(integers, path)
    return path


@pytest.fixture(scope="module")
def floats(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp32") / "mixed.pte"
    network = xnnpack.for_xnnpack(folded(model))
    xnnpack.write(torch_export.program(network, xnnpack.LARGEST_BATCH, ENGINE.layout), path)
    return path


def test_without_executorch_it_says_how_to_install_it(monkeypatch):
    assert ENGINE.problem() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    install = "pip install -r requirements-executorch.txt"
    assert ENGINE.problem() == f"not installed: executorch ({install})"


def test_fp32_answers_as_torch_for_any_batch_size_and_layout(model, floats):
    predict = ENGINE.load(floats, "cpu")
    for count in (1, 64, 3):
        x = images(count)
        with torch.no_grad():
            expected = model(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            logits = predict(x.contiguous(memory_format=layout))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_over_the_largest_runs_in_parts(model, floats):
    x = images(1).expand(xnnpack.LARGEST_BATCH + 2, -1, -1, -1)
    with torch.no_grad():
        expected = model(x[:1])
    logits = ENGINE.load(floats, "cpu")(x)
    torch.testing.assert_close(logits, expected.expand(len(x), 2), rtol=1e-4, atol=1e-4)


def test_an_answer_outlives_the_next_run(floats):
    predict = ENGINE.load(floats, "cpu")
    first = predict(images(2))
    before = first.clone()
    assert not torch.equal(predict(2 * images(2)), before)
    assert torch.equal(first, before)


def test_int8_answers_as_exact_execution_for_any_batch_size(integers, artifact):
    predict, x = ENGINE.load(artifact, "cpu"), images(20)
    exact = execute(integers, x)
    for count in (1, 8, 20):
        logits = torch.cat([predict(part) for part in x.split(count)])
        noise = sqnr_db(exact.numpy(), logits.numpy())
        assert noise is None or noise > 40


def test_every_operator_computes_on_integers(artifact):
    kernels = ENGINE.kernels(artifact)
    assert kernels["layers"] == kernels["integer_layers"] == Mixed.LAYERS
    assert kernels["outside"] == {}
    assert kernels["float"] == {"XNNConvert": 2}  # the images, and the logits
    expected = {
        "XNNHardswish": Mixed.HARDSWISHES,
        "XNNMaxPooling2d": 1,
        "XNNGlobalAvgPooling2d": 2,
        "XNNMultiply": 1,
        "XNNAdd": 2,  # one of them is a gate
        "XNNStaticReshape": 1,
    }
    assert {name: kernels["integer"].get(name, 0) for name in expected} == expected


def test_fp32_is_not_counted_as_integer(floats):
    kernels = ENGINE.kernels(floats)
    assert (kernels["layers"], kernels["integer_layers"]) == (Mixed.LAYERS, 0)
    assert kernels["integer"] == kernels["outside"] == {}
    assert kernels["float"]["XNNAdd"] == 1 and "XNNDiv" not in kernels["float"]


def test_layers_kept_in_fp32_are_not_counted_as_integer_and_answer_right(model, tmp_path):
    keep_fp32 = ("depthwise", "gate", "head.4")
    kept = quantized(model, ENGINE.default_config(8), images(), keep_fp32=keep_fp32)
    ENGINE.lower(kept, tmp_path / "artifact.pte")
    kernels = ENGINE.kernels(tmp_path / "artifact.pte")
    assert (kernels["layers"], kernels["integer_layers"]) == (Mixed.LAYERS, Mixed.LAYERS - 3)
    logits = ENGINE.load(tmp_path / "artifact.pte", "cpu")(images())
    assert sqnr_db(execute(kept, images()).numpy(), logits.numpy()) > 40


def test_weights_are_in_the_file_once(integers, artifact):
    content = artifact.read_bytes()
    for name, layer in integers.layers.items():
        if name == "depthwise.0":  # XNNPACK wants its positions before its channels
            continue
        weight = layer.weight
        if weight.ndim == 4:
            weight = weight.permute(0, 2, 3, 1).contiguous()
        assert content.count(weight.numpy().tobytes()) == 1


def test_the_program_of_a_checkpoint_is_made_once_and_next_to_it(tmp_path, monkeypatch, capfd):
    # MobileNetV3-Small would take 17 s.
    monkeypatch.setattr(architectures, "rebuild", lambda content: small_depthwise())
    baseline = saved(tmp_path / "mobilenetv3_fp32_seed0.pt", small_depthwise())
    capfd.readouterr()
    predict, x = ENGINE.load(baseline.path, "cpu"), torch.randn(2, 3, 224, 224)
    assert capfd.readouterr() == ("", "")
    (file,) = tmp_path.glob("*.pte")
    assert re.fullmatch(r"mobilenetv3_fp32_seed0\.[0-9a-f]{8}\.pte", file.name)
    before = file.stat().st_mtime_ns
    kernels = ENGINE.kernels(baseline.path)
    assert file.stat().st_mtime_ns == before
    assert (kernels["layers"], kernels["integer_layers"], kernels["outside"]) == (4, 0, {})
    with torch.no_grad():
        expected = baseline.model(x)
    assert expected.abs().max() > 1e-3
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(predict(x), expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("package", ["torch", "executorch"])
def test_the_program_of_a_checkpoint_is_made_again_by_other_versions(
    package, tmp_path, monkeypatch
):
    monkeypatch.setattr(architectures, "rebuild", lambda content: small_depthwise())
    monkeypatch.setattr(torch_export, "program", lambda *arguments: None)
    monkeypatch.setattr(xnnpack, "write", lambda program, path: path.write_bytes(b""))
    path = saved(tmp_path / "mobilenetv3_fp32_seed0.pt", small_depthwise()).path
    before, version = ENGINE._program(path), importlib.metadata.version
    assert ENGINE._program(path) == before
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == package else version(name)
    )
    assert ENGINE._program(path) != before


# ---- the division of a hardsigmoid moves into the layer before it


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_the_forms_for_xnnpack_change_no_answer(kind, model, integers):
    network = folded(model) if kind == "float" else integers.network
    changed = xnnpack.for_xnnpack(network)
    types = [type(module) for module in changed.modules()]
    assert nn.Hardsigmoid not in types
    assert (nn.Hardtanh if kind == "float" else xnnpack.ShiftedGate) in types
    # The original stays.
    assert any(isinstance(module, nn.Hardsigmoid) for module in network.modules())
    with torch.no_grad():
        torch.testing.assert_close(changed(images()), network(images()), rtol=1e-5, atol=1e-5)


def test_a_gate_that_may_exceed_one_is_left_as_it_is(model):
    wide = quantized(model, QDQConfig("outputs", torch.int8, bias="int32"), images())
    name = next(name for name, source in wide.qdqs.source.items() if source == "gate.1")
    wide.qdq(name).assign(torch.tensor(1 / 100), torch.tensor(-128))
    changed = xnnpack.for_xnnpack(wide.network)
    assert any(isinstance(module, nn.Hardsigmoid) for module in changed.modules())
    with torch.no_grad():
        assert torch.equal(changed(images()), wide.network(images()))


# ---- the bounds of scales, and whether XNNPACK keeps to them


def qdq(x, scale, zero_point=0, dtype=torch.int8):
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    numbers = (scale, zero_point, low, high, dtype)
    return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *numbers), *numbers)


class Bound(nn.Module):
    """One operator between Q/DQ pairs whose scales have the ratio `ratio`, or another `case`."""

    STEP = 2.0**-5  # scale of the input

    def __init__(self, case: str, ratio: float = 1.0):
        super().__init__()
        self.case, self.ratio = case, ratio
        self.register_buffer("weight", torch.randint(-127, 128, (4, 3, 8, 8), dtype=torch.int8))
        self.register_buffer("scale", torch.tensor([0.25, 0.5, 1.0, 0.5]) * self.STEP)
        self.register_buffer("zero_point", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(4))

    def forward(self, x):
        x = qdq(F.max_pool2d(x, 8, 8), self.STEP)
        output = self.STEP / self.ratio
        match self.case:
            case "layer":
                weight = OPS.dequantize_per_channel.default(
                    self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8
                )
                x = torch.relu(F.conv2d(x, weight, self.bias, stride=8))
                return qdq(x, self.STEP**2 / self.ratio)
            case "sum":
                return qdq(x + qdq(torch.tanh(x), output), output)
            case "product":
                return qdq(x * qdq(torch.tanh(x), self.STEP), self.STEP**2 / self.ratio)
            case "pooling":
                return qdq(F.max_pool2d(x, 2), output)
            case "zero-point":
                return qdq(F.max_pool2d(x, 2), self.STEP, 1)
            case "flattening":
                return qdq(x.reshape(-1, 3 * 28 * 28), output)
            case "mean":
                return qdq(x.mean((2, 3), keepdim=True), output)
            case "unsigned":
                return qdq(F.hardswish(x), self.STEP, 0, torch.uint8)
            case "one float input":
                return qdq(F.hardswish(x), self.STEP) + qdq(x + torch.tanh(x), self.STEP)


GOOD = [
    ("layer", 255.9), ("layer", 2.0**-29), ("sum", 255.9), ("sum", 2.0**-10),
    ("product", 255.9), ("product", 2.0**-16), ("pooling", 1.0), ("mean", 1000.0),
    ("mean", 0.001), ("one float input", 1.0),
]  # fmt: skip
CHANGES = "changes scale and zero-point"
BAD = {
    ("layer", 256.0): "weight: a step of its input is 256 steps of its output, not 2.3e-10 to 256",
    ("layer", 2.0**-33): "weight: a step of its input is 2.91e-11 steps",
    ("sum", 256.0): "add: a step of its input is 256 steps of its output, not 9.8e-04 to 256",
    ("sum", 2.0**-11): "add: a step of its input is 0.0004883 steps",
    ("product", 256.0): "mul: a step of its input is 256 steps of its output, not 1.5e-05 to 256",
    ("product", 2.0**-17): "mul: a step of its input is 7.629e-06 steps",
    ("pooling", 1.01): f"max_pool2d_1 {CHANGES}",
    ("zero-point", 1.0): f"max_pool2d_1 {CHANGES} from (0.03125, 0) to (0.03125, 1)",
    ("flattening", 0.5): f"reshape {CHANGES} from (0.03125, 0) to (0.0625, 0)",
    ("unsigned", 1.0): "hardswish is quantized to uint8",
}
# XNNPACK also refuses them in releases.
REFUSED = [("layer", 256.0), ("pooling", 1.01), ("zero-point", 1.0)]


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_scales_within_the_bounds_are_not_a_violation(case):
    assert violations(torch_export.program(Bound(*case))) == []


@pytest.mark.parametrize("case", BAD, ids=str)
def test_scales_beyond_the_bounds_are_named(case):
    (line,) = violations(torch_export.program(Bound(*case)))
    assert line.startswith(BAD[case])


def test_a_scale_for_each_channel_is_named(model):
    network = quantized(model, QDQConfig("inputs", torch.int8, scales="needed"), images()).network
    before, after = violations(torch_export.program(network))  # of max pooling
    problem = "has a scale for each channel; XNNPACK wants one for each tensor"
    assert before.endswith(problem) and after == f"max_pool2d {problem}"


def test_a_network_that_xnnpack_would_refuse_is_not_lowered(model, tmp_path):
    wrong = quantized(model, ENGINE.default_config(8), images())
    layer = wrong.layers["project"]
    layer.scale = layer.scale * 1e6
    message = r"XNNPACK would refuse this network: project\.weight: a step of its input is"
    with pytest.raises(UserError, match=message):
        ENGINE.lower(wrong, tmp_path / "artifact.pte")
    assert list(tmp_path.iterdir()) == []


LOAD = """
import pathlib, sys
import torch
from utils.backends.xnnpack import ENGINES
try:
    predict = ENGINES["xnnpack"].load(pathlib.Path(sys.argv[1]), "cpu")
except RuntimeError:
    print("refused")
else:
    torch.save(predict(torch.load(sys.argv[2])), sys.argv[3])
    print("ran")
"""


def outcome(network: nn.Module, folder: Path) -> tuple[str, torch.Tensor | None]:
    """Load and run a network in another process, which XNNPACK may end.

    Returns "ran" and the answer, or "refused" or "ended" and None.
    """
    program = torch_export.program(network, xnnpack.LARGEST_BATCH, ENGINE.layout)
    xnnpack.write(program, folder / "a.pte")
    torch.save(images(), folder / "x.pt")
    files = [str(folder / name) for name in ("a.pte", "x.pt", "y.pt")]
    command = [sys.executable, "-c", LOAD, *files]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    said = done.stdout.strip() if done.returncode == 0 else "ended"
    return said, torch.load(folder / "y.pt") if said == "ran" else None


@pytest.mark.slow
@pytest.mark.parametrize("case", GOOD, ids=str)
def test_xnnpack_runs_networks_within_the_bounds(case, tmp_path):
    network = Bound(*case).eval()
    said, answer = outcome(network, tmp_path)
    assert said == "ran"
    kind, ratio = case
    scale = (Bound.STEP**2 if kind in ("layer", "product") else Bound.STEP) / ratio
    steps = 2 if kind == "one float input" else 1  # halves are rounded to either side
    torch.testing.assert_close(answer, network(images()), rtol=0, atol=1.001 * scale * steps)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_xnnpack_does_not_run_networks_beyond_a_bound(case, tmp_path):
    assert outcome(Bound(*case).eval(), tmp_path)[0] in ("refused", "ended")


# ---- the study's models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers"), [("alexnet", 8), ("resnet18", 21), ("mobilenetv3", 54)]
)
def test_a_study_model_runs_on_integers_as_exact_execution(name, layers, tmp_path):
    """Random weights amplify a halved step to about 30 dB, so torch in FP32 sets the bound."""
    torch.manual_seed(0)
    model = architectures.build(name)
    x = images(20)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(x)
    model.eval()
    result = quantized(model, ENGINE.default_config(8), x)
    ENGINE.lower(result, tmp_path / "artifact.pte")
    kernels = ENGINE.kernels(tmp_path / "artifact.pte")
    assert kernels["layers"] == kernels["integer_layers"] == layers
    assert kernels["outside"] == {}
    predict, exact = ENGINE.load(tmp_path / "artifact.pte", "cpu"), execute(result, x)
    with torch.no_grad():
        simulated = sqnr_db(exact.numpy(), result.network(x).numpy())
    for count in (1, 20):
        logits = torch.cat([predict(part) for part in x.split(count)])
        noise = sqnr_db(exact.numpy(), logits.numpy())
        assert noise is None or noise > simulated - 8
