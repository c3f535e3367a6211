"""The committed studies are byte for byte what their runs give, and README says what is in them."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from figures import tables
from figures.shared import cells, compare, frames
from quantization import int8_ladder
from utils import catalog, results

ROOT = Path(__file__).resolve().parents[1]
STUDY = "cats_and_dogs"
SOURCES = ("runs", "ladder")  # folders of what was measured, from which all else is made
ALL_IMAGES = f"{STUDY}_dbea2d6b"
ANEW = {(ALL_IMAGES, "mobilenetv3"): [1]}  # runs of later commits: INT16 on ONNX Runtime, since its recipe corrects biases
STUDIES = (STUDY, ALL_IMAGES)


def runs(study):
    return sorted((ROOT / "results" / study / "runs").glob("*.json"))


def written(*folders):
    """Files that all.py writes for a study, as bytes by name; the report without its pictures."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.parent.name not in SOURCES]
    files = {path.name: path.read_bytes() for path in files if path.suffix != ".lock"}
    return files | {"report.html": re.sub(rb"base64,[\w+/=]*", b"", files["report.html"])}


def same(name, one, other):
    """Whether two files are equal, pictures up to rounding.

    Processors differ in the last bit of a logarithm, and so by one level in a dozen pixels.
    """
    if one == other or not name.endswith(".png"):
        return one == other
    one, other = (np.asarray(Image.open(io.BytesIO(content)), int) for content in (one, other))
    return one.shape == other.shape and abs(one - other).max() <= 2


@pytest.mark.parametrize("study", STUDIES)
def test_every_table_and_figure_is_rebuilt_from_the_runs_byte_for_byte(study, tmp_path):
    folder, drawn = tmp_path / "results" / study, tmp_path / "figures" / study  # as here, for the report's links
    for path in (ROOT / "results" / study / name for name in SOURCES):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
    if (names := ROOT / "results" / study / "test_images.json").is_file():
        shutil.copy(names, folder)
    results.rebuild(folder)
    if (folder / "ladder").is_dir():
        int8_ladder.rebuild(folder / "ladder")
    command = [sys.executable, ROOT / "figures/all.py", "--study", study, "--results", folder.parent, "--out", drawn]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    again = written(folder, drawn)
    committed = written(ROOT / "results" / study, ROOT / "figures" / study)
    assert sorted(again) == sorted(committed)
    assert [name for name in again if not same(name, again[name], committed[name])] == []


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_are_of_one_machine_and_one_set_of_images_and_those_of_a_model_of_one_commit_but_for_those_measured_anew(study):
    records = [results.read(path) for path in runs(study)]
    assert [results.run_id(record["run"]) for record in records] == [path.stem for path in runs(study)] != []
    for section, name in (("environment", "cpu"), ("environment", "versions"), ("provenance", "data_sha256")):
        assert len({json.dumps(record[section][name]) for record in records}) == 1
    for model in {record["run"]["model"] for record in records}:
        of_model = [record for record in records if record["run"]["model"] == model]
        commits = Counter(record["environment"]["git_commit"] for record in of_model)
        assert sorted(commits.values())[:-1] == ANEW.get((study, model), [])
        assert len({entry["protocol"] for record in of_model for entry in record["timing"] if "protocol" in entry}) == 1
    if study == STUDY:  # of two protocols; the other study was made model after model
        protocols = {entry["protocol"] for record in records for entry in record["timing"] if "protocol" in entry}
        assert len({record["environment"]["git_commit"] for record in records}) == len(protocols)  # no commit without its reason
    assert not any(record["environment"]["git_dirty"] for record in records)
    baselines = {
        (record["run"]["model"], record["run"]["seed"]): record["provenance"]["artifact_sha256"]
        for record in records
        if record["run"]["method"] == "fp32"
    }
    assert all(
        record["provenance"]["baseline_sha256"] == baselines[record["run"]["model"], record["run"]["seed"]] for record in records
    )


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_tell_nothing_of_the_disk_that_they_come_from(study):
    for path in runs(study):
        assert not re.search(r'"/|[\s=]/\w', path.read_text()), path.name


# ---- README


