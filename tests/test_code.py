"""Rules for all code: short functions, few parameters, plain names, torch.ao in one place."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from utils import paths

FOLDERS = ("utils", "models", "quantization", "figures")
MOST_PARAMETERS, MOST_LINES = 5, 60
WORDS = {"own", "found"}  # a noun says more


def sources(*folders: str) -> list[str]:
    """The Python files in `folders` of the repository, as paths from its root."""
    return sorted(
        path.relative_to(paths.ROOT).as_posix()
        for folder in folders
        for path in (paths.ROOT / folder).rglob("*.py")
    )


UTILS = sources("utils")
ALL = ["reproduce.py", *sources(*FOLDERS)]


def tree(path: str) -> ast.Module:
    return ast.parse((paths.ROOT / path).read_text(encoding="utf-8"))


def functions(path: str):
    """Every function of a file, methods included."""
    return [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def parameters(function) -> list[str]:
    """Names of a function's parameters, without self and cls, *args and **kwargs."""
    names = [
        each.arg
        for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    ]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("path", UTILS)
def test_a_public_function_has_at_most_five_parameters(path):
    public = [function for function in functions(path) if not re.match("_(?!_)", function.name)]
    assert {
        function.name for function in public if len(parameters(function)) > MOST_PARAMETERS
    } == set()


@pytest.mark.parametrize("path", ALL)
def test_a_function_fits_a_screen(path):
    long = {
        function.name: function.end_lineno - function.lineno + 1 for function in functions(path)
    }
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


@pytest.mark.parametrize("path", ALL)
def test_names_say_what_they_hold(path):
    names = []
    for node in ast.walk(tree(path)):
        match node:
            case (
                ast.Name(id=name)
                | ast.arg(arg=name)
                | ast.keyword(arg=name)
                | ast.alias(asname=name)
            ):
                names.append((name, getattr(node, "lineno", None)))
    assert [(name, line) for name, line in names if name in WORDS] == []


def prose(path: str) -> list[tuple[int, str]]:
    """Comments and docstrings of a file, each with its first line's number."""
    text = (paths.ROOT / path).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [
        (token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node)
    ]
    return comments + [(getattr(node, "lineno", 1), ast.get_docstring(node)) for node in nodes]


@pytest.mark.parametrize("path", ALL)
def test_prose_does_without_own(path):
    assert [(line, text) for line, text in prose(path) if re.search(r"\bown\b", text)] == []


# ---- what may be removed touches one file


def test_only_two_files_know_torch_ao():
    """torch.ao will be removed. Its engines go with it; the operators are then defined here."""
    knows = {
        path
        for path in UTILS
        if re.search(
            r"torch\.ao|torch import ao\b", (paths.ROOT / path).read_text(encoding="utf-8")
        )
    }
    assert knows == {"utils/backends/torch_ao.py", "utils/quantize/decomposed_ops.py"}


def test_only_one_file_registers_hooks():
    knows = {
        path
        for path in ALL
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and re.fullmatch(r"register_\w*hook\w*", node.attr)
    }
    assert knows == {"utils/quantize/layers.py"}


def test_the_rules_are_about_files_that_are_there():
    assert {Path(path).parts[0] for path in ALL} == {*FOLDERS, "reproduce.py"}


@pytest.mark.parametrize("path", ALL)
def test_the_first_line_of_a_docstring_is_short(path):
    first = [(line, text.partition("\n")[0]) for line, text in prose(path)]
    assert [(line, text) for line, text in first if len(text) > 90 and text[0] != "#"] == []
