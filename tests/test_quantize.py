"""INT8 by `utils.backends.torch_ao` on a small network: what is quantized and how, bias correction, the artifact's file, and
the process (`utils.worker`) that loads it.
"""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from tests.helpers import split_of
from utils import architectures, backends, calibrate, correct, environment, paths
from utils.backends import torch_ao
from utils.errors import UserError
from utils.worker import Worker, fastest_cpu

ENGINES = [name for name in torch_ao.ENGINES if name in torch.backends.quantized.supported_engines]
RECIPE = dict(weights="per_channel_symmetric", activations="histogram", bias_correction=False, keep_fp32=())
LAYERS = ("stem.0", "depthwise.0", "pointwise", "head")  # with 8 x 3 x 9, 8 x 9, 6 x 8 and 2 x 6 weights
NUMBERS = {"stem.0": 8 * 27 + 8, "depthwise.0": 8 * 9 + 8, "pointwise": 6 * 8 + 6, "head": 2 * 6 + 2}  # biases included


class Small(nn.Module):
    """Convolution, BatchNorm and ReLU; the same depthwise with hardswish; pointwise without either; linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.Hardswish())
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.pointwise(self.depthwise(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: folding it in changes the weights
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    strength, shift = 0.3 + 1.5 * torch.rand(40, 1, 1, 1, generator=generator), torch.randn(40, 3, 1, 1, generator=generator)
    noise = torch.randn(40, 3, 64, 64, generator=generator)
    return (strength * noise + shift).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def deployed(model, images):
    """The network on each engine, by the default recipe. Packed weights compute on the engine that is set at the time."""
    return {name: backends.get(name).quantize(model, images, RECIPE) for name in ENGINES}


def quantize(model, images, engine="fbgemm", **changes):
    return backends.get(engine).quantize(model, images, RECIPE | changes)


@torch.inference_mode()
def answers(deployed, x):
    torch.backends.quantized.engine = deployed.backend.name
    return deployed.predict(x)


@torch.inference_mode()
def fused_weights(model):
    """The float weights with BatchNorm folded in, by layer name."""
    found = {name: model.get_submodule(name).weight for name in LAYERS}
    for name in ("stem", "depthwise"):
        conv, norm, _ = model.get_submodule(name)
        found[f"{name}.0"] = conv.weight * (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(-1, 1, 1, 1)
    return found


# ---- what is quantized, and how


@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_are_quantized_and_every_number_is_counted(deployed, engine):
    found = deployed[engine]
    assert found.facts["quantized"] == sorted(LAYERS)
    assert (found.weight_modules, found.quantized_modules) == (4, 4)
    assert found.parameters == found.quantized_parameters == sum(NUMBERS.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_kept_in_fp32_are_kept_with_those_below_them(model, images, engine):
    found = quantize(model, images, engine, keep_fp32=("stem", "pointwise"))
    assert found.facts["quantized"] == ["depthwise.0", "head"]
    assert (found.weight_modules, found.quantized_modules) == (4, 2)
    assert found.parameters == sum(NUMBERS.values())
    assert found.quantized_parameters == NUMBERS["depthwise.0"] + NUMBERS["head"]
    kept = found.predict.get_submodule("pointwise")
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
    found = quantize(model, images, activations="minmax")
    assert input_scale(found) == pytest.approx((images.max() - images.min()).item() / 255, rel=1e-4)
    assert input_scale(quantize(model, images)) < 0.99 * input_scale(found)  # the histogram gives up rare values


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("vnni", [True, False])
def test_activations_keep_to_seven_bits_where_products_would_saturate(monkeypatch, model, images, engine, vnni):
    monkeypatch.setattr(environment, "has_vnni", lambda: vnni)
    found = quantize(model, images, engine, activations="minmax")
    reduced = not vnni and engine != "qnnpack"
    assert found.facts["reduce_range"] is reduced
    assert input_scale(found) == pytest.approx((images.max() - images.min()).item() / (127 if reduced else 255), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_answers_stay_near_the_float_ones(model, images, deployed, engine):
    with torch.inference_mode():
        expected = model(images)
    error = answers(deployed[engine], images) - expected
    assert 0 < error.abs().max() < 0.1 * (expected.max() - expected.min())


SATURATING = {("fbgemm", 16)}  # its depthwise kernels add pairs of products in 16 bits, with VNNI too


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
    found = quantize(nn.Sequential(conv), images, engine, activations="minmax")
    layer = found.predict.get_submodule("0")
    scale = input_scale(found)
    expected = nn.functional.conv2d((images / scale).round() * scale, layer.weight().dequantize(), layer.bias(), 1, 1, 1, groups)
    assert (answers(found, images) - expected).abs().max() < 0.51 * layer.scale


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
    found = quantize(training, images)
    assert all(module.training for module in training.modules())
    assert torch.equal(training.stem[1].running_mean, model.stem[1].running_mean)
    assert torch.equal(answers(found, images), answers(deployed["fbgemm"], images))


def test_calibration_shows_each_image_once_in_order_without_gradients():
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            assert not torch.is_grad_enabled()

    images = torch.randn(70, 3, 4, 4)
    calibrate.observe(Recorder(), images)
    assert len(seen) == 3 and torch.equal(torch.cat(seen), images)


# ---- bias correction


def traced(*layers):
    return fx.symbolic_trace(nn.Sequential(*layers)).eval()


@torch.no_grad()
def corrected(prepared, reference, images):
    """The biases of `prepared` after correction, by layer."""
    with correct.channel_means(prepared) as means:
        for batch in images.split(3):
            prepared(batch)
    correct.biases(prepared, reference, images, means)
    return [layer.bias for layer in prepared.children() if isinstance(layer, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def test_channel_means_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    model[0].weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    model[3].weight.fill_(1.0)
    model[3].bias.zero_()
    with correct.channel_means(model) as means:  # batches of two and one: each image counts the same
        model(torch.tensor([0.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2))
        model(torch.tensor([6.0]).view(1, 1, 1, 1).expand(1, 1, 2, 2))
    assert means["0"].tolist() == [2 * 3 + 1, -3]  # before the ReLU
    assert means["3"].tolist() == [4 * (1 + 7 + 13) / 3]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_shifted_weight_is_made_up_for_by_the_bias(bias):
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 2, 1, bias=bias)
    images = torch.randn(8, 3, 4, 4) + torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    prepared = traced(conv, nn.ReLU())
    reference = copy.deepcopy(prepared)
    shift = torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 1.0]])
    reference.get_submodule("0").weight.data += shift.view(2, 3, 1, 1)
    before = prepared.get_submodule("0").bias.detach().clone() if bias else torch.zeros(2)
    weight = prepared.get_submodule("0").weight.detach().clone()
    [found] = corrected(prepared, reference, images)
    assert torch.allclose(found, before - shift @ images.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(prepared.get_submodule("0").weight, weight)


def test_a_later_layer_sees_what_the_corrected_layers_before_it_give():
    torch.manual_seed(3)
    prepared = traced(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    reference = copy.deepcopy(prepared)
    reference.get_submodule("0").weight.data += 0.3
    before = prepared.get_submodule("1").bias.detach().clone()
    first, second = prepared.get_submodule("0").bias.detach().clone(), before
    found = corrected(prepared, reference, torch.randn(8, 3, 4, 4) + 2)
    assert (found[0] - first).abs().min() > 0.1
    assert torch.allclose(found[1], second, atol=1e-5)  # nothing is left to correct


def mean_errors(model, images, **changes):
    """How far quantized arithmetic shifts the mean of each channel from the float network's, for layers without activation."""
    converted, shifts = quantize(model, images, "qnnpack", **changes).predict, {}
    means, outputs = {}, {}

    def keep(into, name):
        return lambda _module, _input, output: into.__setitem__(name, output.dequantize() if output.is_quantized else output)

    for name in ("pointwise", "head"):
        hooks = [network.get_submodule(name).register_forward_hook(keep(into, name))
                 for network, into in ((model, means), (converted, outputs))]  # fmt: skip
        with torch.inference_mode():
            model(images)
            converted(images)
        for hook in hooks:
            hook.remove()
        dims = [d for d in range(means[name].ndim) if d != 1]
        shifts[name] = (outputs[name].mean(dims) - means[name].mean(dims)).abs()
    return shifts


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
from utils import backends
folder = sys.argv[1]
x = torch.from_numpy(numpy.load(f"{folder}/x.npy")).to(memory_format=torch.channels_last)
for name in sys.argv[2:]:
    backend = backends.get(name)
    with torch.inference_mode():
        numpy.save(f"{folder}/{name}.npy", backend.load(f"{folder}/{name}{backend.suffix}", "cpu")(x).numpy())
