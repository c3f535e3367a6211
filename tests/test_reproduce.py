"""The runner of the study: its parts, and whole runs over tiny stand-ins for the scripts."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import write_run

import reproduce
from utils import catalog, cli, cpus, environment, paths, results
from utils.catalog import Backend, Run
from utils.cli import Options

ROOT = Path(__file__).resolve().parents[1]
RUNS = {run.script: run for run in catalog.runs()}
MODELS = ("alexnet", "resnet18", "mobilenetv3")
# Two kinds of scripts are enough, so these tests stay valid when the study gains scripts.
BACKENDS = {
    "native": Backend("native", (("fp32", "fp32"),), ("cpu", "cuda")),
    "fbgemm": Backend("torch_ao", (("ptq", "int8"),)),
    "x86": Backend("torch_ao", (("ptq", "int8"),)),
}
DIGEST, FP32, OTHER = "0" * 64, "f" * 64, "1" * 64
DRIVER = f"""
import runpy, signal, sys, types
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
sys.modules["torch"] = None  # neither the stand-ins nor the runner need it
source = types.SimpleNamespace(study="drawn", digest={DIGEST!r})
loading = types.ModuleType("utils.data.loading")
loading.open_source, loading.find = lambda options: source, lambda options: None
loading.load_images = None
sys.modules["utils.data.loading"] = loading
from utils import catalog, paths
from utils.catalog import Backend

