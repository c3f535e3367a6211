"""Export of float and quantized networks to ONNX, for all engines that read it."""

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn

from utils import architectures
from utils.training import checkpoints

EXAMPLE_SHAPE = (2, 3, 224, 224)  # the exporter would treat a batch of one as a constant
PACKAGES = ("torch", "onnx", "onnxscript")  # that decide the file
OPSET = 21  # the first with 16-bit integers in QuantizeLinear


def export(network: nn.Module, path: Path) -> None:
    """Write `network` as ONNX, with an input "images" and an output "logits".

    "images" is float32 (n, 3, 224, 224) and "logits" float32 (n, 2), with n free. The Q/DQ pairs of
    a quantized network become QuantizeLinear and DequantizeLinear; its weights stay integers.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(EXAMPLE_SHAPE),),
            path,
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )


def of_checkpoint(path: Path) -> Path:
    """Return the path of the ONNX graph of an FP32 checkpoint; export it if it is missing."""

    def write(target: Path) -> None:
        export(architectures.rebuild(checkpoints.read(path)).eval(), target)

    return checkpoints.derived(path, ".onnx", write, (__name__,), PACKAGES)
