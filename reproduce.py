"""Run the study, or a part of it: every script in a separate process, baselines first.

    python reproduce.py --data PATH --init 'weights/{model}.pth'
    python reproduce.py --data PATH --more-seeds 1 2 --headline openvino
    python reproduce.py --data PATH --again
    python reproduce.py --models mobilenetv3 --list

Runs that the same code has already measured on the same images, processor and versions are skipped.
If a baseline fails, only the runs that need it are not run. If this machine lacks an engine, only
its runs are left out. At the end, a table lists the outcome of every run. The exit status is 1 if a
run failed.

--again times finished runs in another session, hours or a restart later, and makes nothing anew.
Three sessions give intervals that hold on another day.

--list prints the commands for GNU parallel or a Slurm array, one per line; they work from any
folder. The fp32 lines come first and must finish before the others start:

    python reproduce.py --list --methods fp32 | parallel -j1
    python reproduce.py --list | grep /quantization/ | parallel -j1
"""

import argparse
import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from utils import catalog, cli, environment, paths, progress, studies
from utils.catalog import Run
from utils.cli import Options
from utils.errors import CannotRunHere, UserError

MODELS = tuple(catalog.MODELS)
METHODS = tuple(dict.fromkeys(method for method, _ in catalog.kinds()))
DTYPES = tuple(dict.fromkeys(dtype for _, dtype in catalog.kinds()))
BACKENDS = tuple(name for name, backend in catalog.BACKENDS.items() if backend.serves)
INT8 = tuple(
    name for name, backend in catalog.BACKENDS.items() if ("ptq", "int8") in backend.serves
)
SEEDED = ("fp32", "int8")  # formats that also run with --more-seeds
SKIPPED = "skipped: done before by the same code on the same images and machine"
LONGER = "standard"  # --timing of INT8 on the engines of --headline, unless --timing is longer


@dataclass(frozen=True)
class Job:
    """One script on one backend."""

    run: Run
    backend: str
    options: Options

    @property
    def network(self) -> tuple[str, int]:
        """Model and seed, which identify its baseline."""
        return self.run.model, self.options.seed


@dataclass
class Outcome:
    """The outcome of a job."""

    job: Job
    # "ok", "interrupted", or "failed", "left out", "skipped" or "not run" followed by the reason
    what: str
    seconds: float = 0.0


def parse() -> argparse.Namespace:
    """Parse the command line: the part of the study to run, and the options of every script."""
    parser = cli.Parser(
        "reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, choices in (
        ("models", MODELS),
        ("methods", METHODS),
        ("dtypes", DTYPES),
        ("backends", BACKENDS),
    ):
        parser.add_argument(
            f"--{option}",
            nargs="+",
            choices=choices,
            default=choices,
            help=f"default: {' '.join(choices)}",
        )
    parser.add_argument(
        "--more-seeds",
        nargs="+",
        type=cli.whole_number(0, cli.MAX_SEED),
        default=(),
        metavar="N",
        help="also train FP32 and INT8 with these seeds, to see how much is chance",
    )
    parser.add_argument(
        "--headline",
        nargs="+",
        choices=INT8,
        default=(),
        metavar="BACKEND",
        help=f"time INT8 on these engines by --timing {LONGER}, for rows that are quoted "
        "(with --seed, not --more-seeds)",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the commands, one per line, fp32 first, and run nothing",
    )
    cli.add_options(parser)
    return parser.parse_args()


def plan(asked: argparse.Namespace) -> list[Job]:
    """List the requested jobs, with every baseline before the jobs that need it.

    In --init, {model} stands for the model. Prints which runs are left out because they do not run
    on the device. Raises `UserError` if options contradict each other or leave nothing to run.
    """
    jobs, left_out = [], Counter()
    for run in catalog.runs():
        if (
            run.model not in asked.models
            or run.method not in asked.methods
            or run.dtype not in asked.dtypes
        ):
            continue
        for backend in (name for name in run.backends if name in asked.backends):
            if asked.device in catalog.BACKENDS[backend].devices:
                jobs += _jobs(run, backend, asked)
            elif asked.device != "cpu" or asked.backends != BACKENDS:
                # Without these options, engines for a GPU are not expected, so not mentioned.
                left_out[backend] += 1
    if left_out:
        counts = ", ".join(f"{backend} ({count} runs)" for backend, count in left_out.items())
        print(f"left out, because these do not run on {asked.device}: {counts}", file=sys.stderr)
    if not jobs:
        raise UserError(
            "nothing to run: no script fits --models, --methods, --dtypes, --backends and --device;"
            " widen one."
        )
    return jobs


