"""`utils.results` and `utils.paths.atomic`: files stay readable despite failures and races."""

import copy
import csv
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.records import LOGITS, Y, record
from utils import paths, results, studies
from utils.catalog import Run
from utils.cli import Options
from utils.errors import UserError


def write(folder, **changes):
    return results.write(record(**changes), LOGITS, Y, folder)


def rows(folder):
    with (folder / "drawn" / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is written


def test_a_run_is_read_as_it_was_written(tmp_path):
    given = record()
    before = copy.deepcopy(given)
    path = results.write(given, LOGITS, Y, tmp_path)
    assert path == tmp_path / "drawn/runs/resnet18_ptq_int8_fbgemm_cpu_seed0.json"
    assert results.read(path) == {"format": results.FORMAT, **before} and given == before
    with np.load(path.with_suffix(".npz")) as stored:
        assert stored["logits"].dtype == np.float32 and np.array_equal(stored["logits"], LOGITS)
        assert stored["y"].dtype == np.int64 and np.array_equal(stored["y"], Y)


def test_the_table_has_fixed_columns_and_a_row_for_each_batch_size(tmp_path):
    write(tmp_path, batches=(1, 8, 16))
    text = (tmp_path / "drawn/results.csv").read_bytes()
    assert text.splitlines()[0].decode().split(",") == list(results.COLUMNS)
    assert len(set(results.COLUMNS)) == len(results.COLUMNS) and b"\r" not in text
    assert [row["batch_size"] for row in rows(tmp_path)] == ["1", "8", "16"]


def test_every_cell_is_its_runs_value(tmp_path):
    given = record()
    results.write(given, LOGITS, Y, tmp_path)
    row = rows(tmp_path)[1]
    for section, names in results.SECTIONS:
        values = given[section][1] if section == "timing" else given[section]
        for name in set(names) - {"mcnemar_p_holm"}:  # which depends on all runs
            if type(values[name]) is float:
                assert float(row[name]) == values[name], name
    expected = dict(
        sqnr_db="",
        git_dirty="",
        simulated="false",
        contended="true",
        isa="avx2 avx512_vnni",
        seed="0",
        model="resnet18",
    )
    assert {name: row[name] for name in expected} == expected


def test_p_values_are_adjusted_for_the_variants_of_the_study(tmp_path):
    for backend, p_value in (("fbgemm", 0.01), ("x86", 0.04), ("onednn", 0.03), ("qnnpack", 0.005)):
        given = record(backend=backend, batches=(1, 8))
        given["metrics"]["mcnemar_p"] = p_value
        results.write(given, LOGITS, Y, tmp_path)
    baseline = record(method="fp32", backend="native", batches=(1,))
    baseline["metrics"] |= {"mcnemar_p": None, "mcnemar_p_holm": None}
    results.write(baseline, LOGITS, Y, tmp_path)
    adjusted = {row["backend"]: row["mcnemar_p_holm"] for row in rows(tmp_path)}
    assert adjusted == dict(fbgemm="0.03", x86="0.06", onednn="0.06", qnnpack="0.02", native="")


def test_lists_of_numbers_take_one_line_and_read_back_the_same():
    given = {
        "a": [1.5, -2e-05, 3],
        "b": [[1, 2], [3.25]],
        "c": ["x, [1,  2]", None],
        "d": [],
        "e": {"f": [True]},
    }
    text = results.as_json(given)
    assert json.loads(text) == given
    assert ' "a": [ 1.5, -2e-05, 3 ]' in text


def test_rows_are_sorted_by_what_they_are_with_numbers_as_numbers(tmp_path):
    for seed in (10, 2):
        write(tmp_path, seed=seed, batches=(8, 16, 1))
    write(tmp_path, model="alexnet", batches=(1,))
    write(tmp_path, backend="qnnpack", batches=(1,))
    keys = [
        (row["model"], row["backend"], int(row["seed"]), int(row["batch_size"]))
        for row in rows(tmp_path)
    ]
    assert keys == sorted(keys) and len(keys) == 8
    seeds_and_batches = [key[2:] for key in keys if key[:2] == ("resnet18", "fbgemm")]
    assert seeds_and_batches == [(2, 1), (2, 8), (2, 16), (10, 1), (10, 8), (10, 16)]


def test_a_run_done_again_replaces_its_rows(tmp_path):
    write(tmp_path, accuracy=0.5)
    write(tmp_path, accuracy=0.75, batches=(1,))
    assert [row["accuracy"] for row in rows(tmp_path)] == ["0.75"]


def test_the_table_is_rebuilt_byte_for_byte_from_the_runs(tmp_path):
    for seed in (1, 0, 2):
        write(tmp_path, seed=seed)
    table = tmp_path / "drawn/results.csv"
    text = table.read_bytes()
    table.unlink()
    assert results.rebuild(tmp_path / "drawn") == table and table.read_bytes() == text
    # The files are created again in another order, as in a checkout by another user.
    for path in (tmp_path / "drawn/runs").iterdir():
        path.with_suffix(f"{path.suffix}.moved").write_bytes(path.read_bytes())
        path.unlink()
    for path in sorted((tmp_path / "drawn/runs").iterdir(), reverse=True):
        path.rename(path.with_suffix(""))
    assert results.rebuild(tmp_path / "drawn").read_bytes() == text


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (("alexnet", "fp32", "fp32", "native", "cuda", 3), "alexnet_fp32_native_cuda_seed3"),
        (("resnet18", "qat", "int8", "x86", "cpu", 0), "resnet18_qat_int8_x86_cpu_seed0"),
    ],
)
def test_names_of_runs(run, name):
    columns = ("model", "method", "dtype", "backend", "device", "seed")
    assert results.run_id(dict(zip(columns, run, strict=True))) == name


