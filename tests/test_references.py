"""Rows of a study have one FP32 reference, and rows that were slowed down say so."""

import pytest

from utils import references

PLACE = dict(
    model="alexnet", device="cpu", cpu="a processor", threads=2, batch_size=1,
    protocol="palindromic-rounds/5", torch="2.13.0",
)  # fmt: skip
SEARCH = {"native": 20.0, "onnxruntime": 10.0, "xnnpack": 8.0}


def row(best, speedup, search=SEARCH, eager=20.0, **changes):
    """A record with one timing entry, and its row."""
    record = {"environment": {"gpu": None}, "timing": [{"fp32_ms": search}]}
    columns = PLACE | {
        "best_fp32": best, "best_fp32_ms": 10.0, "eager_fp32_ms": eager, "contended": False,
        "speedup_vs_best_fp32": speedup, "speedup_vs_best_fp32_ci_low": 0.9 * speedup,
        "speedup_vs_best_fp32_ci_high": 1.1 * speedup,
    }  # fmt: skip
    return record, columns | changes


def unified(*pairs, measured=()):
    records, rows = zip(*pairs, strict=True)
    references.unify(list(records), [[columns] for columns in rows], measured)
    return rows


def test_rows_with_two_references_get_one_by_the_measured_ratio():
    """Two rows that are equally fast show equal speed-ups, whatever they were timed against."""
    first, second = unified(row("xnnpack", 3.2), row("onnxruntime", 4.0))
    assert {first["best_fp32"], second["best_fp32"]} == {"xnnpack"}
    assert (first["best_fp32_converted"], second["best_fp32_converted"]) == (False, True)
    assert first["speedup_vs_best_fp32"] == 3.2
    assert second["speedup_vs_best_fp32"] == pytest.approx(4.0 * 8 / 10)
    assert second["speedup_vs_best_fp32_ci_low"] == pytest.approx(0.9 * 3.2)
    assert second["best_fp32_ms"] == pytest.approx(10 * 8 / 10)


def test_the_record_of_the_study_decides():
    def entry(backend, ms):
        place = {name: PLACE[name] for name in ("model", "device", "cpu", "threads", "batch_size")}
        fastest = backend == "onnxruntime"
        return place | dict(gpu=None, cuda_graph=False, backend=backend, ms=ms, fastest=fastest)

    measured = [entry("native", 30.0), entry("onnxruntime", 9.0), entry("xnnpack", 12.0)]
    first, second = unified(row("xnnpack", 3.0), row("onnxruntime", 4.0), measured=measured)
    assert {first["best_fp32"], second["best_fp32"]} == {"onnxruntime"}
    assert first["speedup_vs_best_fp32"] == pytest.approx(3.0 * 9 / 12)  # not 10 / 8
    assert second["speedup_vs_best_fp32"] == 4.0


def test_several_searches_count_together():
    other = {"native": 20.0, "onnxruntime": 6.0, "xnnpack": 9.0}
    rows = unified(row("xnnpack", 3.0), row("onnxruntime", 4.0, other), row("xnnpack", 3.0))
    # ONNX Runtime takes sqrt(10 x 6), and XNNPACK sqrt(8 x 9). Equal searches count once.
    assert {columns["best_fp32"] for columns in rows} == {"onnxruntime"}
    assert rows[0]["speedup_vs_best_fp32"] == pytest.approx(3.0 * (60 / 72) ** 0.5)


def test_engines_that_were_never_compared_are_not_converted():
    second = {"native": 20.0, "frozen": 15.0}
    rows = unified(row("xnnpack", 3.0), row("frozen", 2.0, second))
    assert rows[1]["best_fp32"] == "xnnpack" and rows[1]["best_fp32_converted"]
    assert rows[1]["speedup_vs_best_fp32"] is None  # no search has both


@pytest.mark.parametrize(
    "change",
    [dict(threads=1), dict(batch_size=32), dict(cpu="another"), dict(model="resnet18"),
     dict(protocol="palindromic-rounds/6+cuda-graph"), dict(device="cuda")],
)  # fmt: skip
def test_other_circumstances_have_another_reference(change):
    slow = {"native": 20.0, "onnxruntime": 10.0, "xnnpack": 11.0}
    first, second = unified(row("xnnpack", 3.2), row("onnxruntime", 4.0, slow, **change))
    assert (first["best_fp32"], second["best_fp32"]) == ("xnnpack", "onnxruntime")
    assert not first["best_fp32_converted"] and not second["best_fp32_converted"]


def test_a_row_without_times_has_no_reference():
    (columns,) = unified(row(None, 1.0, batch_size=None))
    assert columns["best_fp32"] is None and "best_fp32_converted" not in columns


@pytest.mark.parametrize(("eager", "contended"), [(20.0, False), (25.9, False), (26.1, True)])
def test_a_row_is_contended_if_eager_fp32_was_much_slower_than_ever(eager, contended):
    """Two jobs on the same cores slow all sides of all rounds, which no round can show."""
    quiet, other = unified(row("xnnpack", 3.0), row("xnnpack", 3.0, eager=eager))
    assert not quiet["contended"] and other["contended"] == contended


def test_other_versions_and_processors_are_no_measure_of_quietness():
    slow = [
        row("xnnpack", 3.0, eager=80.0, **change) for change in ({"torch": "2.7"}, {"cpu": "b"})
    ]
    assert not any(columns["contended"] for columns in unified(row("xnnpack", 3.0), *slow))


def test_what_was_contended_stays_so():
    (columns,) = unified(row("xnnpack", 3.0, contended=True))
    assert columns["contended"]
