"""`utils.cli`: options and their checks, the commands in records, --help, exit statuses."""

import platform
import shlex
import subprocess
import sys

import pytest

from utils import catalog, cli, paths
from utils.catalog import Run
from utils.errors import CannotRunHere, UserError

RUN = Run("resnet18", "ptq", "fp16")
# A Python without installed packages and without the settings of the environment.
BARE = (sys.executable, "-S", "-E", "-s")


@pytest.mark.parametrize("run", catalog.runs(), ids=lambda run: run.name)
@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--smoke",),
        ("--profile",),
        ("--seed", "3", "--threads", "1"),
        ("--batch-sizes", "8,1"),
        ("--timing", "mlperf"),
    ],
)
def test_a_command_parsed_again_means_the_same(run, given, tmp_path):
    (tmp_path / "w.pth").touch()
    folders = ["--data", str(tmp_path), "--results", str(tmp_path / "my results")]
    folders += ["--checkpoints", str(tmp_path / "b"), "--classes", "red fox", "wolf"]
    start = ["--init", str(tmp_path / "w.pth")] if run.method == "fp32" else []
    for backend in run.backends_on("cpu"):
        options = cli.parse("", run, [*given, *folders, *start, "--backend", backend])
        python, script, *words = shlex.split(cli.command(run, options))
        assert (python, script) == ("python", run.script)
        assert cli.parse("", run, words) == options


@pytest.mark.parametrize(
    "given", [("--cuda-graph",), ("--cuda-graph", "--smoke"), ("--backend", "all")]
)
def test_a_command_for_a_gpu_parsed_again_means_the_same(given):
    options = cli.parse("", RUN, ["--device", "cuda", *given])
    assert cli.parse("", RUN, shlex.split(cli.command(RUN, options))[2:]) == options


@pytest.mark.parametrize(
    ("given", "words"),
    [((), ""), (("--smoke",), " --smoke"), (("--batch-sizes", "1,8,16,32,64"), "")],
)
def test_a_command_leaves_defaults_out(given, words):
    options = cli.parse("", RUN, list(given))
    assert cli.command(RUN, options) == f"python {RUN.script} --backend half{words}"


def test_a_published_command_reveals_nothing_of_the_disk(tmp_path):
    (tmp_path / "pets").mkdir()
    places = ["--data", str(tmp_path / "pets"), "--results", str(tmp_path / "r")]
    options = cli.parse("", RUN, [*places, "--batch-sizes", "1"])
    words = "--backend half --data pets --batch-sizes 1 --results r"
    assert cli.published_command(RUN, options) == f"python {RUN.script} {words}"


def test_an_absolute_command_works_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    options = cli.parse("", RUN, ["--data", "pets", "--results", "r"])
    words = f"--backend half --data {tmp_path}/pets --results {tmp_path}/r"
    assert cli.absolute_command(RUN, options) == f"python {paths.ROOT / RUN.script} {words}"


FAULTS = """
import resource
import numpy as np
from utils import catalog, cli

if {keeps}:
    cli.before_torch(cli.parse("", catalog.Run("resnet18", "ptq", "fp16"), []))
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keeps: bool) -> int:
    """Pages that the system had to clear for the second 64 MiB."""
    command = [sys.executable, "-c", FAULTS.format(keeps=keeps)]
    return int(subprocess.check_output(command, cwd=paths.ROOT, text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_script_reuses_freed_memory():
    assert page_faults(keeps=True) < 10
    assert page_faults(keeps=False) >= 16  # 16 huge pages of 4 MiB, or up to 16,384 small ones


def test_int8_engines_are_refused_on_a_gpu():
    ptq = Run("resnet18", "ptq", "int8")
    with pytest.raises(UserError, match="fbgemm runs on the CPU only"):
        cli.parse("", ptq, ["--device", "cuda"])
    with pytest.raises(UserError, match=r"tensorrt runs on a GPU only; add --device cuda"):
        cli.parse("", ptq, ["--backend", "tensorrt"])
    words = ["--device", "cuda", "--backend", "native"]
    assert cli.parse("", Run("resnet18", "qat", "int8"), words).device == "cuda"


# ---- --help without packages


def bare(*words) -> subprocess.CompletedProcess:
    return subprocess.run([*BARE, *words], cwd=paths.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["numpy", "torch", "tqdm", "filelock", "psutil", "PIL"])
def test_the_bare_python_lacks_the_packages(package):
    assert "ModuleNotFoundError" in bare("-c", f"import {package}").stderr


@pytest.mark.parametrize("script", ["reproduce.py", *(run.script for run in catalog.runs())])
def test_help_needs_no_package(script):
    done = bare(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}"), done.stderr


@pytest.mark.parametrize(
    ("words", "status", "stream", "start"),
    [
        (["--help"], 0, "stdout", "usage: models/alexnet_fp32.py"),
        (["--seed", "x"], 2, "stderr", "error: models/alexnet_fp32.py: argument --seed: 'x'"),
        (["--data", "no"], 2, "stderr", "error: models/alexnet_fp32.py: --data no: no such folder"),
    ],
)
def test_a_command_line_is_answered_without_any_package(words, status, stream, start):
    run = 'Run("alexnet", "fp32", "fp32")'
    program = f'from utils.catalog import Run\nfrom utils import cli\ncli.run(print, "", {run})'
    done = bare("-c", program, *words)
    assert done.returncode == status, done.stderr
    assert getattr(done, stream).startswith(start)


# ---- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no images."), 2, "error: program: no images.\n"),
        (CannotRunHere("x86: gone"), 69, "error: program: cannot run here: x86: gone\n"),
        (UserError("a" * 400), 2, f"error: program: {'a' * 100}...{'a' * 100}\n"),
        (UserError("\x1b[31mred"), 2, "error: program: ?[31mred\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again to continue\n"),
        (cli.Terminated(), 143, "error: interrupted; run the same command again to continue\n"),
    ],
)
def test_an_error_ends_a_script_with_its_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as ended, cli.reporting("program"):
        raise error
    assert ended.value.code == status and capsys.readouterr().err == line


def test_a_mistake_in_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"), cli.reporting("program"):
        raise ValueError("a bug")


@pytest.mark.parametrize("form", ["--results={}", "--checkpoints={}", "--data={}", "--init={}"])
def test_a_tilde_is_the_home_in_every_option(form, tmp_path, monkeypatch):
    """A shell leaves it in --results=~/out. A folder called ~ would invite `rm -r ~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch() if "init" in form else (tmp_path / "there").mkdir()
    word = form.format("~/there")
    options = cli.parse("", Run("resnet18", "fp32", "fp32"), [word])
    name = form.partition("=")[0].removeprefix("--")
    assert str(getattr(options, name)) == str(tmp_path / "there")
    assert not (tmp_path / "~").exists()
