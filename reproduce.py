"""Run the study, or a part of it: every script in a process of its own, baselines first.

    python reproduce.py --data PATH --init 'weights/{model}.pth'
    python reproduce.py --models mobilenetv3 --list

What has been measured already by the same code on the same images is skipped. A script that fails stops only those that need its
baseline. The run ends with a table of what happened, and with status 1 if anything failed or was not run.

--list is for GNU parallel or a Slurm array: one command a line, to be run from the folder of this file. The fp32 lines come first
and must be done before the others start:

    python reproduce.py --list --methods fp32 | parallel -j1
    python reproduce.py --list | grep '^python quantization' | parallel -j1
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

from utils import cli, environment, paths, progress
from utils.errors import UserError

MODELS = ("alexnet", "resnet18", "mobilenetv3")
METHODS = tuple(dict.fromkeys(method for method, _ in cli.BACKENDS))
DTYPES = tuple(dict.fromkeys(dtype for _, dtype in cli.BACKENDS))
ENGINES = tuple(dict.fromkeys(name for names in cli.BACKENDS.values() for name in names))


def parse() -> argparse.Namespace:
    """The command line: which part of the study, and what is handed on to each script."""
    parser = cli.Parser("reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, choices in (("models", MODELS), ("methods", METHODS), ("dtypes", DTYPES), ("backends", ENGINES)):
        parser.add_argument(f"--{option}", nargs="+", choices=choices, default=choices, help=f"default: {' '.join(choices)}")
    parser.add_argument("--list", action="store_true", help="print the commands, one a line, fp32 first, and run nothing")
    parser.add_argument("--init", metavar="imagenet|scratch|FILE", help="as for the scripts; {model} stands for the model")
    for option in ("data", "device", "batch-sizes", "timing", "seed", "threads"):
        parser.add_argument(f"--{option}", help="handed on to every script")
    for option, default in (("results", paths.RESULTS), ("checkpoints", paths.CHECKPOINTS)):
        parser.add_argument(f"--{option}", type=Path, default=default, metavar="DIR", help="handed on to every script")
    for option in ("cuda-graph", "smoke"):
        parser.add_argument(f"--{option}", action="store_true", help="handed on to every script")
    return parser.parse_args()


def plan(args) -> list[tuple[cli.Run, str]]:
    """(run, backend) in an order in which every baseline comes before what needs it."""
    return [
        (cli.Run(model, method, dtype), backend)
        for (method, dtype), backends in cli.BACKENDS.items()
        if method in args.methods and dtype in args.dtypes
        for model in args.models
        for backend in backends
        if backend in args.backends
    ]


def options(run: cli.Run, backend: str, args) -> list[str]:
    """The options of the script that stands for `run`."""
    given = {"backend": backend if len(cli.BACKENDS[run.method, run.dtype]) > 1 else None, "data": args.data}
    given |= {"init": args.init.replace("{model}", run.model) if args.init and run.method == "fp32" else None}
    given |= {"device": args.device, "batch-sizes": args.batch_sizes, "timing": args.timing}
    given |= {"seed": args.seed, "threads": args.threads}
    given |= {"results": args.results if args.results != paths.RESULTS else None}
    given |= {"checkpoints": args.checkpoints if args.checkpoints != paths.CHECKPOINTS else None}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return words + ["--cuda-graph"] * args.cuda_graph + ["--smoke"] * args.smoke


def done(run: cli.Run, words: list[str], images) -> bool:
    """Whether the same code has measured this as asked on the same images, from the same baseline."""
    asked = cli.parse("", run, words)
    import hashlib

    record = _record(run, asked.backend, images.study, asked)
    baseline = _record(cli.Run(run.model, "fp32", "fp32"), "native", images.study, asked)
    if record is None or baseline is None:
        return False
    known, how = record["provenance"], ("smoke" if asked.smoke else asked.timing, cli.protocol(asked))
    timed = {(entry["batch_size"], entry.get("tier"), entry.get("protocol")) for entry in record["timing"]}
    init = asked.init if asked.init in ("imagenet", "scratch") else hashlib.sha256(Path(asked.init).read_bytes()).hexdigest()
    return (
        known["code_sha256"] == environment.code_sha256(run.script)
        and known["data_sha256"] == images.digest
        and known["baseline_sha256"] == baseline["provenance"]["artifact_sha256"]
        and (run.method != "fp32" or record["training"]["init"] == init)
        and (record["run"]["simulated"] or {(size, *how) for size in asked.batch_sizes} <= timed)
    )


def _record(run: cli.Run, backend: str, study: str, asked) -> dict | None:
    from utils import results

    path = asked.results / study / "runs" / f"{results.run_id(results.describe(run, study, backend, False, asked))}.json"
    return results.read(path) if path.exists() else None


def seconds_left(kinds: list, finished: list[tuple]) -> float | None:
    """What jobs of these kinds will take, by the mean of the (kind, seconds) finished, of the same kind if any; None without."""
    known = {kind: [own for other, own in finished if other == kind] or [own for _, own in finished] for kind in kinds}
    return sum(sum(known[kind]) / len(known[kind]) for kind in kinds) if finished else None


def reason(status: int, errors: list[str]) -> str:
    """Why a script failed, from the lines of its stderr: its own `error: `, else its last traceback's exception or last line."""
    lines = [line.strip() for line in errors if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)*(\S.*)", "\n".join(errors), re.MULTILINE)
    said = (own or raised or lines or [""])[-1]
    if status > 0:
        return said or f"status {status}"
    killed = f"killed by signal {-status}"
    return f"{killed}, after: {said}" if said else killed  # what was said last, such as a warning, need not be why


