"""The command line of every script: where and how to run. The recipe says what to run.

Nothing heavy is imported here, so `--help` and a mistyped option are answered at once, even by a
Python without the packages of requirements.txt.
"""

from utils.cli.command_lines import absolute_command, command, published_command, words
from utils.cli.options import (
    BATCH_SIZES,
    DEFAULT_TIMING,
    MAX_SEED,
    PROTOCOL,
    SMOKE_BATCH_SIZES,
    TIMING,
    Options,
    Parser,
    add_options,
    folder,
    init_digest,
    parse,
    resolve,
    whole_number,
)
from utils.cli.process import Terminated, before_torch, reporting, run

__all__ = [
    "BATCH_SIZES",
    "DEFAULT_TIMING",
    "MAX_SEED",
    "PROTOCOL",
    "SMOKE_BATCH_SIZES",
    "TIMING",
    "Options",
    "Parser",
    "Terminated",
    "absolute_command",
    "add_options",
    "before_torch",
    "command",
    "folder",
    "init_digest",
    "parse",
    "published_command",
    "reporting",
    "resolve",
    "run",
    "whole_number",
    "words",
]
