"""The tables script on made-up results."""

import argparse
import re

import numpy as np
import pandas as pd
import pytest
from records import write_run

from figures import tables
from figures.shared import cells, compare, frames, latex, script, seeds
from utils import caveats, stats
from utils.errors import UserError
from utils.results import COLUMNS, run_id

RUN = dict(
    study="x",
    model="resnet18",
    method="ptq",
    dtype="int8",
    backend="fbgemm",
    device="cpu",
    simulated=False,
    seed=0,
)
FP32 = dict(method="fp32", dtype="fp32", backend="native")
BASELINE = FP32 | dict(size_mb=40.0, accuracy=0.975, agreement_fp32=1.0)
CONTROL = dict(method="control", dtype="fp32", backend="native")
SIMULATED = dict(dtype="int16", backend="simulated", simulated=True, batch_size=None)
TIMED = dict(
    latency_ms_p50=5.0, latency_ms_ci_low=4.9, latency_ms_ci_high=5.1, speedup_vs_eager_fp32=2.0,
    speedup_vs_eager_fp32_ci_low=1.9, speedup_vs_eager_fp32_ci_high=2.1, speedup_vs_best_fp32=1.25,
    speedup_vs_best_fp32_ci_low=1.2, speedup_vs_best_fp32_ci_high=1.3, best_fp32="onnxruntime",
    throughput_ips=200.0, contended=False, peak_memory_mb=300.0,
)  # fmt: skip
DIFFERS = dict(
    accuracy_difference=-0.005, accuracy_difference_ci_low=-0.008, mcnemar_p_holm=0.0004,
    accuracy_difference_ci_high=-0.002, margin=0.005, verdict="undecided", agreement_fp32=0.995,
    sqnr_db=28.04,
)  # fmt: skip
QUALITY = dict(
    n_test=2000, accuracy=0.97, accuracy_ci_low=0.9616, accuracy_ci_high=0.9766, precision=0.96,
    recall=0.98, f1=0.9699, size_mb=10.0, parameters=11172738, weight_modules=21,
    integer_layers=20, cpu="A processor", tn=960, fp=40, fn=20, tp=980, negative_class="apples",
    positive_class="pears",
)  # fmt: skip


def results(tmp_path, *rows, study="x"):
    given = RUN | QUALITY | dict(threads=2, batch_size=1, study=study)
    path = tmp_path / study / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame([given | row for row in rows]).reindex(columns=list(COLUMNS))
    frame.to_csv(path, index=False)
    return frames.read(path)


def store(folder, run, right):
    """Write a run's npz: ten images of class 0, with correct decisions for those in `right`."""
    logits = np.array([[1, 0] if image in right else [0, 1] for image in range(10)], np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{run_id(RUN | run)}.npz", logits=logits, y=np.zeros(10, np.int64))


def make(tmp_path, study="x", out=None):
    """Run the script; return the bytes of all files that it wrote, by name."""
    args = argparse.Namespace(study=study, results=tmp_path, out=out)
    tables.make(script.read(args), args)
    folder = out or tmp_path / study
    written = [folder / "tables.md", *sorted((folder / "tables").iterdir())]
    return {path.name: path.read_bytes() for path in written}


def files(names):
    """Names of all files for the tables called `names`."""
    as_csv, as_latex = ({f"{name}.{kind}" for name in names} for kind in ("csv", "tex"))
    return {"tables.md"} | as_csv | as_latex


def test_the_summary_says_what_a_run_lost_and_won(tmp_path):
    frame = tables.named(results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS))
    note, content = tables.summary(frame, 1)
    assert "more than the 0.5 points declared" in note
    judged = content.iloc[0][["points to FP32", "p", "verdict", "smaller by %"]]
    assert judged.tolist() == ["", "", "", "0.0"]
    assert content.iloc[1].to_dict() == {
        "model": "ResNet-18",
        "variant": "INT8 PTQ fbgemm",
        "accuracy %": "97.00 [96.16, 97.66]",
        "points to FP32": "-0.50 [-0.80, -0.20]",
        "p": "<0.001",
        "verdict": "undecided",
        "agrees %": "99.50",
        "SQNR dB": "28.0",
        "MiB": "10.00",
        "smaller by %": "75.0",
        "ms at batch 1": "5.00 [4.90, 5.10]",
        "x eager FP32": "2.000 [1.900, 2.100]",
        "x same engine": "",
        "x best FP32": "1.250 [1.200, 1.300]",
        "best FP32": "onnxruntime",
        "note": "",
    }


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([1, 1], "Every row was timed in one session"),
        ([3, 3, 1], "2 of 3 rows were timed in several sessions"),
        ([3, 4], "Rows were timed in 3 sessions or more"),
        ([None], "Nothing was timed"),
    ],
)
def test_the_page_says_what_its_intervals_cover(counts, words):
    assert words in tables.of_sessions(pd.DataFrame({"n_sessions": counts}, dtype=float))