catalog.BACKENDS = {BACKENDS!r}
paths.ROOT = Path("code").resolve()
runpy.run_path({str(ROOT / "reproduce.py")!r}, run_name="__main__")
"""


class Home:
    """A folder with a stand-in for every script; it prints a line and logs its command."""

    def __init__(self, folder):
        self.folder = folder
        for model in MODELS:
            self.script(f"models/{model}_fp32.py")
            self.script(f"quantization/ptq/{model}_ptq_int8.py")

    def script(self, name, body=""):
        path = self.folder / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "import os, signal, sys, time\nfrom pathlib import Path\n"
        head += "with open('ran.txt', 'a') as file:\n"
        head += "    print(Path(__file__).stem, *sys.argv[1:], file=file)\n"
        path.write_text(head + f"print('hello from {name}')\n" + body)

    def start(self, *options, **how):
        folders = ("--results", "out", "--checkpoints", "weights")
        command = [sys.executable, "-c", DRIVER, *folders, *options]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        return subprocess.Popen(
            command, cwd=self.folder, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""}, **how
        )

    def run(self, *options):
        """Exit status, stdout, stderr, and the table as {"alexnet_fp32 native": outcome}."""
        process = self.start(*options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, table(out)

    def ran(self):
        path = self.folder / "ran.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [re.match(r"\S+( --backend \w+)?", line)[0] for line in lines]

    def record(self, run, backend, batch_sizes=cli.BATCH_SIZES, simulated=False, **changed):
        """Write the part of a real record that the runner reads, with the facts in `changed`."""
        options = Options((backend,), threads=cpus.default_threads(), results=self.folder / "out")
        said = results.describe(run, "drawn", backend, options) | {"simulated": simulated}
        code = {run.script: environment.syntax_sha256(paths.ROOT / run.script)}
        known = {"data_sha256": DIGEST, "baseline_sha256": FP32, "code": code}
        known["artifact_sha256"] = FP32 if run.method == "fp32" else "8" * 64
        how = {"tier": options.tier, "protocol": options.protocol}
        content = {
            "format": results.FORMAT,
            "run": said,
            "training": {"init": "scratch"},
            "footprint": {},
        }
        content |= {
            "metrics": {"accuracy": 0.9},
            "data": {"negative_class": "cat", "positive_class": "dog"},
        }
        content["environment"] = replaced(environment.describe(options.threads), changed)
        content["provenance"] = replaced(known, changed)
        content["timing"] = [
            {"batch_size": size, "threads": 1, **replaced(how, changed)} for size in batch_sizes
        ]
        path = self.folder / "out/drawn/runs" / f"{results.run_id(said)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def replaced(facts, changed):
    return facts | {name: value for name, value in changed.items() if name in facts}


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def table(out):
    rows = re.findall(r"^(\w+_(?:fp32|ptq_int8)) +(\w+) +\d+ s  (.*)$", out, re.MULTILINE)
    return {f"{name} {backend}": what for name, backend, what in rows}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path / "code")  # for the digests in records
    monkeypatch.setattr(catalog, "BACKENDS", BACKENDS)
    return Home(tmp_path)


# ---- its parts


def asked(**changes):
    """Return what `reproduce.parse` gives without options, with `changes`."""
    everything = dict(
        models=MODELS,
        methods=reproduce.METHODS,
        dtypes=reproduce.DTYPES,
        backends=reproduce.BACKENDS,
    )
    parser = cli.Parser()
    cli.add_options(parser)
    of_reproduce = {"list": False, "more_seeds": (), "headline": ()}
    return argparse.Namespace(**everything | vars(parser.parse_args([])) | of_reproduce | changes)


def planned(**changes):
    return [(job.run, job.backend) for job in reproduce.plan(asked(**changes))]


@pytest.mark.parametrize("methods", [reproduce.METHODS, ("fp32", reproduce.METHODS[-1])])
def test_every_baseline_comes_before_the_jobs_that_need_it(methods):
    jobs = planned(methods=methods)
    assert {run.method for run, _ in jobs} == set(methods)
    for number, (run, _) in enumerate(jobs):
        assert run.method == "fp32" or (run.baseline, "native") in jobs[:number]


def test_the_plan_has_every_requested_job_once():
    jobs = planned()
    assert len(set(jobs)) == len(jobs) == sum(len(run.backends_on("cpu")) for run in catalog.runs())
    part = planned(
        models=["resnet18"], methods=["ptq"], dtypes=["int8"], backends=["x86", "native"]
    )
    assert part == [(Run("resnet18", "ptq", "int8"), "x86")]


def test_more_seeds_are_only_for_fp32_and_int8():
    first = reproduce.plan(asked())
    jobs = reproduce.plan(asked(seed=7, more_seeds=[8, 7, 9]))
    assert [(job.run, job.backend) for job in jobs if job.options.seed == 7] == [
        (job.run, job.backend) for job in first
    ]
    for seed in (8, 9):
        part = [(job.run, job.backend) for job in jobs if job.options.seed == seed]
        assert part == [
            (job.run, job.backend) for job in first if job.run.dtype in ("fp32", "int8")
        ]
    places = [job.run.method == "fp32" for job in jobs]
    assert places == sorted(places, reverse=True)  # baselines of all seeds first


@pytest.mark.parametrize(("timing", "longer"), [("quick", "standard"), ("mlperf", "mlperf")])
def test_int8_on_the_engines_of_the_headline_is_timed_longer_with_the_first_seed(timing, longer):
    jobs = reproduce.plan(asked(timing=timing, headline=["openvino"], more_seeds=[1]))
    quoted = {
        job
        for job in jobs
        if (job.run.dtype, job.backend, job.options.seed) == ("int8", "openvino", 0)
    }
    assert {job.run for job in quoted} == {run for run in catalog.runs() if run.dtype == "int8"}
    assert {job.options.timing for job in quoted} == {longer}
    assert {job.options.timing for job in jobs if job not in quoted} == {timing}


def test_a_gpu_gets_the_engines_that_run_there_and_the_others_are_named(capsys):
    jobs = planned(device="cuda")
    assert {backend for _, backend in jobs} == {
        "native",
        "half",
        "amp",
        "simulated",
        "tensorrt",
        "tensorrt_fp16",
    }
    assert all(run.method in ("fp32", "qat") for run, backend in jobs if backend == "native")
    said = capsys.readouterr().err
    assert said.startswith("left out, because these do not run on cuda: fbgemm (6 runs),")
    assert "onnxruntime (18 runs)" in said and len(said.splitlines()) == 1
    planned(backends=["native", "tensorrt"])
    assert (
        capsys.readouterr().err == "left out, because these do not run on cpu: tensorrt (6 runs)\n"
    )


CANNOT_RUN = """
if 'x86' in sys.argv:
    print('error: a: cannot run here: x86: gone', file=sys.stderr)
    sys.exit({status})
