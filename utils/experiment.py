"""What every measurement of a script needs to know. No torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.catalog import Run
from utils.cli import Options

if TYPE_CHECKING:
    from utils.data.dataset import Data
    from utils.training.checkpoints import Checkpoint


@dataclass(frozen=True)
class Experiment:
    """A script's run and options, with the images and the FP32 network that it works on."""

    run: Run
    options: Options
    data: "Data"
    baseline: "Checkpoint"
