"""Export of float and quantized networks with `torch.export`, for XNNPACK and Inductor."""

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

# torch computes convolutions differently from 16 images on. The tracer makes a bound on the batch
# size of that: with fewer images in the example, no batch of more than 15 could run.
EXAMPLE_SHAPE = (16, 3, 224, 224)


def program(
    network: nn.Module,
    largest: int | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> torch.export.ExportedProgram:
    """Export `network` for float32 images (n, 3, 224, 224) in the memory layout `layout`.

    The batch size n is free up to `largest`, or without limit if that is None. In the exported
    graph, no dequantization has two readers, and no Q/DQ pair repeats the one before it.
    """
    example = (torch.zeros(EXAMPLE_SHAPE).to(memory_format=layout),)
    free = {"dynamic_shapes": ({0: torch.export.Dim("n", min=1, max=largest)},)}
    module = torch.export.export(network, example, **free).module(check_guards=False)
    remove_repeated_pairs(module.graph)
    separate_dequantizations(module.graph)
    module.recompile()
    return torch.export.export(module, example, **free)


def separate_dequantizations(graph: fx.Graph) -> None:
    """Give every reader of a dequantized activation a separate dequantization, in place.

    Compilers fuse a dequantization into the integer kernel of its reader. If several operators read
    it, their kernels would depend on one another, or on a tensor that no longer exists.
    """
    for node in [node for node in graph.nodes if node.target is OPS.dequantize_per_tensor.default]:
        for reader in list(node.users)[1:]:
            with graph.inserting_before(reader):
                reader.replace_input_with(node, graph.node_copy(node))


def remove_repeated_pairs(graph: fx.Graph) -> None:
    """Remove every Q/DQ pair that follows a pair with equal numbers, in place.

    Such a pair changes no value. It is left over where the operator between two pairs did nothing.
    """
    for node in list(graph.nodes):
        if node.target is not OPS.quantize_per_tensor.default:
            continue
        before = node.args[0]
        follows = before.target is OPS.dequantize_per_tensor.default
        if follows and before.args[1:] == node.args[1:]:
            node.replace_all_uses_with(before.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what compilers print, warn and log off the terminal, including native code.

    If the block raises an exception, all of it goes to standard error.
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
            # Python's streams may have been replaced; then they do not use these descriptors.
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
