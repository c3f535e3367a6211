"""The committed studies equal what their runs give, byte for byte."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantization import ablation
from utils import results

ROOT = Path(__file__).resolve().parents[1]
STUDY = "cats_and_dogs"
AMX, ZEN5 = "cats_and_dogs_amx", "cats_and_dogs_zen5"  # the same images on other processors
STUDIES = (STUDY, AMX, ZEN5)
SOURCES = ("runs", "ablation")  # folders with measurements, from which everything else is made
LARGEST_REPORT = 1.5e6  # bytes
# Numbers of runs from other commits than most: runs that were added later, runs of a changed
# recipe, and rows that were timed again on a quiet machine.
ANEW = {
    (STUDY, "mobilenetv3"): [1, 3, 12, 17],
    (STUDY, "alexnet"): [1, 11],
    (STUDY, "resnet18"): [3],
}


def runs(study):
    return sorted((ROOT / "results" / study / "runs").glob("*.json"))


def written(*folders):
    """Files that all.py writes for a study, as bytes by name."""
    files = {}
    for folder in folders:
        for path in folder.rglob("*"):
            made = path.is_file() and path.parent.name not in SOURCES and path.suffix != ".lock"
            if made:
                files[path.name] = path.read_bytes()
    return files


def same(name, one, other):
    """Whether two files are equal, pictures up to rounding.

    Processors differ in the last bit of a logarithm, and so by one step in a dozen pixels.
    """
    if one == other or not name.endswith(".png"):
        return one == other
    one, other = (np.asarray(Image.open(io.BytesIO(content)), int) for content in (one, other))
    return one.shape == other.shape and abs(one - other).max() <= 2


def networks(records):
    """Models and checksums of the FP32 networks that runs are compared with."""
    return {(record["run"]["model"], record["provenance"]["baseline_sha256"]) for record in records}


@pytest.mark.parametrize("study", STUDIES)
def test_every_table_and_figure_is_rebuilt_from_the_runs_byte_for_byte(tmp_path, study):
    # The report has links from one folder to the other.
    folder, drawn = tmp_path / "results" / study, tmp_path / "figures" / study
    for source in (ROOT / "results" / study / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(source, folder / source.name)
    shutil.copy(ROOT / "results" / study / "test_images.json", folder)
    results.rebuild(folder)
    if (folder / "ablation").is_dir():
        ablation.rebuild(folder / "ablation")
    options = ["--study", study, "--results", folder.parent, "--out", drawn]
    command = [sys.executable, ROOT / "figures/all.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    again = written(folder, drawn)
    assert len(again["report.html"]) < LARGEST_REPORT
    committed = written(ROOT / "results" / study, ROOT / "figures" / study)
    assert sorted(again) == sorted(committed)
    assert [name for name in again if not same(name, again[name], committed[name])] == []


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_share_a_machine_and_images_and_a_models_runs_most_often_a_commit(study):
    records = [results.read(path) for path in runs(study)]
    names = [results.run_id(record["run"]) for record in records]
    assert names and names == [path.stem for path in runs(study)]
    for section, name in (
        ("environment", "cpu"),
        ("environment", "versions"),
        ("provenance", "data_sha256"),
    ):
        assert len({json.dumps(record[section][name]) for record in records}) == 1
    for model in {record["run"]["model"] for record in records}:
        of_model = [record for record in records if record["run"]["model"] == model]
        commits = Counter(record["environment"]["git_commit"] for record in of_model)
        assert sorted(commits.values())[:-1] == ANEW.get((study, model), [])
        entries = [entry for record in of_model for entry in record["timing"]]
        assert len({entry["protocol"] for entry in entries if "protocol" in entry}) == 1
    assert not any(record["environment"]["git_dirty"] for record in records)


@pytest.mark.parametrize("study", STUDIES)
def test_every_run_is_compared_with_the_fp32_network_of_its_model_and_seed(study):
    records = [results.read(path) for path in runs(study)]
    networks = {}
    for record in records:
        run = record["run"]
        if run["method"] == "fp32":
            networks[run["model"], run["seed"]] = record["provenance"]["artifact_sha256"]
    for record in records:
        network = networks[record["run"]["model"], record["run"]["seed"]]
        assert record["provenance"]["baseline_sha256"] == network


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_do_not_reveal_the_disk_that_they_come_from(study):
    for path in runs(study):
        assert not re.search(r'"/|[\s=]/\w', path.read_text()), path.name


def test_a_newer_epyc_measured_the_fp32_networks_of_the_study_bit_for_bit():
    here, there = (
        networks(record for record in map(results.read, runs(study)) if record["run"]["seed"] == 0)
        for study in (STUDY, ZEN5)
    )
    assert here == there and len(here) == 3


@pytest.mark.parametrize("study", [STUDY, ZEN5])
def test_the_ablation_does_not_reveal_the_disk_and_has_the_networks_of_the_runs(study):
    files = sorted((ROOT / "results" / study / "ablation").glob("*.json"))
    steps = [json.loads(path.read_text()) for path in files]
    assert steps and not any(re.search(r'"/|[\s=]/\w', json.dumps(step)) for step in steps)
    assert not any(step["facts"]["smoke"] for step in steps)
    # Steps that were added later may be of a file with the same weights and other facts in it.
    of_steps = {
        (step["row"]["model"], step["facts"].get("same_weights_as", step["facts"]["baseline"]))
        for step in steps
    }
    assert of_steps <= networks(map(results.read, runs(study)))
