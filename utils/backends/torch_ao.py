"""INT8 by FX graph mode on torch's four CPU engines: fbgemm, x86, onednn, qnnpack.

Everything of `torch.ao.quantization` that the study uses is imported here and nowhere else, so that its removal from torch
would touch one file. The deployed artifact is the converted graph as traced TorchScript: one file that loads without the
code that made it, packed weights and the scales of every hardswish included.
"""

import copy
import dataclasses
import warnings
from pathlib import Path

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "torch.ao.quantization is deprecated": known, see above
    from torch.ao.nn import intrinsic
    from torch.ao.quantization import FakeQuantize as TorchFakeQuantize
    from torch.ao.quantization import (
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        PerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
        get_default_qat_qconfig_mapping,
        get_default_qconfig_mapping,
    )
    from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx, prepare_qat_fx

from utils import calibrate, correct, environment
from utils.backends.base import Deployed, Predictor, weight_modules
from utils.checkpoints import Checkpoint

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
ACTIVATIONS = {"histogram": HistogramObserver, "minmax": MinMaxObserver}
WEIGHTS = {
    "per_channel_symmetric": (PerChannelMinMaxObserver, torch.per_channel_symmetric),
    "per_tensor_symmetric": (MinMaxObserver, torch.per_tensor_symmetric),
}
TRAINED_WEIGHTS = {
    "per_channel_symmetric": (MovingAveragePerChannelMinMaxObserver, torch.per_channel_symmetric),
    "per_tensor_symmetric": (MovingAverageMinMaxObserver, torch.per_tensor_symmetric),
}
# Symmetric weights: what qnnpack's kernels take, for 1/256 of the resolution; so every engine deploys the same integers.
WEIGHT_RANGE = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}


class FakeQuantize(TorchFakeQuantize):
    """torch's fake quantization, but it learns its range in training mode only: validation images must not move it.

    Not the fused one of torch's default QAT settings: that takes the scale of symmetric weights to be max(-min / 128, max / 127),
    while conversion takes another, so nearly every weight changes on conversion.
    """

    frozen = False

    def train(self, mode: bool = True) -> "FakeQuantize":
        self.enable_observer(mode and not self.frozen)
        return super().train(mode)


class ActivationFakeQuantize(FakeQuantize):
    """Of an activation, whose range can be set and frozen. That of a weight just follows the weight."""

    def freeze(self) -> None:
        """Keep the range as it is from now on, in training too."""
        self.frozen = True
        self.disable_observer()

    def start(self, observer: nn.Module) -> None:
        """Take over the range that `observer` would quantize to."""
        scale, zero_point = observer.calculate_qparams()
        bounds = torch.tensor([observer.quant_min, observer.quant_max]) - zero_point
        low, high = (bounds * scale).float()
        self.activation_post_process.min_val.resize_(low.shape).copy_(low)
        self.activation_post_process.max_val.resize_(high.shape).copy_(high)
        self.scale.resize_(scale.shape).copy_(scale)
        self.zero_point.resize_(zero_point.shape).copy_(zero_point)