def test_a_value_without_an_interval_has_no_brackets():
    frame = pd.DataFrame({"x": [1.0, 2.0], "x_ci_low": [0.9, None], "x_ci_high": [1.1, None]})
    assert tables.with_interval(frame, "x", "{:.1f}").tolist() == ["1.0 [0.9, 1.1]", "2.0"]


def test_a_converted_speedup_is_marked(tmp_path):
    converted = TIMED | DIFFERS | {"best_fp32_converted": True}
    frame = tables.named(results(tmp_path, BASELINE | TIMED, converted))
    _, content = tables.summary(frame, 1)
    assert content["note"].tolist() == ["", "converted"]


def test_the_headline_has_each_script_on_the_engine_that_is_fastest_over_the_models(tmp_path):
    ratios = {
        ("resnet18", "fbgemm"): 9.0,
        ("alexnet", "fbgemm"): 0.5,
        ("resnet18", "x86"): 2.5,
        ("alexnet", "x86"): 2.5,
        ("resnet18", "openvino"): 99.0,  # on one model only
    }
    int8 = [
        TIMED | dict(model=model, backend=name, speedup_vs_best_fp32=x)
        for (model, name), x in ratios.items()
    ]
    qat = dict(method="qat", backend="onednn")
    # One of these is not timed, so the table shows the first one in the catalog.
    int16 = [SIMULATED, TIMED | dict(dtype="int16", backend="onnxruntime")]
    frame = results(tmp_path, BASELINE, CONTROL, *int8, qat, *int16)
    _, content = tables.headline(tables.named(frame), 1)
    assert content[["model", "variant"]].to_numpy().tolist() == [
        ["AlexNet", "INT8 PTQ x86"],
        ["ResNet-18", "FP32 native"],
        ["ResNet-18", "FP32 control native"],
        ["ResNet-18", "INT16 PTQ simulated"],
        ["ResNet-18", "INT8 PTQ x86"],
        ["ResNet-18", "INT8 QAT onednn"],
    ]
    times = content.iloc[0][["ms at batch 1", "x best FP32"]]
    assert times.tolist() == ["5.00 [4.90, 5.10]", "2.500 [1.200, 1.300]"]


def test_the_headline_has_the_first_seed(tmp_path):
    frame = results(tmp_path, TIMED | dict(seed=1), TIMED, TIMED | dict(seed=2))
    _, content = tables.headline(tables.named(frame), 1)
    assert content["variant"].tolist() == ["INT8 PTQ fbgemm, seed 0"]


def test_notes_mark_what_cannot_be_compared(tmp_path):
    rows = [
        TIMED,
        TIMED | dict(backend="onednn", contended=True),
        TIMED | dict(dtype="fp16", backend="half", native_fp16=False),
        TIMED | dict(dtype="fp16", backend="amp", native_fp16=True),
        TIMED | dict(backend="qnnpack", isa="avx2 avx512f"),
        SIMULATED,
        dict(backend="x86", threads=1, batch_size=None),
    ]
    frame = results(tmp_path, *rows)
    assert dict(zip(frame["backend"], cells.notes(frame), strict=True)) == {
        "fbgemm": "",
        "onednn": "contended",
        "half": "FP16 emulated",
        "amp": "",
        "qnnpack": "qnnpack off ARM",
        "simulated": "simulated",
        "x86": "timed otherwise",
    }


