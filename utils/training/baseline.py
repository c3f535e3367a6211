"""The FP32 network that a quantized script starts from."""

import os
import subprocess
import sys

from filelock import FileLock

from utils import cli, paths, progress
from utils.catalog import Run
from utils.cli import Options
from utils.data.dataset import Data
from utils.errors import UserError
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint


def load_fp32(run: Run, images: Data, options: Options) -> Checkpoint:
    """Load the FP32 network that `run` starts from, in evaluation mode.

    Raises `UserError`, which says how to train it, if it is missing, damaged, or trained on other
    images. A smoke run first trains it with the script of the baseline, to check all steps.
    """
    if options.smoke:
        _train_for_smoke(run.baseline, images, options)
    return checkpoints.load_baseline(run, images, options)


def _train_for_smoke(baseline: Run, images: Data, options: Options) -> None:
    path = checkpoints.path_of(baseline, images.study, options)
    options = options.replace(
        backends=baseline.backends,
        batch_sizes=(1,),
        init="scratch",
        fastest=False,
        cuda_graph=False,
        profile=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".smoke.lock")):  # several processes may need it at once
        if checkpoints.is_of(path, images):
            return
        command = cli.command(baseline, options)
        progress.say(f"smoke: no baseline yet, making it: {command}")
        group = ("RANK", "WORLD_SIZE")
        alone = {name: value for name, value in os.environ.items() if name not in group}
        script = str(paths.ROOT / baseline.script)
        words = [sys.executable, script, *cli.words(baseline, options)]
        if subprocess.run(words, env=alone).returncode:
            raise UserError(
                f"making the FP32 baseline failed, see its error above. The command was: {command}"
            )
