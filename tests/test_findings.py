"""README and results/findings.md agree with the tables of the committed studies."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures import tables
from figures.shared import cells, compare, frames, reproduced, seeds
from quantization import ablation
from utils import catalog, results

ROOT = Path(__file__).resolve().parents[1]
STUDY = "cats_and_dogs"
AMX, ZEN5 = "cats_and_dogs_amx", "cats_and_dogs_zen5"  # the same images on other processors
DETAILS = "results/findings.md"
COUNT = {5: "five", 6: "six", 7: "seven", 8: "eight"}


def table(study):
    return frames.read(ROOT / "results" / study / "results.csv")


def one_per_run():
    """Rows of results.csv with the lowest seeds, at batch 1 on all threads, by model."""
    return frames.one_batch(tables.named(frames.first_seed(table(STUDY))))


def over_seeds():
    """One row per run of all seeds, and the means over seeds."""
    folder = ROOT / "results" / STUDY
    every, _ = frames.of_all_seeds(table(STUDY))
    return every, seeds.together(every, folder / "runs")


def quiet(rows):
    """Rows whose times may be quoted; raises `AssertionError` if something disturbed one."""
    assert not rows["contended"].any(), rows.loc[rows["contended"], ["model", "backend"]]
    return rows


def undisturbed(rows):
    """The rows that were not disturbed."""
    return rows[~rows["contended"].astype(bool)]


def signed(values):
    return ", ".join(f"{100 * value:+.2f}" for value in values)


def both(column, form="{:.2f}"):
    return " and ".join(form.format(value) for value in column)


def listed(column, form):
    return ", ".join(form.format(value) for value in column)


def gained(one):
    """SQNR of INT8 by QAT minus SQNR by PTQ in dB, on each engine that has both.

    `one` has one row per run of a model.
    """
    int8 = one[one["dtype"] == "int8"].set_index(["method", "backend"])["sqnr_db"]
    return (int8["qat"] - int8["ptq"]).dropna()


def findings(one):
    """Sentences of README with numbers of all models; `one` has one row per run."""

    def of(method, dtype, backend):
        runs = one
        for column, value in (("method", method), ("dtype", dtype), ("backend", backend)):
            runs = runs[runs[column] == value]
        assert runs["model"].tolist() == list(catalog.MODELS)
        return runs

    fp32, half = of("fp32", "fp32", "native"), of("ptq", "fp16", "half")
    int16, fbgemm = of("ptq", "int16", "simulated"), of("ptq", "int8", "fbgemm")
    ptq, qat = of("ptq", "int8", "openvino"), of("qat", "int8", "openvino")
    gains = {model: gained(one[one["model"] == model]) for model in ("alexnet", "resnet18")}
    labels = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "xnnpack": "XNNPACK"}
    best = ", ".join(ptq["best_fp32"].map(labels))
    published = Counter(compare.against_published(one)[1]["verdict"])
    constant = ("threads", "n_test", "cpu", "torch")
    (threads,), (images,), (cpu,), (torch,) = (set(one[name]) for name in constant)
    int8 = one[one["dtype"] == "int8"]
    assert set(int8["verdict"]) == {"held"} and set(one["n_sessions"].dropna()) == {1}
    asked = one[(one["method"] == "ptq") & (one["dtype"] == "int8")].dropna(subset="integer_layers")
    assert set(asked["backend"]) == {"onnxruntime", "openvino", "xnnpack", "inductor"}
    layers = asked.set_index(["model", "backend"])["integer_layers"]
    plain = asked[asked["model"] != "mobilenetv3"]
    assert plain["integer_layers"].equals(plain["weight_modules"].astype(float))
    assert layers["mobilenetv3", "openvino"] == layers["mobilenetv3", "xnnpack"] == 54
    quick_half = undisturbed(half)
    assert quick_half["model"].tolist() == ["alexnet", "mobilenetv3"]
    return [
        f"all {len(one)} variants",
        f"{images:,} test photographs, {threads} threads of an {cpu}, "
        f"PyTorch {torch.partition('+')[0]}",
        f"at {signed(ptq['accuracy_difference'])} points from FP32 by PTQ, and at "
        f"{signed(qat['accuracy_difference'])} by QAT",
        f"INT8 held in all {len(int8)} runs of seed 0",
        "OpenVINO and XNNPACK compute all 54 convolutions and linear layers of MobileNetV3-Small "
        f"on integers, ONNX Runtime {layers['mobilenetv3', 'onnxruntime']:.0f} and Inductor "
        f"{layers['mobilenetv3', 'inductor']:.0f}",
        f"{listed(quiet(ptq)['speedup_vs_eager_fp32'], '{:.1f}')} times as fast as eager FP32",
        f"{listed(ptq['speedup_vs_best_fp32'], '{:.1f}')} times as fast as the fastest FP32 of "
        f"this machine ({best})",
        f"at {quiet(fbgemm.iloc[-1:])['speedup_vs_best_fp32'].item():.2f} times the fastest",
        f"from {listed(fp32['size_mb'], '{:.1f}')} to {listed(ptq['size_mb'], '{:.1f}')} MiB",
        f"at {signed(half['accuracy_difference'])} points from FP32. AlexNet and "
        f"MobileNetV3-Small are {both(quick_half['speedup_vs_eager_fp32'])} times as fast as eager",
        f"decides as FP32 does on {listed(100 * int16['agreement_fp32'], '{:.2f}')} % of the "
        "images",
        f"ResNet-18 gains {between(gains['resnet18'], '{:.1f}')} dB on "
        f"{COUNT[len(gains['resnet18'])]} engines and "
        f"AlexNet {between(gains['alexnet'], '{:.1f}')} dB on {COUNT[len(gains['alexnet'])]}.",
        f"Of the {sum(published.values())} published rows, {published['reproduced']} are "
        f"reproduced, {published['higher here']} are higher here, {published['something else']} "
        f"measured something other than claimed, and {published['not run']} were not run",
    ]


def of_the_ablation(rows):
    """Sentences with numbers of ablation.csv: on MobileNetV3-Small's failure, and the others.

    README also has the first ones.
    """
    openvino = rows[rows["backend"] == "openvino"].set_index(["model", "rung", "kind"]).sort_index()
    rows = rows[rows["model"] == "mobilenetv3"]
    tool = {
        step: f"{100 * accuracy:.2f}"
        for step, accuracy in zip(rows["rung"], rows["test_accuracy"], strict=True)
    }
    accuracy = rows.set_index(["backend", "rung", "kind"])["test_accuracy"].sort_index()

    activations, both_causes = ablation.CAUSES
    same_recipe = openvino.loc["mobilenetv3", "the study's recipe", "varied"]
    with_script = mobile_int8(STUDY, "ptq")["metrics"]["agreement_fp32"]

    def decibels(model, name, kind="stacked"):
        return openvino["test_sqnr_db"][model, name, kind]

    def all_decibels(model, names, kind="stacked"):
        return [f"{decibels(model, name, kind):.1f}" for name in names]

    last = ("adaptive rounding", "reconstruction")
    mobile = all_decibels(
        "mobilenetv3", (ablation.CHANNELS, "MSE ranges", "bias correction", *last)
    )
    alone = decibels("resnet18", "bias correction", "alone")
    corrected = decibels("resnet18", ablation.CHANNELS) - alone
    best = openvino.loc["mobilenetv3", "reconstruction", "stacked"]
    breaks = [
        f"torch FX, ONNX Runtime and XNNPACK bring it to {tool['torch FX']}, "
        f"{tool['ONNX Runtime']} and {tool['XNNPACK']} %, and NNCF to {tool['NNCF']} %",
        f"FP32 has {100 * best['test_accuracy_fp32']:.2f} %",
        f"from {100 * accuracy['onnxruntime', 'MSE ranges', 'stacked']:.2f} "
        f"to {100 * accuracy['onnxruntime', 'equalization', 'stacked']:.2f} %",
        "one scale per layer's weights gives "
        f"{100 * accuracy['openvino', 'the plainest', 'stacked']:.2f} %, one scale per activation "
        f"{100 * accuracy['openvino', activations, 'cause']:.2f} %, both "
        f"{100 * accuracy['openvino', both_causes, 'cause']:.2f} %, and neither "
        f"{100 * accuracy['openvino', ablation.CHANNELS, 'stacked']:.2f} %",
    ]
    others = [
        f"it is {mobile[0]} dB from FP32 with scales for each channel, {mobile[1]} with MSE "
        f"ranges, {mobile[2]} with bias correction, {mobile[3]} with adaptive rounding and "
        f"{mobile[4]} with reconstruction, where it decides as FP32 does on "
        f"{100 * best['test_agreement_fp32']:.2f} % of the images. "
        f"QAT is at {decibels('mobilenetv3', 'QAT', 'trained'):.1f} dB",
        f"does on {100 * same_recipe['test_agreement_fp32']:.2f} % of the images, and the run in "
        f"results.csv on {100 * with_script:.2f} %",
        "takes it from "
        f"{100 * accuracy['openvino', 'the plainest', 'stacked']:.2f} to "
        f"{100 * accuracy['openvino', ablation.CHANNELS, 'stacked']:.2f} %",
        f"Bias correction, alone, takes {corrected:.1f} dB away, though it brings no layer but the "
        "last farther from FP32",
    ]
    for model in ("alexnet", "resnet18"):
        defaults = all_decibels(model, ("torch FX", "ONNX Runtime", "NNCF", "XNNPACK"), "tool")
        steps = all_decibels(model, ("the plainest", ablation.CHANNELS, "MSE ranges", *last))
        others += [
            "The defaults of torch FX, ONNX Runtime, NNCF and XNNPACK are at "
            "{}, {}, {} and {} dB".format(*defaults),
            "On OpenVINO, a scale for each channel of the weights takes it from {} to {} dB, MSE "
            "ranges to {}, adaptive rounding to {} and reconstruction to {}".format(*steps),
        ]
    for _, varied in openvino.xs("varied", level="kind").groupby("model"):
        others.append(
            "With 100 or 2,000 calibration images, or 7 bits as on processors without VNNI, the "
            f"recipe stays at {between(varied['test_sqnr_db'], '{:.1f}')} dB and "
            f"{between(varied['test_accuracy'], '{:.2f}', 100)} %"
        )
    return breaks, others


def between(column, form, scale=1):
    return f"{form.format(scale * column.min())} to {form.format(scale * column.max())}"


def of_mobilenetv3(one):
    """Sentences about INT8 of MobileNetV3-Small on every engine; `one` has one row per run."""
    one = one[one["model"] == "mobilenetv3"]
    gain = gained(one)
    one = one.set_index(["method", "dtype", "backend"]).sort_index()
    int8, fast = one.loc[("ptq", "int8")], ["openvino", "xnnpack"]
    rest = undisturbed(int8.drop(index=fast))["speedup_vs_best_fp32"]
    (disturbed,) = set(int8.index) - set(fast) - set(rest.index)
    bf16, qat = one.loc["ptq", "bf16", "openvino_bf16"], one.loc[("qat", "int8")]
    fp32 = one.loc["fp32", "fp32", "native"]
    assert set(int8["verdict"]) == {"held"} and len(int8) == 8
    layers = int8["integer_layers"].dropna()
    assert dict(layers) == dict(inductor=45, onnxruntime=53, openvino=54, xnnpack=54)
    assert {fp32["best_fp32"], *int8["best_fp32"]} == {"xnnpack"}
    eager = both(quiet(int8.loc[fast])["speedup_vs_eager_fp32"], "{:.1f}")
    best = both(int8.loc[fast, "speedup_vs_best_fp32"])
    in_batches = {backend: three_speedups(STUDY, backend)[2] for backend in int8.index}
    in_batches = {backend: ratio for backend, ratio in in_batches.items() if ratio is not None}
    assert {backend for backend, ratio in in_batches.items() if ratio > 1} == {*fast, "inductor"}
    return [
        f"has {between(int8['accuracy'], '{:.2f}', 100)} % on eight engines "
        f"(FP32 {100 * fp32['accuracy']:.2f} %; held on all)",
        f"decides as FP32 does on {between(int8['agreement_fp32'], '{:.2f}', 100)} % of the "
        f"images, and is {between(int8['sqnr_db'], '{:.1f}')} dB from its logits",
        f"run it {eager} times as fast as eager FP32 and {best} times as fast as the fastest FP32",
        f"{COUNT[len(rest)]} others reach {between(rest, '{:.2f}')}, and the row of {disturbed} "
        "was disturbed. At batch 32, Inductor is the third, with "
        f"{in_batches['inductor']:.2f} times",
        f"{bf16['speedup_vs_best_fp32']:.2f} times the fastest FP32, and nearer to FP32 "
        f"({bf16['sqnr_db']:.1f} dB)",
        f"QAT, from where PTQ ends, is at {between(qat['sqnr_db'], '{:.1f}')} dB on the same "
        f"engines, from {-gain.min():.1f} dB farther to {gain.max():.1f} dB nearer than PTQ",
    ]


def mobile_int8(study, method, backend="openvino"):
    """Record of MobileNetV3-Small's INT8 on an engine."""
    name = f"mobilenetv3_{method}_int8_{backend}_cpu_seed0"
    return results.read(ROOT / f"results/{study}/runs/{name}.json")


