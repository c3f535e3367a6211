"""The tables script on results made up for it."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils import stats
from utils.errors import UserError
from utils.results import COLUMNS, run_id

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
import cells
import compare
import latex
import style
import tables

RUN = dict(study="x", model="resnet18", method="ptq", dtype="int8", backend="fbgemm", device="cpu", simulated=False, seed=0)
BASELINE = dict(method="fp32", dtype="fp32", backend="native", size_mb=40.0, accuracy=0.975, agreement_fp32=1.0)
CONTROL = dict(method="control", dtype="fp32", backend="native")
SIMULATED = dict(dtype="int16", backend="simulated", simulated=True, batch_size=None)
TIMED = dict(
    latency_ms_p50=5.0, latency_ms_ci_low=4.9, latency_ms_ci_high=5.1, speedup_vs_eager_fp32=2.0,
    speedup_vs_eager_fp32_ci_low=1.9, speedup_vs_eager_fp32_ci_high=2.1, speedup_vs_best_fp32=1.25,
    speedup_vs_best_fp32_ci_low=1.2, speedup_vs_best_fp32_ci_high=1.3, best_fp32="onnxruntime", throughput_ips=200.0,
    contended=False, peak_memory_mb=300.0,
)  # fmt: skip
DIFFERS = dict(
    accuracy_difference=-0.005, accuracy_difference_ci_low=-0.008, accuracy_difference_ci_high=-0.002, mcnemar_p_holm=0.0004,
    margin=0.005, verdict="undecided", agreement_fp32=0.995, sqnr_db=28.04,
)  # fmt: skip
QUALITY = dict(
    n_test=2000, accuracy=0.97, accuracy_ci_low=0.9616, accuracy_ci_high=0.9766, precision=0.96, recall=0.98, f1=0.9699,
    size_mb=10.0, parameters=11172738, weight_modules=21, quantized_modules=20, cpu="A processor",
)  # fmt: skip


def results(tmp_path, *rows, study="x"):
    given = RUN | QUALITY | dict(threads=2, batch_size=1, study=study)
    path = tmp_path / study / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([given | row for row in rows]).reindex(columns=list(COLUMNS)).to_csv(path, index=False)
    return style.read(path)


def store(folder, run, right):
    """A run's npz: ten images of class 0, of which those in `right` are decided so."""
    logits = np.array([[1, 0] if image in right else [0, 1] for image in range(10)], np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{run_id(RUN | run)}.npz", logits=logits, y=np.zeros(10, np.int64))


def make(tmp_path, monkeypatch, study="x"):
    """Run the script; returns the bytes of all that it wrote, by name."""
    monkeypatch.setattr(sys, "argv", ["tables.py", "--study", study, "--results", str(tmp_path)])
    tables.main()
    written = [tmp_path / study / "tables.md", *sorted((tmp_path / study / "tables").iterdir())]
    return {path.name: path.read_bytes() for path in written}


def test_the_summary_says_what_a_run_lost_and_won(tmp_path):
    frame = tables.named(results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS))
    note, found = tables.summary(frame, 1)
    assert "more than the 0.5 points declared" in note
    assert found.iloc[0][["points to FP32", "p", "verdict", "smaller by %"]].tolist() == ["", "", "", "0.0"]
    assert found.iloc[1].to_dict() == {
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
        "x best FP32": "1.250 [1.200, 1.300]",
        "best FP32": "onnxruntime",
        "note": "",
    }


def test_the_headline_has_each_script_on_its_default_engine(tmp_path):
    rows = [BASELINE, CONTROL, TIMED, TIMED | dict(backend="x86"), SIMULATED, dict(method="qat", backend="onednn")]
    _, found = tables.headline(tables.named(results(tmp_path, *rows)), 1)
    assert found["variant"].tolist() == ["FP32 native", "INT16 PTQ simulated", "INT8 PTQ fbgemm"]
    assert found.iloc[2][["ms at batch 1", "x eager FP32"]].tolist() == ["5.00 [4.90, 5.10]", "2.000 [1.900, 2.100]"]


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
    rows = [BASELINE, CONTROL, qat, qat | dict(batch_size=64, offline_ips=312.34)]
    for run in (CONTROL, qat):
        store(tmp_path / "runs", run, range(8))
    frame = results(tmp_path, *[row | TIMED for row in rows])
    made = {table.name: tables.finished(table) for table in tables.tables_of(frame, tmp_path)}
    assert "resnet18_ptq" not in made
    found = made["resnet18_qat"].cells
    assert found["variant"].tolist() == ["FP32 native", "FP32 control native", "INT8 QAT fbgemm"]
    assert found["before conversion %"].tolist() == ["", "", "97.15"]
    assert found["best images/s"].tolist() == ["", "", "312.3 (batch 64)"]
    assert found[["parameters", "quantized modules"]].iloc[2].tolist() == ["11,172,738", "20 of 21"]
    assert "Control" in made["resnet18_qat"].note
    assert made["resnet18_speedup"].cells["batch"].tolist() == ["1", "1", "1", "64"]


