"""Counts of the layers that an engine computes on integers, read from the graph it compiled.

No torch: records are read without it. A *layer* is a convolution or a linear layer.
"""

from collections.abc import Mapping

# ONNX Runtime's operators that are layers.
ONNX_FLOAT = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
ONNX_INTEGER = ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger")


def counted(layers: int, integer_layers: int, **more) -> dict:
    """Return what `Backend.kernels` reports.

    `layers` are the layers of the compiled graph, and `integer_layers` the ones that multiply
    integers. `more` has the engine's words: counts of kernels by name, for example.
    """
    return {"layers": layers, "integer_layers": integer_layers, **more}


def of_onnx(operators: Mapping[str, int]) -> dict:
    """Count the layers in an optimized graph of ONNX Runtime, given as {operator: count}."""
    integers = sum(operators.get(name, 0) for name in ONNX_INTEGER)
    floats = sum(operators.get(name, 0) for name in ONNX_FLOAT)
    return counted(integers + floats, integers, operators=dict(operators))


def integer_layers(record: Mapping) -> int | None:
    """Return how many layers of a run its engine computes on integers; None if it does not say.

    `record` is the JSON of a run, or the parts `run`, `backend` and `footprint` of it. Float
    formats and simulations have no integer layers. If the engine shows fewer layers than the
    network has, its count of integer layers says nothing about the others.
    """
    kernels = record.get("backend", {}).get("kernels")
    if kernels and "layers" not in kernels:  # older records have ONNX Runtime's operators alone
        kernels = of_onnx(kernels)
    total = record["footprint"].get("weight_modules")
    if kernels and (total is None or kernels["layers"] >= total):
        return kernels["integer_layers"]
    run = record["run"]
    return 0 if run["simulated"] or run["dtype"] != "int8" else None
