"""The committed studies are byte for byte what their runs give."""

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
SOURCES = ("runs", "ablation")  # folders of what was measured, from which all else is made
# Runs of other commits than most: what was added later, what a recipe changed, and rows that were timed again on a quiet machine.
ANEW = {
    (STUDY, "mobilenetv3"): [1, 3, 12, 17],
    (STUDY, "alexnet"): [1, 11],
    (STUDY, "resnet18"): [3],
}


def runs(study):
    return sorted((ROOT / "results" / study / "runs").glob("*.json"))


def written(*folders):
    """Files that all.py writes for a study, as bytes by name; the report without its pictures."""
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name not in SOURCES
    ]
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
def test_every_table_and_figure_is_rebuilt_from_the_runs_byte_for_byte(tmp_path, study):
    folder, drawn = (
        tmp_path / "results" / study,
        tmp_path / "figures" / study,
    )  # as here, for the report's links
    for source in filter(Path.is_dir, (ROOT / "results" / study / name for name in SOURCES)):
        shutil.copytree(source, folder / source.name)
    shutil.copy(ROOT / "results" / study / "test_images.json", folder)
    results.rebuild(folder)
    if (folder / "ablation").is_dir():
        ablation.rebuild(folder / "ablation")
    command = [
        sys.executable,
        ROOT / "figures/all.py",
        "--study",
        study,
        "--results",
        folder.parent,
        "--out",
        drawn,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    again = written(folder, drawn)
    committed = written(ROOT / "results" / study, ROOT / "figures" / study)
    assert sorted(again) == sorted(committed)
    assert [name for name in again if not same(name, again[name], committed[name])] == []


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_are_of_one_machine_and_one_set_of_images_and_those_of_a_model_of_one_commit_but_for_those_measured_anew(
    study,
):
    records = [results.read(path) for path in runs(study)]
    assert (
        [results.run_id(record["run"]) for record in records]
        == [path.stem for path in runs(study)]
        != []
    )
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
        assert (
            len(
                {
                    entry["protocol"]
                    for record in of_model
                    for entry in record["timing"]
                    if "protocol" in entry
                }
            )
            == 1
        )
    assert not any(record["environment"]["git_dirty"] for record in records)
    baselines = {
        (record["run"]["model"], record["run"]["seed"]): record["provenance"]["artifact_sha256"]
        for record in records
        if record["run"]["method"] == "fp32"
    }
    assert all(
        record["provenance"]["baseline_sha256"]
        == baselines[record["run"]["model"], record["run"]["seed"]]
        for record in records
    )


@pytest.mark.parametrize("study", STUDIES)
def test_the_runs_tell_nothing_of_the_disk_that_they_come_from(study):
    for path in runs(study):
        assert not re.search(r'"/|[\s=]/\w', path.read_text()), path.name


def test_a_newer_epyc_measured_the_fp32_networks_of_the_study_bit_for_bit():
    networks = [
        {(record["run"]["model"], record["provenance"]["baseline_sha256"]) for record in map(results.read, runs(study))
         if record["run"]["seed"] == 0} for study in (STUDY, ZEN5)
    ]  # fmt: skip
    assert networks[0] == networks[1] and len(networks[0]) == 3


@pytest.mark.parametrize("study", [STUDY, ZEN5])
def test_the_ladder_tells_nothing_of_the_disk_and_is_of_the_networks_of_the_runs(study):
    rungs = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results" / study / "ablation").glob("*.json"))
    ]
    assert not any(re.search(r'"/|[\s=]/\w', json.dumps(rung)) for rung in rungs) and rungs
    assert not any(rung["facts"]["smoke"] for rung in rungs)
    records = [results.read(path) for path in runs(study)]
    networks = {
        (record["run"]["model"], record["provenance"]["baseline_sha256"]) for record in records
    }
    assert {(rung["row"]["model"], rung["facts"]["baseline"]) for rung in rungs} <= networks