def test_gain_compares_image_by_image(tmp_path):
    frame = tables.named(results(tmp_path, CONTROL, dict(method="ptq"), dict(method="qat"), dict(backend="onednn")))
    store(tmp_path, CONTROL, range(10))
    store(tmp_path, dict(method="qat"), range(8))
    store(tmp_path, dict(method="ptq"), (0, 1, 2, 3, 4, 8))
    store(tmp_path, dict(backend="onednn"), range(10))
    found = compare.gain(frame, tmp_path)
    assert found["variant"].tolist() == ["INT8 fbgemm"] * 3 + ["INT8 onednn"]
    assert found["difference"].tolist() == ["QAT minus PTQ", "QAT minus control", "PTQ minus control", "PTQ minus control"]
    assert found[["first %", "second %"]].iloc[0].tolist() == ["80.00", "60.00"]
    low, high = stats.paired_difference(3, 1, 10)
    assert found["points"].iloc[0] == f"+20.00 [{100 * low:+.2f}, {100 * high:+.2f}]"
    assert found["only first right"].tolist() == ["3", "0", "0", "0"]
    assert found["only second right"].tolist() == ["1", "2", "4", "0"]
    assert found["p"].tolist() == ["1.000", "1.000", "0.500", "1.000"]  # 10/16, 2/4, 2/16 and 1, the smallest by 4


def test_gain_wants_the_same_images(tmp_path):
    frame = tables.named(results(tmp_path, dict(method="ptq"), dict(method="qat")))
    store(tmp_path, dict(method="qat"), range(8))
    with pytest.raises(UserError, match="missing or damaged"):
        compare.gain(frame, tmp_path)
    np.savez(tmp_path / f"{run_id(RUN)}.npz", logits=np.ones((10, 2)), y=np.ones(10, np.int64))
    with pytest.raises(UserError, match="other test images"):
        compare.gain(frame, tmp_path)


def test_without_a_pair_there_is_no_gain(tmp_path):
    frame = tables.named(results(tmp_path, dict(method="ptq"), dict(method="qat", seed=1), CONTROL | dict(seed=2)))
    assert compare.gain(frame, tmp_path).empty


@pytest.mark.parametrize(
    ("published", "points", "verdict"),
    [
        (97.4, "+0.00 [-1.00, +1.00]", "reproduced"),
        (90.0, "+7.40 [+5.93, +8.92]", "higher here"),  # Wilson: 0.9661 to 0.9801 and 0.8861 to 0.9124
        (99.9, "-2.50 [-3.30, -1.83]", "lower here"),  # and 0.9964 to 0.9997
    ],
)
def test_a_published_accuracy_is_reproduced_where_the_interval_has_zero(tmp_path, published, points, verdict):
    ours = results(tmp_path, dict(accuracy=0.974) | DIFFERS | TIMED).iloc[0]
    row = compare.published.load().query("table == 'resnet18_ptq' and dtype == 'int8'").iloc[0].copy()
    row["accuracy_pct"] = published
    found = compare.beside(row, ours)
    assert (found["points"], found["verdict"]) == (points, verdict)
    assert (found["published x"], found["ours x"], found["published MiB"], found["ours MiB"]) == ("1.7", "2.000", "11.2", "10.00")
    assert found["reason"].endswith("not a gain by INT8; ours: -0.50 points to its own FP32 (undecided)")


def test_every_published_row_is_there_and_says_why_it_was_not_run(tmp_path):
    rows = [dict(dtype="fp16", backend="half", native_fp16=False), SIMULATED, dict(method="qat", accuracy_fake_quant=0.98)]
    note, found = compare.against_published(results(tmp_path, BASELINE, *[row | DIFFERS for row in rows]))
    published = compare.published.load()
    assert found["table"].tolist() == published["table"].tolist()
    run = found[found["verdict"] != "not run"]
    # of ResNet-18: 4 baselines, 2 x FP16 by PTQ, 2 x INT16 by PTQ, the network before conversion; nothing of the others
    assert len(run) == 9 and set(run["ours"]) == {
        "FP32 native", "FP16 PTQ half", "INT16 PTQ simulated", "INT8 QAT fake-quant (simulated)",
    }  # fmt: skip
    assert f"{len(published) - 9} not run" in note
    reasons = dict(zip(found["published"], found["reason"], strict=True))
    assert reasons["MobileNetV3-Small FP16 PTQ onnx tensorrt"].endswith("not run: TensorRT needs an NVIDIA GPU")
    assert reasons["AlexNet FP16 QAT amp native"].endswith("not run: AlexNet FP16 QAT amp is not in this study")
    assert reasons["AlexNet FP32 native"].endswith("not run: AlexNet FP32 native is not in this study")
    assert reasons["ResNet-18 FP32 native"].startswith("every script trained its own baseline")
    assert reasons["ResNet-18 INT16 PTQ simulated"].endswith("ours: no speed, as simulated")
    assert (
        "ours: FP16 emulated" in found[found["table"] == "summary"].set_index("published")["reason"]["ResNet-18 FP16 PTQ native"]
    )
    fake = found[found["published"].str.contains("fake-quant")].iloc[0]
    assert (fake["ours %"], fake["ours MiB"], fake["ours x"]) == ("98.00", "", "")  # nothing of the converted network