def test_a_table_of_qat_has_its_baseline_control_and_best_throughput(tmp_path):
    qat = dict(method="qat", accuracy_fake_quant=0.9715)
    rows = [
        BASELINE,
        CONTROL | dict(integer_layers=None),
        qat,
        qat | dict(batch_size=64, offline_ips=312.34),
    ]
    for run in (CONTROL, qat):
        store(tmp_path / "runs", run, range(8))
    frame = results(tmp_path, *[row | TIMED for row in rows])
    made = {table.name: table for table in tables.tables_of(frame, tmp_path)}
    assert "resnet18_ptq" not in made
    content = made["resnet18_qat"].cells
    assert content["variant"].tolist() == ["FP32 native", "FP32 control native", "INT8 QAT fbgemm"]
    assert content["before conversion %"].tolist() == ["", "", "97.15"]
    assert content["best images/s"].tolist() == ["", "", "312.3 (batch 64)"]
    assert content["integer layers"].tolist() == ["20 of 21", "", "20 of 21"]
    assert content["parameters"].tolist() == ["11,172,738"] * 3
    note = made["resnet18_qat"].note
    assert "Control" in note and "for the class pears" in note
    assert made["resnet18_speedup"].cells["batch"].tolist() == ["1", "1", "1", "64"]


def test_gain_compares_image_by_image(tmp_path):
    runs = (CONTROL, dict(method="ptq"), dict(method="qat"), dict(backend="onednn"))
    frame = tables.named(results(tmp_path, *runs))
    store(tmp_path, CONTROL, range(10))
    store(tmp_path, dict(method="qat"), range(8))
    store(tmp_path, dict(method="ptq"), (0, 1, 2, 3, 4, 8))
    store(tmp_path, dict(backend="onednn"), range(10))
    gains = compare.gain(frame, tmp_path)
    assert gains["variant"].tolist() == ["INT8 fbgemm"] * 3 + ["INT8 onednn"]
    assert gains["difference"].tolist() == [
        "QAT minus PTQ",
        "QAT minus control",
        "PTQ minus control",
        "PTQ minus control",
    ]
    assert gains[["first %", "second %"]].iloc[0].tolist() == ["80.00", "60.00"]
    low, high = stats.paired_difference(3, 1, 10)
    assert gains["points"].iloc[0] == f"+20.00 [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert gains["only first right"].tolist() == ["3", "0", "0", "0"]
    assert gains["only second right"].tolist() == ["1", "2", "4", "0"]
    # p-values 10/16, 2/4, 2/16 and 1; Holm multiplies the smallest by 4.
    assert gains["p"].tolist() == ["1.000", "1.000", "0.500", "1.000"]


def test_gain_wants_the_same_images(tmp_path):
    frame = tables.named(results(tmp_path, dict(method="ptq"), dict(method="qat")))
    store(tmp_path, dict(method="qat"), range(8))
    with pytest.raises(UserError, match="missing or damaged"):
        compare.gain(frame, tmp_path)
    np.savez(tmp_path / f"{run_id(RUN)}.npz", logits=np.ones((10, 2)), y=np.ones(10, np.int64))
    with pytest.raises(UserError, match="other test images"):
        compare.gain(frame, tmp_path)


def test_without_a_pair_there_is_no_gain(tmp_path):
    runs = (dict(method="ptq"), dict(method="qat", seed=1), CONTROL | dict(seed=2))
    assert compare.gain(tables.named(results(tmp_path, *runs)), tmp_path).empty