"""


def test_a_missing_engine_is_left_out_and_does_not_fail_the_study(home):
    home.script("quantization/ptq/alexnet_ptq_int8.py", CANNOT_RUN.format(status=69))
    status, out, _, rows = home.run("--models", "alexnet")
    assert (status, out.splitlines()[-1]) == (0, "ran 2, left out 1")
    assert rows["alexnet_ptq_int8 x86"] == "left out: x86: gone"


def test_the_exit_status_decides_whether_an_engine_is_missing_not_the_words(home):
    home.script("quantization/ptq/alexnet_ptq_int8.py", CANNOT_RUN.format(status=2))
    status, out, _, rows = home.run("--models", "alexnet")
    assert (status, out.splitlines()[-1]) == (1, "ran 2, failed 1")
    assert rows["alexnet_ptq_int8 x86"] == "failed: a: cannot run here: x86: gone"
    home.script("quantization/ptq/alexnet_ptq_int8.py", "sys.exit(69 if 'x86' in sys.argv else 0)")
    status, out, _, rows = home.run("--models", "alexnet")
    assert (status, out.splitlines()[-1]) == (0, "ran 2, left out 1")
    assert rows["alexnet_ptq_int8 x86"] == "left out: status 69"


def test_the_estimate_is_by_kind_if_one_has_finished():
    fp32, int8, fp16 = ("fp32", "fp32"), ("ptq", "int8"), ("ptq", "fp16")
    finished = [(fp32, 100.0), (fp32, 300.0), (int8, 20.0)]
    assert reproduce.seconds_left([fp32], finished) == 200  # (100 + 300) / 2
    assert reproduce.seconds_left([int8, int8, int8], finished) == 60  # 3 * 20
    assert reproduce.seconds_left([fp16], finished) == 140  # none of its kind: (100 + 300 + 20) / 3
    assert (
        reproduce.seconds_left([fp32, int8, int8, fp16, fp16], finished) == 200 + 2 * 20 + 2 * 140
    )
    assert reproduce.seconds_left([], finished) == 0
    assert reproduce.seconds_left([fp32, int8], []) is None


def test_the_headers_estimate_the_jobs_that_will_run(monkeypatch, capsys):
    clock, seconds = (
        [0.0],
        {"resnet18_fp32": 600, "alexnet_fp32": 60, "ptq_int8": 84, "ptq_int16": 9},
    )

    def execute(job):
        clock[0] += next(value for name, value in seconds.items() if job.run.name.endswith(name))
        return "failed: why" if job.run.name == "alexnet_fp32" else "ok"

    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(reproduce, "execute", execute)
    fp32, int8, int16 = ("fp32", "fp32"), ("ptq", "int8"), ("ptq", "int16")
    kinds = [("resnet18", fp32), ("alexnet", fp32), ("resnet18", int8), ("resnet18", int8)]
    kinds += [("alexnet", int8), ("resnet18", int16), ("mobilenetv3", int8)]
    jobs = [reproduce.Job(Run(model, *kind), "x86", Options(("x86",))) for model, kind in kinds]
    outcomes = []
    reproduce.work(jobs, lambda job: job is jobs[3], outcomes)
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[0] for line in printed if line] == [
        "[1/7",
        "[2/7, about 50 min left",  # five, without the one that is done, 600 s each
        "[3/7, about 30 min left",  # three without AlexNet's; its failure after 60 s does not count
        "[6/7, about 7 min left",  # (600 + 84) / 2 for INT16, and 84
        "[7/7, about 84 s left",
    ]
    assert [outcome.seconds for outcome in outcomes] == [600, 60, 84, 0, 0, 9, 84]


TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
    main()
    ~~~~^^
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in <module>

    main()
RuntimeError: in the measuring process:
frame #0: deep in C++"""


