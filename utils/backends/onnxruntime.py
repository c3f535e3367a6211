"""FP32 through the CPU provider of ONNX Runtime.

The graph is exported once from the FP32 checkpoint and kept beside it.
"""

import importlib.util
import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from utils import paths
from utils.backends.base import Predictor
from utils.backends.native import Native
from utils.training import checkpoints

SHAPE = (2, 3, 224, 224)  # of the example; the exporter treats a batch of one as a constant


class OnnxRuntime(Native):
    """The backend of FP32 networks on the CPU provider of ONNX Runtime."""

    name, layout = "onnxruntime", torch.contiguous_format

    def problem(self) -> str | None:
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def load(self, path: Path, device: str) -> Predictor:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Without this, its threads keep spinning while the other side of a comparison is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(self._exported(path), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])

    def _exported(self, path: Path) -> Path:
        """Return the path of the graph of the checkpoint at `path`; export it if it is missing."""
        target = path.with_name(f"{path.stem}.{checkpoints.sha256_of(path)[:8]}.onnx")
        with FileLock(f"{target}.lock"):
            if not target.exists():
                with paths.atomic(target) as temporary:
                    export(super().load(path, "cpu"), temporary)
        return target


def export(model: nn.Module, path: Path) -> None:
    """Write `model` as ONNX, with an input "images" and an output "logits".

    "images" is float32 (n, 3, 224, 224) and "logits" float32 (n, 2), with n free.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(SHAPE),), path, dynamo=True, external_data=False, opset_version=18,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("n")},),
        )  # fmt: skip


ENGINES = {"onnxruntime": OnnxRuntime()}
