"""From the command line to the images of a study: its name, its output, its errors."""

import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests.records import record
from utils import cli, progress, results, studies
from utils.data import decoding, layouts, loading, synthetic
from utils.errors import UserError
from utils.paths import ROOT

PETS = [f"{kind}/{kind}.{n}.png" for kind in ("cat", "dog") for n in range(10)]


def folder_of(root, *names, seed=0):
    """Write noise images with these `names` below `root`; return `root`."""
    generator = np.random.default_rng(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name)
    return root


def options_for(tmp_path, folder=None, **changes):
    places = {"results": tmp_path / "results", "checkpoints": tmp_path / "checkpoints"}
    return cli.Options(("native",), data=folder and str(folder), **places, **changes)


def write_run(folder, study, digest):
    """Write a run on the images `digest`, with everything that `study_name` reads."""
    content = record() | {"format": results.FORMAT}
    content["provenance"] |= {"data_sha256": digest}
    path = folder / study / "runs" / f"{results.run_id(content['run'])}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


# ---- images


def test_load_splits_a_folder_and_describes_it(tmp_path):
    images = loading.load_images(options_for(tmp_path, folder_of(tmp_path / "Pets", *PETS)))
    assert (images.study, images.classes, images.broken) == ("pets", ("cat", "dog"), 0)
    assert [len(part) for part in (images.train, images.validation, images.test)] == [14, 2, 4]
    assert images.describe() == dict(
        study="pets",
        negative_class="cat",
        positive_class="dog",
        sha256=images.digest,
        broken=0,
        layout="class folders",
        near_duplicates=0,
        near_duplicate_pairs=[],
        train=14,
        validation=2,
        test=4,
    )


def test_broken_images_are_counted(tmp_path):
    root = folder_of(tmp_path / "pets", *PETS)
    (root / "cat" / "broken.png").write_bytes(b"")
    assert loading.load_images(options_for(tmp_path, root)).describe()["broken"] == 1


def test_smoke_run_takes_a_few_images_of_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SMOKE_COUNTS", {"train": 6, "val": 2, "test": 2})
    names = [
        f"{part}/{kind}/{n}.png"
        for part in ("train", "val", "test")
        for kind in ("cat", "dog")
        for n in range(4)
    ]
    images = loading.load_images(
        options_for(tmp_path, folder_of(tmp_path / "pets", *names), smoke=True)
    )
    assert images.study == "pets_smoke"
    parts = {"train": images.train, "val": images.validation, "test": images.test}
    assert {name: np.bincount(part.y).tolist() for name, part in parts.items()} == {
        "train": [3, 3],
        "val": [1, 1],
        "test": [1, 1],
    }
    assert all(part.names[i].startswith(name) for name, part in parts.items() for i in part.index)


def test_source_has_the_images_of_load_images(tmp_path):
    options = options_for(tmp_path, folder_of(tmp_path / "pets", *PETS))
    source, images = loading.open_source(options), loading.load_images(options)
    assert (source.study, source.classes, source.digest) == (
        images.study,
        images.classes,
        images.digest,
    )
    parts = {"train": images.train, "val": images.validation, "test": images.test}
    assert {name: rows.tolist() for name, rows in source.index.items()} == {
        name: part.index.tolist() for name, part in parts.items()
    }


def test_chosen_classes(tmp_path):
    names = [f"{kind}/{n}.png" for kind in ("fox", "wolf", "cats") for n in range(10)]
    root = folder_of(tmp_path / "animals", *names)
    images = loading.load_images(options_for(tmp_path, root, classes=("Wolf", "fox")))
    assert (images.study, images.classes) == ("animals_fox_wolf", ("fox", "wolf"))
    assert all(name.startswith(("fox/", "wolf/")) for name in images.train.names)
    with pytest.raises(UserError, match="3 classes"):
        loading.load_images(options_for(tmp_path, root))


def test_find_opens_nothing(tmp_path):
    folder = loading.find(
        options_for(tmp_path, folder_of(tmp_path / "pets", *PETS), classes=("dog", "cat"))
    )
    assert isinstance(folder, layouts.Folder) and len(folder.images) == 20
    assert loading.find(options_for(tmp_path)) is None
    assert not (tmp_path / "checkpoints").exists()


# ---- the name of the study


A, B = "a" * 64, "1a2b3c4d" + "0" * 56


def study_name(study, digest, folder):
    return studies.study_name(study, digest, results.images_digest(folder / study))