@pytest.mark.parametrize(
    ("status", "stderr", "expected"),
    [
        (
            2,
            "a warning\nerror: x.py: no baseline\nerror: x.py: the last\n\nleaked semaphore",
            "x.py: the last",
        ),
        (2, "no error: here\nbut this\n\n", "but this"),
        (1, TRACEBACK, "RuntimeError: in the measuring process:"),
        (1, f"{TRACEBACK}\nresource_tracker: leaked", "RuntimeError: in the measuring process:"),
        (1, "Traceback (most recent call last):\n  File 'x'\nKeyError: 'a'\n", "KeyError: 'a'"),
        (1, f"{TRACEBACK}\nerror: x.py: told in one line", "x.py: told in one line"),
        (3, "", "status 3"),
        (3, "\n \n", "status 3"),
        (-9, "", "killed by signal 9"),
        (-6, "a warning\nterminate called", "killed by signal 6, after: terminate called"),
    ],
)
def test_the_reason_for_a_failure(status, stderr, expected):
    assert reproduce.reason(status, stderr.splitlines()) == expected


# ---- whole runs


def test_it_runs_baselines_first_and_says_what_ran(home):
    status, out, err, rows = home.run("--models", "resnet18", "alexnet", "--threads", "1")
    order = ["alexnet_fp32", "resnet18_fp32"]
    order += [
        f"{model}_ptq_int8 --backend {backend}"
        for model in ("alexnet", "resnet18")
        for backend in ("fbgemm", "x86")
    ]
    assert home.ran() == order
    assert (status, err) == (0, "")
    assert set(rows.values()) == {"ok"} and len(rows) == 6
    assert out.splitlines()[-1] == "ran 6"
    assert out.count("hello from models/alexnet_fp32.py") == 1
    headers = [line for line in out.splitlines() if line.startswith("[")]
    folders = f"--results {home.folder}/out --checkpoints {home.folder}/weights"
    threads = "" if cpus.default_threads() == 1 else "--threads 1 "
    first = f"[1/6] python models/alexnet_fp32.py {threads}{folders}"
    assert headers[0] == first  # in the catalog's order
    assert re.match(r"\[2/6, about \d+ s left\] python models/resnet18_fp32.py", headers[1])
    assert len(headers) == 6
    assert "study:" not in out  # a log needs only the headers


def test_it_continues_after_a_failure_but_not_without_a_baseline(home):
    home.script(
        "models/alexnet_fp32.py", "sys.exit('error: models/alexnet_fp32.py: the disk is full')"
    )
    home.script(
        "quantization/ptq/resnet18_ptq_int8.py",
        "if 'x86' in sys.argv:\n    raise ValueError('one\\ntwo')",
    )
    home.script("quantization/ptq/mobilenetv3_ptq_int8.py", "os.kill(os.getpid(), signal.SIGKILL)")
    status, out, err, rows = home.run()
    assert status == 1
    assert rows == {
        "alexnet_fp32 native": "failed: models/alexnet_fp32.py: the disk is full",
        "resnet18_fp32 native": "ok",
        "mobilenetv3_fp32 native": "ok",
        "alexnet_ptq_int8 fbgemm": "not run: its baseline failed",
        "alexnet_ptq_int8 x86": "not run: its baseline failed",
        "resnet18_ptq_int8 fbgemm": "ok",
        "resnet18_ptq_int8 x86": "failed: ValueError: one",
        "mobilenetv3_ptq_int8 fbgemm": "failed: killed by signal 9",
        "mobilenetv3_ptq_int8 x86": "failed: killed by signal 9",
    }
    assert out.splitlines()[-1] == "ran 3, failed 4, not run 2"
    assert not any("alexnet_ptq" in line for line in home.ran())
    assert "the disk is full" in out.partition("[2/9")[0]  # passed on at once
    assert err == ""


def test_a_baseline_that_fails_with_one_seed_stops_no_other_seed(home):
    home.script(
        "models/alexnet_fp32.py", "if '--seed' in sys.argv:\n    sys.exit('error: no luck')"
    )
    status, out, _, _ = home.run(
        "--models", "alexnet", "--backends", "native", "fbgemm", "--more-seeds", "1"
    )
    said = dict(re.findall(r"^(\w+ +\w+ +seed \d) +\d+ s  (.*)$", out, re.MULTILINE))
    assert {re.sub(" +", " ", name): what for name, what in said.items()} == {
        "alexnet_fp32 native seed 0": "ok",
        "alexnet_fp32 native seed 1": "failed: no luck",
        "alexnet_ptq_int8 fbgemm seed 0": "ok",
        "alexnet_ptq_int8 fbgemm seed 1": "not run: its baseline failed",
    }
    assert status == 1


