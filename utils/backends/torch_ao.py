"""INT8 by FX graph mode on torch's four CPU engines: fbgemm, x86, onednn, qnnpack.

Everything of `torch.ao.quantization` that the study uses is imported here and nowhere else, so that its removal from torch
would touch one file. The deployed artifact is the converted graph as traced TorchScript: one file that loads without the
code that made it, packed weights and the scales of every hardswish included.
"""

import copy
import warnings
from pathlib import Path

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "torch.ao.quantization is deprecated": known, see above
    from torch.ao.quantization import (
        HistogramObserver,
        MinMaxObserver,
        PerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
        get_default_qconfig_mapping,
    )
    from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

from utils import calibrate, correct, environment
from utils.backends.base import Deployed, Predictor

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
ACTIVATIONS = {"histogram": HistogramObserver, "minmax": MinMaxObserver}
WEIGHTS = {
    "per_channel_symmetric": (PerChannelMinMaxObserver, torch.per_channel_symmetric),
    "per_tensor_symmetric": (MinMaxObserver, torch.per_tensor_symmetric),
}


class TorchAO:
    """One of torch's quantized engines. CPU only."""

    suffix, simulated = ".torchscript", False

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
        # qnnpack's kernels take the symmetric range only; it costs 1/256 of the resolution.
        bounds = {"quant_min": -127, "quant_max": 127} if self.name == "qnnpack" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # onednn warns that it lacks VNNI: reduce_range takes care of that
            mapping = get_default_qconfig_mapping(self.name)
        mapping.set_global(
            QConfig(
                activation=ACTIVATIONS[recipe["activations"]].with_args(reduce_range=self.reduce_range()),
                weight=observer.with_args(dtype=torch.qint8, qscheme=scheme, **bounds),
            )
        )
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
        expected = [name for name in weight_modules(model) if not _under(name, recipe["keep_fp32"])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and observers on their reduce_range
            prepared = prepare_fx(model, self.qconfig_mapping(recipe), (images[:1],))
            with correct.channel_means(prepared) as means:
                calibrate.observe(prepared, images)
            if recipe["bias_correction"]:
                correct.biases(prepared, convert_to_reference_fx(copy.deepcopy(prepared)), images, means)
            converted = convert_fx(prepared)
        quantized = quantized_modules(converted)
        if sorted(quantized) != sorted(expected):
            wrong = sorted(set(quantized) ^ set(expected))
            raise RuntimeError(f"{self.name} quantized {len(quantized)} modules, not {len(expected)}: {', '.join(wrong)}")
        return self._deploy(converted, model, images, quantized)

    def _deploy(self, converted: nn.Module, model: nn.Module, images: torch.Tensor, quantized: dict[str, int]) -> Deployed:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            traced = torch.jit.freeze(torch.jit.trace(converted.eval(), images[:1]))
        return Deployed(
            backend=self,
            predict=converted,
            save=lambda path: torch.jit.save(traced, path),
            weight_modules=len(weight_modules(model)),
            quantized_modules=len(quantized),
            parameters=sum(quantized.values()) + sum(parameter.numel() for parameter in converted.parameters()),
            quantized_parameters=sum(quantized.values()),
            facts={"reduce_range": self.reduce_range(), "quantized": sorted(quantized)},
        )

    def load(self, path: Path, device: str) -> Predictor:
        torch.backends.quantized.engine = self.name  # weights are packed for this engine while loading
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=device).eval()


def weight_modules(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers of a float model."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def quantized_modules(converted: nn.Module) -> dict[str, int]:
    """Names of the converted modules that hold packed weights, with how many numbers each holds (bias included)."""
    found = {}
    for name, module in converted.named_modules():
        if callable(getattr(module, "weight", None)):  # packed modules have a method where float ones have a tensor
            bias = module.bias()
            found[name] = module.weight().numel() + (0 if bias is None else bias.numel())
    return found


def _under(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)
