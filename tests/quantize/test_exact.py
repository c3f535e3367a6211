"""Exact execution, bit for bit as in NumPy: int64 sums, then scaling in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import Everything, noise, numbered_split, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.quantize import exact, ptq
from utils.quantize.modules import QDQ, QuantizedLayer
from utils.quantize.network import Quantized
from utils.quantize.operators import folded
from utils.quantize.qdq_config import INTEGERS, QDQConfig
from utils.recipes import Int8

DTYPES = [torch.uint8, torch.int8, torch.int16]
RECIPE = Int8(ranges="minmax", calibration_images=16)
FEW = settings(max_examples=40, deadline=None, derandomize=True)


# ---- the same network in NumPy


def along_channels(values: torch.Tensor, ndim: int) -> np.ndarray:
    """`values`, () or (channels,), float64 or int64, to broadcast over (n, channels, ...)."""
    values = values.numpy().astype(np.float64 if values.is_floating_point() else np.int64)
    return values if values.ndim == 0 else values.reshape(1, -1, *[1] * (ndim - 2))


def windows(x: np.ndarray, kernel: tuple, stride: tuple, dilation: tuple = (1, 1)) -> np.ndarray:
    """Return the inputs of a kernel at each position: (n, channels, height, width, *kernel)."""
    spans = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(x, spans, (2, 3))
    return views[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def integer_sums(layer: QuantizedLayer, x: np.ndarray) -> np.ndarray:
    """Sums of products of int64 `x` and the weights of `layer`, int64."""
    weight = layer.weight.numpy().astype(np.int64)
    if layer.convolution is None:
        return x @ weight.T
    stride, padding, dilation, groups = layer.convolution
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    parts = [
        np.einsum("nchwij,ocij->nohw", windows(part, weight.shape[2:], stride, dilation), filters)
        for part, filters in zip(np.split(padded, groups, 1), np.split(weight, groups), strict=True)
    ]
    return np.concatenate(parts, 1)


def layer_by_integers(
    layer: QuantizedLayer, x: np.ndarray, input_scale: torch.Tensor
) -> np.ndarray:
    step = along_channels(input_scale, x.ndim)
    integers = np.rint(x / step).astype(np.int64)
    assert np.array_equal(integers * step, x)  # the layer does read integers
    sums = integer_sums(layer, integers)
    scale = along_channels(input_scale.double() * layer.scale.double(), sums.ndim)
    if layer.bias_integers is None:
        return sums * scale + along_channels(layer.bias, sums.ndim)
    return (sums + along_channels(layer.bias_integers, sums.ndim)) * scale


def rounded(qdq: QDQ, x: np.ndarray) -> np.ndarray:
    scale, zero_point = along_channels(qdq.scale, x.ndim), along_channels(qdq.zero_point, x.ndim)
    integers = np.clip(np.rint(x / scale).astype(np.int64) + zero_point, *qdq.limits)
    return (integers - zero_point) * scale


def mean(size, x: np.ndarray) -> np.ndarray:
    assert size in (1, (1, 1))
    return x.sum((2, 3), keepdims=True) / x.shape[2] / x.shape[3]


OPERATORS = {
    nn.ReLU: lambda _, x: np.maximum(x, 0),
    nn.Hardswish: lambda _, x: x * np.clip(x + 3, 0, 6) / 6,
    nn.Hardsigmoid: lambda _, x: np.clip(x + 3, 0, 6) / 6,
    nn.AdaptiveAvgPool2d: lambda module, x: mean(module.output_size, x),
    nn.MaxPool2d: lambda module, x: windows(x, [module.kernel_size] * 2, [module.stride] * 2).max(
        (4, 5)
    ),
    nn.Flatten: lambda _, x: x.reshape(len(x), -1),
}
FUNCTIONS = {
    "add": np.add,
    "iadd": np.add,
    "mul": np.multiply,
    "flatten": lambda x, _: x.reshape(len(x), -1),
}


def by_numpy(quantized: Quantized, images: torch.Tensor) -> np.ndarray:
    """The answers of `quantized`, float64, computed in NumPy."""
    values = {}
    for node in quantized.network.graph.nodes:
        inputs = [values.get(argument, argument) for argument in node.args]
        if node.op == "placeholder":
            values[node] = images.double().numpy()
        elif node.op == "call_function":
            values[node] = FUNCTIONS[node.target.__name__](*inputs)
        elif node.op == "output":
            return inputs[0]
        else:
            module = quantized.network.get_submodule(node.target)
            if isinstance(module, QDQ):
                values[node] = rounded(module, *inputs)
            elif isinstance(module, QuantizedLayer):
                values[node] = layer_by_integers(
                    module, *inputs, quantized.input_scale(node.target)
                )
            else:
                values[node] = OPERATORS[type(module)](module, *inputs)
    raise AssertionError("a graph without an output")


# ---- networks with any numbers


class One(nn.Module):
    """A network of one operator."""

    def __init__(self, operator: nn.Module):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x)


class Two(nn.Module):
    """A sum or product of the image and the output of `operator`."""

    def __init__(self, operator: nn.Module, product: bool):
        super().__init__()
        self.operator, self.product = operator, product

    def forward(self, x):
        return self.operator(x) * x if self.product else self.operator(x) + x


def with_numbers(model: nn.Module, config: QDQConfig, random: np.random.Generator) -> Quantized:
    """Quantize `model` with random scales and integers, of which many are as large as possible."""
    quantized = Quantized.skeleton(folded(model), config, ())
    lowest, highest = INTEGERS[config.activation]
    for name in quantized.qdqs.source:
        shape = (3,) if name in quantized.qdqs.channelwise else ()
        scale = torch.from_numpy(
            np.asarray(np.exp(random.uniform(-6, 0, shape)) * 256 / (highest - lowest), np.float32)
        )
        zero_point = (
            random.integers(lowest, highest, shape, endpoint=True)
            if not config.symmetric
            else np.zeros(shape)
        )
        quantized.qdq(name).assign(scale, torch.from_numpy(np.asarray(zero_point)))
    for name, layer in quantized.layers.items():
        extreme = random.choice([-layer.high, layer.high], layer.weight.shape)
        weight = np.where(
            random.random(layer.weight.shape) < 0.5,
            extreme,
            random.integers(-layer.high, layer.high, layer.weight.shape),
        )
        layer.weight = torch.from_numpy(weight).to(layer.weight.dtype)
        layer.scale = torch.from_numpy(
            np.exp(random.uniform(-9, -3, len(weight))).astype(np.float32)
        )
        layer.set_bias(
            torch.from_numpy(random.normal(size=len(weight)).astype(np.float32)),
            quantized.input_scale(name),
        )
    return quantized


def images_for(quantized: Quantized, shape: tuple, random: np.random.Generator) -> torch.Tensor:
    """Images that reach both ends of the first pair's range, and go beyond them."""
    qdq = quantized.qdq(next(iter(quantized.qdqs.source)))
    lowest, highest = INTEGERS[qdq.dtype]
    integers = random.integers(lowest - 20, highest + 20, shape, endpoint=True)
    integers = np.where(
        random.random(shape) < 0.3, random.choice([lowest, highest], shape), integers
    ) + random.uniform(-0.5, 0.5, shape)
    x = (integers - along_channels(qdq.zero_point, len(shape))) * along_channels(
        qdq.scale, len(shape)
    )
    return torch.from_numpy(x.astype(np.float32))