def three_speedups(study, backend="openvino"):
    """Speed-ups of MobileNetV3-Small's INT8 by PTQ over the fastest FP32.

    They are with 2 threads and 1 thread at batch 1, and with 2 threads at batch 32; None where the
    row was disturbed.
    """
    rows = table(study)
    rows = rows[(rows["model"] == "mobilenetv3") & (rows["backend"] == backend)]
    rows = rows[(rows["method"] == "ptq") & (rows["dtype"] == "int8") & (rows["seed"] == 0)]
    rows = undisturbed(rows).set_index(["threads", "batch_size"])["speedup_vs_best_fp32"]
    return tuple(rows.get(point) for point in ((2, 1), (1, 1), (2, 32)))


def milliseconds(operators, kind):
    """Sum the time of a kind of operators."""
    return sum(operator["ms"] for operator in operators if operator["kind"] == kind)


def of_what_was_not_reached(one, means):
    """Sentences about missed goals.

    `one` has one row per run; `means` comes from `seeds.together`.
    """
    records = [mobile_int8(STUDY, method) for method in ("ptq", "qat")]
    two, single, batch = three_speedups(STUDY)

    def share(kind):
        ratios = []
        for record in records:
            int8 = milliseconds(record["profile"]["operators"], kind)
            ratios.append(int8 / milliseconds(record["profile"]["fp32"], kind))
        return " and ".join(f"{ratio:.2f}" for ratio in ratios)

    one = one[(one["model"] == "mobilenetv3") & (one["dtype"] == "int8")]
    ptq, qat = (one.loc[one["method"] == method, "agreement_fp32"] for method in ("ptq", "qat"))
    fp32 = means[means["dtype"] == "fp32"].set_index("model")
    goals = {"resnet18": 0.987, "mobilenetv3": 0.98}
    means, low, high = (fp32[f"accuracy{end}"] for end in ("", "_ci_low", "_ci_high"))
    assert min(ptq.min(), qat.min()) < 0.995
    assert all(low[model] < means[model] < goal < high[model] for model, goal in goals.items())
    ends = [100 * end[model] for model in goals for end in (low, high)]
    assert two < 1.3 and single >= 1.5 and batch >= 1.75
    return [
        f"By PTQ on OpenVINO, it is {two:.2f}, {single:.2f} and {batch:.2f} times as fast",
        f"convolutions take {share('convolution')} of their time in FP32, but depthwise layers "
        f"{share('depthwise')} of it",
        f"PTQ has {between(ptq, '{:.2f}', 100)} % and QAT {between(qat, '{:.2f}', 100)} %: "
        f"up to {round(2000 * (0.995 - min(ptq.min(), qat.min())))} images of 2,000 are missing",
        f"they have {100 * means['resnet18']:.2f} and {100 * means['mobilenetv3']:.2f} %",
        "[{:.2f}, {:.2f}] and [{:.2f}, {:.2f}] %".format(*ends),
    ]


