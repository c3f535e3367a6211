"""INT8 by the default recipe of each deployment tool, for comparison.

A tool takes a float network and calibration images, and writes a file that a backend of the study
loads. So one engine runs both files, and only the quantized networks differ.
"""

import copy
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils.backends import onnx_export, torch_ao, torch_export
from utils.quantize.operators import folded

BATCH = 16  # calibration images


@dataclass(frozen=True)
class Tool:
    """A tool, and the engine that runs its files."""

    backend: str  # key of catalog.BACKENDS
    package: str  # that must be installed
    suffix: str  # of its files
    # Writes a file, from a float network and calibration images.
    write: Callable[[nn.Module, torch.Tensor, Path], None]

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.package) is None


class Batches:
    """Calibration images in batches. ONNX Runtime takes any class with `get_next` as a reader."""

    def __init__(self, images: torch.Tensor):
        self.batches = iter(images.split(BATCH))

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def onnxruntime_default(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """ONNX Runtime's static quantization: min-max, int8 activations, one scale for a weight."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = path.with_suffix(".fp32.onnx"), path.with_suffix(".prepared.onnx")
    onnx_export.export(folded(model), plain)
    with torch_export.quiet():
        quant_pre_process(plain, prepared)
        quantization.quantize_static(prepared, path, Batches(images))


def nncf_default(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """NNCF's post-training quantization for OpenVINO, with fast bias correction."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    plain = path.with_suffix(".fp32.onnx")
    onnx_export.export(folded(model), plain)
    with torch_export.quiet():
        data = nncf.Dataset([image.numpy() for image in images.split(1)])
        network = openvino.Core().read_model(plain)
        openvino.save_model(nncf.quantize(network, data, subset_size=len(images)), path)


def xnnpack_default(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """ExecuTorch's quantizer for XNNPACK: int8 activations, one scale per output channel."""
    with torch_export.quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        # A smaller example would bound the batch size; see `torch_export.EXAMPLE_SHAPE`.
        example = torch.zeros(torch_export.EXAMPLE_SHAPE).to(memory_format=torch.channels_last)
        free = {"dynamic_shapes": ({0: torch.export.Dim("n", min=1, max=64)},)}
        how = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
        quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(how)
        exported = torch.export.export(copy.deepcopy(model).eval(), (example,), **free)
        network = prepare_pt2e(exported.module(), quantizer)
        for batch in images.split(BATCH):
            network(batch.contiguous(memory_format=torch.channels_last))
        program = torch.export.export(convert_pt2e(network), (example,), **free)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)


def torch_default(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Torch's FX graph mode: histograms of activations, one scale per output channel."""
    torch_ao.save_default("x86", model, images, path)


TOOL_DEFAULTS = {
    "torch FX": Tool("x86", "torch", ".torchscript", torch_default),
    "ONNX Runtime": Tool("onnxruntime", "onnxruntime", ".onnx", onnxruntime_default),
    "NNCF": Tool("openvino", "nncf", ".xml", nncf_default),
    "XNNPACK": Tool("xnnpack", "executorch", ".pte", xnnpack_default),
}