"""


def test_artifacts_loaded_in_a_fresh_process_answer_the_same_to_the_bit(tmp_path, deployed):
    x = 3 * torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "x.npy", x.numpy())
    for name, own in deployed.items():
        torch.backends.quantized.engine = name
        own.save(tmp_path / f"{name}{own.backend.suffix}")
    subprocess.run([sys.executable, "-c", LOADER, tmp_path, *deployed], check=True, cwd=paths.ROOT)
    for name, own in deployed.items():
        expected = answers(own, x.to(memory_format=torch.channels_last))
        assert expected.dtype == torch.float32 and expected.shape == (5, 2)
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected.numpy()), name


# ---- engines that cannot run here


def test_an_engine_that_is_missing_neither_stops_the_others_nor_goes_unsaid(monkeypatch, capsys):
    class Args:
        device, backends = "cpu", ("qnnpack", "fbgemm")

    monkeypatch.setattr(torch_ao.TorchAO, "problem", lambda self, _device: "not today" if self.name == "qnnpack" else None)
    found = []
    with pytest.raises(UserError, match="qnnpack: not today"):
        for backend in backends.select(Args):
            found.append(backend.name)
    assert found == ["fbgemm"] and "qnnpack: not today" in capsys.readouterr().out


def test_engines_run_on_the_cpu_only():
    assert "CPU" in backends.get("fbgemm").problem("cuda")
    assert "this build of torch has only" in torch_ao.TorchAO("no such engine").problem("cpu")


# ---- the process that measures


@pytest.fixture
def split(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)
    return split_of(tmp_path / "images", pixels, [0, 1, 0, 1, 0, 1, 0])


@pytest.fixture
def artifact(tmp_path, deployed):
    torch.backends.quantized.engine = "fbgemm"
    deployed["fbgemm"].save(tmp_path / "small.torchscript")
    return tmp_path / "small.torchscript"


def kill(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()


def test_a_worker_answers_as_this_process_does_until_it_is_killed(artifact, split, deployed):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        expected = torch.cat([answers(deployed["fbgemm"], x) for x, _ in split.batches(3)]).numpy()
        found = worker.call("logits", split, 3)
        assert found.dtype == np.float32 and np.array_equal(found, expected)
        x = next(split.batches(7))[0]
        assert np.array_equal(worker.call("run", x), answers(deployed["fbgemm"], x).numpy())
        # A batch of more images than there are repeats them.
        worker.call("hold", split, 20)
        times = worker.call("time", 3)
        assert len(times) == 3 and min(times) > 0
        cost = worker.call("cost")
        assert 0 < cost["load_s"] < 60 and 20 < cost["peak_memory_mb"] < 20_000
        with pytest.raises(RuntimeError, match=r"in the measuring process:\n.*Traceback"):
            worker.call("time", "many")
        assert len(worker.call("time", 1)) == 1  # an error there does not end it
        worker.send("time", 10**9)
        time.sleep(0.3)
        kill(worker)  # as the system does when memory runs out
        with pytest.raises(UserError, match=r"exit status -9.*smaller --batch-sizes"):
            worker.receive()
        with pytest.raises(UserError, match="exit status -9"):  # while it is the other side's turn
            worker.call("time", 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps a thread on a CPU")
def test_what_is_timed_is_called_on_the_same_cpu_in_every_process(artifact, split):
    mine = os.sched_getaffinity(0)
    with Worker("fbgemm", artifact, "cpu", 2) as worker, Worker("fbgemm", artifact, "cpu", 1) as other:
        for size in (1, 4):
            for side in (worker, other):
                side.call("hold", split, size)
            kept = os.sched_getaffinity(worker.process.pid)
            assert len(kept) == 1 and kept == os.sched_getaffinity(other.process.pid)
            threads = [int(path.name) for path in Path(f"/proc/{worker.process.pid}/task").iterdir()]
            helpers = [os.sched_getaffinity(thread) for thread in threads if thread != worker.process.pid]
            assert helpers and all(own == mine for own in helpers)  # the second thread may run beside it
    assert os.sched_getaffinity(0) == mine


def test_the_fastest_cpu_is_the_last_of_those_with_the_highest_clock(tmp_path):
    assert fastest_cpu({0, 1, 5}, tmp_path) == 5  # nothing is known of their clocks
    for cpu, clock in enumerate((5_200_000, 5_200_000, 3_900_000)):
        (tmp_path / f"cpu{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/cpufreq/cpuinfo_max_freq").write_text(f"{clock}\n")
    assert fastest_cpu({0, 1, 2}, tmp_path) == 1
    assert fastest_cpu({2}, tmp_path) == 2


def test_a_worker_killed_before_it_has_loaded_anything_is_reported_the_same(artifact, split):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        worker.send("hold", split, 1)
        kill(worker)
        with pytest.raises(UserError, match="exit status -9"):
            worker.receive()


def test_a_worker_that_cannot_load_says_so(tmp_path):
    (tmp_path / "empty.pt").touch()
    with Worker("native", tmp_path / "empty.pt", "cpu", 1) as worker, pytest.raises(RuntimeError, match="damaged"):
        worker.call("cost")


def test_a_worker_ends_with_its_block(artifact):
    with Worker("fbgemm", artifact, "cpu", 1) as worker:
        assert worker.process.is_alive()
    assert not worker.process.is_alive()


# ---- the real network


def test_every_layer_of_mobilenet_is_quantized():
    model = architectures.build("mobilenetv3").eval()
    found = quantize(model, torch.randn(2, 3, 64, 64))
    assert found.weight_modules == found.quantized_modules == len(torch_ao.weight_modules(model))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # BatchNorm's two numbers for each channel become one, the bias of the convolution before it.
    folded = sum(norm.num_features for norm in norms)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters()) - folded