@pytest.mark.parametrize(
    ("published", "images", "points", "verdict"),
    [
        # Wilson interval of ours: 0.9661 to 0.9801; of the published ones: see below.
        (97.4, 2000, "+0.00 [-1.00, +1.00]", "reproduced"),
        (90.0, 2000, "+7.40 [+5.93, +8.92]", "higher here"),  # 0.8861 to 0.9124
        (99.9, 2000, "-2.50 [-3.30, -1.83]", "lower here"),  # 0.9964 to 0.9997
        (92.0, 25, "+5.40 [-0.43, +22.38]", "reproduced"),  # 0.7503 to 0.9778
    ],
)
def test_a_published_accuracy_is_reproduced_where_the_interval_has_zero(
    tmp_path, published, images, points, verdict
):
    ours = results(tmp_path, dict(accuracy=0.974) | DIFFERS | TIMED).iloc[0]
    rows = compare.published.load().query("table == 'resnet18_ptq' and dtype == 'int8'")
    row = rows.iloc[0].copy()
    row["accuracy_pct"], row["images"], row["measured"] = published, images, "as named"
    line = compare.line(row, ours)
    assert (line["points"], line["verdict"]) == (points, verdict)
    other = pd.Series({**row, "measured": "something else"})
    assert compare.line(other, ours)["verdict"] == "something else"
    assert (line["published x"], line["ours x"]) == ("1.7", "2.000")
    assert (line["published MiB"], line["ours MiB"]) == ("11.2", "10.00")
    reason = "every logit is the same; ours: -0.50 points to its FP32 (undecided)"
    assert line["reason"].endswith(reason)


def test_every_published_row_is_there_and_says_why_it_was_not_run(tmp_path):
    rows = [
        dict(dtype="fp16", backend="half", native_fp16=False),
        SIMULATED,
        dict(method="qat", accuracy_fake_quant=0.98),
    ]
    frame = results(tmp_path, BASELINE, *[row | DIFFERS for row in rows])
    note, content = compare.against_published(frame)
    published = compare.published.load()
    assert content["table"].tolist() == published["table"].tolist()
    run = content[content["verdict"] != "not run"]
    # ResNet-18: 4 baselines, 2 x FP16 by PTQ, 2 x INT16 by PTQ, the network before conversion.
    assert len(run) == 9 and set(run["ours"]) == {
        "FP32 native", "FP16 PTQ half", "INT16 PTQ simulated", "INT8 QAT fake-quant (simulated)",
    }  # fmt: skip
    assert f"{len(published) - 9} not run" in note
    reasons = dict(zip(content["published"], content["reason"], strict=True))
    for name, ending in {
        "MobileNetV3-Small FP16 PTQ onnx tensorrt": "not run: TensorRT needs an NVIDIA GPU",
        "AlexNet FP16 QAT amp native": "not run: AlexNet FP16 QAT amp is not in this study",
        "AlexNet FP32 native": "not run: AlexNet FP32 native is not in this study",
        "ResNet-18 INT16 PTQ simulated": "ours: no speed, as simulated",
    }.items():
        assert reasons[name].endswith(ending)
    assert reasons["ResNet-18 FP32 native"].startswith("every script trained its own baseline")
    in_summary = content[content["table"] == "summary"].set_index("published")["reason"]
    assert "ours: FP16 emulated" in in_summary["ResNet-18 FP16 PTQ native"]
    fake = content[content["published"].str.contains("fake-quant")].iloc[0]
    # There is nothing about the converted network.
    assert (fake["ours %"], fake["ours MiB"], fake["ours x"]) == ("98.00", "", "")


def test_two_variants_make_the_same_files_twice(tmp_path):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS)
    first = make(tmp_path)
    assert make(tmp_path) == first
    made = ("headline", "summary", "resnet18_ptq", "resnet18_speedup")
    assert set(first) == files(made)
    text = first["tables.md"].decode()
    assert text.startswith("# Study x\n\n2000 test images (x), A processor, 2 threads. ")
    assert text.count("\n## ") == 4
    assert first["resnet18_speedup.csv"].decode().splitlines()[1].startswith("FP32 native,2,1,")