def signed(values):
    return ", ".join(f"{100 * value:+.2f}" for value in values)


def listed(column, form):
    return ", ".join(form.format(value) for value in column)


def findings(one):
    """The sentences of README that have numbers, from one row a run of results.csv."""

    def of(method, dtype, backend):
        runs = one[(one["method"] == method) & (one["dtype"] == dtype) & (one["backend"] == backend)]
        assert runs["model"].tolist() == list(catalog.MODELS)
        return runs

    fp32, half, int16 = of("fp32", "fp32", "native"), of("ptq", "fp16", "half"), of("ptq", "int16", "simulated")
    ptq, qat = of("ptq", "int8", "fbgemm"), of("qat", "int8", "fbgemm")
    best = ptq["best_fp32"].map({"onnxruntime": "ONNX Runtime", "compile": "torch.compile"})
    published = Counter(compare.against_published(one)[1]["verdict"])
    (threads,), (images,), (cpu,), (torch,) = (set(one[name]) for name in ("threads", "n_test", "cpu", "torch"))
    return [
        f"all {len(one)} variants",
        f"{images:,} test photographs, {threads} threads of an {cpu}, PyTorch {torch.partition('+')[0]}",
        f"at {signed(qat['accuracy_difference'])} points from FP32 ({', '.join(qat['verdict'])})",
        f"by PTQ at {signed(ptq['accuracy_difference'])} ({', '.join(ptq['verdict'])})",
        f"{listed(ptq['speedup_vs_eager_fp32'], '{:.1f}')} times as fast as eager FP32",
        f"{listed(ptq['speedup_vs_best_fp32'], '{:.1f}')} times as fast as the fastest FP32 of this machine ({', '.join(best)})",
        f"from {listed(fp32['size_mb'], '{:.1f}')} to {listed(ptq['size_mb'], '{:.1f}')} MiB",
        f"at {signed(half['accuracy_difference'])} points from FP32 and "
        f"{listed(half['speedup_vs_eager_fp32'], '{:.2f}')} times as fast",
        f"decides as FP32 does on {listed(100 * int16['agreement_fp32'], '{:.2f}')} % of the images",
        f"Of the {sum(published.values())} published rows, {published['reproduced']} are reproduced, "
        f"{published['higher here']} are higher here, {published['lower here']} lower, and {published['not run']} were not run",
    ]


def of_the_ladder(rungs):
    """The sentences of README that have numbers of ladder.csv."""
    rungs = rungs[rungs["model"] == "mobilenetv3"]
    tool = {rung: f"{100 * accuracy:.2f}" for rung, accuracy in zip(rungs["rung"], rungs["test_accuracy"], strict=True)}

    def of(backend, rung):
        (row,) = [row for _, row in rungs.iterrows() if (row["backend"], row["rung"], row["kind"]) == (backend, rung, "stacked")]
        return row, f"{100 * row['test_accuracy']:.2f}"

    best = of("openvino", "reconstruction")[0]
    return [
        f"torch FX, ONNX Runtime and XNNPACK bring it to {tool['torch FX']}, {tool['ONNX Runtime']} and {tool['XNNPACK']} %, "
        f"and NNCF to {tool['NNCF']} %",
        f"FP32 has {100 * best['test_accuracy_fp32']:.2f} %",
        f"takes it from {of('openvino', 'the plainest')[1]} to {of('openvino', int8_ladder.CHANNELS)[1]} %",
        f"from {of('onnxruntime', 'MSE ranges')[1]} to {of('onnxruntime', 'equalization')[1]} %",
        f"it has {100 * best['test_accuracy']:.2f} %, decides as FP32 does on {100 * best['test_agreement_fp32']:.2f} % of the "
        f"images, and is {best['test_sqnr_db']:.1f} dB from its logits",
    ]


