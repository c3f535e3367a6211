"""INT8 on torch's engines: the integers of the quantized network, and its exact execution."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import Everything, deployed_on, noise, small, small_depthwise, uneven_images
from torch import nn

from utils import architectures, environment, metrics, paths
from utils.backends import registry, torch_ao
from utils.measure import footprint
from utils.quantize import layers, ptq
from utils.quantize.exact import execute, round_to
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

ENGINES = [name for name in torch_ao.ENGINES if name in torch.backends.quantized.supported_engines]
RECIPE = Int8(ranges="minmax", calibration_images=4)
WEIGHTS = {"stem.0": 8 * 27, "depthwise.0": 8 * 9, "pointwise": 6 * 8, "head": 2 * 6}
BIASES = {"stem.0": 8, "depthwise.0": 8, "pointwise": 6, "head": 2}  # BatchNorm gives two of them
IMAGES = uneven_images()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def everything():
    return small(Everything)


@pytest.fixture(scope="module")
def deployed(everything):
    """A network that has everything, on each engine.

    Packed weights compute on the engine that is set when they run.
    """
    return {name: deployed_on(name, everything, IMAGES, RECIPE) for name in ENGINES}


@torch.inference_mode()
def answers(deployed, x):
    torch.backends.quantized.engine = deployed.backend.name
    return deployed.predict(x)


def steps_apart(deployed, x):
    """The largest difference from exact execution, in steps of the last Q/DQ pair."""
    quantized = deployed.quantized
    difference = (answers(deployed, x) - execute(quantized, x)).abs().max()
    return (difference / quantized.qdq(list(quantized.qdqs.source)[-1]).scale).item()


def called(deployed):
    """The calls of the lowered graph, in order: classes of modules, names of functions."""
    names = []
    for node in deployed.predict.graph.nodes:
        if node.op == "call_module":
            names.append(type(deployed.predict.get_submodule(node.target)).__name__)
        elif node.op in ("call_function", "call_method"):
            names.append(getattr(node.target, "__name__", node.target))
    return names


# ---- the lowered graph


@pytest.mark.parametrize("engine", ENGINES)
def test_every_layer_has_exactly_the_integers_and_scales_of_the_quantized_network(deployed, engine):
    network, quantized = deployed[engine].predict, deployed[engine].quantized
    qdqs = {layer: f"qdq_{layer}" for layer in quantized.layers}
    for name, layer in quantized.layers.items():
        packed = network.get_submodule(name)
        weight = packed.weight()
        assert weight.qscheme() == torch.per_channel_affine and weight.q_per_channel_axis() == 0
        assert torch.equal(weight.int_repr(), layer.weight)
        assert not weight.q_per_channel_zero_points().any()
        assert torch.equal(weight.q_per_channel_scales().float(), layer.scale)
        assert torch.equal(packed.bias(), layer.bias)
        after = quantized.qdq(qdqs[name])
        assert (packed.scale, packed.zero_point) == (after.scale.item(), after.zero_point.item())


def test_everything_is_computed_on_integers_from_the_image_to_the_logits(deployed):
    assert called(deployed["fbgemm"]) == [
        "quantize_per_tensor", "ConvReLU2d", "MaxPool2d", "Conv2d", "add", "hardswish", "Conv2d",
        "hardswish", "AdaptiveAvgPool2d", "ConvReLU2d", "Conv2d", "hardsigmoid", "mul", "Conv2d",
        "AdaptiveAvgPool2d", "flatten", "Linear", "hardswish", "Linear", "dequantize",
    ]  # fmt: skip
    kinds = {
        type(module).__module__.split(".")[-4]
        for module in deployed["fbgemm"].predict.modules()
        if hasattr(module, "scale")
    }
    assert kinds <= {"quantized", "nn", "intrinsic"}


class Fused(nn.Module):
    """Layers, a sum and a product, each with a ReLU after it."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.relu(self.left(x)), self.right(x)
        x = self.relu(x[0] + x[1]), x[1]
        x = self.relu(x[0] * x[1])
        return self.head(self.relu(self.hidden(torch.flatten(self.pool(x), 1))))