def test_study_without_runs_has_the_plain_name(tmp_path):
    assert study_name("pets", A, tmp_path) == "pets"
    (tmp_path / "pets" / "runs").mkdir(parents=True)
    assert study_name("pets", A, tmp_path) == "pets"


def test_study_of_the_same_images_has_the_same_name(tmp_path):
    write_run(tmp_path, "pets", A)
    assert study_name("pets", A, tmp_path) == "pets"


def test_study_of_other_images_is_named_after_them(tmp_path):
    write_run(tmp_path, "pets", A)
    assert study_name("pets", B, tmp_path) == "pets_1a2b3c4d"
    write_run(tmp_path, "pets_1a2b3c4d", B)
    assert study_name("pets", B, tmp_path) == "pets_1a2b3c4d"
    assert study_name("pets", A, tmp_path) == "pets"


def test_damaged_run_does_not_count(tmp_path):
    write_run(tmp_path, "pets", A)
    [path] = tmp_path.glob("pets/runs/*.json")
    path.with_name("a_copy.json").write_text("{")  # read first
    assert study_name("pets", B, tmp_path) == f"pets_{B[:8]}"
    path.write_text("{")
    assert study_name("pets", B, tmp_path) == "pets"


def test_other_images_get_a_separate_study(tmp_path, capsys):
    first = loading.open_source(options_for(tmp_path, folder_of(tmp_path / "a" / "pets", *PETS)))
    write_run(tmp_path / "results", "pets", first.digest)
    options = options_for(tmp_path, folder_of(tmp_path / "b" / "pets", *PETS, seed=1))
    capsys.readouterr()
    for _ in range(2):
        images = loading.load_images(options)
        study = f"pets_{images.digest[:8]}"
        assert images.study == study != "pets"
        assert capsys.readouterr().out.splitlines()[0] == (
            f"data: study {study}, because results/pets holds runs of other images; "
            f"results in {tmp_path / 'results' / study}"
        )
        if not (tmp_path / "results" / study).exists():
            write_run(tmp_path / "results", study, images.digest)
    assert loading.load_images(options_for(tmp_path, tmp_path / "a" / "pets")).study == "pets"


# ---- what is printed


def test_first_line_names_the_study_before_anything_is_decoded(tmp_path, monkeypatch, capsys):
    plain = decoding.decode

    def decode(content):
        progress.say("decoding")
        return plain(content)

    monkeypatch.setattr(decoding, "decode", decode)
    options = options_for(tmp_path, folder_of(tmp_path / "Pets", *PETS))
    digests = [loading.open_source(options).digest for _ in range(2)]
    lines = capsys.readouterr().out.splitlines()
    said = [
        f"data: study pets, results in {tmp_path / 'results' / 'pets'}",
        "data: 20 images (cat 10, dog 10), class folders",
        f"data: 14 train, 2 val, 4 test images, sha256 {digests[0][:12]}",
    ]
    assert lines == [said[0], *["decoding"] * 20, *said[1:], *said]


def test_first_line_of_a_smoke_run_on_drawn_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "SMOKE_COUNTS", {"train": 4, "val": 2, "test": 2})
    write_run(tmp_path / "results", "drawn", A)
    write_run(tmp_path / "results", "drawn_smoke", A)  # runs of other images do not matter
    source = loading.open_source(options_for(tmp_path, smoke=True))
    assert (source.study, source.classes) == ("drawn_smoke", synthetic.CLASSES)
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"data: study drawn_smoke, results in {tmp_path / 'results' / 'drawn_smoke'}",
        "data: 8 drawn images (train 4, val 2, test 2)",
    ]


# ---- errors


PROGRAM = """
import sys
sys.modules["torch"] = None  # importing it fails from now on
from pathlib import Path
from utils import cli
from utils.data import loading
from utils.errors import UserError

root = Path(sys.argv[1])
folders = {"results": root / "results", "checkpoints": root / "checkpoints"}
options = cli.Options(("native",), data=sys.argv[2], **folders)
for function in (loading.open_source, loading.load_images):
    try:
        function(options)
    except UserError as error:
        print("error:", str(error).splitlines()[0])
    except ImportError as error:
        print("imported:", error.name)
"""