def of_the_ladder_of_resnet18(rungs):
    """The sentences of README that have numbers of ladder.csv of the study of all images."""
    rungs = rungs[(rungs["model"] == "resnet18") & (rungs["backend"] == "openvino")].set_index(["rung", "kind"]).sort_index()
    decibels = rungs["test_sqnr_db"]
    channels, plainest = decibels[int8_ladder.CHANNELS, "stacked"], decibels["the plainest", "stacked"]
    steps = [f"{decibels[name, 'stacked']:.1f}" for name in ("MSE ranges", "adaptive rounding", "reconstruction")]
    varied, corrected = rungs.xs("varied", level="kind"), decibels["bias correction", "alone"]
    return [
        f"Bias correction, alone, takes {channels - corrected:.1f} dB away, "
        "though it brings no layer but the last farther from FP32",
        f"a scale for each channel of the weights takes it from {plainest:.1f} to {channels:.1f} dB, MSE ranges to {steps[0]}, "
        f"adaptive rounding to {steps[1]} and reconstruction to {steps[2]}",
        f"With 100 or 2,000 calibration images, or the 7 bits of processors without VNNI, the recipe stays at "
        f"{between(varied['test_sqnr_db'], '{:.1f}')} dB and {between(varied['test_accuracy'], '{:.2f}', 100)} %",
    ]


def between(column, form, scale=1):
    return f"{form.format(scale * column.min())} to {form.format(scale * column.max())}"


def of_mobilenetv3(one):
    """The sentences of README about INT8 of MobileNetV3-Small on every engine, from one row a run of results.csv."""
    one = one[one["model"] == "mobilenetv3"].set_index(["method", "dtype", "backend"]).sort_index()
    int8, fast = one.loc[("ptq", "int8")], ["openvino", "xnnpack"]
    rest = int8.drop(index=fast)["speedup_vs_best_fp32"]
    bf16, qat = one.loc["ptq", "bf16", "openvino_bf16"], one.loc["qat", "int8", "openvino"]
    int16 = one.loc[("ptq", "int16")]

    assert int16.loc["onnxruntime", "verdict"] == "undecided"
    assert set(int8["verdict"]) == {"held"} and set(int8["quantized_modules"]) == {54} and len(int8) == 8
    assert {one.loc["fp32", "fp32", "native"]["best_fp32"], *int8["best_fp32"]} == {"xnnpack"}
    return [
        f"has {between(int8['accuracy'], '{:.2f}', 100)} % on eight engines "
        f"(FP32 {100 * one.loc['fp32', 'fp32', 'native']['accuracy']:.2f} %; held on all)",
        f"decides as FP32 does on {between(int8['agreement_fp32'], '{:.2f}', 100)} % of the images, "
        f"and is {between(int8['sqnr_db'], '{:.1f}')} dB from its logits",
        f"run it {' and '.join(f'{x:.1f}' for x in int8.loc[fast, 'speedup_vs_eager_fp32'])} times as fast as eager FP32 and "
        f"{' and '.join(f'{x:.2f}' for x in int8.loc[fast, 'speedup_vs_best_fp32'])} times as fast as the fastest FP32",
        f"the other six reach {between(rest, '{:.2f}')}",
        f"{bf16['speedup_vs_best_fp32']:.2f} times the fastest FP32, and nearer to FP32 ({bf16['sqnr_db']:.1f} dB)",
        f"QAT on OpenVINO, from where PTQ ends, is at {qat['sqnr_db']:.1f} dB, and PTQ at {int8.loc['openvino', 'sqnr_db']:.1f}",
        f"is {int16.loc['onnxruntime', 'sqnr_db']:.1f} dB from FP32 in the study of all images, and 2,000 images "
        f"cannot tell whether it holds ({100 * int16.loc['onnxruntime', 'accuracy_difference']:.2f} points)",
        f"with weights of 16 bits it is at {int16.loc['simulated', 'sqnr_db']:.1f} dB",
    ]