def test_one_failure_decides_the_status(home):
    home.script("quantization/ptq/alexnet_ptq_int8.py", "os._exit(3 if 'x86' in sys.argv else 0)")
    status, out, _, rows = home.run("--models", "alexnet")
    assert status == 1
    assert rows["alexnet_ptq_int8 x86"] == "failed: status 3"
    assert out.splitlines()[-1] == "ran 2, failed 1"


def test_finished_jobs_are_skipped(home):
    baseline, quantized = Run("alexnet", "fp32", "fp32"), Run("alexnet", "ptq", "int8")
    home.record(baseline, "native")
    home.record(quantized, "fbgemm")
    status, out, _, rows = home.run("--models", "alexnet")
    assert status == 0
    assert home.ran() == ["alexnet_ptq_int8 --backend x86"]
    assert rows["alexnet_fp32 native"] == rows["alexnet_ptq_int8 fbgemm"]
    assert rows["alexnet_ptq_int8 fbgemm"].startswith("skipped: done before")
    assert out.splitlines()[-1] == "ran 1, skipped 2"
    assert "[3/3] python" in out


@pytest.mark.parametrize(
    "changed",
    [
        {"code": {"quantization/ptq/alexnet_ptq_int8.py": "other"}},
        {"code": {"utils/gone.py": "0"}},
        {"code": {}},
        {"threads": 1000},
        {"cpu": "another"},
        {"isa": ["none"]},
        {"versions": {"torch": "1.0"}},
        {"data_sha256": OTHER},
        {"baseline_sha256": OTHER},
        {"batch_sizes": (1, 8)},
        {"batch_sizes": (None,)},
        {"tier": "smoke"},
        {"protocol": f"{cli.PROTOCOL}+cuda-graph"},
    ],
    ids=str,
)
def test_a_job_measured_differently_is_not_skipped(home, changed):
    home.record(Run("alexnet", "fp32", "fp32"), "native")
    home.record(Run("alexnet", "ptq", "int8"), "fbgemm", **changed)
    *_, rows = home.run("--models", "alexnet", "--backends", "native", "fbgemm")
    assert rows["alexnet_fp32 native"].startswith("skipped")
    assert rows["alexnet_ptq_int8 fbgemm"] == "ok"


def test_a_reworded_docstring_invalidates_nothing_and_another_number_does(home):
    for run, backend in (
        (Run("alexnet", "fp32", "fp32"), "native"),
        (Run("alexnet", "ptq", "int8"), "fbgemm"),
    ):
        home.record(run, backend)
    options = ("--models", "alexnet", "--backends", "native", "fbgemm")
    script = home.folder / "code/quantization/ptq/alexnet_ptq_int8.py"
    script.write_text(
        '"""A docstring."""\n# a comment\n' + script.read_text().replace("(*sys", "( *sys")
    )
    assert home.run(*options)[1].splitlines()[-1] == "skipped 2"
    script.write_text(script.read_text() + "changed = 1\n")
    assert home.run(*options)[1].splitlines()[-1] == "ran 1, skipped 1"


def test_a_simulated_run_is_skipped_without_times(home):
    home.record(Run("alexnet", "fp32", "fp32"), "native")
    home.record(Run("alexnet", "ptq", "int8"), "fbgemm", batch_sizes=(None,), simulated=True)
    assert (
        home.run("--models", "alexnet", "--backends", "native", "fbgemm")[1].splitlines()[-1]
        == "skipped 2"
    )


def test_again_runs_the_scripts_of_finished_runs_that_were_timed_once_more(home):
    """The scripts decide whether enough time has passed; simulated runs have no times."""
    status, _, errors, _ = home.run("--models", "alexnet", "--again")
    assert status == 2 and "--again: the study has none of these runs" in errors
    home.record(Run("alexnet", "fp32", "fp32"), "native")
    home.record(Run("alexnet", "ptq", "int8"), "x86")
    home.record(Run("alexnet", "ptq", "int8"), "fbgemm", batch_sizes=(None,), simulated=True)
    status, out, _, _ = home.run("--models", "alexnet", "--again")
    assert status == 0 and out.splitlines()[-1] == "ran 2"
    assert home.ran() == ["alexnet_fp32", "alexnet_ptq_int8 --backend x86"]
    assert all("--again" in line for line in (home.folder / "ran.txt").read_text().splitlines())


