"""`utils.cli`: the command that a result names is the one that was given."""

import platform
import shlex
import subprocess
import sys

import pytest

from utils import catalog, cli
from utils.catalog import Run
from utils.errors import UserError

RUN = Run("resnet18", "ptq", "fp16")
TIMED = (
    "--device",
    "cuda",
    "--cuda-graph",
    "--batch-sizes",
    "8,1",
    "--threads",
    "1",
    "--timing",
    "mlperf",
)


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
def test_a_command_read_again_means_the_same(run, given, tmp_path):
    (tmp_path / "w.pth").touch()
    folders = (
        "--data",
        str(tmp_path),
        "--results",
        str(tmp_path / "my results"),
        "--checkpoints",
        str(tmp_path / "b"),
    )
    start = ("--init", str(tmp_path / "w.pth")) if run.method == "fp32" else ()
    for backend in run.backends_on("cpu"):
        options = cli.parse(
            "",
            run,
            [*given, *folders, *start, "--classes", "red fox", "wolf", "--backend", backend],
        )
        python, script, *words = shlex.split(cli.command(run, options))
        assert (python, script) == ("python", run.script)
        assert cli.parse("", run, words) == options


@pytest.mark.parametrize(
    "given", [("--cuda-graph",), ("--cuda-graph", "--smoke"), ("--backend", "all")]
)
def test_a_command_for_a_gpu_read_again_means_the_same(given):
    options = cli.parse("", RUN, ["--device", "cuda", *given])
    assert cli.parse("", RUN, shlex.split(cli.command(RUN, options))[2:]) == options


def test_a_command_leaves_out_what_is_the_default():
    for given, said in (
        ((), ""),
        (("--smoke",), " --smoke"),
        (("--batch-sizes", "1,8,16,32,64"), ""),
    ):
        assert (
            cli.command(RUN, cli.parse("", RUN, list(given)))
            == f"python {RUN.script} --backend half{said}"
        )


def test_a_published_command_tells_nothing_of_the_disk(tmp_path):
    (tmp_path / "pets").mkdir()
    options = cli.parse(
        "",
        RUN,
        ["--data", str(tmp_path / "pets"), "--results", str(tmp_path / "r"), "--batch-sizes", "1"],
    )
    said = cli.published_command(RUN, options)
    assert said == f"python {RUN.script} --backend half --data pets --batch-sizes 1 --results r"


def test_an_absolute_command_can_be_given_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    options = cli.parse("", RUN, ["--data", "pets", "--results", "r"])
    said = cli.absolute_command(RUN, options)
    assert (
        said
        == f"python {cli.paths.ROOT / RUN.script} --backend half --data {tmp_path}/pets --results {tmp_path}/r"
    )


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_script_uses_the_memory_that_it_has_freed():
    def faults(keeps):  # pages that the system had to clear for the second 64 MiB
        return int(
            subprocess.check_output(
                [sys.executable, "-c", FAULTS.format(keeps=keeps)], cwd=cli.paths.ROOT, text=True
            )
        )

    assert (
        faults(keeps=True) < 10 and faults(keeps=False) >= 16
    )  # 16 huge pages of 4 MiB at most, or 16,384 small ones


def test_int8_engines_are_refused_on_a_gpu():
    with pytest.raises(UserError, match="fbgemm runs on the CPU only"):
        cli.parse("", Run("resnet18", "ptq", "int8"), ["--device", "cuda"])
    with pytest.raises(UserError, match=r"tensorrt runs on a GPU only; add --device cuda"):
        cli.parse("", Run("resnet18", "ptq", "int8"), ["--backend", "tensorrt"])
    assert (
        cli.parse(
            "", Run("resnet18", "qat", "int8"), ["--device", "cuda", "--backend", "native"]
        ).device
        == "cuda"
    )
