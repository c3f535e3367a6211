"""TensorRT: the formats in its graphs, that they build, and how a plan runs.

TensorRT-RTX builds the plans here. It has the same API and needs no GPU to build. This says nothing
about TensorRT's speed, size or accuracy.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from utils import architectures, metrics
from utils.backends import onnx_export, tensorrt
from utils.backends.tensorrt import TensorRT
from utils.errors import UserError
from utils.quantize import exact, ptq
from utils.quantize.operators import folded
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8
from utils.timing import worker

RTX = "tensorrt_rtx"
FP32 = TensorRT("tensorrt", torch.float32, RTX)
FP16 = TensorRT("tensorrt_fp16", torch.float16, RTX)
RECIPE = Int8(ranges="minmax", calibration_images=4)
IMAGES = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
FLOAT = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


class Small(nn.Module):
    """A residual network with convolutions, one of them depthwise, a gate and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 3, stride=8), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.hardswish = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish()
        self.squeeze, self.excite = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Hardsigmoid()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        y = self.hardswish(self.depthwise(x))
        x = x + y * self.gate(self.excite(self.squeeze(y)))
        return self.head(torch.flatten(self.pool(x), 1))


def trained(model):
    """The model in evaluation mode, with BatchNorm statistics of noise."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(IMAGES)
    return model.eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return trained(Small())


@pytest.fixture(scope="module")
def quantized(small):
    return ptq(small, IMAGES, RECIPE, FP32.default_config(8))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled in this test, in order."""
    seen, build = [], tensorrt.build

    def watched(package, graph):
        seen.append(onnx.load(graph))
        return build(package, graph)

    monkeypatch.setattr(tensorrt, "build", watched)
    return seen