configs = st.builds(
    QDQConfig,
    position=st.sampled_from(["outputs", "inputs"]),
    activation=st.sampled_from(DTYPES),
    weight=st.sampled_from([torch.int8, torch.int16]),
    bias=st.sampled_from(["float", "int32"]),
    symmetric=st.booleans(),
    scales=st.sampled_from(["tensor", "needed", "apart"]),
)
sizes, seeds = st.integers(1, 3), st.integers(0, 2**32 - 1)
both = st.tuples(sizes, sizes)


@given(
    configs, both, both, both, both, st.sampled_from([1, 3]), st.sampled_from([3, 6, 33]), seeds,
)  # fmt: skip
@settings(FEW, max_examples=80)
def test_convolutions(config, kernel, stride, padding, dilation, groups, channels, seed):
    """With groups, there are one or several filters per channel."""
    random = np.random.default_rng(seed)
    padding = tuple(min(pad, size) for pad, size in zip(padding, kernel, strict=True))
    conv = nn.Conv2d(3, channels, kernel, stride, padding, dilation, groups)
    quantized = with_numbers(One(conv), config, random)
    images = images_for(quantized, (2, 3, 9, 10), random)
    assert np.array_equal(exact.execute(quantized, images).numpy(), by_numpy(quantized, images))


def test_they_include_depthwise_layers_with_one_scale_per_channel():
    quantized = with_numbers(
        One(nn.Conv2d(3, 3, 3, groups=3)),
        QDQConfig("inputs", scales="needed"),
        np.random.default_rng(0),
    )
    assert quantized.input_scale("operator").shape == (3,)
    assert quantized.input_scale("operator").unique().numel() == 3


@given(configs, st.integers(1, 300), sizes, seeds)
@FEW
def test_linear_layers(config, inputs, outputs, seed):
    random = np.random.default_rng(seed)
    quantized = with_numbers(One(nn.Linear(inputs, outputs)), config, random)
    images = images_for(quantized, (4, inputs), random)
    assert np.array_equal(exact.execute(quantized, images).numpy(), by_numpy(quantized, images))