def test_two_variants_make_the_same_files_twice(tmp_path, monkeypatch):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS)
    first = make(tmp_path, monkeypatch)
    assert make(tmp_path, monkeypatch) == first
    made = ("headline", "summary", "resnet18_ptq", "resnet18_speedup", "published")
    assert set(first) == {"tables.md", *(f"{name}.{kind}" for name in made for kind in ("csv", "tex"))}
    text = first["tables.md"].decode()
    assert text.startswith("# Study x\n\n2000 test images (x), A processor, 2 threads. ")
    assert text.count("\n## ") == 5
    assert first["resnet18_speedup.csv"].decode().splitlines()[1].startswith("FP32 native,2,1,")


def test_a_study_of_drawings_without_quantized_runs(tmp_path, monkeypatch):
    results(tmp_path, BASELINE | TIMED, study="drawn")
    found = make(tmp_path, monkeypatch, "drawn")
    made = ("headline", "summary", "resnet18_speedup")
    assert set(found) == {"tables.md", *(f"{name}.{kind}" for name in made for kind in ("csv", "tex"))}
    assert b"verdict" not in found["summary.csv"] and b"Verdict" not in found["tables.md"]  # nothing to judge


def test_a_mistake_ends_the_script_with_one_line(tmp_path, monkeypatch):
    results(tmp_path, BASELINE, dict(method="ptq"), dict(method="qat"))
    with pytest.raises(SystemExit, match=r"^error: .*npz is missing or damaged.*$"):
        make(tmp_path, monkeypatch)
    assert not (tmp_path / "x/tables.md").exists()


def test_every_row_of_a_latex_table_has_all_columns(tmp_path, monkeypatch):
    results(tmp_path, BASELINE | TIMED, TIMED | DIFFERS, SIMULATED | DIFFERS)
    for name, content in make(tmp_path, monkeypatch).items():
        if name.endswith(".tex"):
            text = content.decode()
            assert re.findall(r"\\begin\{(\w+)\}", text) == re.findall(r"\\end\{(\w+)\}", text)[::-1]
            assert text.count(r"\begingroup") == text.count(r"\endgroup")
            plain = text.replace(r"\{", "").replace(r"\}", "")
            assert plain.count("{") == plain.count("}")
            (spec,) = re.findall(r"\\begin\{longtable\}\{@\{\}(.*)@\{\}\}", text)
            columns = len(re.sub(r">\{.*?\}p\{.*?\}", "p", spec))
            rows = [line for line in text.splitlines() if line.endswith(r"\\") and "caption" not in line]
            heads = [line for line in text.splitlines() if line.startswith(r"\toprule")]
            assert len(heads) == 2 and rows
            assert {len(re.findall(r"(?<!\\)&", line)) for line in rows + heads} == {columns - 1}
            assert rf"\label{{tab:x-{name[:-4].replace('_', '-')}}}" in text


def test_latex_prints_what_was_written():
    assert latex.escape("50 % & a_b #1 $2 {x} <0.001 C:\\ ~^|") == (
        r"50 \% \& a\_b \#1 \$2 \{x\} \textless{}0.001 C:\textbackslash{} \textasciitilde{}\textasciicircum{}\textbar{}"
    )
    assert latex.escape("-0.50 [-1.20, +0.20] ResNet-18") == "$-$0.50 [$-$1.20, +0.20] ResNet-18"


def test_seeds_make_mean_and_spread(tmp_path):
    rows = [dict(seed=seed, accuracy=value) for seed, value in enumerate((0.97, 0.98, 0.975))]
    frame = results(tmp_path, *rows, dict(model="alexnet", accuracy=0.9))
    (row,) = tables.over_seeds(frame).to_dict("records")
    expected = {"variant": "INT8 PTQ fbgemm", "seeds": "3", "mean": "97.50", "std": "0.50", "min": "97.00", "max": "98.00"}
    assert row == {"model": "ResNet-18"} | expected
    assert tables.named(frame)["variant"].tolist()[-1] == "INT8 PTQ fbgemm, seed 2"


def test_one_seed_has_no_spread(tmp_path):
    assert tables.over_seeds(results(tmp_path, dict(accuracy=0.9))) is None


def test_the_baseline_comes_first_and_simulated_runs_say_so(tmp_path):
    frame = results(tmp_path, SIMULATED, CONTROL, BASELINE)
    assert frame["series"].tolist() == ["FP32 native", "FP32 control native", "INT16 PTQ simulated"]
    one, batch = style.one_batch(frame)
    assert (len(one), batch) == (3, 1)


def test_a_table_lines_up():
    table = cells.markdown(pd.DataFrame({"a": ["x", "longer"], "b": ["1", "-22"]}))
    assert table.splitlines() == ["| a      |   b |", "| ------ | --: |", "| x      |   1 |", "| longer | -22 |"]


@pytest.mark.parametrize(("value", "text"), [(1.234, "1.23"), (float("nan"), "")])
def test_a_number_that_is_missing_is_left_empty(value, text):
    assert cells.number(value) == text