def _jobs(run: Run, backend: str, asked: argparse.Namespace) -> Iterator[Job]:
    """Yield the jobs of `run` on `backend`, one per seed."""
    part = ("models", "methods", "dtypes", "backends", "more_seeds", "headline", "list")
    given = {name: value for name, value in vars(asked).items() if name not in part}
    given["init"] = None
    if run.method == "fp32" and asked.init:
        given["init"] = asked.init.replace("{model}", run.model)
    seeds = (asked.seed, *asked.more_seeds) if run.dtype in SEEDED else (asked.seed,)
    for seed in dict.fromkeys(seeds):
        quoted = run.dtype == "int8" and backend in asked.headline and seed == asked.seed
        timing = max(asked.timing, LONGER, key=cli.TIMING.index) if quoted else asked.timing
        changes = {"seed": seed, "timing": timing}
        yield Job(run, backend, cli.resolve((backend,), given | changes))


def done(job: Job, study: str, digest: str) -> bool:
    """Whether a job has already been measured as it would be measured now.

    That is, with the same code, images, baseline, processor, threads, versions and timing protocol.
    """
    from utils import results

    options = job.options
    if options.again:
        return False  # the script skips what was timed within the last hour
    record = results.find(job.run, study, job.backend, options)
    baseline = results.find(job.run.baseline, study, "native", options)
    if record is None or baseline is None:
        return False
    known, machine = record["provenance"], record["environment"]
    timed = {
        (entry["batch_size"], entry.get("tier"), entry.get("protocol"))
        for entry in record["timing"]
    }
    wanted = {(size, options.tier, options.protocol) for size in options.batch_sizes}
    return (
        known["data_sha256"] == digest
        and known["baseline_sha256"] == baseline["provenance"]["artifact_sha256"]
        and environment.moved(machine) is None
        and machine["threads"] == options.threads
        and (
            job.run.method != "fp32" or record["training"]["init"] == cli.init_digest(options.init)
        )
        and (record["run"]["simulated"] or wanted <= timed)
        and (not options.profile or "profile" in record)
        and bool(known.get("code"))  # older records have only a digest of all files
        and environment.is_code(known["code"])
    )


def finished_jobs(jobs: list[Job], study: str) -> list[Job]:
    """List the jobs that --again times: those with a run in the study that is not simulated."""
    from utils import results

    records = {job: results.find(job.run, study, job.backend, job.options) for job in jobs}
    finished = [job for job, record in records.items() if record and not record["run"]["simulated"]]
    if not finished:
        raise UserError(
            "--again: the study has none of these runs; run them without --again first."
        )
    return finished


def seconds_left(kinds: list, finished: list[tuple]) -> float | None:
    """Estimate the seconds that jobs of these `kinds` will take; None if nothing has finished.

    `finished` has a (kind, seconds) for each finished job. The estimate for a kind is the mean of
    its finished jobs, or of all finished jobs if it has none.
    """
    if not finished:
        return None
    left = 0.0
    for kind in kinds:
        of_kind = [seconds for other, seconds in finished if other == kind]
        known = of_kind or [seconds for _, seconds in finished]
        left += sum(known) / len(known)
    return left


def reason(status: int, errors: list[str]) -> str:
    """Say why a script failed, from its exit status and its stderr.

    The reason is its last `error: ` line, else its last exception, else its last line.
    """
    lines = [line.strip() for line in errors if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)*(\S.*)", "\n".join(errors), re.MULTILINE)
    said = (told or raised or lines or [""])[-1]
    if status > 0:
        return said or f"status {status}"
    killed = f"killed by signal {-status}"
    # The last line may be a warning instead of the reason.
    return f"{killed}, after: {said}" if said else killed


def _pass_on(stream, lines: list[str]) -> None:
    # The pipe is closed even if printing fails. Otherwise the script would wait forever to write.
    with stream, contextlib.suppress(BrokenPipeError):
        for line in stream:
            # Only the last state of a progress bar is kept.
            lines.append(line.decode(errors="replace").rstrip().rpartition("\r")[2])
            progress.say(lines[-1])


def execute(job: Job) -> str:
    """Run one script and pass its output on.

    Returns "ok", or "failed: " with the reason, or "left out: " if its engine cannot run here.
    """
    import subprocess  # not at the top, so that `--help` answers sooner
    import threading

    command = [sys.executable, paths.ROOT / job.run.script, *cli.words(job.run, job.options)]
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    printed, errors = [], []
    pipes = ((process.stdout, printed), (process.stderr, errors))
    threads = [threading.Thread(target=_pass_on, args=pipe, daemon=True) for pipe in pipes]
    for thread in threads:
        thread.start()
    try:
        process.wait()
    except cli.Terminated:
        process.terminate()  # SIGTERM went to this process alone
        raise
    finally:
        # After Ctrl-C, the script is ending as well: it is in this process group.
        for thread in threads:
            thread.join()
        process.wait()
    if process.returncode == 0:
        return "ok"
    why = reason(process.returncode, errors)
    if process.returncode == CannotRunHere.status:
        return f"left out: {why.partition(CannotRunHere.PREFIX)[2] or why}"
    return f"failed: {why}"