class TorchAO:
    """One of torch's quantized engines. CPU only."""

    suffix, simulated, watched = ".torchscript", False, False
    layout = torch.channels_last

    def __init__(self, name: str):
        self.name = name

    def problem(self, device: str) -> str | None:
        if device != "cpu":
            return "runs on the CPU only"
        if self.name not in torch.backends.quantized.supported_engines:
            return f"this build of torch has only {', '.join(torch.backends.quantized.supported_engines)}"
        return None

    def reduce_range(self) -> bool:
        """Whether activations must keep to 7 bits here.

        Without VNNI, fbgemm and oneDNN multiply u8 by s8 with an instruction that adds pairs of products in 16 bits and
        saturates (torch documents this under reduce_range). qnnpack computes in 16 x 16 bits and never does. fbgemm's
        depthwise kernels saturate with VNNI, too, but only where neighbouring inputs and weights are both near their ends: on
        MobileNetV3's trained weights that costs less than the lost bit would (validation SQNR 17.8 dB against 12.4 dB).
        """
        return self.name != "qnnpack" and not environment.has_vnni()

    def qconfig_mapping(self, recipe: dict) -> QConfigMapping:
        """Which observers watch what. Starts from torch's mapping, which fixes the ranges of sigmoid and hardsigmoid."""
        observer, scheme = WEIGHTS[recipe["weights"]]
        activation = ACTIVATIONS[recipe["activations"]].with_args(reduce_range=self.reduce_range())
        weight = observer.with_args(qscheme=scheme, **WEIGHT_RANGE)
        return self._mapping(get_default_qconfig_mapping, QConfig(activation=activation, weight=weight), recipe)

    def qat_mapping(self, recipe: dict) -> QConfigMapping:
        """The same for training: what the observers see is rounded at once, and their ranges follow it."""
        observer, scheme = TRAINED_WEIGHTS[recipe["weights"]]
        activation = ActivationFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, reduce_range=self.reduce_range())
        weight = FakeQuantize.with_args(observer=observer, qscheme=scheme, averaging_constant=1.0, **WEIGHT_RANGE)
        return self._mapping(get_default_qat_qconfig_mapping, QConfig(activation=activation, weight=weight), recipe)

    def _mapping(self, default, qconfig: QConfig, recipe: dict) -> QConfigMapping:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onednn warns that it lacks VNNI: reduce_range takes care of that
            mapping = default(self.name)
        mapping.set_global(qconfig)
        for name in recipe["keep_fp32"]:
            mapping.set_module_name(name, None)
        return mapping

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Post-training quantization of `model` to INT8 on calibration `images` (n, 3, 224, 224), normalised.

        Recipe: `weights` and `activations` (observers), `bias_correction` (whether), `keep_fp32` (modules left in FP32, by
        name). Raises `RuntimeError` when another number of modules was quantized than the recipe asks for.
        """
        torch.backends.quantized.engine = self.name
        model = copy.deepcopy(model).cpu().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and observers on their reduce_range
            prepared = prepare_fx(model, self.qconfig_mapping(recipe), (images[:1],))
            with correct.channel_means(prepared) as means:
                calibrate.observe(prepared, images)
            if recipe["bias_correction"]:
                correct.biases(prepared, convert_to_reference_fx(copy.deepcopy(prepared)), images, means)
            converted = convert_fx(prepared)
        return self._deploy(converted, model, images, recipe)

    def training(self, recipe: dict) -> tuple[str, dict]:
        """Engines that round alike share one training: on a processor with VNNI all of them do."""
        names = ("weights", "activations", "keep_fp32", "calibration_images")
        tag = "7bit" if self.reduce_range() else ""
        return tag, {name: recipe[name] for name in names} | {"reduce_range": self.reduce_range()}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """`model` with rounding where the converted network will round, BatchNorm fused into its convolution (FX QAT).

        The ranges of activations start where PTQ would put them, by the recipe's observer on `images` in the float network.
        """
        torch.backends.quantized.engine = self.name
        model = copy.deepcopy(model).cpu().train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare_qat_fx(model, self.qat_mapping(recipe), (images[:1],))
            prepared.eval()
            own = [module for module in prepared.modules() if isinstance(module, FakeQuantize)]
            for module in own:
                module.enable_observer(not isinstance(module, ActivationFakeQuantize))  # weights have their ranges at once
                module.disable_fake_quant()
            _start_ranges(prepared, ACTIVATIONS[recipe["activations"]].with_args(reduce_range=self.reduce_range()), images)
        for module in own:
            module.enable_fake_quant()
        return prepared.train()

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a trained network to integers, with the ranges it was trained with."""
        torch.backends.quantized.engine = self.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = fold_kept(convert_fx(copy.deepcopy(trained.model).eval()))
        model = float_twin(trained.model, model)
        return dataclasses.replace(self._deploy(converted, model, images, recipe), fake_quant=trained.model)

    def _deploy(self, converted: nn.Module, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        expected = [name for name in weight_modules(model) if not _under(name, recipe["keep_fp32"])]
        quantized = quantized_modules(converted)
        if sorted(quantized) != sorted(expected):
            wrong = sorted(set(quantized) ^ set(expected))
            raise RuntimeError(f"{self.name} quantized {len(quantized)} modules, not {len(expected)}: {', '.join(wrong)}")
        floats = sum(parameter.numel() for parameter in converted.parameters())
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            traced = torch.jit.freeze(torch.jit.trace(converted.eval(), images[:1]))
        return Deployed(
            backend=self,
            predict=converted,
            save=lambda path: torch.jit.save(traced, path),
            network=converted,
            reference=fuse(model),
            weight_modules=len(weight_modules(model)),
            quantized_modules=len(quantized),
            parameters=sum(map(sum, quantized.values())) + floats,
            quantized_parameters=sum(map(sum, quantized.values())),
            weight_bytes=sum(weights + 4 * biases for weights, biases in quantized.values()) + 4 * floats,
            facts={"reduce_range": self.reduce_range(), "quantized": sorted(quantized)},
        )

    def load(self, path: Path, device: str) -> Predictor:
        torch.backends.quantized.engine = self.name  # weights are packed for this engine while loading
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=device).eval()


