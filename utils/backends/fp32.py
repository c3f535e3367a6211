"""FP32 on other engines than eager PyTorch: speed-ups are stated against the fastest of them, too.

They answer as eager FP32 does, up to the order of summation, and deploy nothing of their own: each makes what it runs from
the FP32 checkpoint while loading.
"""

import importlib.util
import io
import os
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from utils import checkpoints, paths
from utils.backends.base import Predictor
from utils.backends.native import Native

SHAPE = (2, 3, 224, 224)  # of the example that is traced; one image would be taken for a constant


def _example(device: str) -> torch.Tensor:
    return torch.zeros(SHAPE, device=device).to(memory_format=torch.channels_last)


class Frozen(Native):
    """Traced to TorchScript and frozen: no Python between the operators, BatchNorm folded into convolutions."""

    name = "frozen"

    def load(self, path: Path, device: str) -> Predictor:
        model = super().load(path, device)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # TorchScript's deprecation
            return torch.jit.freeze(torch.jit.trace(model, _example(device)))


class Compiled(Native):
    """`torch.compile`, weights frozen; compiles again for every batch size, as its kernels are the faster for it."""

    name = "compile"

    def problem(self, device: str) -> str | None:
        if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "torch.compile needs a C++ compiler"
        return None

    def load(self, path: Path, device: str) -> Predictor:
        import torch._inductor.config  # not needed by anything else, and slow to import

        torch._inductor.config.freezing = True
        torch._dynamo.config.cache_size_limit = 64  # batch sizes
        return torch.compile(super().load(path, device), dynamic=False)


class OnnxRuntime(Native):
    """ONNX Runtime's CPU provider, on a graph exported once and kept beside the checkpoint."""

    name, layout = "onnxruntime", torch.contiguous_format

    def problem(self, device: str) -> str | None:
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else "runs on the CPU only" if device != "cpu" else None

    def load(self, path: Path, device: str) -> Predictor:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Else its threads go on spinning while the other side of a comparison is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(self._exported(path), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])

    def _exported(self, path: Path) -> Path:
        target = path.with_name(f"{path.stem}.{checkpoints.sha256_of(path)[:8]}.onnx")
        with FileLock(f"{target}.lock"):
            if not target.exists():
                with paths.atomic(target) as temporary:
                    export(super().load(path, "cpu"), temporary)
        return target


def export(model: nn.Module, path: Path) -> None:
    """Write `model` as ONNX with input "images" float32 (n, 3, 224, 224), n free, and output "logits"."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(SHAPE),), path, dynamo=True, external_data=False, opset_version=18,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("n")},),
        )  # fmt: skip