def of_int16(one):
    """Sentences of README about INT16 of MobileNetV3-Small; `one` has one row per run."""
    int16 = one.query("model == 'mobilenetv3' and method == 'ptq' and dtype == 'int16'")
    int16 = int16.set_index("backend")
    assert int16.loc["onnxruntime", "verdict"] == "undecided"
    return [
        f"is {int16.loc['onnxruntime', 'sqnr_db']:.1f} dB from FP32, and 2,000 images "
        "cannot tell whether it holds "
        f"({100 * int16.loc['onnxruntime', 'accuracy_difference']:.2f} points)",
        f"with weights of 16 bits it is at {int16.loc['simulated', 'sqnr_db']:.1f} dB",
    ]


def of_a_plain_network(one, model):
    """Sentences about INT8 of AlexNet or ResNet-18 on every engine; `one` has one row per run."""
    one = one[one["model"] == model]
    gain = gained(one)
    one = one.set_index(["method", "dtype", "backend"]).sort_index()
    int8, trained = one.loc[("ptq", "int8")], one.loc[("qat", "int8")]
    fp32, bf16 = one.loc["fp32", "fp32", "native"], one.loc["ptq", "bf16", "openvino_bf16"]
    ptq, qat = int8.loc["openvino"], trained.loc["openvino"]
    rest = undisturbed(int8.drop(index=["openvino", "qnnpack"]))["speedup_vs_best_fp32"]
    quiet(int8.loc[["openvino", "qnnpack"]])
    assert set(int8["verdict"]) == {"held"} and len(int8) == 8
    assert rest.min() > 1 and len(gain) == len(trained)
    return [
        f"It has {between(int8['accuracy'], '{:.2f}', 100)} % on eight engines "
        f"(FP32 {100 * fp32['accuracy']:.2f} %; held on all)",
        f"decides as FP32 does on {between(int8['agreement_fp32'], '{:.2f}', 100)} % of the "
        f"images, and is {between(int8['sqnr_db'], '{:.1f}')} dB from its logits. It is "
        f"{ptq['speedup_vs_eager_fp32']:.1f} times as fast as eager FP32 and "
        f"{ptq['speedup_vs_best_fp32']:.2f} times as fast as the fastest FP32 on OpenVINO; "
        f"{between(rest, '{:.2f}')} on {COUNT[len(rest)]} others, and "
        f"{int8.loc['qnnpack', 'speedup_vs_best_fp32']:.2f} on QNNPACK",
        f"is at {qat['sqnr_db']:.1f} dB and decides as FP32 does on "
        f"{100 * qat['agreement_fp32']:.2f} % of the images; "
        f"PTQ is at {ptq['sqnr_db']:.1f} dB and {100 * ptq['agreement_fp32']:.2f} %. "
        f"On {COUNT[len(trained)]} engines, QAT is {between(gain, '{:.1f}')} dB nearer than PTQ",
        f"BF16 on OpenVINO is {bf16['speedup_vs_best_fp32']:.2f} times as fast as the fastest "
        f"FP32, at {bf16['sqnr_db']:.1f} dB",
    ]


