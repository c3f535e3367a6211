"""INT8 by torch's engines on a small network: what is quantized and how, bias correction, the artifact's file."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import small_depthwise, uneven_images
from torch import nn

from utils import environment, paths
from utils.backends import registry, torch_ao
from utils.measure import footprint
from utils.quantize import layers
from utils.training import architectures

ENGINES = [name for name in torch_ao.ENGINES if name in torch.backends.quantized.supported_engines]
RECIPE = dict(weights="per_channel_symmetric", activations="histogram", bias_correction=False, keep_fp32=())
WEIGHTS = {"stem.0": 8 * 27, "depthwise.0": 8 * 9, "pointwise": 6 * 8, "head": 2 * 6}
BIASES = {"stem.0": 8, "depthwise.0": 8, "pointwise": 6, "head": 2}  # two of them made of BatchNorm
LAYERS = tuple(WEIGHTS)


@pytest.fixture(scope="module")
def model():
    return small_depthwise()


@pytest.fixture(scope="module")
def images():
    return uneven_images()


@pytest.fixture(scope="module")
def deployed(model, images):
    """The network on each engine, by the default recipe. Packed weights compute on the engine that is set at the time."""
    return {name: registry.get(name).quantize(model, images, RECIPE) for name in ENGINES}


def quantize(model, images, engine="fbgemm", **changes):
    return registry.get(engine).quantize(model, images, RECIPE | changes)


@torch.inference_mode()
def answers(deployed, x):
    torch.backends.quantized.engine = deployed.backend.name
    return deployed.predict(x)


@torch.inference_mode()
def fused_weights(model):
    """The float weights with BatchNorm folded in, by layer name."""
    weights = {name: model.get_submodule(name).weight for name in LAYERS}
    for name in ("stem", "depthwise"):
        conv, norm, _ = model.get_submodule(name)
        weights[f"{name}.0"] = conv.weight * (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1, 1)
    return weights


# ---- what is quantized, and how


@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_are_quantized_and_every_number_is_counted(deployed, engine):
    assert deployed[engine].facts["quantized"] == sorted(LAYERS)
    counts = footprint.of_numbers(deployed[engine].stored)
    assert (counts["weight_modules"], counts["quantized_modules"]) == (4, 4)
    assert counts["parameters"] == sum(WEIGHTS.values()) + sum(BIASES.values())
    assert counts["quantized_share"] == sum(WEIGHTS.values()) / counts["parameters"]  # biases stay in FP32
    assert counts["theoretical_mb"] == (sum(WEIGHTS.values()) + 4 * sum(BIASES.values())) / environment.MIB


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_kept_in_fp32_are_kept_with_those_below_them(model, images, engine):
    partly = quantize(model, images, engine, keep_fp32=("stem", "pointwise"))
    assert partly.facts["quantized"] == ["depthwise.0", "head"]
    counts = footprint.of_numbers(partly.stored)
    assert (counts["weight_modules"], counts["quantized_modules"]) == (4, 2)
    assert counts["parameters"] == sum(WEIGHTS.values()) + sum(BIASES.values())
    assert counts["quantized_share"] == (WEIGHTS["depthwise.0"] + WEIGHTS["head"]) / counts["parameters"]
    kept = partly.predict.get_submodule("pointwise")
    assert type(kept) is nn.Conv2d and torch.equal(kept.weight, model.pointwise.weight)


def test_a_name_keeps_only_itself_and_what_is_below_it(model, images):
    wider = nn.Sequential()
    for name in ("part", "part1"):
        wider.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert quantize(wider.eval(), images[:4], keep_fp32=("part",)).facts["quantized"] == ["part1.0"]


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_have_a_symmetric_scale_for_each_output_channel(model, deployed, engine):
    for name, weight in fused_weights(model).items():
        packed = deployed[engine].predict.get_submodule(name).weight()
        assert packed.qscheme() == torch.per_channel_affine and packed.q_per_channel_axis() == 0
        assert not packed.q_per_channel_zero_points().any()
        highest = weight.abs().amax(list(range(1, weight.ndim)))
        assert torch.allclose(packed.q_per_channel_scales().float(), highest / 127, rtol=1e-5)
        integers = packed.int_repr().int()
        assert bool((integers.abs().amax(list(range(1, weight.ndim))) == 127).all())  # each channel uses its whole range
        error = (packed.dequantize() - weight).abs().amax(list(range(1, weight.ndim)))
        assert bool((error <= 0.5001 * highest / 127).all())


def test_weights_can_share_one_scale(model, images):
    packed = quantize(model, images, weights="per_tensor_symmetric").predict.get_submodule("stem.0").weight()
    assert packed.qscheme() == torch.per_tensor_affine and packed.q_zero_point() == 0
    assert packed.q_scale() == pytest.approx(fused_weights(model)["stem.0"].abs().max().item() / 127, rel=1e-5)


def input_scale(deployed):
    return next(value.item() for name, value in deployed.predict.named_buffers() if "input_scale" in name)


def test_minmax_activations_span_all_values_seen(model, images):
    scale = input_scale(quantize(model, images, activations="minmax"))
    steps = 255 if environment.has_vnni() else 127
    assert scale == pytest.approx((images.max() - images.min()).item() / steps, rel=1e-4)
    assert input_scale(quantize(model, images)) < 0.99 * scale  # the histogram gives up rare values


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vnni", [True, False])
def test_activations_keep_to_seven_bits_where_products_would_saturate(monkeypatch, model, images, engine, vnni):
    monkeypatch.setattr(environment, "has_vnni", lambda: vnni)
    quantized = quantize(model, images, engine, activations="minmax")
    reduced = not vnni and engine != "qnnpack"
    assert quantized.facts["reduce_range"] is reduced
    assert input_scale(quantized) == pytest.approx((images.max() - images.min()).item() / (127 if reduced else 255), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_answers_stay_near_the_float_ones(model, images, deployed, engine):
    with torch.inference_mode():
        expected = model(images)
    error = answers(deployed[engine], images) - expected
    assert 0 < error.abs().max() < 0.1 * (expected.max() - expected.min())


# fbgemm's depthwise kernels add pairs of products in 16 bits, with VNNI too; without VNNI, activations have 7 bits.
SATURATING = {("fbgemm", 16)} if environment.has_vnni() else set()


@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("engine", ENGINES)
@torch.no_grad()
def test_kernels_compute_what_the_integers_say(request, engine, groups):
    """Large weights and inputs: where products are added up in too few bits, the sum is far off."""
    if (engine, groups) in SATURATING:
        request.applymarker(pytest.mark.xfail(strict=True, reason="fbgemm's depthwise kernels saturate on 8-bit activations"))
    torch.manual_seed(4)
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
    conv.weight.copy_(torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0))
    images = torch.rand(4, 16, 12, 12).to(memory_format=torch.channels_last)
    images[:2] = images[:2].round()
    quantized = quantize(nn.Sequential(conv), images, engine, activations="minmax")
    layer = quantized.predict.get_submodule("0")
    scale = input_scale(quantized)
    expected = nn.functional.conv2d((images / scale).round() * scale, layer.weight().dequantize(), layer.bias(), 1, 1, 1, groups)
    assert (answers(quantized, images) - expected).abs().max() < 0.51 * layer.scale


def test_a_layer_that_stays_float_unasked_is_an_error(monkeypatch, model, images):
    mapping = torch_ao.TorchAO.qconfig_mapping
    monkeypatch.setattr(
        torch_ao.TorchAO, "qconfig_mapping", lambda self, recipe: mapping(self, recipe | {"keep_fp32": ("head",)})
    )
    with pytest.raises(RuntimeError, match=r"fbgemm quantized 3 modules, not 4: head$"):
        quantize(model, images)


def test_a_layer_that_is_quantized_unasked_is_an_error(monkeypatch, model, images):
    mapping = torch_ao.TorchAO.qconfig_mapping
    monkeypatch.setattr(torch_ao.TorchAO, "qconfig_mapping", lambda self, recipe: mapping(self, recipe | {"keep_fp32": ()}))
    with pytest.raises(RuntimeError, match=r"fbgemm quantized 4 modules, not 3: head$"):
        quantize(model, images, keep_fp32=("head",))


# ---- what is left alone


@pytest.mark.parametrize("correction", [False, True])
def test_the_float_model_and_the_images_are_not_touched(model, images, correction):
    twin, shown = copy.deepcopy(model), images.clone()
    modules = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    quantize(model, images, bias_correction=correction)
    assert torch.equal(images, shown)
    assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == modules
    state, before = model.state_dict(), twin.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in state)
    assert not any(module.training or module._forward_hooks for module in model.modules())


def test_a_model_in_training_mode_is_quantized_as_in_evaluation_and_stays_as_it_is(model, images, deployed):
    training = copy.deepcopy(model).train()
    quantized = quantize(training, images)
    assert all(module.training for module in training.modules())
    assert torch.equal(training.stem[1].running_mean, model.stem[1].running_mean)
    assert torch.equal(answers(quantized, images), answers(deployed["fbgemm"], images))


# ---- bias correction


def mean_errors(model, images, **changes):
    """How far quantized arithmetic shifts the mean of each channel from the float network's, for layers without activation."""
    converted = quantize(model, images, "qnnpack", **changes).predict
    seen = []
    for network in (model, converted):
        linear = {name: network.get_submodule(name) for name in ("pointwise", "head")}
        with layers.outputs(linear) as outputs, torch.inference_mode():
            network(images)
        seen.append({name: layers.mean_by_channel(output) for name, output in outputs.items()})
    return {name: (seen[1][name] - seen[0][name]).abs() for name in seen[0]}