@pytest.mark.parametrize("engine", ENGINES)
def test_relu_is_computed_together_with_the_operator_before_it(engine):
    network = deployed_on(engine, small(Fused), IMAGES, RECIPE)
    assert called(network) == [
        "quantize_per_tensor", "ConvReLU2d", "Conv2d", "add_relu", "mul_relu",
        "AdaptiveAvgPool2d", "flatten", "LinearReLU", "Linear", "dequantize",
    ]  # fmt: skip
    assert steps_apart(network, IMAGES) < 1.01


@pytest.mark.parametrize("engine", ENGINES)
def test_relu6_is_computed_on_integers_between_pairs_of_one_scale(engine):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    with torch.no_grad():
        model[0].weight *= 20  # so that ReLU6 clips
    deployed = deployed_on(engine, model, IMAGES, RECIPE)
    first, second = (deployed.quantized.qdq(name) for name in ("qdq__0", "qdq__1"))
    assert first.numbers == second.numbers
    assert first.scale == pytest.approx(6 / deployed.quantized.config.steps, rel=1e-3)
    assert steps_apart(deployed, IMAGES) <= 1
    assert called(deployed).count("dequantize") == 1  # of the logits


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_has_everything_answers_as_its_exact_execution(everything, deployed, engine):
    x = torch.cat([IMAGES, noise(8, 64, seed=3) * 4])
    exact = execute(deployed[engine].quantized, x).numpy()
    assert metrics.sqnr_db(exact, answers(deployed[engine], x).numpy()) > 40
    with torch.inference_mode():
        fp32 = everything(IMAGES).numpy()
    assert metrics.sqnr_db(fp32, answers(deployed[engine], IMAGES).numpy()) > 30


# ---- kernels, where sums are large


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
@torch.no_grad()
def test_kernels_compute_what_the_integers_say(engine, groups, bias, overflow_fix):
    """Large weights and inputs: a sum of products in too few bits is far off."""
    torch.manual_seed(4)
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=bias)
    conv.weight.copy_(torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0))
    conv.weight[0], conv.weight[1] = 1, -1
    images = torch.rand(4, 16, 12, 12).to(memory_format=torch.channels_last)
    images[:2] = images[:2].round()
    images[2] = 1
    recipe = RECIPE.replace(overflow_fix=overflow_fix)
    network = deployed_on(engine, nn.Sequential(conv), images, recipe)
    layer = network.quantized.layers["0"]
    assert layer.weight.abs().min() == layer.high
    assert steps_apart(network, images) < 1.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
@torch.no_grad()
def test_linear_kernels_compute_what_the_integers_say(engine, overflow_fix):
    torch.manual_seed(4)
    linear = nn.Linear(512, 8)
    linear.weight.copy_(torch.where(torch.rand_like(linear.weight) < 0.5, -1.0, 1.0))
    linear.weight[0] = 1
    images = torch.rand(6, 512).round()
    images[0] = 1
    recipe = RECIPE.replace(overflow_fix=overflow_fix)
    network = deployed_on(engine, nn.Sequential(linear), images, recipe)
    assert steps_apart(network, images) < 1.01