def of_the_seeds(every, means):
    """Sentences about three seeds, of which README also has the first two.

    `every` has one row per run of all seeds; `means` comes from `seeds.together`.
    """
    assert set(means["seeds"]) == {3}
    means = means.set_index(["method", "dtype", "backend", "model"]).sort_index()
    fp32, qat = means.loc[("fp32", "fp32", "native")], means.loc[("qat", "int8", "openvino")]
    assert fp32.index.tolist() == qat.index.tolist() == list(catalog.MODELS)
    ptq = [means.loc[("ptq", "int8")].xs(model, level="model") for model in catalog.MODELS]
    verdicts = [Counter(engines["verdict"]) for engines in ptq]
    assert [set(verdict) for verdict in verdicts] == [{"held"}, {"held"}, {"held", "undecided"}]
    assert [len(engines) for engines in ptq] == [8, 8, 8]
    differences = [between(engines["accuracy_difference"], "{:+.2f}", 100) for engines in ptq]
    every = every[(every["method"] == "ptq") & (every["dtype"] == "int8")]
    groups = every.groupby("model", observed=True)["sqnr_db"]
    decibels = [between(groups.get_group(model), "{:.1f}") for model in catalog.MODELS]
    return [
        f"FP32 has {listed(100 * fp32['accuracy'], '{:.2f}')} % in the mean, with a standard "
        f"deviation of {listed(100 * fp32['std'], '{:.2f}')} points",
        f"INT8 by PTQ is at {differences[0]}, {differences[1]} and {differences[2]} points from it "
        "on eight engines",
        f"and QAT on OpenVINO at {signed(qat['accuracy_difference'])}",
        f"it held on all engines for AlexNet and ResNet-18, and on {verdicts[2]['held']} for "
        f"MobileNetV3-Small; on the other {verdicts[2]['undecided']}, three seeds cannot tell",
        f"With any seed and on any engine, PTQ is {decibels[0]}, {decibels[1]} and {decibels[2]} "
        "dB from FP32",
    ]