@pytest.mark.parametrize(("method", "backend"), [("ptq", "x86"), ("qat", "native")])
def test_describe_names_the_run(method, backend):
    options = Options((backend,), seed=4)
    run = results.describe(Run("alexnet", method, "int8"), "drawn", backend, options)
    kind = dict(method=method, dtype="int8")
    if backend == "native":
        kind = dict(method="control", dtype="fp32")
    assert run == dict(
        study="drawn",
        model="alexnet",
        **kind,
        backend=backend,
        device="cpu",
        simulated=False,
        seed=4,
    )
    assert list(run) == list(dict(results.SECTIONS)["run"])


def test_only_one_data_set_is_compared_with_the_dissertation():
    yes = ("cats_and_dogs", "cats_and_dogs_1a2b3c4d", "cats_and_dogs_smoke")
    no = ("drawn", "drawn_smoke", "pets", "data_cats_and_dogs", "petimages", "dogs_vs_cats")
    assert all(map(studies.is_dissertations, yes)) and not any(map(studies.is_dissertations, no))


# ---- what goes wrong


def test_a_number_that_json_cannot_hold_leaves_everything_as_it_was(tmp_path):
    write(tmp_path, accuracy=0.5)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        results.write(record(accuracy=float("nan")), LOGITS + 1, Y, tmp_path)
    assert files(tmp_path) == before


def damaged(change):
    """Make a function that applies `change(record)` to the content of a run's file."""

    def damage(content):
        given = json.loads(content)
        change(given)
        return json.dumps(given).encode()

    return damage


DAMAGE = [  # the reason in the message, and the damage
    ("is not valid JSON", lambda content: b""),
    ("is not valid JSON", lambda content: content[:-100]),
    ("is not valid JSON", lambda content: b"\xff\xfe" + content),
    (
        "is not valid JSON",
        lambda content: content.replace(b'"accuracy": 0.5', b'"accuracy": NaN'),
    ),
    ("was written by another version", damaged(lambda given: given.update(format=2))),
    ("was written by another version", damaged(lambda given: given.pop("format"))),
    (
        "is not a run (the whole: 'metrics' is a required property)",
        damaged(lambda given: given.pop("metrics")),
    ),
    (
        "is not a run (metrics.accuracy: 1.5 is greater than the maximum of 1)",
        damaged(lambda given: given["metrics"].update(accuracy=1.5)),
    ),
    (
        "is not a run (run.backend: ",
        damaged(lambda given: given["run"].update(backend="abacus")),
    ),
    (
        "is not a run (timing.0.batch_size: '8' is not of type",
        damaged(lambda given: given["timing"][0].update(batch_size="8")),
    ),
    ("is not a run (the whole: [] is not of type 'object')", lambda content: b"[]"),
    (
        "holds the run resnet18_ptq_int8_fbgemm_cpu_seed7",
        damaged(lambda given: given["run"].update(seed=7)),
    ),
]