OPERATORS = {
    "stride, dilation": nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), (1, 2)),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "max pooling": nn.MaxPool2d(3, 2),
    "mean": nn.AdaptiveAvgPool2d(1),
    "means": nn.AdaptiveAvgPool2d((3, 2)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_operator_answers_as_its_exact_execution_within_a_step(engine, name):
    torch.manual_seed(0)
    operator = OPERATORS[name]
    # Pooling computes on integers only after other operators.
    pools = isinstance(operator, nn.MaxPool2d | nn.AdaptiveAvgPool2d)
    before = [nn.Conv2d(3, 3, 1)] if pools else []
    model = nn.Sequential(*before, operator).eval()
    network = deployed_on(engine, model, IMAGES, RECIPE)
    first = network.quantized.qdq(next(iter(network.quantized.qdqs.source)))
    images = round_to(first, 1.5 * IMAGES).float()
    assert steps_apart(network, images) < 1.01
    assert called(network)[0] == "quantize_per_tensor" and called(network).count("dequantize") == 1


# ---- the Q/DQ configuration


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vnni", [True, False])
def test_a_factor_keeps_to_seven_bits_where_sums_of_products_would_overflow(
    monkeypatch, everything, engine, vnni
):
    monkeypatch.setattr(environment, "has_vnni", lambda *names: vnni or not names)
    for overflow_fix, highest, steps in (("weights", 64, 255), ("activations", 127, 127)):
        highest, steps = (127, 255) if vnni or engine == "qnnpack" else (highest, steps)
        config = registry.get(engine).qdq_config(RECIPE.replace(overflow_fix=overflow_fix))
        network = ptq(everything, IMAGES, RECIPE, config)
        assert max(layer.weight.abs().max().item() for layer in network.layers.values()) == highest
        expected = (IMAGES.max() - IMAGES.min()).item() / steps
        assert network.qdq("qdq_x").scale.item() == pytest.approx(expected, rel=1e-6)
        # Sums overflow in fbgemm's depthwise kernels on every processor.
        depthwise = 64 if engine == "fbgemm" and vnni else highest
        assert network.layers["depthwise"].weight.abs().max().item() == depthwise


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "qnnpack"])
@pytest.mark.parametrize("overflow_fix", ["weights", "activations"])
def test_a_recipe_can_ask_for_the_seven_bits_of_processors_without_vnni(
    monkeypatch, engine, overflow_fix
):
    recipe, backend = RECIPE.replace(overflow_fix=overflow_fix), registry.get(engine)
    monkeypatch.setattr(environment, "has_vnni", lambda *names: not names)
    without = backend.qdq_config(recipe)
    monkeypatch.setattr(environment, "has_vnni", lambda *names: True)
    portable = backend.qdq_config(recipe.replace(portable=True))
    assert portable == without != backend.qdq_config(recipe)


@pytest.mark.parametrize("engine", ENGINES)
def test_scales_that_torch_fixes_are_known_to_the_method(deployed, engine):
    config, quantized = registry.get(engine).qdq_config(RECIPE), deployed[engine].quantized
    # torch's layers only give integers.
    assert not config.float_logits and "qdq_head" in quantized.qdqs.source
    assert quantized.qdq("qdq_gate").numbers == torch_ao.GATE
    assert quantized.qdq("qdq_squeeze").numbers == quantized.qdq("qdq_swish_1").numbers
    assert deployed[engine].facts["placement"] == config.describe()


# ---- FP32 between integers


class Residual(nn.Module):
    """A sum that belongs to a block, with the block's input first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.conv(x)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3), Residual(), Residual()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.second(self.first(self.stem(x)))), 1))


ISLANDS = [
    ("stem",),
    ("first",),
    ("first", "second"),
    ("first.conv",),
    ("fc",),
    ("pool", "fc"),
    ("stem", "first", "second", "pool", "fc"),
]


@pytest.mark.parametrize("keep_fp32", ISLANDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_modules_kept_in_fp32_compute_between_integers(engine, keep_fp32):
    model = small(Blocks)
    network = deployed_on(engine, model, IMAGES, RECIPE.replace(keep_fp32=keep_fp32))
    exact = execute(network.quantized, IMAGES).numpy()
    sqnr = metrics.sqnr_db(exact, answers(network, IMAGES).numpy())
    assert sqnr is None or sqnr > 35  # qnnpack's convolutions round a value to the other side
    for name in layers.weighted(model):
        kept = any(f"{name}.".startswith(f"{module}.") for module in keep_fp32)
        assert (name in network.facts["quantized"]) != kept
        layer = network.predict.get_submodule(name.replace(".", "_"))
        assert (type(layer) is nn.Conv2d or type(layer) is nn.Linear) == kept
        if kept:
            assert torch.equal(layer.weight, model.get_submodule(name).weight)


class Between(nn.Module):
    """Operators that torch's engines lack, or give another scale."""

    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.operator, self.relu = nn.Conv2d(3, 4, 3), operator, nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.operator(self, self.conv(x))), 1))


IN_FP32 = {
    "mean, then relu": lambda net, x: net.relu(net.pool(x)),
    "relu next to another reader": lambda net, x: net.relu(x) + x,
    "sum of multiples": lambda _, x: torch.add(x, x, alpha=3),
    "half": lambda _, x: x * 0.5,
}


@pytest.mark.parametrize("name", IN_FP32)
@pytest.mark.parametrize("engine", ENGINES)
def test_operators_that_an_engine_lacks_compute_in_fp32_and_are_rounded(engine, name):
    network = deployed_on(engine, Between(IN_FP32[name]).eval(), IMAGES, RECIPE)
    assert called(network).count("quantize_per_tensor") == 2  # the image, and after the operator
    assert steps_apart(network, IMAGES) < 1.01