def test_out_says_where_tables_go(tmp_path):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS)
    elsewhere = make(tmp_path, out=tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["results.csv"]
    assert elsewhere == make(tmp_path)


def test_a_study_of_drawings_without_quantized_runs(tmp_path):
    results(tmp_path, BASELINE | TIMED, study="drawn")
    written = make(tmp_path, "drawn")
    made = ("headline", "summary", "resnet18_speedup")
    assert set(written) == files(made)
    # There is nothing to judge.
    assert b"verdict" not in written["summary.csv"] and b"Verdict" not in written["tables.md"]


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
def test_only_its_data_set_is_compared_with_the_dissertation(tmp_path, study, theirs):
    frame = results(tmp_path, BASELINE | TIMED, study=study)
    names = [table.name for table in tables.tables_of(frame, tmp_path)]
    assert ("published" in names) == theirs


def test_answers_that_are_missing_write_nothing(tmp_path):
    results(tmp_path, BASELINE, dict(method="ptq"), dict(method="qat"))
    with pytest.raises(UserError, match=r"^.*npz is missing or damaged.*$"):
        make(tmp_path)
    assert not (tmp_path / "x/tables.md").exists()


def test_the_tables_name_the_classes_of_their_study(tmp_path):
    fruit = dict(study="fruit", classes=("apples", "pears"))
    write_run(tmp_path, "resnet18", "fp32", "fp32", "native", **fruit)
    write_run(tmp_path, "resnet18", "ptq", "int8", "fbgemm", **fruit)
    for content in make(tmp_path, "fruit").values():
        assert not re.search(rb"\b(cat|dog)s?\b", content)


# ---- zero, caveats and processors


def test_a_file_that_is_a_little_larger_is_not_smaller_by_minus_zero(tmp_path):
    runs = (BASELINE, CONTROL | dict(size_mb=40.001), dict(size_mb=40.12))
    frame = tables.named(results(tmp_path, *runs))
    assert tables.summary(frame, 1)[1]["smaller by %"].tolist() == ["0.0", "0.0", "-0.3"]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (1.234, "{:.2f}", "1.23"),
        (float("nan"), "{:.2f}", ""),
        (-0.0004, "{:.2f}", "0.00"),
        (-0.0004, "{:+.2f}", "+0.00"),
        (-0.0, "{:.1f}", "0.0"),
        (-0.05, "{:+.2f}", "-0.05"),
        (0, "{}", "0"),
        (0.0, "{:.0f} of ", "0 of "),
    ],
)
def test_a_number_has_no_minus_if_it_rounds_to_zero(value, form, text):
    assert cells.number(value, form) == text


def test_every_row_of_a_smoke_study_says_so(tmp_path):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS, SIMULATED | DIFFERS, study="pets_smoke")
    text = make(tmp_path, "pets_smoke")["tables.md"].decode()
    rows = [line for line in text.splitlines() if re.match(r"\| (ResNet-18|FP32|INT)", line)]
    assert len(rows) == 3 + 3 + 3 + 2 and all("| smoke" in row for row in rows)
    assert text.count(caveats.MEANING["smoke"]) == 4


def test_a_baseline_at_chance_and_a_small_test_set_are_noted_and_explained(tmp_path):
    guess = dict(n_test=100, accuracy=0.5, tn=25, fp=25, fn=25, tp=25)
    small = dict(n_test=100, tn=49, fp=1, fn=2, tp=48)
    rows = [
        BASELINE | guess,
        guess | dict(margin=0.005, accuracy_difference=0.0),
        small | dict(backend="x86", margin=0.005),
    ]
    results(tmp_path, *rows)
    made = make(tmp_path)
    notes = pd.read_csv(tmp_path / "x/tables/summary.csv").set_index("variant")["note"]
    assert "FP32 at chance" in notes["FP32 native"]
    assert "FP32 at chance; too few images" in notes["INT8 PTQ fbgemm"]
    assert "too few images" in notes["INT8 PTQ x86"]
    assert "FP32 at chance" not in notes["INT8 PTQ x86"]
    text = made["tables.md"].decode()
    assert f"held needs at least {caveats.fewest_images(0.005)} test images" in text
    assert caveats.MEANING["FP32 at chance"] in text