OTHERS = [
    nn.ReLU(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.MaxPool2d(3, 2),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
]


@given(configs, st.sampled_from(OTHERS), st.booleans(), seeds)
@FEW
def test_all_other_operators_of_one_tensor(config, operator, keeps, seed):
    random = np.random.default_rng(seed)
    config = dataclasses.replace(
        config, position="outputs", scales="tensor", pooling_keeps_scale=keeps, unit_gates=keeps
    )
    quantized = with_numbers(nn.Sequential(nn.Hardswish(), operator), config, random)
    images = images_for(quantized, (2, 3, 7, 7), random)
    assert np.array_equal(exact.execute(quantized, images).numpy(), by_numpy(quantized, images))


@given(
    configs,
    st.booleans(),
    st.sampled_from([nn.ReLU(), nn.Hardswish(), nn.AdaptiveAvgPool2d(1)]),
    seeds,
)
@FEW
def test_sums_and_products(config, product, operator, seed):
    random = np.random.default_rng(seed)
    quantized = with_numbers(
        Two(operator, product), dataclasses.replace(config, position="outputs"), random
    )
    assert "qdq_mul" in quantized.qdqs.source or "qdq_add" in quantized.qdqs.source
    images = images_for(quantized, (2, 3, 7, 7), random)
    assert np.array_equal(exact.execute(quantized, images).numpy(), by_numpy(quantized, images))


NETWORKS = [
    QDQConfig("outputs"),
    QDQConfig("outputs", steps=127, pooling_keeps_scale=True, unit_gates=True),
    QDQConfig("outputs", torch.int8, bias="int32"),
    QDQConfig("outputs", torch.int16, torch.int16, "int32", True, 2**16 - 1, "apart"),
    QDQConfig("inputs", scales="needed"),
    QDQConfig("inputs", scales="needed", rounded_sums=True, centred=True),
    QDQConfig("inputs", torch.int8, symmetric=True),
]


@pytest.mark.parametrize("config", NETWORKS)
def test_a_network_that_has_everything(config):
    images = noise(6, 33)
    recipe = RECIPE.replace(bias_correction=True)
    quantized = ptq(small(Everything), images, recipe, config)
    answer = exact.execute(quantized, images)
    assert answer.dtype == torch.float64 and answer.shape == (6, 2) and answer.unique().numel() > 6
    assert np.array_equal(answer.numpy(), by_numpy(quantized, images))


# ---- sums


def layer_of(weight: torch.Tensor, **convolution) -> QuantizedLayer:
    layer = (
        nn.Linear(*weight.shape[::-1])
        if weight.ndim == 2
        else nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], **convolution)
    )
    quantized = QuantizedLayer(layer, QDQConfig("outputs", weight=weight.dtype))
    quantized.weight = weight
    return quantized


