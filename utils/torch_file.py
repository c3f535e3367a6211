"""Files of torch, written so that a full disk raises an exception."""

import io

import torch


def packed(content: dict) -> memoryview:
    """Return the bytes that `torch.save` would write to a file.

    Its C++ writer ends the process, without a traceback, if the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()
