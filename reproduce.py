"""Run the study, or a part of it: every script in a separate process, baselines first.

    python reproduce.py --data PATH --init 'weights/{model}.pth'
    python reproduce.py --data PATH --init 'weights/{model}.pth' --more-seeds 1 2 --headline openvino
    python reproduce.py --models mobilenetv3 --list

Runs that the same code has measured on the same images, processor and versions are skipped. A
baseline that fails stops only the runs that need it, and an engine that this machine lacks only its
runs. The last output is a table of all outcomes. The exit status is 1 if a run failed or was stopped.

--list prints the commands for GNU parallel or a Slurm array, one a line, to be run from any folder.
The fp32 lines come first and must be done before the others start:

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
from dataclasses import dataclass

from utils import catalog, cli, environment, paths, progress
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError

MODELS = tuple(catalog.MODELS)
METHODS = tuple(dict.fromkeys(method for method, _ in catalog.kinds()))
DTYPES = tuple(dict.fromkeys(dtype for _, dtype in catalog.kinds()))
BACKENDS = tuple(name for name, backend in catalog.BACKENDS.items() if backend.serves)
INT8 = tuple(
    name for name, backend in catalog.BACKENDS.items() if ("ptq", "int8") in backend.serves
)
SEEDED = ("fp32", "int8")  # formats that are run with --more-seeds, too
LONGER = "standard"  # how INT8 on the engines of --headline is timed, unless --timing asks for more
CANNOT = "cannot run here: "  # of the error of a script, see `select` in utils/backends/registry.py


@dataclass(frozen=True)
class Job:
    """One script on one backend."""

    run: Run
    backend: str
    options: Options

    @property
    def network(self) -> tuple[str, int]:
        """Model and seed, which tell its baseline from others."""
        return self.run.model, self.options.seed


@dataclass
class Outcome:
    """The outcome of a job."""

    job: Job
    what: (
        str  # "ok", "interrupted", or "failed", "left out", "skipped" or "not run" with the reason
    )
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
    more = "train FP32 and INT8 with these seeds beside --seed, to see how much is chance"
    parser.add_argument(
        "--more-seeds",
        nargs="+",
        type=cli.whole_number(0, cli.MAX_SEED),
        default=(),
        metavar="N",
        help=more,
    )
    longer = f"time INT8 on these engines by --timing {LONGER}, for rows that are quoted (with --seed, not --more-seeds)"
    parser.add_argument(
        "--headline", nargs="+", choices=INT8, default=(), metavar="BACKEND", help=longer
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print the commands, one a line, fp32 first, and run nothing",
    )
    cli.add_options(parser)
    return parser.parse_args()


def plan(asked: argparse.Namespace) -> list[Job]:
    """List the jobs that were asked for, every baseline before the jobs that need it.

    In --init, {model} stands for the model. Prints which runs are left out because they do not run
    on the device. Raises `UserError` if options contradict each other or leave nothing to run.
    """
    part = ("models", "methods", "dtypes", "backends", "more_seeds", "headline", "list")
    given = {name: value for name, value in vars(asked).items() if name not in part}
    seeds = dict.fromkeys((asked.seed, *asked.more_seeds))
    jobs, left_out = [], Counter()
    for run in catalog.runs():
        if (
            run.model not in asked.models
            or run.method not in asked.methods
            or run.dtype not in asked.dtypes
        ):
            continue
        init = (
            asked.init and asked.init.replace("{model}", run.model)
            if run.method == "fp32"
            else None
        )
        for backend in (name for name in run.backends if name in asked.backends):
            if asked.device in catalog.BACKENDS[backend].devices:
                for seed in seeds if run.dtype in SEEDED else (asked.seed,):
                    quoted = (
                        run.dtype == "int8" and backend in asked.headline and seed == asked.seed
                    )
                    timing = (
                        max(asked.timing, LONGER, key=cli.TIMING.index) if quoted else asked.timing
                    )
                    changes = {"init": init, "seed": seed, "timing": timing}
                    jobs.append(Job(run, backend, cli.resolve((backend,), given | changes)))
            elif (
                asked.device != "cpu" or asked.backends != BACKENDS
            ):  # the usual run has nothing for a GPU
                left_out[backend] += 1
    if left_out:
        counts = ", ".join(f"{backend} ({count} runs)" for backend, count in left_out.items())
        print(f"left out, because these do not run on {asked.device}: {counts}", file=sys.stderr)
    if not jobs:
        raise UserError(
            "nothing to run: no script fits --models, --methods, --dtypes, --backends and --device; widen one."
        )
    return jobs


def done(job: Job, study: str, digest: str) -> bool:
    """Whether a job has been measured already, as it would be measured now.

    That means by the same code, images, baseline, processor, threads, versions and timing protocol.
    """
    from utils import results

    options = job.options
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
        and (machine["cpu"], tuple(machine["isa"])) == environment.cpu()
        and machine["threads"] == options.threads
        and machine["versions"] == environment.versions()
        and (
            job.run.method != "fp32" or record["training"]["init"] == cli.init_digest(options.init)
        )
        and (record["run"]["simulated"] or wanted <= timed)
        and (not options.profile or "profile" in record)
        and bool(known.get("code"))  # the committed study has only a digest of all files
        and environment.is_code(known["code"])
    )


def seconds_left(kinds: list, finished: list[tuple]) -> float | None:
    """Estimate the seconds that jobs of these `kinds` will take; None if nothing has finished.

    `finished` has a (kind, seconds) for each finished job. The estimate for a kind is the mean of
    its finished jobs, or of all finished jobs if it has none.
    """
    known = {
        kind: [s for other, s in finished if other == kind] or [s for _, s in finished]
        for kind in kinds
    }
    return sum(sum(known[kind]) / len(known[kind]) for kind in kinds) if finished else None


def reason(status: int, errors: list[str]) -> str:
    """Find out why a script failed, from its exit status and its stderr.

    The reason is its `error: ` line, else its last exception, else its last line.
    """
    lines = [line.strip() for line in errors if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)*(\S.*)", "\n".join(errors), re.MULTILINE)
    said = (told or raised or lines or [""])[-1]
    if status > 0:
        return said or f"status {status}"
    killed = f"killed by signal {-status}"
    # The last line need not be the reason: it may be a warning.
    return f"{killed}, after: {said}" if said else killed


def _pass_on(stream, lines: list[str]) -> None:
    # The pipe is closed even if printing fails; the script would wait for ever if it stayed open.
    with stream, contextlib.suppress(BrokenPipeError):
        for line in stream:
            # Of a progress bar, only the last state is kept.
            lines.append(line.decode(errors="replace").rstrip().rpartition("\r")[2])
            progress.say(lines[-1])


def execute(job: Job) -> str:
    """Run one script and pass on what it prints.

    Returns "ok", or "failed: " or, where its engine cannot run here, "left out: " and the reason.
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
        process.terminate()  # it is told to this process alone
        raise
    finally:
        # After Ctrl-C, too: the script is in our process group, so it got the signal and is ending.
        for thread in threads:
            thread.join()
        process.wait()
    if process.returncode == 0:
        return "ok"
    why = reason(process.returncode, errors)
    # An optional engine that is not installed, say: no failure of the study.
    return f"left out: {why.partition(CANNOT)[2]}" if CANNOT in why else f"failed: {why}"