def without_torch(tmp_path, folder):
    """Return what `open_source` and `load_images` raise if torch cannot be imported."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("data: ")]


@pytest.mark.parametrize(
    ("names", "empty", "message"),
    [
        (
            [f"{kind}/1.png" for kind in ("fox", "wolf", "cats")],
            (),
            "found 3 classes: cat (1 image), fox (1 image), wolf (1",
        ),
        ([*PETS[:10], "dog/1.png"], ("dog/1.png",), "none of the dog images can be read."),
        (["cat/1.png", *PETS[10:]], (), "the train part has 7 usable images and not both classes."),
    ],
)
def test_bad_data_is_refused_without_torch(tmp_path, names, empty, message):
    root = folder_of(tmp_path / "images", *names)
    for name in empty:
        (root / name).write_bytes(b"")
    lines = without_torch(tmp_path, root)
    assert len(lines) == 2
    assert all(line.startswith("error: ") and message in line for line in lines), lines


def test_good_data_is_opened_without_torch(tmp_path):
    lines = without_torch(tmp_path, folder_of(tmp_path / "pets", *PETS))
    assert lines == ["imported: torch"]  # by `load_images`


def test_part_without_one_of_the_classes_is_refused(tmp_path):
    names = [f"dog/dog.{n}.png" for n in range(10)]
    names.append("cat/cat.1.png")  # the only cat goes to the test part
    with pytest.raises(UserError, match="the train part has 7 usable images and not both classes"):
        loading.load_images(options_for(tmp_path, folder_of(tmp_path / "pets", *names)))


@pytest.mark.parametrize("smoke", [False, True])
def test_empty_part_is_refused(tmp_path, smoke):
    root = folder_of(tmp_path / "pets", "cat/1.png", "dog/1.png")  # both go to the test part
    with pytest.raises(UserError, match="the train part has 0 usable images"):
        loading.open_source(options_for(tmp_path, root, smoke=smoke))


def test_missing_gpu_is_reported_before_anything_is_decoded(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(loading, "open_source", lambda options: pytest.fail("images were decoded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch finds no usable GPU"):
        loading.load_images(
            options_for(tmp_path, folder_of(tmp_path / "pets", *PETS), device="cuda")
        )
    with pytest.raises(UserError, match="does not exist"):
        loading.load_images(options_for(tmp_path, tmp_path / "nowhere", device="cuda"))


@pytest.mark.parametrize(
    ("installed", "reason"), [(False, "pip install kagglehub"), (True, "no route to host")]
)
def test_failed_download_says_why_and_what_to_do(monkeypatch, installed, reason):
    def fail(_dataset):
        raise ConnectionError("no route to host\nand many more lines")

    monkeypatch.setitem(
        sys.modules,
        "kagglehub",
        types.SimpleNamespace(dataset_download=fail) if installed else None,
    )
    with pytest.raises(UserError, match=reason) as caught:
        loading.download()
    assert "\n" not in str(caught.value)


def test_kaggle_downloads_the_dissertations_data_set(tmp_path, monkeypatch):
    names = [f"dataset/{part}/{kind}s/{kind}.{n}.png" for part in ("training_set", "test_set")
             for kind in ("cat", "dog") for n in range(10)]  # fmt: skip
    single = "dataset/single_prediction/cat_or_dog_1.png"
    root, asked = folder_of(tmp_path / "versions" / "1", *names, single), []

    def dataset_download(name):
        asked.append(name)
        return str(root)

    monkeypatch.setitem(
        sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=dataset_download)
    )
    source = loading.open_source(options_for(tmp_path, "kaggle"))
    assert asked == ["d4rklucif3r/cat-and-dogs"]
    assert source.study == "cats_and_dogs"
    assert {name: len(rows) for name, rows in source.index.items()} == {
        "train": 16,
        "val": 4,
        "test": 20,
    }


def test_names_that_are_not_utf8_are_read(tmp_path):
    folder = folder_of(tmp_path / "pets", *PETS)
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        path.rename(path.with_name(f"{number}\udcff{path.suffix}"))
    images = loading.load_images(options_for(tmp_path, folder))
    assert sum(map(len, (images.train, images.validation, images.test))) == 20


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_are_reported_in_one_line(tmp_path, count, smoke):
    folder = folder_of(tmp_path / "pets", *PETS[:count], *PETS[10 : 10 + count])
    with pytest.raises(UserError, match="Give at least 3 different images of each class"):
        loading.load_images(options_for(tmp_path, folder, smoke=smoke))


def test_testing_on_the_training_images_is_refused(tmp_path, capsys):
    folder = folder_of(tmp_path / "pets", *PETS)
    for part in ("train", "test"):
        shutil.copytree(folder, tmp_path / "same" / part)
    with pytest.raises(UserError, match="test images that differ from the training images"):
        loading.load_images(options_for(tmp_path, tmp_path / "same"))
    assert "20 images are copies of test images and left out of train" in capsys.readouterr().out