def test_several_processors_do_not_pass_unnoticed(tmp_path):
    rows = [BASELINE | TIMED, TIMED | DIFFERS, TIMED | DIFFERS | dict(backend="x86", cpu="Another")]
    results(tmp_path, *rows)
    text = make(tmp_path)["tables.md"].decode()
    assert "2000 test images (x), A processor (2 runs), Another (1 run), 2 threads." in text
    marked = [
        line.split("|")[2].strip()
        for line in text.splitlines()
        if "other processor" in line and line.startswith("| ResNet")
    ]
    assert marked == ["INT8 PTQ x86"]  # in the table of all variants; the headline has one engine
    assert caveats.MEANING["other processor"] in text


def test_processors_of_one_name_differ_by_their_instruction_sets(tmp_path):
    both = dict(isa="avx2 avx512_vnni")
    rows = [
        BASELINE | TIMED | both,
        TIMED | DIFFERS | both,
        TIMED | DIFFERS | dict(backend="x86", isa="avx2"),
    ]
    results(tmp_path, *rows)
    text = make(tmp_path)["tables.md"].decode()
    processors = "A processor with avx2 avx512_vnni (2 runs), A processor with avx2 (1 run)"
    assert f"{processors}, 2 threads." in text
    assert "other processor" in text


def test_one_processor_is_not_a_caveat(tmp_path):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS)
    text = make(tmp_path)["tables.md"].decode()
    assert "2000 test images (x), A processor, 2 threads." in text and "processor:" not in text


def test_every_row_of_a_latex_table_has_all_columns(tmp_path):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS, SIMULATED | DIFFERS)
    for name, content in make(tmp_path).items():
        if name.endswith(".tex"):
            text = content.decode()
            ends = re.findall(r"\\end\{(\w+)\}", text)
            assert re.findall(r"\\begin\{(\w+)\}", text) == ends[::-1]
            assert text.count(r"\begingroup") == text.count(r"\endgroup")
            plain = text.replace(r"\{", "").replace(r"\}", "")
            assert plain.count("{") == plain.count("}")
            (spec,) = re.findall(r"\\begin\{longtable\}\{@\{\}(.*)@\{\}\}", text)
            columns = len(re.sub(r">\{.*?\}p\{.*?\}", "p", spec))
            lines = [line for line in text.splitlines() if "caption" not in line]
            rows = [line for line in lines if line.endswith(r"\\")]
            heads = [line for line in lines if line.startswith(r"\toprule")]
            assert len(heads) == 2 and rows
            assert {len(re.findall(r"(?<!\\)&", line)) for line in rows + heads} == {columns - 1}
            assert rf"\label{{tab:x-{name[:-4].replace('_', '-')}}}" in text


def test_latex_prints_what_was_written():
    assert latex.escape("50 % & a_b #1 $2 {x} <0.001 C:\\ ~^|") == (
        r"50 \% \& a\_b \#1 \$2 \{x\} \textless{}0.001 C:\textbackslash{} "
        r"\textasciitilde{}\textasciicircum{}\textbar{}"
    )
    assert latex.escape("-0.50 [-1.20, +0.20] ResNet-18") == "$-$0.50 [$-$1.20, +0.20] ResNet-18"