@pytest.mark.parametrize("engine", ENGINES)
def test_operators_that_an_engine_lacks_are_named_once(engine, capsys):
    deployed_on(engine, Between(IN_FP32["half"]).eval(), IMAGES, RECIPE)
    capsys.readouterr()
    network = deployed_on(engine, Between(IN_FP32["half"]).eval(), IMAGES, RECIPE)
    said = capsys.readouterr().out.splitlines()
    assert network.facts["not_on_integers"] == ["mul"]
    line = f"{engine} has no integer operator, only FP32, for mul"
    assert [text for text in said if "no integer" in text] == [line]
    kept = deployed_on(engine, small(Blocks), IMAGES, RECIPE.replace(keep_fp32=("stem",)))
    assert kept.facts["not_on_integers"] == [] and "no integer" not in capsys.readouterr().out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep_fp32", [(), ("stem", "fc")])
def test_the_layers_that_run_on_integers_are_counted_in_the_file(engine, keep_fp32, tmp_path):
    model = small(Blocks)
    network = deployed_on(engine, model, IMAGES, RECIPE.replace(keep_fp32=keep_fp32))
    network.save(path := tmp_path / "network.torchscript")
    counts, total = registry.get(engine).kernels(path), len(layers.weighted(model))
    kept = sum(name.startswith(keep_fp32 or "-") for name in layers.weighted(model))
    assert (counts["layers"], counts["integer_layers"]) == (total, total - kept)
    operators = counts["operators"]
    assert sum(operators[name] for name in operators if "quantized::" in name) >= total - kept


def test_a_quantized_layer_without_an_integer_operator_has_fp32_weights_in_the_file(
    monkeypatch, tmp_path
):
    """No network of the study has one. torch folds its rounded weights into FP32."""
    computed = torch_ao._Integers._computed

    def without_fc(self, node, nodes):
        return None if node.target == "fc" else computed(self, node, nodes)

    monkeypatch.setattr(torch_ao._Integers, "_computed", without_fc)
    network = deployed_on("x86", small(Blocks), IMAGES, RECIPE)
    assert network.facts["not_on_integers"] == ["fc"]
    bits = {numbers.layer: numbers.bits for numbers in network.stored if numbers.layer}
    assert {name for name, width in bits.items() if width == 32} == {"fc"}
    network.save(path := tmp_path / "network.torchscript")
    assert registry.get("x86").kernels(path)["integer_layers"] == len(bits) - 1
    weight = network.quantized.layers["fc"].values().numpy().tobytes()
    assert weight in path.read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
@torch.inference_mode()
def test_means_and_gates_with_other_scales_compute_in_fp32_and_are_rounded(engine, everything):
    """From a configuration that fixes neither scale: torch's operators always have the same."""
    steps = registry.get(engine).qdq_config(RECIPE).steps
    quantized = ptq(everything, IMAGES, RECIPE, QDQConfig("outputs", steps=steps))
    network = registry.get(engine).integers(quantized)
    assert metrics.sqnr_db(execute(quantized, IMAGES).numpy(), network(IMAGES).numpy()) > 40
    names = [getattr(node.target, "__name__", node.target) for node in network.graph.nodes]
    assert names.count("quantize_per_tensor") == 1 + 3  # the image, two means and a gate


def test_flattening_by_any_name_is_computed_on_integers():
    for flatten in (
        lambda x: x.flatten(1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], 4),
        nn.Flatten(),
    ):
        model = Between(lambda _, x: x)
        model.forward = lambda x, net=model, flatten=flatten: net.fc(flatten(net.pool(net.conv(x))))
        network = deployed_on("qnnpack", model.eval(), IMAGES, RECIPE)
        assert steps_apart(network, IMAGES) < 1.01
        assert "Linear" in called(network) and called(network).count("quantize_per_tensor") == 1