def test_a_damaged_result_is_reported_and_measured_again(home):
    home.record(Run("alexnet", "fp32", "fp32"), "native")
    (path,) = (home.folder / "out/drawn/runs").iterdir()
    path.write_text("{")
    status, out, err, _ = home.run("--models", "alexnet", "--methods", "fp32")
    assert (status, err) == (0, "") and out.splitlines()[-1] == "ran 1"
    assert f"results: left out: {path.relative_to(home.folder)} is not valid JSON" in out.replace(
        f"{home.folder}/", ""
    )


def test_a_bar_in_the_output_of_a_script_is_one_line(home):
    home.script(
        "models/alexnet_fp32.py",
        "sys.stderr.write('10%\\r60%\\r100%\\n')\nsys.stdout.buffer.write(b'\\xff odd')",
    )
    lines = home.run("--models", "alexnet", "--methods", "fp32")[1].splitlines()
    assert "100%" in lines and "� odd" in lines
    assert not any("60%" in line for line in lines)


def test_ctrl_c_waits_for_the_script_and_prints_the_table_so_far(home):
    body = """
try:
    Path('ready').touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    Path('tidied').touch()
    print('tidied up')
    sys.exit(130)
"""
    home.script("models/resnet18_fp32.py", body)
    process = home.start("--models", "alexnet", "resnet18", "mobilenetv3", start_new_session=True)
    wait_for(home.folder / "ready")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert table(out) == {"alexnet_fp32 native": "ok", "resnet18_fp32 native": "interrupted"}
    assert out.splitlines()[-1] == "ran 1, interrupted 1"
    assert "tidied up" in out and (home.folder / "tidied").exists()
    assert err.startswith("error: interrupted") and len(err.splitlines()) == 1


def test_sigterm_also_ends_the_script(home):
    body = """
sys.path.insert(0, ROOT)
from utils import cli
with cli.reporting("it"):
    Path("ready").touch()
    time.sleep(60)
"""
    home.script("models/resnet18_fp32.py", body.replace("ROOT", repr(str(ROOT))))
    process = home.start("--models", "resnet18")
    wait_for(home.folder / "ready")
    started = time.monotonic()
    process.terminate()  # this process alone, unlike a terminal
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - started < 20
    told = "error: interrupted; run the same command again to continue"
    assert (
        told in out.splitlines() and out.splitlines()[-1] == "interrupted 1" and err == f"{told}\n"
    )


def test_a_terminal_gets_a_bar_below_the_lines(home):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = home.start("--models", "alexnet", stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 65536):
            seen += block
    except OSError:  # on Linux: the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = seen.decode()
    assert "study: 1/3" in text and re.search(r"study: 2/3 [^\r]*about \d+ s left", text)
    assert "jobs/s" not in text.partition("[1/3]")[2]  # tqdm's estimate
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert "hello from models/alexnet_fp32.py" in lines  # on a separate line
    assert lines[-2] == "ran 3"


# ---- the command line


def test_list_prints_one_command_per_line_fp32_first(tmp_path):
    options = (
        "--list",
        "--batch-sizes",
        "1,8",
        "--results",
        "a b",
        "--threads",
        "1",
        "--seed",
        "3",
        "--smoke",
    )
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == sum(len(run.backends_on("cpu")) for run in catalog.runs())
    assert len({tuple(line) for line in lines}) == len(lines)
    kinds = ["/models/" in line[1] for line in lines]
    assert kinds == sorted(kinds, reverse=True) and sum(kinds) == len(MODELS)
    for python, script, *words in lines:
        run = RUNS[Path(script).relative_to(ROOT).as_posix()]
        assert (python, script) == ("python", str(ROOT / run.script))
        options = cli.parse("", run, words)
        assert (options.batch_sizes, options.seed, options.threads, options.smoke) == (
            (1, 8),
            3,
            1,
            True,
        )
        assert options.results == tmp_path / "a b"