def formats(graph):
    """Counts of operators by type and number format, which is the format of their first output."""
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    values = (*inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return Counter((node.op_type, types[node.output[0]]) for node in graph.graph.node)


def answers(graph):
    """Logits of a graph in ONNX Runtime, operator by operator in the formats of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its optimizer would multiply two scales in FP16, where their product is nearly 0.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": IMAGES.numpy()})[0]


# ---- graphs


@pytest.mark.parametrize("engine", [FP32, FP16], ids=lambda engine: engine.name)
def test_a_float_network_is_in_the_format_of_its_engine(engine, small, graphs, tmp_path):
    pytest.importorskip(RTX)
    engine.lower_half(folded(small), tmp_path / "plan")
    (graph,) = graphs
    computing = []
    for (operator, format), count in formats(graph).items():
        if operator in ("Conv", "Gemm", "Relu", "HardSwish", "Add"):
            computing += [format] * count
    assert computing == [FLOAT[engine.rest]] * 7
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    with torch.inference_mode():
        expected = small(IMAGES).numpy()
    assert metrics.sqnr_db(expected, answers(graph)) > (100 if engine is FP32 else 50)
    assert (tmp_path / "plan").stat().st_size > 1000


@pytest.mark.parametrize("engine", [FP32, FP16], ids=lambda engine: engine.name)
def test_a_quantized_network_has_integers_in_its_layers_and_floats_elsewhere(
    engine, quantized, graphs, tmp_path
):
    pytest.importorskip(RTX)
    engine.lower(quantized, tmp_path / "plan")
    (graph,) = graphs
    kinds, rest = formats(graph), FLOAT[engine.rest]
    assert kinds["QuantizeLinear", TensorProto.INT8] == 4  # one for each layer's input
    assert kinds["DequantizeLinear", rest] == 8
    assert (kinds["Conv", rest], kinds["Gemm", rest]) == (3, 1)
    constants = [numpy_helper.to_array(tensor) for tensor in graph.graph.initializer]
    weights = [value for value in constants if value.dtype == np.int8 and value.ndim > 1]
    assert len(weights) == 4
    for layer in quantized.layers.values():
        assert any(np.array_equal(layer.weight.numpy(), weight) for weight in weights)
    expected = exact.execute(quantized, IMAGES).numpy()
    assert metrics.sqnr_db(expected, answers(graph)) > (60 if engine is FP32 else 30)


def test_scales_too_small_for_fp16_change_the_integers_and_keep_the_weights(quantized):
    layer = quantized.layers["excite"]
    before, values = layer.scale, layer.values()
    for factor, same in ((1.0, True), (1e-5, False), (1e-12, False)):
        layer.scale = before * factor
        short = tensorrt._Layer(layer)
        scale = short.scale.float()[:, None, None, None]
        assert bool((scale > 0).all()) and torch.equal(short.weight, layer.weight) == same
        allowed = values.abs() * factor * 2.0**-11 if same else scale / 2
        assert bool(((short.weight * scale - values * factor).abs() <= 1.001 * allowed).all())
    layer.scale = before


def test_layers_kept_in_fp32_have_no_pairs(small, graphs, tmp_path):
    pytest.importorskip(RTX)
    recipe = RECIPE.replace(keep_fp32=("stem", "excite"))
    FP32.lower(ptq(small, IMAGES, recipe, FP32.default_config(8)), tmp_path / "plan")
    assert formats(graphs[0])["QuantizeLinear", TensorProto.INT8] == 2


@pytest.mark.parametrize(
    "config",
    [
        QDQConfig("inputs"),
        QDQConfig("inputs", torch.int8),
        QDQConfig("inputs", torch.int8, symmetric=True, scales="needed"),
    ],
    ids=["unsigned", "shifted", "a scale for each channel"],
)
def test_a_network_quantized_for_others_is_refused(config, small, tmp_path):
    with pytest.raises(UserError, match="breaks TensorRT's rules"):
        FP32.lower(ptq(small, IMAGES, RECIPE, config), tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_tensorrt_is_reported(tmp_path):
    pytest.importorskip(RTX)
    images = onnx.helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 224, 224])
    logits = onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    odd = onnx.helper.make_node("Det", ["images"], ["logits"])
    graph = onnx.helper.make_graph([odd], "odd", [images], [logits])
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(model, tmp_path / "graph")
    with pytest.raises(UserError, match=r"refuses the network: .*operator: Det") as refusal:
        tensorrt.build(RTX, tmp_path / "graph")
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def network():
    """The study's networks by name, and their quantized forms."""
    made = {}

    def of(name):
        if name not in made:
            torch.manual_seed(0)
            model = trained(architectures.build(name))
            made[name] = model, ptq(model, IMAGES, RECIPE, FP32.default_config(8))
        return made[name]

    return of


@pytest.mark.parametrize("form", ["fp16", "int8", "int8 and fp16"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("alexnet", 8),
        ("resnet18", 21),
        pytest.param("mobilenetv3", 54, marks=pytest.mark.slow),
    ],
)
def test_the_networks_of_the_study_build(name, layers, form, network, graphs, tmp_path):
    pytest.importorskip(RTX)
    model, integers = network(name)
    if form == "fp16":
        FP16.lower_half(folded(model), tmp_path / "plan")
    else:
        (FP32 if form == "int8" else FP16).lower(integers, tmp_path / "plan")
    kinds = formats(graphs[0])
    rest = FLOAT[torch.float32 if form == "int8" else torch.float16]
    assert kinds["Conv", rest] + kinds["Gemm", rest] == layers
    assert kinds["DequantizeLinear", rest] >= layers or form == "fp16"
    assert (tmp_path / "plan").stat().st_size > 1e6


# ---- plans


def test_missing_requirements_are_said_in_one_line(monkeypatch):
    engine = TensorRT("tensorrt", torch.float32)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "tensorrt" else name
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    install = "not installed: tensorrt (pip install -r requirements-tensorrt.txt)"
    assert engine.problem() == f"no NVIDIA GPU that this build of torch can use; {install}"
    assert engine.suffix == ".tensorrt.plan"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert engine.problem() == install
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert engine.problem() is None


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name only, and a TensorRT of version 11.4 that notes its calls.

    The yielded list holds the events. TensorRT accepts up to 64 images.
    """
    events = []

    @dataclass
    class Stream:
        name: str = "side"
        cuda_stream = property(lambda self: self.name)

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Context:
        shape, addresses = (-1, 3, 224, 224), {}

        def get_tensor_shape(self, name):
            return self.shape

        def set_input_shape(self, name, shape):
            events.append(f"shape {shape[0]}")
            self.shape = shape
            return shape[0] <= 64

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def execute_async_v3(self, stream):
            events.append((f"runs on {stream}", dict(self.addresses)))
            return self.shape[0] != 13

    class Runtime:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, content):
            self.log.log("ERROR", "wrong magic number\nin detail")
            self.log.log("WARNING", "a warning")
            return SimpleNamespace(create_execution_context=Context) if content == b"plan" else None

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR="INTERNAL", ERROR="ERROR")

    noted = SimpleNamespace(__version__="11.4", Runtime=Runtime, ILogger=ILogger)
    monkeypatch.setitem(sys.modules, "noted_tensorrt", noted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    current = ["default"]
    faked = {
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA RTX 4090 (TM)",
        "Stream": Stream,
        "current_stream": lambda device: Stream(current[0]),
        "default_stream": lambda device: Stream("default"),
    }
    for name, value in faked.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    tensorrt._library.cache_clear()
    yield SimpleNamespace(events=events, current=current)
    tensorrt._library.cache_clear()


def plan_of(folder, content=b"plan"):
    (folder / "x.plan").write_bytes(content)
    return TensorRT("tensorrt", torch.float32, "noted_tensorrt").load(folder / "x.plan", "cuda")


def test_a_plan_runs_after_earlier_work_and_before_later_work(gpu, tmp_path):
    plan, x = plan_of(tmp_path), torch.zeros(2, 3, 224, 224)
    logits = plan(x)
    assert logits.shape == (2, 2) and logits.dtype == torch.float32
    ran = ("runs on side", {"images": x.data_ptr(), "logits": logits.data_ptr()})
    assert gpu.events == ["shape 2", "side waits for default", ran, "default waits for side"]


def test_a_plan_stays_on_the_stream_of_its_caller_as_a_capture_needs(gpu, tmp_path):
    plan, x = plan_of(tmp_path), torch.zeros(2, 3, 224, 224)
    plan(x)
    gpu.current[0] = "captured"
    gpu.events.clear()
    plan(x)
    # There is no new shape.
    waits = {event for event in gpu.events if isinstance(event, str)}
    assert waits == {"captured waits for captured"}
    assert [event[0] for event in gpu.events if not isinstance(event, str)] == ["runs on captured"]


def test_a_plan_reads_images_of_any_memory_layout(gpu, tmp_path):
    x = torch.zeros(2, 3, 224, 224).to(memory_format=torch.channels_last)
    plan_of(tmp_path)(x)
    ran = next(event for event in gpu.events if not isinstance(event, str))
    assert ran[1]["images"] != x.data_ptr()


def test_a_plan_says_what_it_cannot_do(gpu, tmp_path):
    with pytest.raises(UserError, match="takes 1 to 64 images, not 65: give smaller --batch-sizes"):
        plan_of(tmp_path)(torch.zeros(65, 3, 1, 1))
    with pytest.raises(RuntimeError, match="could not start"):
        plan_of(tmp_path)(torch.zeros(13, 3, 1, 1))
    message = r"TensorRT 11.4 cannot load this plan here \(wrong magic number in detail\)"
    with pytest.raises(UserError, match=message) as refusal:
        plan_of(tmp_path, b"the plan of another version")
    assert "runs only with the version and on the model of GPU" in str(refusal.value)


def test_file_names_and_records_name_the_gpu_and_the_version(gpu, quantized):
    engine = TensorRT("tensorrt_fp16", torch.float16, "noted_tensorrt")
    assert engine.suffix == ".tensorrt_fp16.nvidia-rtx-4090-tm.11.4.plan"
    facts = engine.deploy(quantized).facts
    assert (facts["gpu"], facts["tensorrt"]) == ("NVIDIA RTX 4090 (TM)", "11.4")
    assert len(facts["quantized"]) == 4


def test_the_plan_of_an_fp32_checkpoint_is_built_once(small, tmp_path, monkeypatch):
    pytest.importorskip(RTX)
    (checkpoint := tmp_path / "x.pt").write_bytes(b"weights")
    onnx_export.export(folded(small), tmp_path / "x.onnx")
    monkeypatch.setattr(onnx_export, "of_checkpoint", lambda path: path.with_suffix(".onnx"))
    plan = FP32._fp32_plan(checkpoint)
    written = plan.stat().st_mtime_ns
    assert re.fullmatch(r"x\.[0-9a-f]{8}\.tensorrt\.plan", plan.name)
    assert FP32._fp32_plan(checkpoint) == plan and plan.stat().st_mtime_ns == written


# ---- on a GPU


@pytest.mark.skipif(
    TensorRT("tensorrt", torch.float32).problem() is not None, reason="needs TensorRT and a GPU"
)
@pytest.mark.parametrize("graph", [False, True], ids=["called", "captured"])
@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("tensorrt", "float", 80),
        ("tensorrt_fp16", "float", 40),
        ("tensorrt", "int8", 25),
        ("tensorrt_fp16", "int8", 20),
    ],
)
def test_a_plan_answers_as_its_network(name, kind, least, graph, small, quantized, tmp_path):
    engine = tensorrt.ENGINES[name]
    if kind == "float":
        engine.lower_half(folded(small), tmp_path / "x.plan")
        with torch.inference_mode():
            expected = small(IMAGES).numpy()
    else:
        engine.lower(quantized, tmp_path / "x.plan")
        expected = exact.execute(quantized, IMAGES).numpy()
    plan, x = engine.load(tmp_path / "x.plan", "cuda"), torch.zeros_like(IMAGES, device="cuda")
    logits = []

    def run():
        logits.append(plan(x))

    if graph:
        run = worker._captured(run)
    x.copy_(IMAGES)
    run()
    assert metrics.sqnr_db(expected, logits[-1].cpu().numpy()) > least
