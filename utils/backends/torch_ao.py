"""INT8 through FX graph mode on torch's four CPU engines: fbgemm, x86, onednn, qnnpack.

Only this module imports `torch.ao` and depends on its classes, so their removal from torch would
affect this file alone. The deployed artifact is the converted graph as traced TorchScript: one file
that loads without the code that made it, including packed weights and the scales of every
hardswish.
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

from utils import environment
from utils.backends.base import Deployed, Layer, Predictor, Stored, stored_parameters
from utils.quantize import layers, ranges
from utils.quantize.bias_correction import correct_biases
from utils.training.checkpoints import Checkpoint

ACTIVATIONS = {"histogram": HistogramObserver, "minmax": MinMaxObserver}
WEIGHTS = {
    "per_channel_symmetric": (PerChannelMinMaxObserver, torch.per_channel_symmetric),
    "per_tensor_symmetric": (MinMaxObserver, torch.per_tensor_symmetric),
}
TRAINED_WEIGHTS = {
    "per_channel_symmetric": (MovingAveragePerChannelMinMaxObserver, torch.per_channel_symmetric),
    "per_tensor_symmetric": (MovingAverageMinMaxObserver, torch.per_tensor_symmetric),
}
UINT8 = (0, 255)  # the range that every kernel clips activations to
# qnnpack's kernels need symmetric weights, which cost 1/256 of the resolution. All engines use
# them, so that all deploy the same integers.
WEIGHT_RANGE = {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127}


class FakeQuantize(TorchFakeQuantize):
    """torch's fake quantization, which here observes its range in training mode only.

    Validation images must not move the range. torch's default QAT settings have a fused variant,
    not used here: its scale of symmetric weights is max(-min / 128, max / 127), conversion computes
    another one, and so nearly every weight would change on conversion.
    """

    frozen = False

    def train(self, mode: bool = True) -> "FakeQuantize":
        self.enable_observer(mode and not self.frozen)
        return super().train(mode)


class ActivationFakeQuantize(FakeQuantize):
    """Fake quantization of an activation, with a range that can be set and frozen.

    The range of a weight just follows the weight. With `reduce_range`, torch's fake quantization
    clips at 127. The deployed kernels only get the coarser scale and clip at 255, and so does this
    class, so that the trained network rounds as the deployed one does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.observer_enabled[0] == 1:
            self.activation_post_process(x.detach())
            self._set(*self.calculate_qparams())
        if self.fake_quant_enabled[0] == 1:
            x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *UINT8)
        return x

    def freeze(self) -> None:
        """Keep the range as it is from now on, even in training mode."""
        self.frozen = True
        self.disable_observer()

    def start(self, observer: nn.Module) -> None:
        """Adopt the range that `observer` would quantize to."""
        scale, zero_point = observer.calculate_qparams()
        bounds = torch.tensor([observer.quant_min, observer.quant_max]) - zero_point
        low, high = (bounds * scale).float()
        self.activation_post_process.min_val.resize_(low.shape).copy_(low)
        self.activation_post_process.max_val.resize_(high.shape).copy_(high)
        self._set(scale, zero_point)

    def _set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        self.scale.resize_(scale.shape).copy_(scale)
        self.zero_point.resize_(zero_point.shape).copy_(zero_point)


