"""The engines a model can be deployed on, by the names that `--backend` takes.

Each engine turns a float model into a *deployed artifact*, a file, and loads that file into something that maps a batch of
images to logits. All measuring is done on the file, loaded again by another process.
"""

from collections.abc import Iterator

from utils import progress
from utils.backends.base import Backend, Deployed
from utils.backends.fp16 import FP16, Autocast, Half
from utils.backends.fp32 import Compiled, Frozen, OnnxRuntime
from utils.backends.native import Native
from utils.backends.simulated import Simulated
from utils.backends.torch_ao import ENGINES, TorchAO
from utils.errors import UserError

__all__ = ["Backend", "Deployed", "get", "select"]

_ALL: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        *(Native(), Frozen(), Compiled(), OnnxRuntime()),
        *map(TorchAO, ENGINES),
        *(FP16("half", Half), FP16("amp", Autocast)),
        Simulated(),
    )
}


def get(name: str) -> Backend:
    """The backend called `name`."""
    return _ALL[name]


def select(args) -> Iterator[Backend]:
    """The backends that `--backend` asks for and that can run here.

    Raises `UserError` with the reasons after the last one that can: with `all`, one missing engine neither stops the others
    nor is passed over in silence.
    """
    missing = []
    for name in args.backends:
        if reason := _ALL[name].problem(args.device):
            missing.append(f"{name}: {reason}")
            progress.say(f"backend {missing[-1]}")
        else:
            yield _ALL[name]
    if missing:
        raise UserError(f"cannot run here: {'; '.join(missing)}")
