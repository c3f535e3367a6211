"""The figure scripts, on a small study made up for them."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
import accuracy_vs_latency
import confusion_matrices
import published
import reliability
import style
import training_curves

from utils import metrics, paths, results, stats

SCRIPTS = sorted(path.stem for path in paths.FIGURES.glob("*.py") if "style.save(" in path.read_text(encoding="utf-8"))
RUNS = [
    ("resnet18", "fp32", "fp32", "native"), ("resnet18", "control", "fp32", "native"), ("resnet18", "ptq", "int8", "fbgemm"),
    ("resnet18", "ptq", "int16", "simulated"), ("resnet18", "qat", "int8", "fbgemm"), ("resnet18", "qat", "int8", "qnnpack"),
    ("mobilenetv3", "fp32", "fp32", "native"), ("mobilenetv3", "ptq", "int8", "fbgemm"), ("mobilenetv3", "ptq", "fp16", "half"),
]  # fmt: skip


def timed(rng, batch, threads, fast):
    """A timing entry, its times drawn around `fast` ms."""
    samples = fast * batch / threads * (1 + rng.gamma(1, 0.05, (2, 3, 4)))
    p50, p90, p99 = (float(value) for value in np.quantile(samples, [0.5, 0.9, 0.99]))
    entry = {"threads": threads, "batch_size": batch, "contended": threads == 1, "best_fp32": "compile"}
    entry |= {"latency_ms_p50": p50, "latency_ms_ci_low": 0.98 * p50, "latency_ms_ci_high": 1.02 * p50, "latency_ms_p90": p90}
    entry |= {"latency_ms_p99": p99, "throughput_ips": 1000 * batch / p50, "samples_ms": samples.tolist()}
    for side, value in (("eager", 10 / fast), ("best", 7 / fast)):
        name = f"speedup_vs_{side}_fp32"
        entry |= {name: value, f"{name}_ci_low": 0.95 * value, f"{name}_ci_high": 1.05 * value}
    return entry


def write(folder, model, method, dtype, backend, study="cats_and_dogs", seed=0, threads=(1, 2)):
    """Write a whole run that follows from what it is called."""
    rng = np.random.default_rng([len(model), len(method), len(backend), seed])
    y = np.arange(80) % 2
    logits = rng.normal(0, 1, (80, 2)).astype(np.float32) + 3 * np.eye(2, dtype=np.float32)[y]
    quality = metrics.classification(logits, y)
    low, high = stats.wilson(round(80 * quality["accuracy"]), 80)
    quality |= {"accuracy_ci_low": low, "accuracy_ci_high": high, "mcnemar_p": None}
    if method != "fp32":
        quality |= stats.against(logits.argmax(1) == y, y == y)
    if method == "qat":
        quality |= {"accuracy_fake_quant": 0.9}
    simulated, fast = backend == "simulated", {"fp32": 10.0, "int8": 4.0, "fp16": 60.0, "int16": 1.0}[dtype]
    run = dict(
        study=study, model=model, method=method, dtype=dtype, backend=backend, device="cpu", simulated=simulated, seed=seed
    )
    history = [{"epoch": n, "train_loss": 1 / (n + 1), "validation_loss": 1.1 / (n + 1), "validation_accuracy": 0.8 + n / 20,
                "seconds": 1.0} for n in range(3)]  # fmt: skip
    layer = {"kind": "Conv2d", "parameters": 9, "weight_sqnr_db": 40.0 + seed, "output_sqnr_db": None}
    record = {
        "run": run, "metrics": quality, "footprint": {"size_mb": fast, "theoretical_mb": 0.9 * fast},
        "training": {"history": history, "best_epoch": 1}, "environment": {"cpu": "a processor"}, "provenance": {},
        "layers": [{**layer, "layer": "conv1"}, {**layer, "layer": "fc", "output_sqnr_db": 20.0}],
        "timing": [{"batch_size": None, "threads": max(threads)}] if simulated
        else [timed(rng, batch, n, fast) for n in threads for batch in (1, 8)],
    }  # fmt: skip
    return results.write(record, logits, y, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`cats_and_dogs` with several models, methods and seeds; `drawn` with two runs, timed on one number of threads."""
    folder = tmp_path_factory.mktemp("results")
    for run in RUNS:
        write(folder, *run)
    write(folder, *RUNS[2], seed=1)
    for run in RUNS[-3:-1]:
        write(folder, *run, study="drawn", threads=(2,))
    write(folder, *RUNS[0], study="only_fp32")
    write(folder, *RUNS[3], study="only_simulated")
    return folder