def on_all_threads(frame):
    """Rows of a study on all threads, by method, format, backend and batch size."""
    frame = frame[frame["threads"] == frame["threads"].max()]
    return frame.set_index(["method", "dtype", "backend", "batch_size"]).sort_index()


def elsewhere(name):
    """Compare the study `name` with this one.

    Returns the rows of both on all threads, the number of runs in both, and sentences about them.
    """
    here, there = table(name), table(STUDY)
    sides = [
        reproduced.Study(study, frame, ROOT / "results" / study)
        for study, frame in ((name, here), (STUDY, there))
    ]
    note, _ = reproduced.comparison(*sides)
    runs, differ, unadjusted, low, high, points, quantized = re.search(
        r"(\d+) of these runs answered.* accuracy of (\d+) differs .*, of (\d+) before .*; (\d+) "
        r"to (\d+) decisions differ.* points to FP32 (\d+) of (\d+)",
        note,
    ).groups()
    assert f"Runs in both: {runs}." in note
    here, there = on_all_threads(here), on_all_threads(there)
    sentences = [
        f"Of the {runs} runs that both studies have, image by image, the accuracy of {differ} "
        f"differs after adjusting for {runs} tests, and of {unadjusted} before; {low} to {high} "
        "decisions differ",
        f"{points} of the {quantized} quantized ones are as far from FP32",
        f"On OpenVINO, INT8 is {times(here, 'int8', 'openvino')} times as fast as the fastest FP32 "
        "at batch 1",
    ]
    return here, there, (runs, differ, unadjusted, low, high), sentences