def test_the_environment_says_how_long_the_script_has_taken():
    code = (
        "import time; from utils import environment; time.sleep(0.5); "
        "print(environment.describe(1)['script_s'])"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert 0.5 <= float(done.stdout) <= time.monotonic() - started + 0.1  # of a second


@pytest.mark.parametrize(("why", "damage"), DAMAGE)
def test_a_damaged_run_is_named_and_left_out_of_the_table(tmp_path, capsys, why, damage):
    path = write(tmp_path, accuracy=0.5)
    write(tmp_path, seed=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=re.escape(f"{path} {why}")):
        results.read(path)
    write(tmp_path, seed=2)
    assert {row["seed"] for row in rows(tmp_path)} == {"1", "2"}
    assert f"results: left out: {path} {why}" in capsys.readouterr().out
    assert results.images_digest(tmp_path / "drawn") == "a" * 64
    options = Options(("fbgemm",), results=tmp_path)
    assert results.find(Run("resnet18", "ptq", "int8"), "drawn", "fbgemm", options) is None
    write(tmp_path, accuracy=0.5)  # measured again
    assert {row["seed"] for row in rows(tmp_path)} == {"0", "1", "2"}


def test_a_copy_of_a_run_adds_no_row(tmp_path):
    path = write(tmp_path)
    path.with_name("copy.json").write_bytes(path.read_bytes())
    results.rebuild(tmp_path / "drawn")
    assert len(rows(tmp_path)) == 2


# ---- writing at the same time


WRITER = """
import sys, time
from pathlib import Path
from tests.records import LOGITS, Y, record; from utils import results
write_text = results.paths.write_text
def slowly(path, text):
    time.sleep(0.01)  # after reading the runs, before writing the table: others could write now
    write_text(path, text)
results.paths.write_text = slowly
for seed in map(int, sys.argv[2:]):
    results.write(record(seed=seed, batches=(1,)), LOGITS, Y, Path(sys.argv[1]))
    table = (Path(sys.argv[1]) / "drawn/results.csv").read_text()
    assert f",False,{seed},".lower() in table, f"the row of seed {seed} was lost"
"""


def test_eight_processes_that_write_at_once_lose_nothing(tmp_path):
    command = [sys.executable, "-c", WRITER, tmp_path]
    writers = [
        subprocess.Popen([*command, *map(str, range(first, 40, 8))], cwd=paths.ROOT)
        for first in range(8)
    ]
    assert [writer.wait(timeout=100) for writer in writers] == [0] * 8
    assert [row["seed"] for row in rows(tmp_path)] == [str(seed) for seed in range(40)]
    names = set(files(tmp_path / "drawn" / "runs"))
    assert len(names) == 80 and not any(name.endswith(".tmp") for name in names)


# ---- paths.atomic


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    paths.write_text(tmp_path / "file.txt", "old")
    with (
        pytest.raises(OSError, match="disk full"),
        paths.atomic(tmp_path / "file.txt") as temporary,
    ):
        temporary.write_text("new but")
        raise OSError("disk full")
    with pytest.raises(KeyboardInterrupt), paths.atomic(tmp_path / "file.txt"):
        raise KeyboardInterrupt
    assert files(tmp_path) == {"file.txt": b"old"}


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    with paths.atomic(path) as temporary:
        # Only a file on the same file system can be moved at once.
        assert temporary.parent == path.parent and not path.exists()
        temporary.write_text("first")
    with paths.atomic(path) as temporary:
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_files_are_readable_by_others_and_have_unix_line_ends(tmp_path):
    paths.write_text(tmp_path / "file.txt", "Gr\u00f6\u00dfe\nzwei\n")
    assert (tmp_path / "file.txt").read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\nzwei\n"
    assert sys.platform == "win32" or (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o644


def test_json_of_a_run_is_valid_for_strict_readers(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(write(tmp_path).read_text(), parse_constant=refuse)


def test_the_names_of_the_test_images_are_kept_once(tmp_path):
    names = ["cats/1.jpg", "caf\udce9\n.jpg"]
    for backend in ("fbgemm", "x86"):
        results.write(record(backend=backend), LOGITS, Y, tmp_path, names)
    assert results.test_images(tmp_path / "drawn") == names
    assert len(list(tmp_path.rglob("test_images.json"))) == 1
    results.write(record(), LOGITS, Y, tmp_path)  # a run that does not know them keeps them
    assert results.test_images(tmp_path / "drawn") == names
    for damage in ("", "{}", "[1]", "[", "\0"):
        (tmp_path / "drawn" / "test_images.json").write_text(damage)
        assert results.test_images(tmp_path / "drawn") == []