def draw(monkeypatch, folder, name, study, out):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--results", str(folder), "--study", study, "--out", str(out)])
    __import__(name).main()
    return {path.name: path.read_bytes() for path in out.iterdir()}


def frame_of(folder, study="cats_and_dogs"):
    return style.read(folder / study / "results.csv")


# ---- every script


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_drawn_the_same_each_time(monkeypatch, folder, tmp_path, name):
    first, second = (draw(monkeypatch, folder, name, "cats_and_dogs", tmp_path / n) for n in "ab")
    assert set(first) == {f"{name}.png", f"{name}.pdf"}
    assert first[f"{name}.png"].startswith(b"\x89PNG") and first[f"{name}.pdf"].startswith(b"%PDF")
    assert first == second


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "published_vs_reproduced"])
def test_two_runs_of_one_model_are_enough(monkeypatch, folder, tmp_path, name):
    assert len(draw(monkeypatch, folder, name, "drawn", tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "study", "message"),
    [
        ("published_vs_reproduced", "drawn", "the published figures are of cats_and_dogs"),
        ("ptq_vs_qat", "only_fp32", "study only_fp32 has no quantized runs"),
        ("throughput", "only_simulated", "study only_simulated has no timed runs"),
        ("accuracy_vs_latency", "only_simulated", "study only_simulated has no timed runs"),
        ("training_curves", "only_simulated", "study only_simulated has no training to draw"),
        ("layer_sqnr", "only_fp32", "study only_fp32 has no quantized runs"),
        ("size", "typo", r"there is no .*results\.csv\. Run the scripts first, or give --study; studies there: cats_and_dogs"),
    ],
)
def test_a_study_that_lacks_the_runs_ends_with_one_line(monkeypatch, folder, tmp_path, name, study, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as ended:
        draw(monkeypatch, folder, name, study, tmp_path)
    assert "\n" not in ended.value.code and not list(tmp_path.iterdir())


WITHOUT_TORCH = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("size", run_name="__main__")
assert "torch" not in sys.modules
"""


def test_a_script_runs_from_another_folder_and_without_torch(folder, tmp_path):
    options = ["--results", folder, "--study", "cats_and_dogs", "--out", "here"]
    own = dict(cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, paths.FIGURES, *options], **own)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, paths.FIGURES / "size.py", *options], check=True, **own)
    assert done.stdout.splitlines() == [f"written: {Path('here') / name}" for name in ("size.png", "size.pdf")]
    done = subprocess.run([sys.executable, paths.FIGURES / "size.py", "--results", folder, "--study", "typo"], **own)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_make_draws_every_figure():
    done = subprocess.run(["make", "--dry-run", "render", "STUDY=cats_and_dogs"], cwd=paths.ROOT, capture_output=True, text=True)
    assert set(SCRIPTS) <= set(done.stdout.replace(";", " ").split())


# ---- what they are made of


def test_the_front_holds_what_nothing_else_beats():
    table = pd.DataFrame({"latency_ms_p50": [5, 1, 3, 2, 2, 9, 3], "accuracy": [0.9, 0.5, 0.7, 0.6, 0.65, 0.9, 0.6]})
    assert accuracy_vs_latency.front(table).index.tolist() == [1, 4, 2, 0]  # 5: as accurate as 0, slower


def test_bins_of_a_reliability_diagram():
    probability = np.array([0.0, 1 / 15, 0.07, 0.5, 0.99, 1.0])  # an edge belongs to the bin below it
    found = reliability.bins(probability, np.array([0, 1, 0, 1, 1, 1]))
    assert [(dogs, n) for _, dogs, n in found] == [(1, 2), (0, 1), (1, 1), (2, 2)]
    assert np.allclose([mean for mean, _, _ in found], [1 / 30, 0.07, 0.5, 0.995])


def test_a_confusion_matrix_has_what_is_shown_in_rows():
    assert confusion_matrices.matrix({"tn": 1, "fp": 2, "fn": 3, "tp": 4}).tolist() == [[1, 2], [3, 4]]


def test_engines_that_share_a_training_are_drawn_once(folder):
    frame = style.first_seed(frame_of(folder))
    found = training_curves.histories(frame, argparse.Namespace(results=folder, study="cats_and_dogs"))
    names = [name for row, _, name in found if row["model"] == "resnet18"]
    assert names == ["FP32 native", "FP32 control native", "INT8 QAT"]


def test_a_training_is_named_by_what_tells_it_from_its_kin():
    def row(model, backend):
        return dict(model=model, method="qat", dtype="int8", backend=backend, series=f"INT8 QAT {backend}")

    fbgemm, qnnpack, other = row("resnet18", "fbgemm"), row("resnet18", "qnnpack"), row("alexnet", "fbgemm")
    alone, shared = (fbgemm, {}, ["fbgemm"]), (other, {}, ["fbgemm", "qnnpack"])
    assert training_curves.named(fbgemm, ["fbgemm"], [alone]) == "INT8 QAT fbgemm"
    assert training_curves.named(fbgemm, ["fbgemm"], [alone, shared]) == "INT8 QAT"
    kin = [alone, (qnnpack, {}, ["qnnpack"]), shared]
    names = [training_curves.named(found, engines, kin) for found, _, engines in kin]
    assert names == ["INT8 QAT fbgemm", "INT8 QAT qnnpack", "INT8 QAT fbgemm/qnnpack"]


def test_one_row_a_run_none_lost(folder, tmp_path):
    write(tmp_path, *RUNS[0])
    write(tmp_path, *RUNS[2], threads=(1,))
    one, batch = style.one_batch(frame_of(tmp_path))
    assert batch == 1 and one["series"].tolist() == ["FP32 native", "INT8 PTQ fbgemm"]
    assert one["latency_ms_p50"].isna().tolist() == [False, True]  # it was not timed on all threads
    assert len(style.one_batch(frame_of(folder))[0]) == len(RUNS) + 1


def test_a_run_that_is_missing_is_said_to_be(folder):
    frame, _ = style.one_batch(frame_of(folder))
    rows = style.labels(frame)
    figure, panels = style.panels(frame, rows)
    said = {}
    for axes, model, own in panels:
        style.gaps(axes, own, rows, "latency_ms_p50")
        said[model] = {rows[round(text.get_position()[1])]: text.get_text() for text in axes.texts}
    style.plt.close(figure)
    assert said["resnet18"] == {"FP16 PTQ half": "not run", "INT16 PTQ simulated": "not timed"}
    assert said["mobilenetv3"]["FP32 control native"] == said["mobilenetv3"]["INT8 QAT qnnpack"] == "not run"


def test_texts_keep_clear_of_each_other():
    figure, axes = style.plt.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    figure.draw_without_rendering()
    style.annotate(axes, [(5, 5, f"engine {n}") for n in range(8)])
    boxes = [style.Text.get_window_extent(text) for text in axes.texts]
    style.plt.close(figure)
    assert len(boxes) == 8 and all(not box.count_overlaps(boxes[:n]) for n, box in enumerate(boxes))


# ---- the dissertation's figures


def row_of(**given):
    row = dict(model="resnet18", method="qat", dtype="int8", variant="", backend_here="fbgemm") | given
    return pd.Series(row)


@pytest.mark.parametrize(
    ("given", "series"),
    [
        (dict(), "INT8 QAT fbgemm"),
        (dict(method="baseline", dtype="fp32", backend_here="native"), "FP32 native"),  # not the control
        (dict(method="ptq", dtype="int16", backend_here="simulated"), "INT16 PTQ simulated"),
        (dict(method="ptq", dtype="fp16", backend_here="tensorrt"), None),
        (dict(model="alexnet"), None),
    ],
)
def test_a_published_row_finds_its_run(folder, given, series):
    found = published.match(row_of(**given), style.one_batch(frame_of(folder))[0])
    assert (found if series is None else found["series"]) == series


def test_of_several_seeds_the_lowest_is_compared(folder):
    frame = style.one_batch(frame_of(folder))[0]
    assert published.match(row_of(method="ptq"), frame)["seed"] == 0
    assert published.match(row_of(method="ptq"), frame[frame["seed"] == 1])["seed"] == 1


def test_fake_quant_is_the_network_before_conversion(folder):
    found = published.match(row_of(variant="fake-quant"), style.one_batch(frame_of(folder))[0])
    assert found["accuracy"] == 0.9 and found["simulated"] and found["series"] == "INT8 QAT fake-quant (simulated)"
    assert (found["accuracy_ci_low"], found["accuracy_ci_high"]) == pytest.approx(stats.wilson(72, 80))
    assert pd.isna(found["latency_ms_p50"]) and pd.isna(found["size_mb"])


def test_every_published_row_is_read():
    table = published.load()
    assert len(table) == len((paths.RESULTS / "published.csv").read_text().splitlines()) - 1
    assert table["accuracy_pct"].notna().all() and (table["variant"] == "fake-quant").sum() == 1