def times(study, dtype, backend, batch=1, over="best", form="{:.2f}"):
    """Speed-ups over FP32 of a format by PTQ for the three models, from rows of `elsewhere`."""
    rows = quiet(study.loc["ptq", dtype, backend, batch])
    assert rows["model"].tolist() == list(catalog.MODELS)
    return listed(rows[f"speedup_vs_{over}_fp32"], form)


def of_an_intel_xeon():
    """Sentences about the study on a Xeon with AMX: in README, and in detail."""
    here, there, (runs, differ, unadjusted, low, high), common = elsewhere(AMX)
    int8 = here.loc[("ptq", "int8")].xs(1, level="batch_size")
    mobile = int8[int8["model"] == "mobilenetv3"]
    assert set(int8.loc[int8["model"] != "mobilenetv3", "verdict"]) == {"held"}
    assert Counter(mobile["verdict"]) == {"held": 1, "undecided": 3} and len(int8) == 12
    lost = between(mobile["accuracy_difference"], "{:+.2f}", 100)
    emulated = undisturbed(there.loc["ptq", "fp16", "half", 1])
    assert emulated["model"].tolist() == ["alexnet", "mobilenetv3"]
    int8_times = times(here, "int8", "openvino", form="{:.1f}")
    fp16_times = times(here, "fp16", "openvino_fp16", form="{:.1f}")
    short = [
        f"{runs} runs can be compared image by image: {low} to {high} of 2,000 decisions differ. "
        f"The accuracy of {unadjusted} differs at 5 %, of {'none' if differ == '0' else differ} "
        f"after adjusting for {runs} tests. MobileNetV3-Small in INT8, at {lost} points from FP32, "
        "held there on one of four engines; the others are undecided. INT8 on OpenVINO is "
        f"{int8_times} times as fast as the fastest FP32 there, and FP16, which that processor "
        f"does not emulate, {fp16_times} times",
    ]
    return short, [
        *common,
        f"trained anew, is at {lost} points: it held on one engine",
        f"on XNNPACK, MobileNetV3-Small is {mobile['speedup_vs_best_fp32']['xnnpack']:.2f} times "
        "as fast",
        f"BF16 on OpenVINO is {times(here, 'bf16', 'openvino_bf16')} times as fast as the fastest "
        f"FP32 at batch 1, and {times(here, 'bf16', 'openvino_bf16', 32)} times at batch 32",
        f"FP16 on OpenVINO is {times(here, 'fp16', 'openvino_fp16')} and "
        f"{times(here, 'fp16', 'openvino_fp16', 32)} times as fast",
        f"and {times(here, 'int8', 'openvino', 32)} times at batch 32",
        f"PyTorch's `.half()` is {times(here, 'fp16', 'half', over='eager')} times as fast as its "
        "FP32 at batch 1; on the EPYC, which emulates it, AlexNet and MobileNetV3-Small are "
        f"{both(emulated['speedup_vs_eager_fp32'])} times as fast",
    ]