class TorchAO:
    """The backend of one of torch's quantized engines, on the CPU only."""

    suffix, watched = ".torchscript", False
    layout = torch.channels_last

    def __init__(self, name: str):
        self.name = name

    def problem(self) -> str | None:
        if self.name not in torch.backends.quantized.supported_engines:
            return f"this build of torch has only {', '.join(torch.backends.quantized.supported_engines)}"
        return None

    def reduce_range(self) -> bool:
        """Return whether the ranges of activations must span 7 bits here instead of 8.

        Without VNNI, fbgemm and oneDNN multiply u8 by s8 with an instruction that adds pairs of
        products in 16 bits and saturates (see reduce_range in torch's documentation). qnnpack
        computes in 16 x 16 bits and never saturates. With VNNI, fbgemm's depthwise kernels still
        saturate, but only where neighbouring inputs and weights are both near the ends of their
        ranges. On MobileNetV3's trained weights that costs less than the loss of a bit (validation
        SQNR 17.8 dB against 12.4 dB).
        """
        return self.name != "qnnpack" and not environment.has_vnni()

    def qconfig_mapping(self, recipe: dict) -> QConfigMapping:
        """Return the observers of PTQ, by module and operator.

        torch's default mapping is the start, as it fixes the ranges of sigmoid and hardsigmoid.
        """
        observer, scheme = WEIGHTS[recipe["weights"]]
        activation = ACTIVATIONS[recipe["activations"]].with_args(reduce_range=self.reduce_range())
        weight = observer.with_args(qscheme=scheme, **WEIGHT_RANGE)
        return self._mapping(get_default_qconfig_mapping, QConfig(activation=activation, weight=weight), recipe)

    def qat_mapping(self, recipe: dict) -> QConfigMapping:
        """Return the fake quantization of QAT, by module and operator.

        Values are rounded as soon as they are observed, and the ranges follow them.
        """
        observer, scheme = TRAINED_WEIGHTS[recipe["weights"]]
        activation = ActivationFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, reduce_range=self.reduce_range())
        weight = FakeQuantize.with_args(observer=observer, qscheme=scheme, averaging_constant=1.0, **WEIGHT_RANGE)
        return self._mapping(get_default_qat_qconfig_mapping, QConfig(activation=activation, weight=weight), recipe)

    def _mapping(self, default, qconfig: QConfig, recipe: dict) -> QConfigMapping:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onednn warns of missing VNNI; see reduce_range
            mapping = default(self.name)
        mapping.set_global(qconfig)
        for name in recipe["keep_fp32"]:
            mapping.set_module_name(name, None)
        return mapping

    def quantize(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a float `model` to INT8 by PTQ, calibrated on `images`.

        `images` are float32 (n, 3, 224, 224), normalised. Recipe: `weights` (a key of WEIGHTS),
        `activations` (a key of ACTIVATIONS), `bias_correction` (bool) and `keep_fp32` (names of
        modules that stay in FP32). Raises `RuntimeError` if the quantized modules are not those
        that the recipe asks for.
        """
        torch.backends.quantized.engine = self.name
        model = copy.deepcopy(model).cpu().eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and observers on reduce_range
            prepared = prepare_fx(model, self.qconfig_mapping(recipe), (images[:1],))
            with layers.channel_means(prepared) as means:
                ranges.observe(prepared, images)
            if recipe["bias_correction"]:
                correct_biases(prepared, convert_to_reference_fx(copy.deepcopy(prepared)), images, means)
            converted = convert_fx(prepared)
        return self._deploy(converted, model, images, recipe)

    def training(self, recipe: dict) -> tuple[str, dict]:
        """Return the tag and the settings of QAT; see `Backend.training`.

        Engines that round alike share one training. On a processor with VNNI, all of them do.
        """
        names = ("weights", "activations", "keep_fp32", "calibration_images")
        tag = "7bit" if self.reduce_range() else ""
        return tag, {name: recipe[name] for name in names} | {"reduce_range": self.reduce_range()}

    def prepare(self, model: nn.Module, images: torch.Tensor, recipe: dict) -> nn.Module:
        """Return `model` with fake quantization where the converted network will round (FX QAT).

        BatchNorm is fused into its convolution. The ranges of activations start where PTQ would put
        them: at those of the recipe's observer on `images` in the float network.
        """
        torch.backends.quantized.engine = self.name
        model = copy.deepcopy(model).cpu().train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare_qat_fx(model, self.qat_mapping(recipe), (images[:1],))
            prepared.eval()
            rounding = [module for module in prepared.modules() if isinstance(module, FakeQuantize)]
            for module in rounding:
                # Weights get their ranges from these observers, activations from `_start_ranges`.
                module.enable_observer(not isinstance(module, ActivationFakeQuantize))
                module.disable_fake_quant()
            _start_ranges(prepared, ACTIVATIONS[recipe["activations"]].with_args(reduce_range=self.reduce_range()), images)
        for module in rounding:
            module.enable_fake_quant()
        return prepared.train()

    def convert(self, trained: Checkpoint, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        """Convert a trained network to integers, with the ranges of its training."""
        torch.backends.quantized.engine = self.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = fold_kept(convert_fx(copy.deepcopy(trained.model).eval()))
        model = float_twin(trained.model, model)
        return dataclasses.replace(self._deploy(converted, model, images, recipe), fake_quant=trained.model)

    def _deploy(self, converted: nn.Module, model: nn.Module, images: torch.Tensor, recipe: dict) -> Deployed:
        expected = [name for name in layers.weighted(model) if not _under(name, recipe["keep_fp32"])]
        packed = packed_modules(converted)
        if sorted(packed) != sorted(expected):
            wrong = sorted(set(packed) ^ set(expected))
            raise RuntimeError(f"{self.name} quantized {len(packed)} modules, not {len(expected)}: {', '.join(wrong)}")
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            traced = torch.jit.freeze(torch.jit.trace(converted.eval(), images[:1]))
        return Deployed(
            backend=self,
            predict=converted,
            save=lambda path: torch.jit.save(traced, path),
            network=converted,
            layers=converted_layers(converted, model),
            stored=(*stored_packed(packed), *stored_parameters(converted)),
            reference=fuse(model),
            facts={"reduce_range": self.reduce_range(), "quantized": sorted(packed)},
        )

    def load(self, path: Path, device: str) -> Predictor:
        torch.backends.quantized.engine = self.name  # loading packs weights for this engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=device).eval()


def packed_modules(converted: nn.Module) -> dict[str, nn.Module]:
    """Return the converted modules that hold packed weights, by name.

    Their `weight` is a method; that of a float module is a tensor.
    """
    return {name: module for name, module in converted.named_modules() if callable(getattr(module, "weight", None))}


def stored_packed(packed: dict[str, nn.Module]) -> tuple[Stored, ...]:
    """Return the weights (int8) and biases (float32) of packed modules as `Stored`."""
    weights = [Stored(module.weight().numel(), 8, name) for name, module in packed.items()]
    biases = [Stored(module.bias().numel(), 32) for module in packed.values() if module.bias() is not None]
    return (*weights, *biases)


def converted_layers(converted: nn.Module, model: nn.Module) -> dict[str, Layer]:
    """Return the layers of a converted network by their names in the float `model`.

    A layer may be fused with its ReLU. If it is packed, the two are one module. If it stays in
    FP32, they are a sequence, with the weights of `model`.
    """
    converted_by_name = {}
    for name in layers.weighted(model):
        module = converted.get_submodule(name)
        relu = "ReLU" in type(module).__name__
        if callable(getattr(module, "weight", None)):
            converted_by_name[name] = Layer(module, module.weight().dequantize(), relu)
        else:
            converted_by_name[name] = Layer(module, None if isinstance(module, nn.Sequential) else module.weight, relu)
    return converted_by_name


def fold_kept(converted: nn.Module) -> nn.Module:
    """Fold the BatchNorm of layers kept in FP32 into their convolutions, in place.

    Conversion does so for all other layers. Freezing the traced network would fold these, too, but
    the network before saving must give the same logits as the saved one, to the bit.
    """
    for name, module in list(converted.named_modules()):
        if isinstance(module, intrinsic.ConvBn2d | intrinsic.ConvBnReLU2d):
            layer = fuse_conv_bn_eval(module[0], module[1])
            converted.set_submodule(name, intrinsic.ConvReLU2d(layer, module[2]) if len(module) == 3 else layer)
    return converted


def _start_ranges(prepared: nn.Module, observer, images: torch.Tensor) -> None:
    """Start the activation ranges of a QAT network from an `observer()` run on `images`."""
    activations = {name: module for name, module in prepared.named_modules() if isinstance(module, ActivationFakeQuantize)}
    observers = {name: observer() for name in activations}
    # Fake quantization is off, so the output of these modules is their input.
    with layers.watching(activations.items(), lambda name, output: observers[name](output)):
        ranges.observe(prepared, images)
    for name, module in activations.items():
        module.start(observers[name])


def float_twin(trained: nn.Module, model: nn.Module) -> nn.Module:
    """Copy the float `model`, with the weights and BatchNorm statistics of `trained`.

    `trained` is the network that QAT trained from `model`. In it, a convolution holds the BatchNorm
    that follows it as its child `bn`. With a convolution kept in FP32, BatchNorm is the second
    element of a sequence.
    """
    model = copy.deepcopy(model).cpu().eval()
    modules = dict(model.named_modules())
    state = trained.state_dict()
    weights = {}
    for node in fx.symbolic_trace(model).graph.nodes:
        module = modules[node.target] if node.op == "call_module" else nn.Identity()
        places = (node.target, f"{node.target}.0")
        if isinstance(module, nn.BatchNorm2d):
            places = (node.target, f"{node.args[0].target}.bn", f"{node.args[0].target}.1")
        for name in module.state_dict():
            weights[f"{node.target}.{name}"] = next(state[f"{place}.{name}"] for place in places if f"{place}.{name}" in state)
    model.load_state_dict(weights)
    return model


def _under(name: str, parents: tuple[str, ...]) -> bool:
    """Return whether module `name` is one of `parents` or inside one of them."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


ENGINES = {name: TorchAO(name) for name in ("fbgemm", "x86", "onednn", "qnnpack")}
