"""The committed study: what is made from its runs is byte for byte what is committed, and README says what is in it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from utils import results

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
import cells
import compare
import style
import tables

ROOT = Path(__file__).resolve().parents[1]
STUDY = "cats_and_dogs"
RUNS = sorted((ROOT / "results" / STUDY / "runs").glob("*.json"))


def made(root):
    """All that `make figures` writes for the study, as bytes by path."""
    folders = (root / "results" / STUDY, root / "figures" / STUDY)
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found if path.parent.name != "runs"}


def test_make_figures_rebuilds_every_table_and_figure_byte_for_byte(tmp_path):
    for name in ("Makefile", "requirements.txt", "tests/requirements.txt", "results/published.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=lambda folder, names: [n for n in names if "." not in n])
    shutil.copytree(ROOT / "results" / STUDY / "runs", tmp_path / "results" / STUDY / "runs")
    results.rebuild(tmp_path / "results" / STUDY)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()  # the packages are those of this Python
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "figures", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    again, committed = made(tmp_path), made(ROOT)
    assert sorted(again) == sorted(committed)
    assert [name for name in again if again[name] != committed[name]] == []


def test_the_runs_are_of_one_machine_and_one_set_of_images_and_those_of_a_model_of_one_commit():
    own = [results.read(path) for path in RUNS]
    assert [results.run_id(record["run"]) for record in own] == [path.stem for path in RUNS] != []
    for section, name in (("environment", "cpu"), ("environment", "versions"), ("provenance", "data_sha256")):
        assert len({json.dumps(record[section][name]) for record in own}) == 1
    for model in style.MODELS:
        assert len({record["environment"]["git_commit"] for record in own if record["run"]["model"] == model}) == 1
    protocols = {entry["protocol"] for record in own for entry in record["timing"] if "protocol" in entry}
    assert len({record["environment"]["git_commit"] for record in own}) == len(protocols)  # no commit without its reason
    assert not any(record["environment"]["git_dirty"] for record in own)
    baselines = {
        record["run"]["model"]: record["provenance"]["artifact_sha256"] for record in own if record["run"]["method"] == "fp32"
    }
    assert all(record["provenance"]["baseline_sha256"] == baselines[record["run"]["model"]] for record in own)


def test_the_runs_tell_nothing_of_the_disk_that_they_come_from():
    for path in RUNS:
        assert not re.search(r'"/|[\s=]/\w', path.read_text()), path.name


# ---- README


def signed(values):
    return ", ".join(f"{100 * value:+.2f}" for value in values)


def listed(column, form):
    return ", ".join(form.format(value) for value in column)


def findings(one):
    """The sentences of README that have numbers, from one row a run of results.csv."""

    def of(method, dtype, backend):
        found = one[(one["method"] == method) & (one["dtype"] == dtype) & (one["backend"] == backend)]
        assert found["model"].tolist() == list(style.MODELS)
        return found

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


def test_the_readme_says_what_results_csv_says():
    one, batch = style.one_batch(tables.named(style.read(ROOT / "results" / STUDY / "results.csv")))
    text = (ROOT / "README.md").read_text()
    words = " ".join(text.split())
    assert [sentence for sentence in findings(one) if sentence not in words] == []
    assert cells.markdown(tables.finished(tables.Table("", "", *tables.headline(one, batch))).cells) in text
    for name in re.findall(r"\]\(((?:figures|results)/[^)#]+)", text):
        assert (ROOT / name).is_file(), name