def same_logits(name):
    """Whether a run has bit-equal logits on the newer EPYC and in this study."""
    folder = ROOT / "results"
    here, there = (np.load(folder / study / "runs" / name)["logits"] for study in (ZEN5, STUDY))
    return np.array_equal(here, there)


def of_a_newer_epyc():
    """Sentences about the study on a newer EPYC: in README, and in detail."""
    here, _, (runs, *_), common = elsewhere(ZEN5)
    two, single, batch = three_speedups(ZEN5)
    assert batch is None  # disturbed
    in_batches = undisturbed(here.loc["ptq", "int8", "openvino", 32])
    assert in_batches["model"].tolist() == ["alexnet", "resnet18"]
    openvino = here.loc["ptq", "int8", "openvino", 1].set_index("model").loc["mobilenetv3"]
    assert set(here.xs("int8", level="dtype")["verdict"]) == {"held"}
    files = sorted((ROOT / "results" / ZEN5 / "runs").glob("*.npz"))
    other = [path.stem for path in files if not same_logits(path.name)]
    engines = ("ptq_int8_inductor", "ptq_int8_openvino", "qat_int8_openvino")
    assert other == [f"mobilenetv3_{engine}_cpu_seed0" for engine in engines]
    short = [
        f"{int(runs) - len(other)} of {runs} runs the same logits, to the last bit. INT8 held in "
        f"all, and on OpenVINO is {times(here, 'int8', 'openvino', form='{:.1f}')} times as fast "
        "as the fastest FP32",
    ]
    return short, [
        *common,
        f"In {int(runs) - len(other)} of them, the logits of all 2,000 images are the same to the "
        "last bit",
        f"AlexNet and ResNet-18 are {both(in_batches['speedup_vs_best_fp32'])} times as fast",
        f"It is {two:.2f} and {single:.2f} times as fast as the fastest FP32 at batch 1",
        f"It is {openvino['sqnr_db']:.1f} dB from FP32, and decides as FP32 does on "
        f"{100 * openvino['agreement_fp32']:.2f} % of the images",
        f"{two:.2f} and {single:.2f} at batch 1 on the newer EPYC",
    ]


def missing(page, sentences):
    """List the sentences that a page lacks."""
    words = " ".join((ROOT / page).read_text().split())
    return [sentence for sentence in sentences if sentence not in words]


def test_the_readme_and_the_findings_say_what_results_csv_says():
    one, _ = one_per_run()
    assert missing("README.md", findings(one) + of_int16(one)) == []
    assert missing(DETAILS, of_mobilenetv3(one)) == []
    for model in ("alexnet", "resnet18"):
        assert missing(DETAILS, of_a_plain_network(one, model)) == []


def test_the_readme_and_the_findings_say_what_several_seeds_give():
    sentences = of_the_seeds(*over_seeds())
    assert missing(DETAILS, sentences) == missing("README.md", sentences[:2]) == []


def test_the_readme_and_the_findings_say_what_other_processors_give():
    for short, others in (of_an_intel_xeon(), of_a_newer_epyc()):
        assert missing("README.md", short) == missing(DETAILS, others) == []


def test_the_findings_say_what_was_not_reached():
    one, _ = one_per_run()
    _, means = over_seeds()
    assert missing(DETAILS, of_what_was_not_reached(one, means)) == []


def test_the_findings_name_published_figures_as_published():
    details = (ROOT / DETAILS).read_text()
    section = details.partition("## What the published figures measured\n")[2]
    section = section.partition("\n## ")[0]
    told = re.findall(r"^- \*\*(\S+) (\S+) by (\S+), (\d+\.\d+) %", section, re.MULTILINE)
    rows = compare.published.load()
    names = {model.label: name for name, model in catalog.MODELS.items()}
    for model, dtype, method, percent in told:
        key = (names[model], dtype.lower(), method.lower())
        known = rows.set_index(["model", "dtype", "method"]).sort_index().loc[[key]]
        assert float(percent) in set(known["accuracy_pct"]), key
    assert len(told) == section.count("\n- ") == 8
    assert set(rows["images"]) == {25, 1600, 2000}
    assert "first 25 test images" in section and "first 1,600 test images" in section