def test_seeds_make_mean_and_spread(tmp_path):
    """Of ten images, FP32 gets all right with both seeds; INT8 gets nine and seven right."""
    rows = [kind | dict(seed=seed) for kind in (BASELINE, {}) for seed in (0, 1)]
    for row, right in zip(rows, (10, 10, 9, 7), strict=True):
        store(tmp_path / "x/runs", row, range(right))
    frame = results(tmp_path, *rows, dict(model="alexnet"))
    whole, int8 = tables.over_seeds(seeds.together(frame, tmp_path / "x/runs")).to_dict("records")
    assert (whole["variant"], whole["seeds"]) == ("FP32 native", "2")
    assert (whole["std"], whole["points to FP32"]) == ("0.00", "")
    assert (int8["model"], int8["variant"], int8["seeds"]) == ("ResNet-18", "INT8 PTQ fbgemm", "2")
    # The standard deviation is sqrt(2) 10; t of two seeds is 12.7.
    assert int8["mean %"] == "80.00 [0.00, 100.00]" and int8["std"] == "14.14"
    assert int8["points to FP32"].startswith("-20.00 [") and int8["verdict"] == "undecided"
    assert tables.named(frame)["variant"].tolist()[-1] == "INT8 PTQ fbgemm, seed 1"


def by_name(tmp_path, rows):
    """Make all tables of a study, by name."""
    made = tables.tables_of(results(tmp_path, *rows), tmp_path / "x")
    return {table.name: table for table in made}


def test_tables_of_runs_have_the_lowest_seed_and_one_table_has_all(tmp_path):
    rows = [
        dict(seed=2, accuracy=0.9),
        dict(seed=1, accuracy=0.7),
        dict(backend="onednn", seed=2, accuracy=0.8),
    ]
    for row, right in zip(rows, (9, 7, 8), strict=True):
        store(tmp_path / "x/runs", row, range(right))
    several, single = by_name(tmp_path, rows), by_name(tmp_path, rows[1:])
    for name in ("summary", "resnet18_ptq"):
        variants = zip(
            several[name].cells["variant"], several[name].cells["accuracy %"], strict=True
        )
        shown = {variant: accuracy[:5] for variant, accuracy in variants}
        assert shown == {"INT8 PTQ fbgemm, seed 1": "70.00", "INT8 PTQ onednn, seed 2": "80.00"}
    over_seeds = several["over_seeds"].cells[["variant", "seeds"]]
    assert over_seeds.to_numpy().tolist() == [["INT8 PTQ fbgemm", "2"]]
    assert tables.LOWEST.strip() in several["summary"].note
    assert "over_seeds" not in single and tables.LOWEST.strip() not in single["summary"].note


def test_seeds_of_other_test_images_are_refused(tmp_path):
    rows = [dict(seed=0), dict(seed=1)]
    for row in rows:
        store(tmp_path, row, range(9))
    other = {"logits": np.zeros((10, 2), np.float32), "y": np.ones(10, np.int64)}
    np.savez(tmp_path / f"{run_id(RUN | rows[1])}.npz", **other)
    with pytest.raises(UserError, match="are about different test images"):
        seeds.together(results(tmp_path, *rows), tmp_path)


def test_one_seed_has_no_spread(tmp_path):
    assert seeds.together(results(tmp_path, dict(accuracy=0.9)), tmp_path).empty


def test_the_baseline_comes_first_and_simulated_runs_say_so(tmp_path):
    frame = results(tmp_path, SIMULATED, CONTROL, BASELINE)
    assert frame["series"].tolist() == ["FP32 native", "FP32 control native", "INT16 PTQ simulated"]
    one, batch = frames.one_batch(frame)
    assert (len(one), batch) == (3, 1)


def test_markdown_holds_what_a_cell_says():
    table = cells.markdown(pd.DataFrame({"a": ["x|y", "<b>bold", "p <0.001 < 1"]}))
    rows = [line.strip("| ") for line in table.splitlines()[2:]]
    assert rows == [r"x\|y", r"\<b>bold", "p <0.001 < 1"]


def test_a_table_lines_up():
    table = cells.markdown(pd.DataFrame({"a": ["x", "longer"], "b": ["1", "-22"]}))
    assert table.splitlines() == [
        "| a      |   b |",
        "| ------ | --: |",
        "| x      |   1 |",
        "| longer | -22 |",
    ]