@pytest.mark.parametrize(
    ("inputs", "dtype", "highest", "calls"),
    [
        (500, torch.int8, 255, [torch.float32]),  # 500 x 127 x 255 < 2^24
        (
            600,
            torch.int8,
            255,
            [torch.float32, torch.float32],
        ),  # 600 x 127 x 16 < 2^24: multiples of 16, and remainders
        (9000, torch.int8, 255, [torch.float64]),
        (100, torch.int16, 2**15, [torch.float64]),
    ],
)
def test_sums_are_exact_in_each_of_three_ways(monkeypatch, inputs, dtype, highest, calls):
    random = np.random.default_rng(inputs)
    largest = torch.iinfo(dtype).max
    weight = torch.from_numpy(random.integers(-largest, largest, (8, inputs), endpoint=True)).to(
        dtype
    )
    weight[0], weight[1] = largest, -largest
    x = random.integers(-highest, highest, (20, inputs), endpoint=True)
    x[0], x[1] = highest, -highest
    layer, seen = layer_of(weight), []
    compute = QuantizedLayer.compute
    monkeypatch.setattr(
        QuantizedLayer,
        "compute",
        lambda self, x, *rest: (seen.append(x.dtype), compute(self, x, *rest))[1],
    )
    sums = exact.exact_sums(layer, torch.from_numpy(x).double())
    assert seen == calls and sums.dtype == torch.float64
    assert np.array_equal(sums.numpy(), x @ weight.numpy().astype(np.int64).T)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    ("kernel", "channels", "groups"), [(1, 256, 1), (3, 48, 1), (3, 64, 64), (5, 16, 1), (11, 3, 1)]
)
def test_float_convolutions_of_integers_are_exact(batch, kernel, channels, groups):
    """A transformed convolution, such as Winograd's, would not be exact."""
    random = torch.Generator().manual_seed(kernel)
    weight = torch.randint(
        -127,
        128,
        (32 if groups == 1 else groups, channels // groups, kernel, kernel),
        generator=random,
    )
    layer = layer_of(weight.to(torch.int8))
    layer.convolution = ((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    x = torch.randint(-255, 256, (batch, channels, 12, 12), generator=random).double()
    expected = layer.compute(x, weight.double(), None)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(exact.exact_sums(layer, x.contiguous(memory_format=layout)), expected)


# ---- next to the same network in FP32


@given(configs, seeds)
@FEW
def test_in_fp32_the_network_differs_by_what_its_arithmetic_explains(config, seed):
    """By a step of the output where the exact value is nearly halfway between two; nowhere else."""
    random = np.random.default_rng(seed)
    config = dataclasses.replace(
        config, position="outputs", activation=torch.uint8, weight=torch.int8
    )
    quantized = with_numbers(One(nn.Conv2d(3, 4, 3)), config, random)
    layer, qdq = quantized.layers["operator"], quantized.qdq("qdq_operator")
    first = quantized.qdq("qdq_x")
    images = exact.round_to(first, images_for(quantized, (4, 3, 9, 9), random)).float()
    before = []
    with torch.no_grad():
        exact.ExactInterpreter(quantized, lambda _, output: before.append(output)).run(
            images.double()
        )
        single = quantized.network(images).double()
    # FP32 rounds 27 products and sums, each by at most 2^-24 of the magnitudes that are added.
    reach = (
        255
        * layer.weight.double().abs().flatten(1).sum(1)
        * quantized.input_scale("operator").double()
        * layer.scale.double()
    )
    bound = (40 * 2**-24 * (reach + layer.bias.abs()) + 1e-4 * qdq.scale).view(1, -1, 1, 1)
    low, high = (exact.round_to(qdq, before[0] + error) for error in (-bound, bound))
    tiny = 1e-4 * qdq.scale  # of up to 255 steps, each rounded to FP32
    assert (low <= single + tiny).all() and (single <= high + tiny).all()
    assert bool((low == high).any())


def test_the_network_in_fp32_is_close_to_the_exact_one():
    images, quantized = noise(16, 33), None
    for config in NETWORKS:
        quantized = ptq(small(Everything), images, RECIPE, config)
        with torch.inference_mode():
            single = quantized.network(images)
        expected = exact.execute(quantized, images)
        assert single.dtype == torch.float32
        signal, error = expected.square().sum(), (single - expected).square().sum()
        assert error < signal / 1e3, config  # 30 dB, by a few roundings to the other side


# ---- operators in floating point


def test_layers_kept_in_fp32_are_computed_in_float64():
    model, images = small(Everything), noise(4, 33)
    names = tuple(name for name, _ in model.named_children())
    quantized = ptq(model, images, RECIPE.replace(keep_fp32=names), QDQConfig("inputs"))
    assert quantized.layers == {}
    with torch.inference_mode():
        expected = model.double()(images.double())
    answer = exact.execute(quantized, images)
    # BatchNorm is folded in FP32.
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)


def test_batchnorm_that_stays_is_computed_in_float64():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)).eval()
    model[1].running_var.uniform_(0.5, 2)
    images = noise(4, 5)
    quantized = ptq(
        model,
        images,
        RECIPE,
        QDQConfig("inputs", torch.int16, torch.int16, steps=65535),
    )
    torch.testing.assert_close(
        exact.execute(quantized, images).float(), model(images), rtol=1e-3, atol=1e-3
    )


# ---- splits and watching


def test_logits_of_a_split_come_in_its_order(tmp_path):
    split = numbered_split(tmp_path, np.arange(7) % 2, side=33)
    images = torch.cat([x for x, _ in split.batches(7)])
    quantized = ptq(small(Everything), images, RECIPE, QDQConfig("outputs"))
    logits = exact.logits(quantized, split, batch_size=3)
    assert logits.dtype == np.float32 and logits.shape == (7, 2)
    assert np.array_equal(logits, exact.execute(quantized, images).float().numpy())


def test_every_layer_is_watched_before_its_activation():
    model, images, seen = small(Everything), noise(2, 33), {}
    quantized = ptq(model, images, RECIPE.replace(keep_fp32=("reduce",)), QDQConfig("outputs"))
    with torch.no_grad():
        exact.ExactInterpreter(
            quantized, lambda name, output: seen.update({name: output.clone()})
        ).run(images.double())
    assert list(seen) == ["stem", "conv", "depthwise", "reduce", "excite", "project", "fc", "head"]
    assert seen["stem"].min() < 0 and seen["reduce"].min() < 0  # ReLU follows