def test_the_readme_has_the_int8_of_the_table_in_short():
    one, batch = one_per_run()
    _, short = tables.headline(one[one["dtype"] == "int8"], batch)
    finished = tables.finished(tables.Table("", "", "", short), None)
    assert cells.markdown(finished.cells) in (ROOT / "README.md").read_text()


def test_the_readme_and_the_findings_link_to_files_of_the_study_that_are_there():
    for page in (ROOT / "README.md", ROOT / DETAILS):
        links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
        assert links and [name for name in links if not (page.parent / name).is_file()] == []


def test_the_readme_and_the_findings_say_what_ablation_csv_says():
    breaks, others = of_the_ablation(pd.read_csv(ROOT / "results" / STUDY / "ablation.csv"))
    assert missing("README.md", breaks) == missing(DETAILS, breaks + others) == []


def test_bias_correction_brings_only_the_last_layer_of_resnet18_farther_from_fp32():
    layers = pd.read_csv(ROOT / "results" / STUDY / "ablation_layers.csv")
    layers = layers[(layers["model"] == "resnet18") & (layers["backend"] == "openvino")]
    layers = layers.set_index(["rung", "kind", "layer"])["sqnr_db"].sort_index()
    gained = layers["bias correction", "alone"] - layers[ablation.CHANNELS, "stacked"]
    # The first layer also gets farther, by 0.002 dB.
    assert gained.index[gained < -0.01].tolist() == ["fc"] and len(gained) == 21


def test_the_headline_says_no_more_than_the_verdicts_over_seeds():
    """The study's own judgement, over seeds and on other processors."""
    _, means = over_seeds()
    int8 = means[(means["method"] == "ptq") & (means["dtype"] == "int8")]
    counts = {model: Counter(rows["verdict"]) for model, rows in int8.groupby("model")}
    assert counts == {
        "alexnet": {"held": 8}, "resnet18": {"held": 8}, "mobilenetv3": {"held": 5, "undecided": 3}
    }  # fmt: skip
    assert missing("README.md", [
        "keeps AlexNet and ResNet-18 within 0.5 points of FP32** on all eight engines, over three "
        "seeds. MobileNetV3-Small stays within 0.5 points on all eight with one seed. Over three "
        "seeds it does so on five, and 2,000 images cannot decide the other three",
    ]) == []  # fmt: skip


def test_times_of_disturbed_rows_may_not_be_quoted():
    rows = pd.DataFrame({"model": ["resnet18"], "backend": ["half"], "contended": [True]})
    with pytest.raises(AssertionError):
        quiet(rows)
    assert undisturbed(rows).empty


@pytest.mark.parametrize("study", [STUDY, AMX, ZEN5])
def test_no_page_quotes_the_speed_up_of_a_disturbed_row_next_to_its_name(study):
    """A ratio of two decimals in a sentence that names the network and the engine of the row."""
    labels = {
        "half": ".half()", "openvino": "OpenVINO", "onednn": "onednn", "xnnpack": "XNNPACK",
        "inductor": "Inductor", "fbgemm": "fbgemm", "onnxruntime": "ONNX Runtime",
    }  # fmt: skip
    rows = table(study)
    rows = rows[rows["contended"].astype(bool) & (rows["seed"] == 0)]
    quoted = []
    for page in ("README.md", DETAILS):
        sentences = re.split(r"(?<=[.:;])\s", " ".join((ROOT / page).read_text().split()))
        for _, row in rows.iterrows():
            names = (catalog.MODELS[row["model"]].label, labels.get(row["backend"], "none"))
            for column in ("speedup_vs_best_fp32", "speedup_vs_eager_fp32"):
                number = f"{row[column]:.2f}"
                quoted += [
                    (number, sentence)
                    for sentence in sentences
                    if all(name in sentence for name in names)
                    and re.search(rf"(?<![\d.]){re.escape(number)} times", sentence)
                ]
    assert quoted == []
