"""`utils.cli`: the command that a result names is the one that was given."""

import shlex

import pytest

from utils import cli

RUN = cli.Run("resnet18", "ptq", "fp16")
TIMED = ("--device", "cuda", "--cuda-graph", "--batch-sizes", "8,1", "--threads", "1", "--timing", "mlperf")


@pytest.mark.parametrize("given", [(), ("--smoke",), ("--backend", "amp", "--seed", "3"), TIMED, (*TIMED, "--smoke")])
def test_a_command_read_again_means_the_same(given, tmp_path):
    folders = ("--data", str(tmp_path), "--results", str(tmp_path / "my results"), "--checkpoints", str(tmp_path / "b"))
    args = cli.parse("", RUN, [*given, *folders])
    python, script, *words = shlex.split(cli.command(RUN, args, args.backend))
    assert (python, script) == ("python", RUN.script)
    assert cli.parse("", RUN, words) == args


def test_a_command_leaves_out_what_is_the_default():
    for given, said in ((), ""), (("--smoke",), " --smoke"), (("--batch-sizes", "1,8,16,32,64"), ""):
        assert cli.command(RUN, cli.parse("", RUN, list(given)), "half") == f"python {RUN.script} --backend half{said}"


def test_a_published_command_tells_nothing_of_the_disk(tmp_path):
    (tmp_path / "pets").mkdir()
    args = cli.parse("", RUN, ["--data", str(tmp_path / "pets"), "--results", str(tmp_path / "r"), "--batch-sizes", "1"])
    said = cli.command(RUN, args, "half", private=True)
    assert said == f"python {RUN.script} --backend half --data pets --results r --batch-sizes 1"
