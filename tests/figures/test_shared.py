"""What the figure scripts share: reading results.csv, drawing, and how mistakes end."""

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
BASELINE, CONTROL = (
    ("resnet18", "fp32", "fp32", "native"),
    ("resnet18", "control", "fp32", "native"),
)
PTQ, INT16 = ("resnet18", "ptq", "int8", "fbgemm"), ("resnet18", "ptq", "int16", "simulated")
QAT, OTHER = ("resnet18", "qat", "int8", "qnnpack"), ("mobilenetv3", "ptq", "fp16", "half")


def frame_of(folder, study="cats_and_dogs"):
    return frames.read(folder / study / "results.csv")


def run(name, *options, cwd):
    command = [sys.executable, paths.FIGURES / f"{name}.py", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


# ---- mistakes


@pytest.mark.parametrize("name", HELPERS)
def test_a_helper_run_as_a_script_says_that_it_is_none(name, tmp_path):
    command = [sys.executable, paths.FIGURES / "shared" / name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"error: figures/shared/{name} is no script; run ")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("name", ["size", "tables", "report", "all"])
def test_a_mistyped_study_ends_with_one_line_and_status_2(name, tmp_path):
    write_run(tmp_path, *BASELINE)
    done = run(name, "--results", tmp_path, "--study", "typo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"error: figures/{name}.py: there is no ")
        and done.stderr.count("\n") == 1
    )


def test_a_study_without_timed_runs_ends_with_one_line_and_status_2(tmp_path):
    write_run(tmp_path, *INT16)
    done = run(
        "throughput",
        "--results",
        tmp_path,
        "--study",
        "cats_and_dogs",
        "--out",
        tmp_path / "out",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: figures/throughput.py: study cats_and_dogs has no timed runs yet.\n",
    )


def test_out_that_is_a_file_ends_with_one_line_and_status_2(tmp_path):
    write_run(tmp_path, *BASELINE)
    (tmp_path / "file").touch()
    done = run(
        "size", "--results", tmp_path, "--study", "cats_and_dogs", "--out", "file", cwd=tmp_path
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, f'{{"format": {results.FORMAT}}}')
            for name in ("latency_distributions", "layer_sqnr", "training_curves")
        ),
        *(("training_curves", content) for content in ("{", "null", '{"format": 2}', None)),
        *(("report", content) for content in ("", "[]", f'{{"format": {results.FORMAT}}}')),
    ],
)
def test_a_damaged_run_ends_with_one_line(monkeypatch, capsys, tmp_path, name, content):
    path, _ = write_run(tmp_path, *BASELINE), write_run(tmp_path, *PTQ)
    path = (
        tmp_path / "cats_and_dogs/runs/resnet18_ptq_int8_fbgemm_cpu_seed0.json"
        if name == "layer_sqnr"
        else path
    )
    path.unlink() if content is None else path.write_text(content)
    options = [
        "--results",
        str(tmp_path),
        "--study",
        "cats_and_dogs",
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    with pytest.raises(SystemExit) as ended:
        script.run(import_module(f"figures.{name}").make, "")
    said = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and path.name in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )


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
    for model, backend in (
        ("resnet18", "x86"),
        ("resnet18", "fbgemm"),
        ("alexnet", "x86"),
        ("alexnet", "fbgemm"),
    ):
        write_run(tmp_path, model, "ptq", "int8", backend)
    shown = frames.usual(frame_of(tmp_path))
    assert shown[["model", "method", "backend"]].to_numpy().tolist() == [
        ["alexnet", "ptq", "fbgemm"], ["alexnet", "qat", "onednn"], ["resnet18", "ptq", "fbgemm"], ["resnet18", "qat", "onednn"],
    ]  # fmt: skip


def test_one_row_a_run_none_lost(tmp_path):
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
    assert (
        frames.is_dissertations(frame_of(tmp_path, study))
        == studies.is_dissertations(study)
        == theirs
    )


def test_the_setting_of_one_processor(tmp_path):
    write_run(tmp_path, *BASELINE, cpu="AMD EPYC")
    assert (
        frames.setting(frame_of(tmp_path)) == "80 test images (cats and dogs), AMD EPYC, 2 threads"
    )


# ---- drawing


def test_a_run_that_is_missing_is_said_to_be(tmp_path):
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
    assert (
        said["mobilenetv3"]["FP32 control native"]
        == said["mobilenetv3"]["INT8 QAT qnnpack"]
        == "not run"
    )


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
    assert (
        names == [f"engine {n}" for n in range(len(names))]
        and (len(names) == number) == room
        and len(names) >= 8
    )


def test_marks_look_as_the_catalog_says():
    assert (style.methods(filled=True), style.methods(filled=False)) == ("PTQ", "QAT")
    for model, method, dtype in ((m, k, d) for m in catalog.MODELS for k, d in catalog.kinds()):
        look = style.look(dict(model=model, method=method, dtype=dtype))
        colour = look["color"] if catalog.METHODS[method].filled else look["markeredgecolor"]
        assert (look["marker"], colour) == (
            catalog.MODELS[model].marker,
            catalog.FORMATS[dtype].colour,
        )
