"""Modules that the figure scripts share: results.csv, drawing and error messages."""

import argparse
import subprocess
import sys
from importlib import import_module

import pytest
from records import write_run

from figures.shared import frames, runs, script, style
from utils import catalog, paths, results, studies
from utils.errors import UserError

HELPERS = sorted(
    path.name for path in (paths.FIGURES / "shared").glob("*.py") if path.name != "__init__.py"
)
BASELINE = ("resnet18", "fp32", "fp32", "native")
CONTROL = ("resnet18", "control", "fp32", "native")
PTQ = ("resnet18", "ptq", "int8", "fbgemm")
INT16 = ("resnet18", "ptq", "int16", "simulated")
QAT = ("resnet18", "qat", "int8", "qnnpack")
OTHER = ("mobilenetv3", "ptq", "fp16", "half")
STUDY = ("--study", "cats_and_dogs")


def frame_of(folder, study="cats_and_dogs"):
    return frames.read(folder / study / "results.csv")


def run(name, *options, cwd):
    command = [sys.executable, paths.FIGURES / f"{name}.py", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


# ---- mistakes


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_run_as_a_script_says_that_it_is_not_one(name, tmp_path):
    command = [sys.executable, paths.FIGURES / "shared" / name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: figures/shared/{name} is not a script; run ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["size", "tables", "report", "all"])
def test_a_mistyped_study_ends_with_one_line_and_status_2(name, tmp_path):
    write_run(tmp_path, *BASELINE)
    done = run(name, "--results", tmp_path, "--study", "typo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: figures/{name}.py: there is no ")
    assert done.stderr.count("\n") == 1


def test_a_study_without_timed_runs_ends_with_one_line_and_status_2(tmp_path):
    write_run(tmp_path, *INT16)
    options = ["--results", tmp_path, *STUDY, "--out", tmp_path / "out"]
    done = run("throughput", *options, cwd=tmp_path)
    message = "error: figures/throughput.py: study cats_and_dogs has no timed runs yet.\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_out_that_is_a_file_ends_with_one_line_and_status_2(tmp_path):
    write_run(tmp_path, *BASELINE)
    (tmp_path / "file").touch()
    done = run("size", "--results", tmp_path, *STUDY, "--out", "file", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


EMPTY = f'{{"format": {results.FORMAT}}}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latency_distributions", EMPTY),
        ("layer_sqnr", EMPTY),
        ("training_curves", EMPTY),
        ("training_curves", "{"),
        ("training_curves", "null"),
        ("training_curves", '{"format": 2}'),
        ("training_curves", None),
        ("report", ""),
        ("report", "[]"),
        ("report", EMPTY),
    ],
)
def test_a_damaged_run_ends_with_one_line(monkeypatch, capsys, tmp_path, name, content):
    baseline, quantized = write_run(tmp_path, *BASELINE), write_run(tmp_path, *PTQ)
    path = quantized if name == "layer_sqnr" else baseline
    path.unlink() if content is None else path.write_text(content)
    options = ["--results", str(tmp_path), *STUDY, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    with pytest.raises(SystemExit) as ended:
        script.run(import_module(f"figures.{name}").make, "")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and path.name in said
    assert said.startswith("error: ") and said.count("\n") == 1


def test_damaged_answers_are_named(tmp_path):
    args = argparse.Namespace(results=tmp_path, study="cats_and_dogs")
    write_run(tmp_path, *BASELINE)
    path = runs.path(args, frame_of(tmp_path).iloc[0], "npz")
    for damage in (b"", path.read_bytes()[:200]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"seed0\.npz is missing or damaged"):
            runs.answers(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe\x00,\n1", "is damaged|lacks the columns"),
        (b"study,model\nx,resnet18\n", "lacks the columns method, dtype, backend, ..."),
        (",".join(results.COLUMNS).encode(), "holds no runs yet"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x/results.csv"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        frames.read(path)
    assert "\n" not in str(error.value)


def test_a_table_with_what_the_catalog_lacks_is_refused(tmp_path):
    write_run(tmp_path, *PTQ)
    path = tmp_path / "cats_and_dogs/results.csv"
    path.write_text(path.read_text().replace("fbgemm", "abacus"))
    with pytest.raises(
        UserError, match=r"names the backend abacus, which utils/catalog\.py does not have"
    ):
        frames.read(path)


# ---- the frame


def test_models_are_shown_on_the_backend_that_most_of_them_ran_on(tmp_path):
    for backend in ("x86", "onednn"):
        write_run(tmp_path, "resnet18", "qat", "int8", backend)
    for backend in ("qnnpack", "onednn"):
        write_run(tmp_path, "alexnet", "qat", "int8", backend)
    for backend in ("x86", "fbgemm"):
        write_run(tmp_path, "resnet18", "ptq", "int8", backend)
        write_run(tmp_path, "alexnet", "ptq", "int8", backend)
    shown = frames.usual(frame_of(tmp_path))
    assert shown[["model", "method", "backend"]].to_numpy().tolist() == [
        ["alexnet", "ptq", "fbgemm"],
        ["alexnet", "qat", "onednn"],
        ["resnet18", "ptq", "fbgemm"],
        ["resnet18", "qat", "onednn"],
    ]


def test_there_is_one_row_per_run(tmp_path):
    write_run(tmp_path, *BASELINE)
    write_run(tmp_path, *PTQ, threads=(1,))
    one, batch = frames.one_batch(frame_of(tmp_path))
    assert batch == 1 and one["series"].tolist() == ["FP32 native", "INT8 PTQ fbgemm"]
    assert one["latency_ms_p50"].isna().tolist() == [False, True]  # it was not timed on all threads


def test_rows_are_in_the_catalogs_order_and_know_their_baselines_processor(tmp_path):
    for run, cpu in ((OTHER, "c"), (INT16, "b"), (CONTROL, "a"), (BASELINE, "a")):
        write_run(tmp_path, *run, cpu=cpu)
    frame, _ = frames.one_batch(frame_of(tmp_path))
    assert frame["series"].tolist() == [
        "FP32 native",
        "FP32 control native",
        "INT16 PTQ simulated",
        "FP16 PTQ half",
    ]
    assert frame["deployment"].tolist()[2:] == ["INT16 simulated", "FP16 half"]
    assert frame["fp32_processor"].tolist() == ["a", "a", "a", None]
    assert frames.present(frame) == ["resnet18", "mobilenetv3"]


@pytest.mark.parametrize("classes", [("NA", "null"), ("1", "2"), ("apples", "pears")])
def test_classes_keep_their_names(tmp_path, classes):
    write_run(tmp_path, *BASELINE, classes=classes)
    assert frames.classes(frame_of(tmp_path)) == classes


@pytest.mark.parametrize(
    ("study", "theirs"),
    [
        ("pets", False),
        ("drawn", False),
        ("cats_and_dogs", True),
        ("cats_and_dogs_1a2b3c4d", True),
        ("cats_and_dogs_smoke", True),
    ],
)
def test_the_dissertations_data_set(tmp_path, study, theirs):
    write_run(tmp_path, *BASELINE, study=study)
    assert frames.is_dissertations(frame_of(tmp_path, study)) == theirs
    assert studies.is_dissertations(study) == theirs


def test_the_setting_of_one_processor(tmp_path):
    write_run(tmp_path, *BASELINE, cpu="AMD EPYC")
    setting = frames.setting(frame_of(tmp_path))
    assert setting == "80 test images (cats and dogs), AMD EPYC, 2 threads"


# ---- drawing


def test_a_missing_run_is_named(tmp_path):
    for run in (BASELINE, CONTROL, INT16, QAT, OTHER):
        write_run(tmp_path, *run)
    frame, _ = frames.one_batch(frame_of(tmp_path))
    rows = frames.labels(frame)
    figure, panels = style.panels(frame, rows)
    said = {}
    for axes, model, part in panels:
        style.gaps(axes, part, rows, style.Dots("latency_ms_p50"))
        said[model] = {rows[round(text.get_position()[1])]: text.get_text() for text in axes.texts}
    style.plt.close(figure)
    assert said["resnet18"] == {"FP16 PTQ half": "not run", "INT16 PTQ simulated": "not timed"}
    for name in ("FP32 control native", "INT8 QAT qnnpack"):
        assert said["mobilenetv3"][name] == "not run"


@pytest.mark.parametrize(("number", "room"), [(8, True), (60, False)])
def test_texts_keep_clear_of_each_other_and_the_first_are_there(number, room):
    figure, axes = style.plt.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    figure.draw_without_rendering()
    style.annotate(axes, [(5, 5, f"engine {n}") for n in range(number)])
    boxes = [style.Text.get_window_extent(text) for text in axes.texts]
    style.plt.close(figure)
    assert all(not box.count_overlaps(boxes[:n]) for n, box in enumerate(boxes))
    names = [text.get_text() for text in axes.texts]
    assert names == [f"engine {n}" for n in range(len(names))]
    assert (len(names) == number) == room and len(names) >= 8


def test_marks_look_as_the_catalog_says():
    assert (style.methods(filled=True), style.methods(filled=False)) == ("PTQ", "QAT")
    for run in catalog.runs():
        look = style.look(dict(model=run.model, method=run.method, dtype=run.dtype))
        colour = look["color"] if catalog.METHODS[run.method].filled else look["markeredgecolor"]
        assert look["marker"] == catalog.MODELS[run.model].marker
        assert colour == catalog.FORMATS[run.dtype].colour
