"""The first step of every quantized script: load its images and its FP32 network."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, data, paths, progress
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.training.sessions import Experiment


def begin(run: Run, options: Options) -> "Experiment":
    """Load the images and the FP32 baseline of `run`.

    Raises `UserError`, which says what to do, if one of them is missing. A smoke run trains a
    missing baseline with the baseline's script, so that `--smoke` checks all steps.
    """
    images = data.load(options)
    from utils.training import checkpoints, sessions  # imports torch: only after the images

    if options.smoke:
        path = checkpoints.path_of(run.baseline, images.study, options)
        _make_smoke_baseline(run.baseline, options, path, lambda: checkpoints.is_of(path, images))
    return sessions.Experiment(
        run, options, images, checkpoints.load_baseline(run, images, options)
    )


def _make_smoke_baseline(baseline: Run, options: Options, path: Path, is_of_these_images) -> None:
    import subprocess  # slower to import than all that `--help` needs

    from filelock import FileLock

    plain = dict(fastest=False, cuda_graph=False, profile=False)
    options = options.replace(backends=baseline.backends, batch_sizes=(1,), init="scratch", **plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # several processes may need it at once
        if is_of_these_images():
            return
        command = cli.command(baseline, options)
        progress.say(f"smoke: no baseline yet, making it: {command}")
        alone = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
        }
        words = [sys.executable, str(paths.ROOT / baseline.script), *cli.words(baseline, options)]
        if subprocess.run(words, env=alone).returncode:
            raise UserError(
                f"making the FP32 baseline failed, see its error above. The command was: {command}"
            )