def quantized_modules(converted: nn.Module) -> dict[str, tuple[int, int]]:
    """Names of the converted modules that hold packed weights, with how many weights and biases each holds."""
    found = {}
    for name, module in converted.named_modules():
        if callable(getattr(module, "weight", None)):  # packed modules have a method where float ones have a tensor
            bias = module.bias()
            found[name] = module.weight().numel(), 0 if bias is None else bias.numel()
    return found


def fold_kept(converted: nn.Module) -> nn.Module:
    """Fold the BatchNorm of layers kept in FP32 into their convolutions, in place, as conversion does for all others.

    Freezing the traced network would do it anyway, and what is saved must answer as what was not, to the bit.
    """
    for name, module in list(converted.named_modules()):
        if isinstance(module, intrinsic.ConvBn2d | intrinsic.ConvBnReLU2d):
            layer = fuse_conv_bn_eval(module[0], module[1])
            converted.set_submodule(name, intrinsic.ConvReLU2d(layer, module[2]) if len(module) == 3 else layer)
    return converted


def _start_ranges(prepared: nn.Module, observer, images: torch.Tensor) -> None:
    """Show `images` to an `observer()` of every activation of a QAT network, and start its range from what that finds."""
    watched = {module: observer() for module in prepared.modules() if isinstance(module, ActivationFakeQuantize)}

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        watched[module](inputs[0])

    hooks = [module.register_forward_pre_hook(look) for module in watched]
    calibrate.observe(prepared, images)
    for hook in hooks:
        hook.remove()
    for module, own in watched.items():
        module.start(own)


def float_twin(trained: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of the float `model` with the weights and the BatchNorm statistics of the network that QAT trained from it.

    There a convolution holds the BatchNorm that follows it as its part `bn`, or, kept in FP32, as the second of a sequence.
    """
    model = copy.deepcopy(model).cpu().eval()
    modules = dict(model.named_modules())
    own = trained.state_dict()
    weights = {}
    for node in fx.symbolic_trace(model).graph.nodes:
        module = modules[node.target] if node.op == "call_module" else nn.Identity()
        places = (node.target, f"{node.target}.0")
        if isinstance(module, nn.BatchNorm2d):
            places = (node.target, f"{node.args[0].target}.bn", f"{node.args[0].target}.1")
        for name in module.state_dict():
            weights[f"{node.target}.{name}"] = next(own[f"{place}.{name}"] for place in places if f"{place}.{name}" in own)
    model.load_state_dict(weights)
    return model


def _under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)
