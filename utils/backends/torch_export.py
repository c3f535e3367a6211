"""Export of float and quantized networks by `torch.export`, for compilers that read its graphs."""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

import torch
from torch import fx, nn

from utils.quantize.decomposed_ops import OPS

# Of the example. torch's choice of a convolution depends on whether a batch has 16 images; the tracer takes it for a bound.
# With fewer images in the example, it would be an upper one: no batch over 15 could run.
SHAPE = (16, 3, 224, 224)


def program(
    network: nn.Module,
    largest: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> torch.export.ExportedProgram:
    """Export `network`, a function of float32 images (n, 3, 224, 224) in the memory layout `layout`.

    The batch size n is free up to `largest`, or without limit. In the graph of the exported program,
    no dequantization has two readers, and no pair repeats the one before it.
    """
    example = (torch.zeros(SHAPE).to(memory_format=layout),)
    free = {"dynamic_shapes": ({0: torch.export.Dim("n", min=1, max=largest)},)}
    module = torch.export.export(network, example, **free).module(check_guards=False)
    remove_repeated_pairs(module.graph)
    separate_dequantizations(module.graph)
    module.recompile()
    return torch.export.export(module, example, **free)


def separate_dequantizations(graph: fx.Graph) -> None:
    """Give every reader of a dequantized activation a separate dequantization, in place.

    Compilers take a dequantization into the integer kernel of its reader. If several operators read
    it, they find that their kernels depend on one another, or on a tensor that is gone.
    """
    for node in [node for node in graph.nodes if node.target is OPS.dequantize_per_tensor.default]:
        for reader in list(node.users)[1:]:
            with graph.inserting_before(reader):
                reader.replace_input_with(node, graph.node_copy(node))


def remove_repeated_pairs(graph: fx.Graph) -> None:
    """Remove every quantization of values that a dequantization with equal numbers gave, in place.

    It changes no value. It remains where an operator between two pairs did nothing.
    """
    for node in list(graph.nodes):
        before = node.args[0] if node.target is OPS.quantize_per_tensor.default else None
        if (
            isinstance(before, fx.Node)
            and before.target is OPS.dequantize_per_tensor.default
            and before.args[1:] == node.args[1:]
        ):
            node.replace_all_uses_with(before.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what compilers print, warn and log off the terminal, native code included.

    If an exception leaves the block, all of it goes to the standard error after all.
    """
    threshold = logging.root.manager.disable
    with (
        tempfile.TemporaryFile() as kept,
        warnings.catch_warnings(),
        contextlib.ExitStack() as stack,
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        _flush()
        saved = {number: os.dup(number) for number in (1, 2)}
        for number in saved:
            os.dup2(kept.fileno(), number)
        failed = True
        try:
            # Whoever replaced Python's streams does not write to these descriptors.
            text = stack.enter_context(os.fdopen(os.dup(kept.fileno()), "w", buffering=1))
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield
            failed = False
        finally:
            _flush()
            logging.disable(threshold)
            for number, original in saved.items():
                os.dup2(original, number)
                os.close(original)
            if failed:
                kept.seek(0)
                sys.stderr.write(kept.read().decode(errors="replace"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
