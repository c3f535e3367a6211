"""Runs and tables with any damage: usable files are used, and a line names each other one."""

import copy
import csv
import io
import json
import random
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record, write_ablation, write_run

from figures import all as everything
from figures.shared import script
from utils import results
from utils.errors import UserError

NASTY = [-1, 0, 1, 2, 1e308, "", "fp32", "ptq", "qnnpack", "../x", "\x1b[2J", "caf\udce9", [], {}]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(NASTY),
)


def containers(inner):
    """Lists and dictionaries of JSON values."""
    lists = st.lists(inner, max_size=3)
    return lists | st.dictionaries(st.text(max_size=3), inner, max_size=3)


JSON = st.recursive(SCALARS, containers, max_leaves=5)


ACCIDENTS = ["cut", "zeros", "flip", "twice", "noise"]


def places(value, above=()):
    """Yield all the paths into a JSON value."""
    yield above
    children = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from places(child, (*above, key))


WHOLE = {"format": results.FORMAT, **record()}
PLACES = [place for place in places(WHOLE) if place]
CHANGES = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(PLACES), JSON),
    st.tuples(st.just("remove"), st.sampled_from(PLACES), st.none()),
)


def changed(changes):
    """Copy a whole run with the changes that still apply."""
    value = copy.deepcopy(WHOLE)
    for what, place, new in changes:
        inner = value
        try:
            for key in place[:-1]:
                inner = inner[key]
            if what == "set":
                inner[place[-1]] = new
            else:
                del inner[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue
    return value


def damaged(text: bytes, how: str, seed: int) -> bytes:
    """Return the bytes after an accident."""
    rng = random.Random(seed)
    place = rng.randrange(len(text)) if text else 0
    if how == "cut":
        return text[:place]
    if how == "zeros":
        return text[:place] + bytes(len(text) - place)
    if how == "flip" and not text:
        return b""
    if how == "flip":
        return text[:place] + bytes([text[place] ^ 1 << rng.randrange(8)]) + text[place + 1 :]
    if how == "twice":
        return text + text
    return bytes(rng.randrange(256) for _ in range(100))


@given(st.lists(CHANGES, max_size=3), st.none() | st.sampled_from(ACCIDENTS), st.integers(0, 9999))
def test_any_run_is_a_row_or_left_out(changes, accident, seed):
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "drawn" / "runs"
        runs.mkdir(parents=True)
        good = {"format": results.FORMAT, **record(model="alexnet")}
        (runs / f"{results.run_id(good['run'])}.json").write_text(json.dumps(good))
        text = json.dumps(changed(changes)).encode()
        name = f"{results.run_id(WHOLE['run'])}.json"
        (runs / name).write_bytes(damaged(text, accident, seed) if accident else text)
        said = io.StringIO()
        with redirect_stdout(said):
            csv_path = results.rebuild(runs.parent)
        rows = list(csv.DictReader(csv_path.open(newline="")))
        lines = said.getvalue().splitlines()
        assert sum(row["model"] == "alexnet" for row in rows) == 2
        used = [row for row in rows if row["model"] != "alexnet"]
        if lines:
            assert len(lines) == 1 and name in lines[0] and not used
        else:
            assert used, "left out without a word"
            for row in used:
                assert row["dtype"] == "int8" and (
                    not row["accuracy"] or 0 <= float(row["accuracy"]) <= 1
                )


# ---- figures and tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Files of a study of two models, as {path below the results: bytes}."""
    folder = tmp_path_factory.mktemp("whole")
    for model in ("alexnet", "resnet18"):
        write_run(folder, model, "fp32", "fp32", "native")
        write_run(folder, model, "ptq", "int8", "fbgemm")
        write_run(folder, model, "qat", "int8", "fbgemm")
    write_ablation(folder)
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def attempt(name, results_folder, out):
    """Run a figure script on the files that are there, like figures/all.py; return its error."""
    args = SimpleNamespace(study="cats_and_dogs", results=results_folder, out=out)
    try:
        frame = script.read(args)
    except UserError as error:
        return str(error)
    return everything.attempt(name, frame, args)[1]


SCRIPTS = [everything.FIRST, *everything.names(), everything.LAST]


@settings(max_examples=max(10, settings.default.max_examples // 5))
@given(
    st.sampled_from(SCRIPTS),
    st.integers(0, 99),
    st.sampled_from([*ACCIDENTS, "gone", "folder"]),
    st.integers(0, 9999),
)
def test_any_damage_to_a_study_is_a_line(study, name, which, how, seed):
    with tempfile.TemporaryDirectory() as place:
        files = list(study)
        victim = files[which % len(files)]
        for path, content in study.items():
            target = Path(place) / "results" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == victim and how == "folder":
                target.mkdir()
            elif path != victim or how != "gone":
                target.write_bytes(damaged(content, how, seed) if path == victim else content)
        error = attempt(name, Path(place) / "results", Path(place) / "figures")
        # An unexpected error begins with its class, as in "KeyError: 'x'".
        unexpected = ("Error", "Exception", "Exit", "Iteration", "Warning")
        assert error is None or not error.split(":")[0].endswith(unexpected), error
        assert error is None or len(error.split("\n")) <= 2, error


def test_the_whole_study_has_tables(study, tmp_path):
    """The scripts above read these files: without damage, there is no error."""
    for path, content in study.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert attempt(everything.FIRST, tmp_path, None) is None
    assert (tmp_path / "cats_and_dogs" / "tables.md").exists()
