"""The figure scripts, on a small study made up for them."""

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from records import write_ablation, write_run

from figures import (
    accuracy_vs_latency,
    accuracy_vs_size,
    confusion_matrices,
    engines,
    reliability,
    training_curves,
)
from figures.shared import frames, published, script, style
from utils import paths, results, stats
from utils.errors import UserError

SCRIPTS = sorted(
    path.stem
    for path in paths.FIGURES.glob("*.py")
    if "style.save(" in path.read_text(encoding="utf-8")
)
RUNS = [
    ("resnet18", "fp32", "fp32", "native"),
    ("resnet18", "control", "fp32", "native"),
    ("resnet18", "ptq", "int8", "fbgemm"),
    ("resnet18", "ptq", "int16", "simulated"),
    ("resnet18", "qat", "int8", "fbgemm"),
    ("resnet18", "qat", "int8", "qnnpack"),
    ("mobilenetv3", "fp32", "fp32", "native"),
    ("mobilenetv3", "ptq", "int8", "fbgemm"),
    ("mobilenetv3", "ptq", "fp16", "half"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of four studies: one with several models, methods and seeds, three with few runs."""
    folder = tmp_path_factory.mktemp("results")
    for run in RUNS:
        write_run(folder, *run)
    for run in (RUNS[0], RUNS[2]):
        write_run(folder, *run, seed=1)
    for run in RUNS[-3:-1]:
        write_run(folder, *run, study="drawn", threads=(2,))
    for study in ("cats_and_dogs", "drawn"):
        write_ablation(folder, study)
    write_run(folder, *RUNS[0], study="only_fp32")
    write_run(folder, *RUNS[3], study="only_simulated")
    return folder


def draw(folder, name, study, out):
    args = argparse.Namespace(results=folder, study=study, out=out)
    import_module(f"figures.{name}").make(script.read(args), args)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def texts(monkeypatch, folder, name, study, out):
    """All texts of a figure when it is saved."""
    saved = []
    monkeypatch.setattr(style, "save", lambda figure, args, name: saved.append(figure))
    args = argparse.Namespace(results=folder, study=study, out=out)
    import_module(f"figures.{name}").make(script.read(args), args)
    (figure,) = saved
    figure.draw_without_rendering()
    content = [text.get_text() for text in figure.findobj(style.Text)]
    style.plt.close(figure)
    return "\n".join(content)


def frame_of(folder, study="cats_and_dogs"):
    return frames.read(folder / study / "results.csv")


# ---- every script


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_a_picture_and_a_page(folder, tmp_path, name):
    """test_study.py shows for the committed studies that both are the same each time."""
    files = draw(folder, name, "cats_and_dogs", tmp_path)
    assert set(files) == {f"{name}.png", f"{name}.pdf"}
    assert files[f"{name}.png"].startswith(b"\x89PNG") and files[f"{name}.pdf"].startswith(b"%PDF")


@pytest.mark.parametrize(
    "name", [name for name in SCRIPTS if name not in (published.FIGURE, "over_seeds")]
)
def test_two_runs_of_one_model_are_enough(folder, tmp_path, name):
    assert len(draw(folder, name, "drawn", tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "study", "message"),
    [
        ("published_vs_reproduced", "drawn", "the published figures are about cats_and_dogs"),
        ("ptq_vs_qat", "only_fp32", "study only_fp32 has no quantized runs"),
        ("throughput", "only_simulated", "study only_simulated has no timed runs"),
        ("accuracy_vs_latency", "only_simulated", "study only_simulated has no timed runs"),
        ("training_curves", "only_simulated", "study only_simulated has no training to draw"),
        ("layer_sqnr", "only_fp32", "study only_fp32 has no quantized runs"),
        ("over_seeds", "drawn", "study drawn has no variant with several seeds"),
        (
            "method_vs_engine",
            "only_fp32",
            "study only_fp32 has no run whose network was executed on exact integers",
        ),
        ("engines", "only_simulated", "study only_simulated has no search of the fastest FP32"),
        ("ablation", "only_fp32", r"study only_fp32 has no ablation\.csv"),
        ("ablation_layers", "only_fp32", r"study only_fp32 has no ablation_layers\.csv"),
        ("layer_latency", "only_fp32", "study only_fp32 has no run with a profile"),
        (
            "size",
            "typo",
            r"there is no .*results\.csv\. Run the scripts first, or give --study; "
            "studies there: cats_and_dogs",
        ),
    ],
)
def test_a_study_that_lacks_the_runs_is_refused_in_one_line(folder, tmp_path, name, study, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        draw(folder, name, study, tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


WITHOUT_TORCH = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("size", run_name="__main__")
assert "torch" not in sys.modules
"""


def test_a_script_runs_from_another_folder_and_without_torch(folder, tmp_path):
    options = ["--results", folder, "--study", "cats_and_dogs", "--out", "here"]
    how = dict(cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, paths.FIGURES, *options], **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"written: {Path('here') / name}" for name in ("size.png", "size.pdf")
    ]


def test_a_notebook_may_export_a_backend_that_is_not_installed(folder, tmp_path):
    """Colab and Jupyter export one for their kernels, which every process there inherits."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    names = [path.stem for path in sorted(paths.FIGURES.glob("*.py")) if path.stem != "__init__"]
    imports = "; ".join(f"import figures.{name}" for name in names)
    how = dict(cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", imports], **how)
    assert done.returncode == 0, done.stderr
    options = ["--results", folder, "--study", "cats_and_dogs", "--out", tmp_path]
    done = subprocess.run([sys.executable, paths.FIGURES / "size.py", *options], **how)
    assert done.returncode == 0 and (tmp_path / "size.png").exists(), done.stderr


# ---- single figures


def test_int8_is_placed_by_its_speed_up_over_the_fastest_fp32_of_the_search(folder):
    """On 2 threads, eager FP32 takes 5 ms and compile 3.5; INT8 is 7 / 4 times as fast as that."""
    args = argparse.Namespace(results=folder, study="cats_and_dogs")
    rows = engines.placed(frames.one_batch(frame_of(folder))[0], args)
    rows = rows[rows["model"] == "resnet18"].set_index("series")["ms"]
    assert rows["FP32 native"] == 5 and rows["FP32 compile"] == 3.5
    assert rows["INT8 PTQ fbgemm"] == rows["INT8 QAT qnnpack"] == pytest.approx(2)


def test_files_of_nearly_one_size_are_set_side_by_side():
    """Of four files the first, third and last differ by less than 2 %, and one decade is wide."""
    first, alone, second, third = np.log10(
        accuracy_vs_size.apart(np.array([10.0, 100, 10.1, 10.2]), 1.0)
    )
    assert alone == 2
    step = accuracy_vs_size.SPREAD
    assert [first, second, third] == pytest.approx(
        [1 - step, np.log10(10.1), np.log10(10.2) + step]
    )


# ---- classes and processors


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != published.FIGURE])
def test_a_figure_names_the_classes_of_its_study(monkeypatch, tmp_path, name):
    fruit = dict(study="fruit", classes=("apples", "pears"))
    for run in RUNS[:5]:
        write_run(tmp_path, *run, **fruit)
    write_run(tmp_path, *RUNS[2], seed=1, **fruit)
    write_ablation(tmp_path, "fruit")
    words = texts(monkeypatch, tmp_path, name, "fruit", tmp_path)
    assert not [word for word in ("cat", "dog", "animal") if word in words.lower()]
    if name == "confusion_matrices":
        assert words.count("apples") == words.count("pears") == 20  # 2 axes, 2 ticks, 5 panels
    if name == "reliability":
        assert "share of class pears" in words


def test_a_long_class_name_keeps_both_its_ends():
    assert confusion_matrices.shortened("apples") == "apples"
    assert confusion_matrices.shortened("$x$") == r"\$x\$"
    assert confusion_matrices.shortened("fruit_apples") == "fruit…pples"


@pytest.mark.parametrize("name", ["size", "accuracy_vs_latency", "reliability"])
def test_a_figure_names_all_processors_of_its_runs(monkeypatch, tmp_path, name):
    for run in RUNS[:3]:
        write_run(tmp_path, *run, cpu="AMD EPYC")
    write_run(tmp_path, *RUNS[4], cpu="Intel Xeon")
    words = texts(monkeypatch, tmp_path, name, "cats_and_dogs", tmp_path)
    assert "AMD EPYC (3 runs), Intel Xeon (1 run), 2 threads" in words


def test_percentiles_of_too_few_runs_are_left_out(monkeypatch, tmp_path):
    write_run(tmp_path, *RUNS[0])
    path = write_run(tmp_path, *RUNS[2])
    record = results.read(path)
    for timing in record["timing"]:
        timing["latency_ms_p99"] = None
    path.write_text(results.as_json(record))
    results.rebuild(tmp_path / "cats_and_dogs")
    words = texts(monkeypatch, tmp_path, "latency_distributions", "cats_and_dogs", tmp_path)
    assert re.search(r"^[\d.]+ / [\d.]+ / –$", words, re.M)
    assert re.search(r"^[\d.]+ / [\d.]+ / [\d.]+$", words, re.M)
    assert "–: too few runs" in words


def test_layers_are_of_an_engine_that_lets_them_be_compared(monkeypatch, tmp_path):
    """ONNX Runtime comes before XNNPACK in the catalog, but its layers cannot be read."""
    for backend in ("onnxruntime", "xnnpack"):
        path = write_run(tmp_path, "resnet18", "ptq", "int8", backend)
        if backend == "onnxruntime":
            path.write_text(results.as_json(results.read(path) | {"layers": []}))
    words = texts(monkeypatch, tmp_path, "layer_sqnr", "cats_and_dogs", tmp_path)
    assert "INT8 PTQ xnnpack" in words and "onnxruntime" not in words


# ---- parts of figures


def test_the_front_holds_what_nothing_else_beats():
    points = [(5, 0.9), (1, 0.5), (3, 0.7), (2, 0.6), (2, 0.65), (9, 0.9), (3, 0.6)]
    # (9, 0.9) is equally accurate, but slower.
    assert accuracy_vs_latency.front(points) == [(1, 0.5), (2, 0.65), (3, 0.7), (5, 0.9)]


def test_the_fastest_fp32_takes_the_time_1_with_the_accuracy_of_fp32(tmp_path):
    for run in RUNS[:3]:
        write_run(tmp_path, *run)
    frame, _ = frames.one_batch(frames.read(tmp_path / "cats_and_dogs" / "results.csv"))
    runs = accuracy_vs_latency.placed(frame[frame["model"] == RUNS[0][0]])
    fp32 = runs[runs["method"] == "fp32"].iloc[0]
    assert accuracy_vs_latency.fastest(runs) == ((1.0, fp32["accuracy"]), "compile")
    times = [1 / value for value in runs["speedup_vs_best_fp32"]]
    assert runs["time"].tolist() == pytest.approx(times)
    assert (runs["low"] < runs["time"]).all() and (runs["time"] < runs["high"]).all()


def test_what_is_on_the_front_is_labelled_first():
    runs = {
        "method": ["fp32", "ptq", "qat", "control"],
        "backend": ["native", "fbgemm", "x86", "native"],
        "time": [1.4, 0.5, 0.4, 1.5],
        "accuracy": [0.5, 0.25, 0.375, 0.75],
        "best_fp32": ["xnnpack"] * 4,
    }
    labelled = accuracy_vs_latency.named(pd.DataFrame(runs))
    assert labelled == [
        (1.0, 50, "xnnpack"),
        (0.4, 37.5, "x86"),
        (1.5, 75, "control"),
        (0.5, 25, "fbgemm"),
    ]


def test_bins_of_a_reliability_diagram():
    probability = np.array([0.0, 1 / 15, 0.07, 0.5, 0.99, 1.0])  # an edge is in the lower bin
    bins = reliability.bins(probability, np.array([0, 1, 0, 1, 1, 1]))
    assert [(positives, n) for _, positives, n in bins] == [(1, 2), (0, 1), (1, 1), (2, 2)]
    assert np.allclose([mean for mean, _, _ in bins], [1 / 30, 0.07, 0.5, 0.995])


def test_a_confusion_matrix_has_true_classes_in_rows():
    counts = {"tn": 1, "fp": 2, "fn": 3, "tp": 4}
    assert confusion_matrices.matrix(counts).tolist() == [[1, 2], [3, 4]]


def test_cells_have_their_shades_with_the_first_row_on_top_and_are_not_pictures(tmp_path):
    figure = style.plt.figure(figsize=(1, 1), dpi=100)
    axes, table = figure.add_axes([0, 0, 1, 1]), np.array([[0, 1], [0.4, 0]])
    style.shaded(axes, table, cmap="gray", vmin=0, vmax=1)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[25:100:50, 25:100:50, 0]
    assert pixels.tolist() == [[0, 255], [102, 0]]
    figure.savefig(tmp_path / "cells.pdf")
    assert b"/Subtype /Image" not in (tmp_path / "cells.pdf").read_bytes()


def test_a_variant_that_no_model_has_is_not_a_gap(folder, tmp_path, monkeypatch):
    """MobileNetV3-Small lacks ResNet-18's two QAT and PTQ to INT16, and ResNet-18 PTQ to FP16."""
    content = texts(monkeypatch, folder, "ptq_vs_qat", "cats_and_dogs", tmp_path)
    assert content.count("QAT not run") == 2 and content.count("PTQ not run") == 2


def test_engines_that_share_a_training_are_drawn_once(folder):
    frame, _ = frames.one_batch(frame_of(folder))
    args = argparse.Namespace(results=folder, study="cats_and_dogs")
    histories = training_curves.histories(frame, args)
    names = [name for row, _, name in histories if row["model"] == "resnet18"]
    assert names == ["FP32 native", "FP32 control native", "INT8 QAT"]


def test_fine_tuning_of_one_epoch_has_no_curve(tmp_path):
    for model in ("resnet18", "mobilenetv3"):
        for run in (("fp32", "fp32", "native"), ("qat", "int8", "fbgemm")):
            write_run(tmp_path, model, *run)
    for path in (tmp_path / "cats_and_dogs/runs").glob("resnet18_*.json"):
        content = json.loads(path.read_text())
        content["training"] |= {"history": content["training"]["history"][:1], "best_epoch": 0}
        path.write_text(json.dumps(content))
    args = argparse.Namespace(results=tmp_path, study="cats_and_dogs")
    histories = training_curves.histories(frame_of(tmp_path), args)
    drawn = [(row["model"], name) for row, _, name in histories]
    assert drawn == [
        ("resnet18", "FP32 native"),
        ("mobilenetv3", "FP32 native"),
        ("mobilenetv3", "INT8 QAT fbgemm"),
    ]


def test_a_training_is_named_by_its_difference_to_similar_ones():
    def row(model, backend):
        qat = dict(method="qat", dtype="int8", series=f"INT8 QAT {backend}")
        return dict(model=model, backend=backend) | qat

    fbgemm, qnnpack = row("resnet18", "fbgemm"), row("resnet18", "qnnpack")
    other = row("alexnet", "fbgemm")
    alone, shared = (fbgemm, {}, ["fbgemm"]), (other, {}, ["fbgemm", "qnnpack"])
    assert training_curves.named(fbgemm, ["fbgemm"], [alone]) == "INT8 QAT fbgemm"
    assert training_curves.named(fbgemm, ["fbgemm"], [alone, shared]) == "INT8 QAT"
    kin = [alone, (qnnpack, {}, ["qnnpack"]), shared]
    names = [training_curves.named(row, engines, kin) for row, _, engines in kin]
    assert names == ["INT8 QAT fbgemm", "INT8 QAT qnnpack", "INT8 QAT fbgemm/qnnpack"]


# ---- the dissertation's figures


def row_of(**given):
    row = dict(model="resnet18", method="qat", dtype="int8", variant="", backend_here="fbgemm")
    return pd.Series(row | given)


@pytest.mark.parametrize(
    ("given", "series"),
    [
        (dict(), "INT8 QAT fbgemm"),
        # Not the control.
        (dict(method="baseline", dtype="fp32", backend_here="native"), "FP32 native"),
        (dict(method="ptq", dtype="int16", backend_here="simulated"), "INT16 PTQ simulated"),
        (dict(method="ptq", dtype="fp16", backend_here="tensorrt"), None),
        (dict(model="alexnet"), None),
    ],
)
def test_a_published_row_has_its_run(folder, given, series):
    run = published.match(row_of(**given), frames.one_batch(frame_of(folder))[0])
    assert (run if series is None else run["series"]) == series


def test_a_variant_with_one_seed_is_not_a_gap_if_others_have_several(tmp_path, monkeypatch):
    for run in (RUNS[0], RUNS[6], RUNS[2]):  # two baselines, and INT8 of one model
        for seed in (0, 1):
            write_run(tmp_path, *run, seed=seed)
    write_run(tmp_path, *RUNS[7], seed=0)  # INT8 of the other model
    assert "not run" not in texts(monkeypatch, tmp_path, "over_seeds", "cats_and_dogs", tmp_path)


def test_of_several_seeds_the_lowest_is_compared(folder):
    frame = frames.of_all_seeds(frame_of(folder))[0]
    assert published.match(row_of(method="ptq"), frame)["seed"] == 0
    assert published.match(row_of(method="ptq"), frame[frame["seed"] == 1])["seed"] == 1


def test_fake_quant_is_the_network_before_conversion(folder):
    run = published.match(row_of(variant="fake-quant"), frames.one_batch(frame_of(folder))[0])
    assert run["accuracy"] == 0.9 and run["simulated"]
    assert run["series"] == "INT8 QAT fake-quant (simulated)"
    assert (run["accuracy_ci_low"], run["accuracy_ci_high"]) == pytest.approx(stats.wilson(72, 80))
    assert pd.isna(run["latency_ms_p50"]) and pd.isna(run["size_mb"])


def test_every_published_row_is_read():
    table = published.load()
    assert len(table) == len((paths.RESULTS / "published.csv").read_text().splitlines()) - 1
    assert table["accuracy_pct"].notna().all() and (table["variant"] == "fake-quant").sum() == 1


def test_operators_of_each_model_are_next_to_operators_of_fp32(folder, tmp_path, monkeypatch):
    content = texts(monkeypatch, folder, "layer_latency", "cats_and_dogs", tmp_path).splitlines()
    profiled = {model for model, _, dtype, _ in RUNS if dtype == "int8"}
    rows = {(model, method, backend) for model, method, dtype, backend in RUNS if dtype == "int8"}
    assert "FP32 native" in content and content.count("4.03") == len(profiled) > 1
    assert content.count("1.52") == len(rows)  # milliseconds of all operators