# ---- the numbers of the file


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("keep_fp32", [(), ("stem", "pointwise")])
def test_all_numbers_are_counted(engine, keep_fp32):
    recipe = RECIPE.replace(keep_fp32=keep_fp32)
    network = deployed_on(engine, small_depthwise(), IMAGES, recipe)
    quantized = [name for name in WEIGHTS if not name.startswith(keep_fp32 or "-")]
    assert network.facts["quantized"] == sorted(quantized)
    counts = footprint.of_numbers(network.stored)
    assert (counts["weight_modules"], counts["quantized_modules"]) == (4, len(quantized))
    assert counts["parameters"] == sum(WEIGHTS.values()) + sum(BIASES.values())
    integers = sum(WEIGHTS[name] for name in quantized)
    assert counts["quantized_share"] == integers / counts["parameters"]  # biases stay in FP32
    size = integers + 4 * (counts["parameters"] - integers)
    assert counts["theoretical_mb"] == size / environment.MIB


LOADER = """
import sys
import numpy, torch
from utils.backends import registry
folder = sys.argv[1]
x = torch.from_numpy(numpy.load(f"{folder}/x.npy")).to(memory_format=torch.channels_last)
for name in sys.argv[2:]:
    backend = registry.get(name)
    predict = backend.load(f"{folder}/{name}{backend.suffix}", "cpu")
    with torch.inference_mode():
        numpy.save(f"{folder}/{name}.npy", predict(x).numpy())
"""


def test_artifacts_loaded_in_a_fresh_process_answer_the_same_to_the_bit(
    tmp_path, everything, deployed
):
    recipe = RECIPE.replace(keep_fp32=("reduce", "conv"))
    kept = {name: deployed_on(name, everything, IMAGES, recipe) for name in ENGINES}
    x = 3 * noise(5, 64, seed=5)
    for folder, networks in ((tmp_path / "all", deployed), (tmp_path / "partly", kept)):
        folder.mkdir()
        np.save(folder / "x.npy", x.numpy())
        for name, network in networks.items():
            torch.backends.quantized.engine = name
            network.save(folder / f"{name}{network.backend.suffix}")
        command = [sys.executable, "-c", LOADER, folder, *networks]
        subprocess.run(command, check=True, cwd=paths.ROOT)
        for name, network in networks.items():
            expected = answers(network, x.to(memory_format=torch.channels_last))
            assert expected.dtype == torch.float32 and expected.shape == (5, 2)
            assert np.array_equal(np.load(folder / f"{name}.npy"), expected.numpy()), name


def test_an_engine_that_this_build_lacks_says_so(monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", "qnnpack"])
    assert registry.get("qnnpack").problem() is None
    assert registry.get("fbgemm").problem() == "this build of torch has only none, qnnpack"


SPEAKING = """
import pathlib
import torch
from helpers import deployed_on, noise, small_depthwise
from utils.backends import registry
from utils.recipes import Int8

images, recipe = noise(2, 224), Int8(ranges="minmax", calibration_images=2)
for name in torch.backends.quantized.supported_engines:
    if name == "none":
        continue
    deployed = deployed_on(name, small_depthwise(), images, recipe)
    deployed.predict(images)
    deployed.save(file := pathlib.Path("artifact"))
    registry.get(name).load(file, "cpu")(images)
"""


def test_the_deprecation_of_quint8_is_said_once_in_a_process(tmp_path):
    folders = os.pathsep.join([str(paths.ROOT), str(paths.ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", SPEAKING],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    (line,) = result.stdout.splitlines()
    assert line.startswith("torch will remove quint8, the number format of fbgemm, x86, onednn and")
    assert "(pytorch/pytorch#184982)" in line and "take another --backend" in line
    assert result.stderr == ""


# ---- the real network


def test_every_layer_of_mobilenet_is_quantized(tmp_path):
    model = architectures.build("mobilenetv3").eval()
    network = deployed_on("fbgemm", model, torch.randn(2, 3, 64, 64), RECIPE)
    counts = footprint.of_numbers(network.stored)
    assert counts["weight_modules"] == counts["quantized_modules"] == 54
    network.save(path := tmp_path / "network.torchscript")
    kernels = registry.get("fbgemm").kernels(path)
    assert kernels["layers"] == kernels["integer_layers"] == 54
    assert len(layers.weighted(model)) == 54
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # BatchNorm's two numbers for each channel become one, the bias of the convolution before it.
    folded = sum(norm.num_features for norm in norms)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert counts["parameters"] == parameters - folded
    assert called(network).count("quantize_per_tensor") == called(network).count("dequantize") == 1