@pytest.mark.skipif(shutil.which("parallel") is None, reason="GNU parallel is not installed")
def test_gnu_parallel_and_an_array_of_slurm_run_the_list(home):
    """Baselines, then the others two at a time; also a single line, as in a task of an array."""
    home.run("--list")  # must leave nothing behind
    listed = home.run("--list", "--threads", "1")[1]
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (home.folder / "jobs").write_text(
        "".join(line + "\n" for line in listed.splitlines() if "/quantization/" in line)
    )
    (home.folder / "first").write_text(
        "".join(line + "\n" for line in listed.splitlines() if "/models/" in line)
    )
    for options, file in (("-j1", "first"), ("-j2", "jobs")):
        command = f"cat {file} | parallel {options}"
        subprocess.run(
            command, shell=True, cwd=home.folder, env=environ, check=True, capture_output=True
        )
    ran = home.ran()
    assert ran[:3] == [f"{model}_fp32" for model in MODELS]
    assert sorted(ran[3:]) == sorted(
        f"{model}_ptq_int8 --backend {name}" for model in MODELS for name in ("fbgemm", "x86")
    )
    task = environ | {"SLURM_ARRAY_TASK_ID": "2"}
    command = 'sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs)"'
    subprocess.run(command, shell=True, cwd=home.folder, env=task, check=True, capture_output=True)
    assert home.ran()[-1] == "alexnet_ptq_int8 --backend x86"


def test_list_prints_absolute_paths_and_gives_init_only_to_the_baselines(tmp_path):
    for name in ("w/resnet18.pth", "pets/cat/1.jpg", "pets/dog/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    options = ("--list", "--models", "resnet18", "--init", "w/{model}.pth", "--data", "pets")
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = done.stdout.splitlines()
    options = f"--data {tmp_path}/pets --init {tmp_path}/w/resnet18.pth"
    assert first == f"python {ROOT}/models/resnet18_fp32.py {options}"
    assert rest and all(f"--data {tmp_path}/pets" in line and "--init" not in line for line in rest)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--models", "vgg"), "vgg"),
        (("--methods", "fp32", "--backends", "fbgemm"), "nothing to run"),
        (("--methods", "fp32", "--backends", "fbgemm", "--list"), "nothing to run"),
        (("--threads", "1000"), "1000"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", "nowhere", "--list"), "nowhere"),
        (("--data", ".", "--list"), "no images in"),
        (("--threads", "1000", "--list"), "1000"),
        (("--init", "nowhere/{model}.pth"), "nowhere/alexnet.pth"),
        (("--batch-sizes", "0"), "'0'"),
    ],
)
def test_a_mistake_is_reported_in_one_line_without_torch(options, named, tmp_path):
    code = (
        f"import runpy, sys; sys.argv[0] = 'x'; sys.path.insert(0, {str(ROOT)!r}); "
        "sys.modules['torch'] = None; "
        f"runpy.run_path({str(ROOT / 'reproduce.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and named in done.stderr
    # Errors in the data take a second line for the expected layout.
    assert len(done.stderr.splitlines()) <= 2


def test_a_reader_that_goes_away_causes_no_traceback():
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, ROOT / "reproduce.py", "--list"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("study", "smoke", "shown"), [
    ("cats_and_dogs", False, True), ("cats_and_dogs_1a2b3c4d", False, True),
    ("drawn", False, False), ("cats_and_dogs", True, False),
])  # fmt: skip
def test_a_study_of_the_dissertations_images_ends_next_to_the_committed_one(
    study, smoke, shown, tmp_path, monkeypatch, capfd
):
    """Other images, smoke runs and the committed study itself are not compared."""
    write_run(tmp_path / "committed", "alexnet", "fp32", "fp32", "native")
    write_run(tmp_path / "mine", "alexnet", "fp32", "fp32", "native", study=study)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "committed")
    reproduce.compare(study, Options(("native",), results=tmp_path / "mine", smoke=smoke))
    assert ("Next to the committed study:" in capfd.readouterr().out) == shown
    assert (tmp_path / "mine" / study / "tables" / "against.csv").exists() == shown
    reproduce.compare("cats_and_dogs", Options(("native",), results=tmp_path / "committed"))
    assert capfd.readouterr().out == ""