def of_a_plain_network(one, model):
    """The sentences of README about INT8 of AlexNet or ResNet-18 on every engine, from one row a run of results.csv."""
    one = one[one["model"] == model].set_index(["method", "dtype", "backend"]).sort_index()
    int8, fp32, qat = one.loc[("ptq", "int8")], one.loc["fp32", "fp32", "native"], one.loc["qat", "int8", "openvino"]
    bf16 = one.loc["ptq", "bf16", "openvino_bf16"]
    ptq, rest = int8.loc["openvino"], int8["speedup_vs_best_fp32"].drop(["openvino", "qnnpack"])
    assert set(int8["verdict"]) == {"held"} and len(int8) == 8 and rest.min() > 1
    return [
        f"it has {between(int8['accuracy'], '{:.2f}', 100)} % on eight engines "
        f"(FP32 {100 * fp32['accuracy']:.2f} %; held on all)",
        f"decides as FP32 does on {between(int8['agreement_fp32'], '{:.2f}', 100)} % of the images, "
        f"and is {between(int8['sqnr_db'], '{:.1f}')} dB from its logits. On the same machine it is "
        f"{ptq['speedup_vs_eager_fp32']:.1f} times as fast as eager FP32 and "
        f"{ptq['speedup_vs_best_fp32']:.2f} times as fast as the fastest FP32 on OpenVINO; "
        f"{between(rest, '{:.2f}')} on six others, and {int8.loc['qnnpack', 'speedup_vs_best_fp32']:.2f} on QNNPACK",
        f"is at {qat['sqnr_db']:.1f} dB and decides as FP32 does on {100 * qat['agreement_fp32']:.2f} % of the images; "
        f"PTQ is at {ptq['sqnr_db']:.1f} dB and {100 * ptq['agreement_fp32']:.2f} %",
        f"BF16 on OpenVINO is {bf16['speedup_vs_best_fp32']:.2f} times as fast as the fastest FP32, at {bf16['sqnr_db']:.1f} dB",
    ]


def test_the_readme_says_what_the_study_of_all_images_says():
    words = " ".join((ROOT / "README.md").read_text().split())
    one, _ = frames.one_batch(frames.read(ROOT / "results" / ALL_IMAGES / "results.csv"))
    plain = [sentence for model in ("alexnet", "resnet18") for sentence in of_a_plain_network(one, model)]
    assert [sentence for sentence in of_mobilenetv3(one) + plain if sentence not in words] == []


def test_the_readme_says_what_ladder_csv_says():
    words = " ".join((ROOT / "README.md").read_text().split())
    first, second = (pd.read_csv(ROOT / "results" / study / "ladder.csv") for study in STUDIES)
    assert [sentence for sentence in of_the_ladder(first) + of_the_ladder_of_resnet18(second) if sentence not in words] == []


def test_bias_correction_brings_no_layer_of_resnet18_but_the_last_farther_from_fp32():
    layers = pd.read_csv(ROOT / "results" / ALL_IMAGES / "ladder_layers.csv")
    layers = layers[(layers["model"] == "resnet18") & (layers["backend"] == "openvino")]
    layers = layers.set_index(["rung", "kind", "layer"])["sqnr_db"].sort_index()
    gained = layers["bias correction", "alone"] - layers[int8_ladder.CHANNELS, "stacked"]
    assert gained.index[gained < -0.01].tolist() == ["fc"] and len(gained) == 21  # the first layer by 0.002 dB


@pytest.mark.parametrize("study", STUDIES)
def test_the_ladder_tells_nothing_of_the_disk_and_is_of_one_network_a_model(study):
    rungs = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / study / "ladder").glob("*.json"))]
    assert not any(re.search(r'"/|[\s=]/\w', json.dumps(rung)) for rung in rungs) and rungs
    assert not any(rung["facts"]["smoke"] for rung in rungs)
    for model in {rung["row"]["model"] for rung in rungs}:
        assert len({rung["facts"]["baseline"] for rung in rungs if rung["row"]["model"] == model}) == 1


def test_the_readme_says_what_results_csv_says():
    frame = frames.read(ROOT / "results" / STUDY / "results.csv")
    one, batch = frames.one_batch(tables.named(frame))
    text = (ROOT / "README.md").read_text()
    words = " ".join(text.split())
    assert [sentence for sentence in findings(one) if sentence not in words] == []
    assert (
        cells.markdown(tables.finished(tables.Table("", "", *tables.headline(one[one["dtype"] == "int8"], batch)), None).cells)
        in text
    )
    for name in re.findall(r"\]\(((?:figures|results)/[^)#]+)", text):
        assert (ROOT / name).is_file(), name
