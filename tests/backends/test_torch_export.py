"""Exported graphs after their passes, and compilers that are quiet unless they fail."""

import ctypes
import logging
import sys
import warnings

import pytest
import torch
from small_networks import images, mixed
from torch import nn

from utils.backends import torch_export
from utils.quantize.decomposed_ops import OPS
from utils.quantize.operators import folded

NUMBERS = (0.5, 3, -128, 127, torch.int8)
Q, DQ = OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default


def qdq(x, numbers=NUMBERS):
    return DQ(Q(x, *numbers), *numbers)


class Shared(nn.Module):
    """Three operators read one rounded tensor, one of them twice; a Q/DQ pair is repeated."""

    def forward(self, x):
        x = qdq(x)
        return qdq(qdq(torch.relu(x) + x * x)) + torch.tanh(x)


def count(graph, target):
    return sum(node.target is target for node in graph.nodes)


def test_every_reader_has_a_separate_dequantization_and_answers_stay():
    module = torch.export.export(Shared(), (torch.randn(2, 3),)).module()
    x = 20 * torch.randn(2, 3)
    before = module(x)
    assert count(module.graph, DQ) == 3
    torch_export.separate_dequantizations(module.graph)
    module.recompile()
    # Dequantizations for the readers relu, mul and tanh, and for two pairs.
    assert count(module.graph, DQ) == 5 and count(module.graph, Q) == 3
    assert all(len(node.users) <= 1 for node in module.graph.nodes if node.target is DQ)
    assert torch.equal(module(x), before)


class Repeated(nn.Module):
    """Two equal Q/DQ pairs, and one with other numbers."""

    def forward(self, x):
        return qdq(qdq(qdq(x)), (0.25, 3, -128, 127, torch.int8))


def test_a_pair_that_repeats_another_is_removed_one_with_other_numbers_is_not():
    module = torch.export.export(Repeated(), (torch.randn(2, 3),)).module()
    x = 20 * torch.randn(2, 3)
    before = module(x)
    torch_export.remove_repeated_pairs(module.graph)
    module.recompile()
    assert count(module.graph, Q) == count(module.graph, DQ) == 2
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_batch_size_of_a_program_is_free_up_to_the_largest(layout):
    model = mixed()
    program = torch_export.program(folded(model), 40, layout)
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 40)
    for size in (1, 40):
        x = images(size).contiguous(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


def everything_speaks():
    """Write to both streams from Python and from native code, warn, and log."""
    print("python, output")
    print("python, errors", file=sys.stderr)
    native = ctypes.CDLL(None)
    native.write(1, b"native, output\n", 15)
    native.write(2, b"native, errors\n", 15)
    warnings.warn("a warning", stacklevel=1)
    logging.getLogger("compiler").warning("a message")


def test_compilers_are_quiet(capfd):
    with torch_export.quiet():
        everything_speaks()
    assert capfd.readouterr() == ("", "")
    print("heard")
    assert logging.getLogger("compiler").isEnabledFor(logging.WARNING)
    assert capfd.readouterr().out == "heard\n"


def test_a_compiler_that_fails_is_heard(capfd):
    with pytest.raises(ValueError, match="because"), torch_export.quiet():
        everything_speaks()
        raise ValueError("because")
    output, errors = capfd.readouterr()
    assert output == ""
    for who in ("python", "native"):
        assert f"{who}, output" in errors and f"{who}, errors" in errors