def _pass_on(stream, lines: list[str]) -> None:
    with stream, contextlib.suppress(BrokenPipeError):  # closed even if we cannot print, or the script would wait for ever
        for line in stream:
            lines.append(line.decode(errors="replace").rstrip().rpartition("\r")[2])  # of a bar, its last state
            progress.say(lines[-1])


def execute(run: cli.Run, words: list[str]) -> str:
    """Run one script and pass on what it prints; returns "ok", or "failed: " and why."""
    import subprocess  # not at the top: `--help` runs nothing, and answers sooner without
    import threading

    command, environ = [sys.executable, paths.ROOT / run.script, *words], os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    printed, errors = [], []
    pipes = ((process.stdout, printed), (process.stderr, errors))
    threads = [threading.Thread(target=_pass_on, args=pipe, daemon=True) for pipe in pipes]
    for thread in threads:
        thread.start()
    try:
        process.wait()
    finally:  # after Ctrl-C, too: the script got it as well, being in the same process group, and is about to end
        for thread in threads:
            thread.join()
        process.wait()
    return "ok" if process.returncode == 0 else f"failed: {reason(process.returncode, errors)}"


def work(jobs: list[tuple], images, outcome: list[tuple]) -> None:
    """Run the (run, backend, options) of `jobs`; appends (run, backend, what happened, seconds) of each to `outcome`."""
    finished, failed = [], set()  # (kind, seconds) for the estimate; models whose baseline failed
    with progress.Bar("study", len(jobs), "jobs") as bar:
        for number, (run, backend, words) in enumerate(jobs):
            if run.model in failed or done(run, words, images):
                there = "skipped: done before by the same code on the same images"
                outcome.append((run, backend, "not run: its baseline failed" if run.model in failed else there, 0.0))
                continue
            ahead = [job for job, _, given in jobs[number:] if job.model not in failed and not done(job, given, images)]
            left = seconds_left([(job.method, job.dtype) for job in ahead], finished)
            _announce(bar, number, shlex.join(["python", run.script, *words]), left)
            what, begun = "interrupted", time.monotonic()
            try:
                what = execute(run, words)
            finally:
                outcome.append((run, backend, what, time.monotonic() - begun))
            if what == "ok":
                finished.append(((run.method, run.dtype), outcome[-1][-1]))
            elif run.method == "fp32":
                failed.add(run.model)


def _announce(bar: progress.Bar, number: int, command: str, left: float | None) -> None:
    note = "" if left is None else f"about {left:.0f} s left" if left < 90 else f"about {left / 60:.0f} min left"
    if bar.bar is not None:  # a log has the lines below
        bar.bar.bar_format = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"  # tqdm would take all jobs for equally long
        bar.step(number - bar.done, note)
    progress.say(f"\n[{number + 1}/{bar.total}{note and ', ' + note}] {command}")


def summarize(outcome: list[tuple]) -> None:
    """Print the table of what happened, and totals."""
    print()
    for run, backend, what, seconds in outcome:
        print(f"{run.name:22} {backend:{max(map(len, ENGINES))}} {seconds:6.0f} s  {what}")
    totals = Counter("ran" if what == "ok" else what.partition(":")[0] for _, _, what, _ in outcome)
    order = ("ran", "skipped", "failed", "not run", "interrupted")
    print(", ".join(f"{what} {totals[what]}" for what in order if totals[what]) or "nothing was run", flush=True)


def main() -> int:
    args = parse()
    jobs = [(run, backend, options(run, backend, args)) for run, backend in plan(args)]
    if not jobs:
        raise UserError("nothing to run: no script fits all of --models, --methods, --dtypes and --backends.")
    if args.list:
        for run, _, words in jobs:
            print(shlex.join(["python", run.script, *words]))
        return 0
    asked = [cli.parse("", run, words) for run, _, words in jobs]  # a mistake shows now, not after the first hour
    from utils import data  # torch: after the command line has been checked

    images, outcome = data.load(asked[0]), []
    try:
        work(jobs, images, outcome)
    finally:
        summarize(outcome)
    return int(any(what.startswith("failed") for _, _, what, _ in outcome))  # what was not run comes with a failure


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        message, status = f"reproduce.py: {error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command goes on where it was", 130
    except BrokenPipeError:  # after `| head`, or when Ctrl-C has ended a `tee`, too
        os._exit(141)  # as SIGPIPE would; an ordinary exit flushes stdout once more, and complains
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
