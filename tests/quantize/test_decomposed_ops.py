"""The definitions of the `quantized_decomposed` operators agree with torch's, bit for bit."""

import pytest
import torch

from utils.quantize import decomposed_ops
from utils.quantize.decomposed_ops import DEFINITIONS, OPS
from utils.quantize.qdq_config import INTEGERS

X = 3 * torch.randn(6, 5, 4, 7, generator=torch.Generator().manual_seed(0))
X[0, 0, 0, :4] = torch.tensor([0.0, 0.05, -0.15, 1e30])  # ties, and a value out of range
SCALES = torch.tensor([0.1, 0.037, 1.0, 2.0**-10, 0.5])
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FORMATS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def zero_points(dtype):
    low, high = INTEGERS[dtype]
    return torch.tensor([0, 3, 128, low, high]).clamp(low, high)


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_package_defines_them_here():
    assert decomposed_ops.missing() == [] and decomposed_ops.LIBRARY is None


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_schemas_are_torchs(name):
    schema = getattr(OPS, name).default._schema
    assert str(schema) == f"quantized_decomposed::{name}{DEFINITIONS[name][0]}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_scale_for_a_tensor_gives_torchs_bits(dtype, layout):
    x = X.contiguous(memory_format=layout)
    _, quantize, quantize_meta = DEFINITIONS["quantize_per_tensor"]
    _, dequantize, dequantize_meta = DEFINITIONS["dequantize_per_tensor"]
    for scale, zero_point in zip(SCALES.tolist(), zero_points(dtype).tolist(), strict=True):
        numbers = (scale, zero_point, *INTEGERS[dtype], dtype)
        integers = OPS.quantize_per_tensor.default(x, *numbers)
        assert_same(quantize(x, *numbers), integers)
        assert_same(
            quantize(x.half(), *numbers), OPS.quantize_per_tensor.default(x.half(), *numbers)
        )
        values = OPS.dequantize_per_tensor.default(integers, *numbers)
        assert_same(dequantize(integers, *numbers), values)
        short = OPS.dequantize_per_tensor.default(integers, *numbers, out_dtype=torch.float16)
        assert_same(dequantize(integers, *numbers, out_dtype=torch.float16), short)
        for meta, result in (
            (quantize_meta(x.to("meta"), *numbers), integers),
            (dequantize_meta(integers.to("meta"), *numbers), values),
        ):
            assert (meta.shape, meta.dtype, meta.stride()) == (
                result.shape, result.dtype, result.stride(),
            )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_for_each_channel_gives_torchs_bits(axis, dtype, layout):
    x = (X.transpose(0, 1) if axis == 0 else X).contiguous(memory_format=layout)
    _, quantize, quantize_meta = DEFINITIONS["quantize_per_channel"]
    _, dequantize, dequantize_meta = DEFINITIONS["dequantize_per_channel"]
    numbers = (SCALES, zero_points(dtype), axis, *INTEGERS[dtype], dtype)
    integers = OPS.quantize_per_channel.default(x, *numbers)
    assert_same(quantize(x, *numbers), integers)
    values = OPS.dequantize_per_channel.default(integers, *numbers)
    assert_same(dequantize(integers, *numbers), values)
    symmetric = (SCALES, None, *numbers[2:])
    assert_same(
        dequantize(integers, *symmetric), OPS.dequantize_per_channel.default(integers, *symmetric)
    )
    for meta, result in (
        (quantize_meta(x.to("meta"), *numbers), integers),
        (dequantize_meta(integers.to("meta"), *numbers), values),
    ):
        assert (meta.shape, meta.dtype) == (result.shape, result.dtype)


def test_what_torch_refuses_is_refused():
    quantize, dequantize = (
        DEFINITIONS[f"{name}_per_tensor"][1] for name in ("quantize", "dequantize")
    )
    for wrong in (
        lambda: quantize(X.double(), 1.0, 0, 0, 255, torch.uint8),
        lambda: quantize(X, 1.0, 0, -1, 255, torch.uint8),
        lambda: dequantize(torch.zeros(2, dtype=torch.int8), 1.0, 0, 0, 255, torch.uint8),
        lambda: DEFINITIONS["quantize_per_channel"][1](
            X, SCALES, zero_points(torch.uint8), 4, 0, 255, torch.uint8
        ),
    ):
        with pytest.raises(ValueError):
            wrong()