def work(jobs: list[Job], is_done, outcomes: list[Outcome]) -> None:
    """Run the jobs for which `is_done(job)` is false; append the outcomes of all to `outcomes`."""
    finished, failed = (
        [],
        set(),
    )  # (kind, seconds) for the estimate; (model, seed) whose baseline failed
    with progress.Bar("study", len(jobs), "jobs") as bar:
        for number, job in enumerate(jobs):
            if job.network in failed or is_done(job):
                there = "skipped: done before by the same code on the same images and machine"
                outcomes.append(
                    Outcome(job, "not run: its baseline failed" if job.network in failed else there)
                )
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
    note = (
        ""
        if left is None
        else f"about {left:.0f} s left"
        if left < 90
        else f"about {left / 60:.0f} min left"
    )
    if bar.bar is not None:  # in a log, the line below is enough
        # Without tqdm's estimate of the time left, which takes all jobs to be equally long.
        bar.bar.bar_format = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
        bar.step(number - bar.done, note)
    progress.say(f"\n[{number + 1}/{bar.total}{note and ', ' + note}] {command}")


def summarize(outcomes: list[Outcome]) -> None:
    """Print a table of the outcomes, and their totals."""
    print()
    several = len({outcome.job.options.seed for outcome in outcomes}) > 1
    for outcome in outcomes:
        backend = (
            f"{outcome.job.backend:{max(map(len, BACKENDS))}}"
            + f" seed {outcome.job.options.seed}" * several
        )
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
    """Print how the study differs from the committed one, if that is another one of the dissertation's images."""
    import subprocess

    from utils import results

    committed, ours = paths.RESULTS / results.DISSERTATIONS, options.results / study
    both = all((folder / "results.csv").exists() for folder in (committed, ours))
    if (
        options.smoke
        or not both
        or not results.is_dissertations(study)
        or committed.resolve() == ours.resolve()
    ):
        return
    print("\nBeside the committed study:", flush=True)
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
    jobs = plan(asked)  # shows a mistake now, not after the first hour
    from utils.data import loading

    if asked.list:
        loading.find(jobs[0].options)  # shows a mistake in the data now
        for job in jobs:
            print(cli.absolute_command(job.run, job.options))
        return 0
    source, outcomes = loading.open_source(jobs[0].options), []
    try:
        work(jobs, lambda job: done(job, source.study, source.digest), outcomes)
    finally:
        summarize(outcomes)
    compare(source.study, jobs[0].options)
    # A job is "not run" only after another has failed.
    return int(any(outcome.what.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    with cli.reporting("reproduce.py"):
        sys.exit(main())
