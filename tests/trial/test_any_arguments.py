"""Random command lines: they parse, or one line says why not."""

import contextlib
import io
import shlex

from hypothesis import given
from hypothesis import strategies as st

from utils import catalog, cli, cpus
from utils.catalog import Run
from utils.errors import UserError

RUNS = [Run(model, *kind) for model in catalog.MODELS for kind in catalog.kinds()]
ODD = st.one_of(
    # An argument cannot contain a zero byte.
    st.text(st.characters(exclude_characters="\0"), max_size=20),
    st.sampled_from([
        "", " ", "-1", "0", "1", "1,8", "1,,8", "4294967296", "1e3", "nan", "all", "/", ".", "..",
        "~", "/dev/null", "/proc", "caf\udce9", "x" * 5000, "a/" * 2500, "--", "-h", "--help=1",
        "kaggle", "cat", "int8",
    ]),
)  # fmt: skip
OPTIONS = [f"--{name}" for name in (
    "backend", "data", "classes", "init", "device", "batch-sizes", "seed", "threads", "cuda-graph",
    "timing", "profile", "results", "checkpoints", "smoke", "th", "unknown",
)]  # fmt: skip
GOOD = {
    "--backend": sorted({*catalog.BACKENDS, "all", "fastest"}),
    "--init": ["scratch", "imagenet", __file__],
    "--seed": ["3"],
    "--threads": ["1"],
    "--batch-sizes": ["1,32", "8"],
    "--timing": cli.TIMING,
    "--device": ["cpu", "cuda"],
    "--data": ["kaggle", "/"],
    "--results": ["r"],
    "--checkpoints": ["c d"],
}
WORDS = st.one_of(
    st.tuples(st.sampled_from(OPTIONS), ODD),
    st.sampled_from([(option, value) for option, values in GOOD.items() for value in values]),
    st.sampled_from([("--smoke",), ("--profile",), ("--classes", "a", "b"), ("--help",)]),
    st.tuples(ODD),
)


def parsed(run, argv):
    """Options of the command line; None after the help, or after one line with status 2."""
    printed, told = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(told),
            cli.reporting(run.script),
        ):
            return cli.parse("What it does.", run, argv)
    except SystemExit as ended:
        lines = told.getvalue().split("\n")
        if ended.code == 0:
            assert printed.getvalue().startswith("usage:") and lines == [""]
        else:
            assert ended.code == 2 and lines[0].startswith("error: ") and lines[1:] == [""], (
                told.getvalue()
            )
            assert lines[0].isprintable() and len(lines[0]) < 1000, lines[0]
        return None


@given(st.sampled_from(RUNS), st.lists(WORDS, max_size=5))
def test_any_command_line_is_options_or_a_line(run, words):
    options = parsed(run, [word for group in words for word in group])
    if options is not None:
        assert set(options.backends) <= set(run.backends)
        assert options.batch_sizes == tuple(sorted(set(options.batch_sizes)))
        assert options.threads <= cpus.usable() and 0 <= options.seed <= cli.MAX_SEED


@given(
    st.sampled_from(RUNS),
    st.lists(st.sampled_from([(k, v) for k, values in GOOD.items() for v in values]), max_size=6),
)
def test_the_command_of_options_gives_these_options(run, words):
    """Parse the commands that reproduce.py --list prints."""
    try:
        options = parsed(run, [word for group in words for word in group])
    except UserError:
        return
    if options is not None and (run.method == "fp32" or options.init in ("scratch", "imagenet")):
        command = shlex.split(cli.command(run, options))
        assert command[:2] == ["python", run.script]
        again = parsed(run, command[2:])
        assert again is not None and (run.method != "fp32" or again == options)
        assert again.replace(init=options.init) == options
