"""TF32: FP32 numbers that NVIDIA's tensor cores multiply with a mantissa of 10 bits.

torch allows it in convolutions by default, so "FP32" on a GPU would not be FP32. The study's FP32
networks run without it, in torch as in TensorRT. Training keeps torch's default.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch


def allow(convolutions: bool, products: bool) -> None:
    """Allow or forbid TF32 in this process, in convolutions and in matrix products."""
    with warnings.catch_warnings():
        # torch 2.9 prefers `fp32_precision`, which 2.7 lacks. The two must not be mixed.
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


def allowed() -> tuple[bool, bool]:
    """Return whether this process may use TF32 in convolutions, and in matrix products."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def forbid(device: str) -> None:
    """Compute FP32 in FP32 from now on, in this process, if `device` is "cuda"."""
    if device == "cuda":
        allow(False, False)


@contextlib.contextmanager
def forbidden(device: str) -> Iterator[None]:
    """Compute FP32 in FP32 within this context, if `device` is "cuda"."""
    before = allowed()
    forbid(device)
    try:
        yield
    finally:
        allow(*before)
