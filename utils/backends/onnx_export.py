"""Export of float and quantized networks to ONNX, for all engines that read it."""

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn

from utils import architectures
from utils.training import checkpoints

SHAPE = (2, 3, 224, 224)  # of the example; the exporter treats a batch of one as a constant
OPSET = 21  # the first with 16-bit integers in QuantizeLinear


def export(network: nn.Module, path: Path) -> None:
    """Write `network` as ONNX, with an input "images" and an output "logits".

    "images" is float32 (n, 3, 224, 224) and "logits" float32 (n, 2), with n free. The pairs of a
    quantized network become QuantizeLinear and DequantizeLinear, and its weights stay integers.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(SHAPE),), path, dynamo=True, external_data=False, opset_version=OPSET,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )  # fmt: skip


def of_checkpoint(path: Path) -> Path:
    """Return the path of the graph of the FP32 checkpoint at `path`; export it if it is missing."""
    return checkpoints.derived(
        path,
        ".onnx",
        lambda target: export(architectures.rebuild(checkpoints.read(path)).eval(), target),
    )
