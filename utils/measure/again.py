"""Another timing session of a finished run, from its artifact."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from utils import checksums, environment, progress, results
from utils.backends.base import Backend
from utils.errors import UserError
from utils.experiment import Experiment
from utils.timing import protocol

APART = timedelta(hours=1)  # sessions of one boot; sooner ones would share what varies by the day


def again(experiment: Experiment, backend: Backend) -> None:
    """Time the finished run of `experiment` on `backend` in another session, and store it.

    The run's figures of time are then those over all its sessions. A session less than an hour
    after the last one, in the same boot, is skipped with a message. Raises `UserError` if the run,
    its artifact, its protocol, the processor or the packages are not those of the record.
    """
    options, run = experiment.options, experiment.run.on(backend.name)
    name = f"{run.name} on {backend.name}"
    record = results.find(experiment.run, experiment.data.study, backend.name, options)
    if record is None:
        raise UserError(f"--again: {name} has no finished run; run its script without --again.")
    if record["run"]["simulated"]:
        progress.say(f"timing: {name} is simulated, so it is not timed")
        return
    file = record["provenance"].get("artifact", "")  # earlier records do not name it
    path = options.checkpoints / experiment.data.study / file
    if why := _changed(record, path, experiment):
        raise UserError(f"--again: {name}: {why}; run its script without --again.")
    if wait := too_soon(record["timing"][0]["sessions"]):
        progress.say(f"timing: {name} was timed less than an hour ago; try again in {wait} min")
        return
    record["timing"] = protocol.again((backend.name, path), experiment, record["timing"])
    folder = options.results / experiment.data.study
    with np.load(folder / "runs" / f"{results.run_id(record['run'])}.npz") as stored:
        logits, y = stored["logits"], stored["y"]
    written = results.write(record, logits, y, options.results)
    for row in results.rows_of(record):
        low, high = row["speedup_vs_best_fp32_ci_low"], row["speedup_vs_best_fp32_ci_high"]
        progress.say(
            f"{name}, batch {row['batch_size']}, {row['threads']} threads: "
            f"{row['speedup_vs_best_fp32']:.3f} times {row['best_fp32']} [{low:.3f}, {high:.3f}] "
            f"over {row['n_sessions']} sessions"
        )
    progress.say(f"written: {written}")


def _changed(record: dict, path: Path, experiment: Experiment) -> str | None:
    """Return why the files or the machine here are not those of `record`; None if they are."""
    options, known = experiment.options, record["provenance"]
    if any("sessions" not in entry for entry in record["timing"]):
        return "it was timed by an earlier protocol"
    if {entry["protocol"] for entry in record["timing"]} != {options.protocol}:
        return "it was timed by another protocol"
    if why := environment.moved(record["environment"]):
        return f"it was timed {why}"
    if known["baseline_sha256"] != experiment.baseline.sha256:
        return "its FP32 network is another one"
    if not path.is_file() or checksums.sha256_of(path) != known["artifact_sha256"]:
        return f"its file {path} is missing or another one"
    return None


def too_soon(sessions: list[dict]) -> int | None:
    """Return the minutes until another session counts as one; None if it may start now."""
    last, now = sessions[-1], environment.session()
    passed = datetime.now(UTC) - datetime.fromisoformat(last["time_utc"])
    if passed >= APART or last["boot"] != now["boot"]:
        return None
    return 1 + int((APART - passed).total_seconds() // 60)
