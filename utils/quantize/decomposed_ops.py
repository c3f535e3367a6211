"""The `quantized_decomposed` operators: quantization and dequantization for exporters.

torch 2.13 defines them in torch.ao, which a later version will remove. They come from the package
that defines them. If none does, this module defines them with the same schemas and arithmetic.

One case remains: if a package defines them after this module did, torch raises a RuntimeError there
("Tried to register an operator ... multiple times"). So this module first imports the packages that
may define them, and defines only operators that are missing.
"""

import contextlib
import importlib
import logging
import warnings

import torch

OPS = torch.ops.quantized_decomposed
# Modules that define the operators, or import whatever does. The exporters for XNNPACK and Inductor
# use the second; in torchao 0.18, it takes the operators from torch.ao.
MODULES = ("torch.ao.quantization.fx._decomposed", "torchao.quantization.pt2e.utils")


def _checked(x: torch.Tensor, axis: int | None = None) -> torch.Tensor:
    """Return the values to quantize in FP32. Raises `ValueError` for an unknown format or axis."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected floating-point values of 16 or 32 bits, not {x.dtype}")
    _check_axis(x, axis)
    return x.float()


def _check_axis(x: torch.Tensor, axis: int | None) -> None:
    if axis is not None and axis >= x.ndim:
        raise ValueError(f"axis {axis} is not below {x.ndim}, the number of dimensions")


def _check_integers(x: torch.Tensor, dtype: torch.dtype, axis: int | None = None) -> None:
    if x.dtype != dtype:
        raise ValueError(f"expected integers of {dtype}, not {x.dtype}")
    _check_axis(x, axis)


def _check_limits(low: int, high: int, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless `dtype` holds the integers from `low` to `high`."""
    limits = torch.iinfo(dtype)
    if low < limits.min or high > limits.max:
        raise ValueError(f"{dtype} does not hold the integers from {low} to {high}")


def _along(axis: int, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape `values` (n,) so that they broadcast over `x` along `axis`."""
    shape = [1] * x.ndim
    shape[axis] = len(values)
    return values.view(shape)


def _quantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype
) -> torch.Tensor:
    """Quantize `x` to integers from `low` to `high`, stored in `dtype`."""
    x = _checked(x)
    _check_limits(low, high, dtype)
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high).to(dtype)


def _quantize_per_tensor_meta(x, scale, zero_point, low, high, dtype) -> torch.Tensor:
    return torch.empty_like(_checked(x), dtype=dtype)


def _dequantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype,
    *, out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the values of the integers `x`; `low` and `high` are not used."""
    _check_integers(x, dtype)
    return (x.to(out_dtype or torch.float32) - zero_point) * scale


def _dequantize_per_tensor_meta(
    x, scale, zero_point, low, high, dtype, *, out_dtype=None
) -> torch.Tensor:
    return torch.empty_like(x, dtype=out_dtype or torch.float32)


def _quantize_per_channel(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, axis: int,
    low: int, high: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Quantize `x` to integers from `low` to `high`, with a scale for each channel of `axis`."""
    x = _checked(x, axis)
    _check_limits(low, high, dtype)
    inverse, zero_points = 1.0 / _along(axis, scales, x), _along(axis, zero_points, x)
    return torch.clamp(torch.round(x * inverse) + zero_points, low, high).to(dtype)


def _quantize_per_channel_meta(x, scales, zero_points, axis, low, high, dtype) -> torch.Tensor:
    _check_limits(low, high, dtype)
    return torch.empty_like(_checked(x, axis), dtype=dtype)


def _dequantize_per_channel(
    x: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, axis: int,
    low: int, high: int, dtype: torch.dtype, *, out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the values of the integers `x`, with a scale for each channel of `axis`."""
    _check_integers(x, dtype, axis)
    _check_limits(low, high, dtype)
    shifted = x if zero_points is None else x - _along(axis, zero_points, x)
    return (shifted * _along(axis, scales, x)).to(out_dtype or torch.float32)


def _dequantize_per_channel_meta(
    x, scales, zero_points, axis, low, high, dtype, *, out_dtype=None
) -> torch.Tensor:
    _check_integers(x, dtype, axis)
    _check_limits(low, high, dtype)
    return torch.empty_like(x, dtype=out_dtype or torch.float32)


# Name -> schema without the name, implementation, implementation for tensors without data.
DEFINITIONS = {
    "quantize_per_tensor": (
        "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
        "ScalarType dtype) -> Tensor",
        _quantize_per_tensor,
        _quantize_per_tensor_meta,
    ),
    "dequantize_per_tensor": (
        "(Tensor input, float scale, int zero_point, int quant_min, int quant_max, "
        "ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
        _dequantize_per_tensor,
        _dequantize_per_tensor_meta,
    ),
    "quantize_per_channel": (
        "(Tensor input, Tensor scales, Tensor zero_points, int axis, int quant_min, "
        "int quant_max, ScalarType dtype) -> Tensor",
        _quantize_per_channel,
        _quantize_per_channel_meta,
    ),
    "dequantize_per_channel": (
        "(Tensor input, Tensor scales, Tensor? zero_points, int axis, int quant_min, "
        "int quant_max, ScalarType dtype, *, ScalarType? out_dtype=None) -> Tensor",
        _dequantize_per_channel,
        _dequantize_per_channel_meta,
    ),
}


def missing() -> list[str]:
    """Return the names of the operators that nothing has defined in this process."""
    return [name for name in DEFINITIONS if not hasattr(getattr(OPS, name, None), "default")]


def define(names: list[str]) -> torch.library.Library:
    """Define the operators `names` for as long as the library that is returned exists."""
    # A fragment leaves room for other packages' operators of this namespace.
    library = torch.library.Library("quantized_decomposed", "FRAGMENT")
    for name in names:
        schema, compute, meta = DEFINITIONS[name]
        library.define(name + schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        library.impl(name, meta, "Meta")
    return library


def _import_definitions() -> None:
    """Import MODULES until one has defined the operators."""
    threshold = logging.root.manager.disable
    for module in MODULES:
        if not missing():
            return
        try:
            # Off the terminal: torch.ao's deprecation, and extensions that torchao cannot load.
            logging.disable(logging.WARNING)
            # A package that does not fit this version of torch can raise anything.
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        finally:
            logging.disable(threshold)


_import_definitions()
LIBRARY = define(missing()) if missing() else None  # None if a package defines the operators
