"""Run the study, or a part of it: every script in a process of its own, baselines first.

    python reproduce.py --data PATH --init 'weights/{model}.pth'
    python reproduce.py --models mobilenetv3 --list

What has been measured already by the same code on the same images is skipped. A script that fails does not stop the others;
the run ends with a table of what happened, and with status 1 if anything failed.
"""

import argparse
import hashlib
import shlex
import subprocess
import sys
import time
from pathlib import Path

from utils import cli, environment, paths, results
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
    parser.add_argument("--list", action="store_true", help="print the commands, one a line, and run nothing")
    parser.add_argument("--init", metavar="imagenet|scratch|FILE", help="as for the scripts; {model} stands for the model")
    for option in ("data", "device", "batch-sizes", "seed", "threads"):
        parser.add_argument(f"--{option}", help="handed on to every script")
    for option, default in (("results", paths.RESULTS), ("checkpoints", paths.CHECKPOINTS)):
        parser.add_argument(f"--{option}", type=Path, default=default, metavar="DIR", help="handed on to every script")
    parser.add_argument("--smoke", action="store_true", help="handed on to every script")
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
    given |= {"device": args.device, "batch-sizes": args.batch_sizes, "seed": args.seed, "threads": args.threads}
    given |= {"results": args.results if args.results != paths.RESULTS else None}
    given |= {"checkpoints": args.checkpoints if args.checkpoints != paths.CHECKPOINTS else None}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    return words + ["--smoke"] * args.smoke


def done(run: cli.Run, words: list[str], study: str, digest: str) -> bool:
    """Whether the same code has measured this on the same images, from the same baseline and for the same batch sizes."""
    asked = cli.parse("", run, words)
    record = _record(run, asked.backend, study, asked)
    baseline = _record(cli.Run(run.model, "fp32", "fp32"), "native", study, asked)
    if record is None or baseline is None:
        return False
    known = record["provenance"]
    init = asked.init if asked.init in ("imagenet", "scratch") else hashlib.sha256(Path(asked.init).read_bytes()).hexdigest()
    return (
        known["code_sha256"] == environment.code_sha256(run.script)
        and known["data_sha256"] == digest
        and known["baseline_sha256"] == baseline["provenance"]["artifact_sha256"]
        and (run.method != "fp32" or record["training"]["init"] == init)
        and set(asked.batch_sizes) <= {entry["batch_size"] for entry in record["timing"]}
    )


def _record(run: cli.Run, backend: str, study: str, asked) -> dict | None:
    path = asked.results / study / "runs" / f"{results.run_id(results.describe(run, study, backend, False, asked))}.json"
    return results.read(path) if path.exists() else None


def execute(run: cli.Run, words: list[str]) -> str:
    """Run one script; returns "ok" or why not."""
    status = subprocess.run([sys.executable, paths.ROOT / run.script, *words]).returncode
    return "ok" if status == 0 else f"failed with status {status}"


def main() -> int:
    args = parse()
    jobs = [(run, backend, options(run, backend, args)) for run, backend in plan(args)]
    if args.list:
        for run, _, words in jobs:
            print(shlex.join(["python", run.script, *words]))
        return 0
    if not jobs:
        raise UserError("nothing to run: no script fits all of --models, --methods, --dtypes and --backends.")
    asked = [cli.parse("", run, words) for run, _, words in jobs]  # a mistake shows now, not after the first hour
    from utils import data  # torch: after the command line has been checked

    images = data.load(asked[0])
    outcome, started, ran = [], time.monotonic(), 0
    for number, (run, backend, words) in enumerate(jobs):
        if done(run, words, images.study, images.digest):
            outcome.append((run, backend, "skipped: done before by the same code on the same images", 0.0))
            continue
        left = f", about {(time.monotonic() - started) / ran * (len(jobs) - number) / 60:.0f} min left" if ran else ""
        print(f"\n[{number + 1}/{len(jobs)}{left}] {shlex.join(['python', run.script, *words])}", flush=True)
        begun = time.monotonic()
        outcome.append((run, backend, execute(run, words), time.monotonic() - begun))
        ran += 1
    print()
    for run, backend, what, seconds in outcome:
        print(f"{run.name:26} {backend:8} {seconds:6.0f} s  {what}")
    return int(any(what.startswith("failed") for *_, what, _ in outcome))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: reproduce.py: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