def test_after_correction_the_mean_of_each_channel_is_nearly_that_of_the_float_network(model, images):
    uneven = copy.deepcopy(model)
    uneven.depthwise[1].weight.data[0] *= 20  # one scale for all channels then rounds the others badly
    before = mean_errors(uneven, images, weights="per_tensor_symmetric", bias_correction=False)
    after = mean_errors(uneven, images, weights="per_tensor_symmetric", bias_correction=True)
    for name in ("pointwise", "head"):
        assert after[name].mean() < 0.2 * before[name].mean(), name


def test_every_layer_is_corrected_those_with_a_fused_activation_too(model, images):
    plain, corrected = (
        quantize(model, images, weights="per_tensor_symmetric", bias_correction=wanted).predict for wanted in (False, True)
    )
    for name in LAYERS:
        before, after = plain.get_submodule(name), corrected.get_submodule(name)
        assert not torch.equal(before.bias(), after.bias()), name
        assert torch.equal(before.weight().int_repr(), after.weight().int_repr()), name


# ---- the artifact


LOADER = """
import sys
import numpy, torch
from utils.backends import registry
folder = sys.argv[1]
x = torch.from_numpy(numpy.load(f"{folder}/x.npy")).to(memory_format=torch.channels_last)
for name in sys.argv[2:]:
    backend = registry.get(name)
    with torch.inference_mode():
        numpy.save(f"{folder}/{name}.npy", backend.load(f"{folder}/{name}{backend.suffix}", "cpu")(x).numpy())
"""


def test_artifacts_loaded_in_a_fresh_process_answer_the_same_to_the_bit(tmp_path, deployed):
    x = 3 * torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "x.npy", x.numpy())
    for name, engine in deployed.items():
        torch.backends.quantized.engine = name
        engine.save(tmp_path / f"{name}{engine.backend.suffix}")
    subprocess.run([sys.executable, "-c", LOADER, tmp_path, *deployed], check=True, cwd=paths.ROOT)
    for name, engine in deployed.items():
        expected = answers(engine, x.to(memory_format=torch.channels_last))
        assert expected.dtype == torch.float32 and expected.shape == (5, 2)
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected.numpy()), name


# ---- the real network


def test_every_layer_of_mobilenet_is_quantized():
    model = architectures.build("mobilenetv3").eval()
    counts = footprint.of_numbers(quantize(model, torch.randn(2, 3, 64, 64)).stored)
    assert counts["weight_modules"] == counts["quantized_modules"] == len(layers.weighted(model)) == 54
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # BatchNorm's two numbers for each channel become one, the bias of the convolution before it.
    folded = sum(norm.num_features for norm in norms)
    assert counts["parameters"] == sum(parameter.numel() for parameter in model.parameters()) - folded