def work(jobs: list[Job], is_done, outcomes: list[Outcome]) -> None:
    """Run the jobs for which `is_done(job)` is false; append the outcomes of all to `outcomes`."""
    finished = []  # (kind, seconds) of jobs, for the estimate
    failed = set()  # (model, seed) of networks whose baseline failed
    with progress.Bar("study", len(jobs), "jobs") as bar:
        for number, job in enumerate(jobs):
            if job.network in failed:
                outcomes.append(Outcome(job, "not run: its baseline failed"))
                continue
            if is_done(job):
                outcomes.append(Outcome(job, SKIPPED))
                continue
            ahead = [
                other.run
                for other in jobs[number:]
                if other.network not in failed and not is_done(other)
            ]
            left = seconds_left([(run.method, run.dtype) for run in ahead], finished)
            _announce(bar, number, cli.command(job.run, job.options), left)
            outcome, begun = Outcome(job, "interrupted"), time.monotonic()
            outcomes.append(outcome)
            try:
                outcome.what = execute(job)
            finally:
                outcome.seconds = time.monotonic() - begun
            if outcome.what == "ok":
                finished.append(((job.run.method, job.run.dtype), outcome.seconds))
            elif job.run.method == "fp32":
                failed.add(job.network)


def _announce(bar: progress.Bar, number: int, command: str, left: float | None) -> None:
    """Print the header of a job, with the estimate of the time left."""
    if left is None:
        note = ""
    elif left < 90:
        note = f"about {left:.0f} s left"
    else:
        note = f"about {left / 60:.0f} min left"
    if bar.bar is not None:  # a log needs only the line below
        # Leave out tqdm's estimate of the time left, which assumes jobs of equal length.
        bar.bar.bar_format = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
        bar.step(number - bar.done, note)
    position = f"{number + 1}/{bar.total}"
    progress.say(f"\n[{position}, {note}] {command}" if note else f"\n[{position}] {command}")


def summarize(outcomes: list[Outcome]) -> None:
    """Print a table of the outcomes, and their totals."""
    print()
    several = len({outcome.job.options.seed for outcome in outcomes}) > 1
    width = max(map(len, BACKENDS))
    for outcome in outcomes:
        backend = f"{outcome.job.backend:{width}}"
        if several:
            backend += f" seed {outcome.job.options.seed}"
        print(f"{outcome.job.run.name:22} {backend} {outcome.seconds:6.0f} s  {outcome.what}")
    totals = Counter(
        "ran" if outcome.what == "ok" else outcome.what.partition(":")[0] for outcome in outcomes
    )
    order = ("ran", "skipped", "left out", "failed", "not run", "interrupted")
    print(
        ", ".join(f"{what} {totals[what]}" for what in order if totals[what]) or "nothing was run",
        flush=True,
    )


def compare(study: str, options: Options) -> None:
    """Print how the study differs from the committed one, if both use the dissertation's images."""
    import subprocess

    committed, ours = paths.RESULTS / studies.DISSERTATIONS, options.results / study
    both = all((folder / "results.csv").exists() for folder in (committed, ours))
    if (
        options.smoke
        or not both
        or not studies.is_dissertations(study)
        or committed.resolve() == ours.resolve()
    ):
        return
    print("\nNext to the committed study:", flush=True)
    tables = [
        paths.ROOT / "figures" / "tables.py",
        "--study",
        study,
        "--results",
        options.results,
        "--against",
        committed,
    ]
    subprocess.run([sys.executable, *tables])


def main() -> int:
    asked = parse()
    jobs = plan(asked)  # raises an error now, not after the first hour
    from utils.data import loading

    if asked.list:
        loading.find(jobs[0].options)  # raises an error in the data now
        for job in jobs:
            print(cli.absolute_command(job.run, job.options))
        return 0
    source, outcomes = loading.open_source(jobs[0].options), []
    if asked.again:
        jobs = finished_jobs(jobs, source.study)
    try:
        work(jobs, lambda job: done(job, source.study, source.digest), outcomes)
    finally:
        summarize(outcomes)
    compare(source.study, jobs[0].options)
    # A job is "not run" only after another one failed.
    return int(any(outcome.what.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    with cli.reporting("reproduce.py"):
        sys.exit(main())
