"""The fastest FP32 of a machine is searched once for everything that is compared with it, and kept beside the checkpoint."""

import json

import pytest
from helpers import FakeWorker

from utils import checksums
from utils.backends import registry
from utils.cli import Options
from utils.timing import fastest, rounds
from utils.training.checkpoints import Checkpoint

OPTIONS = Options(("native",), threads=2)


@pytest.fixture
def find(monkeypatch, tmp_path):
    """Search with faked processes; returns what `find` returned and the names of the engines that were started."""
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)
    monkeypatch.setattr(
        registry, "problem", lambda name, device: "no compiler" if name == "compile" else None
    )

    def find(batch_sizes, sha256="abc", **changes):
        FakeWorker.log.clear()
        baseline = Checkpoint(tmp_path / "b.pt", None, sha256, {})
        best = fastest.find(baseline, "images", batch_sizes, OPTIONS.replace(**changes))
        return best, [call[0] for call in FakeWorker.log if call[1] == "start"]

    return find


def test_all_engines_that_can_run_are_timed_and_the_fastest_is_named(find):
    best, started = find([1, 8])
    able = ("native", "onnxruntime", "openvino", "xnnpack", "frozen")
    assert started == [*able]
    for size in (1, 8):
        assert best[size]["fp32_ms"] == pytest.approx(
            {name: 30 if name == "native" else 20 for name in able}
        )
        assert best[size]["best_fp32"] in able[1:]
        assert best[size]["fp32_missing"] == {"compile": "no compiler"}


def test_brief_timing_waits_for_no_compiler(find, monkeypatch):
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    assert "compile" in find([1])[1]
    best, started = find([1], timing="brief")
    assert started and "compile" not in started and "brief" in best[1]["fp32_missing"]["compile"]


def test_an_engine_that_cannot_run_says_so_in_brief_timing_too(find):
    assert find([1], timing="brief")[0][1]["fp32_missing"] == {"compile": "no compiler"}


def test_a_batch_size_is_searched_once(find):
    first, _ = find([1])
    again, started = find([1])
    assert again == first and started == []
    both, started = find([1, 8])
    assert started and both[1] == first[1]
    assert {call[3] for call in FakeWorker.log if call[1] == "hold"} == {8}


@pytest.mark.parametrize(
    "change", [{"threads": 1}, {"sha256": "other weights"}, {"cuda_graph": True}]
)
def test_other_threads_weights_or_graphs_are_another_search_that_overwrites_nothing(
    find, tmp_path, change
):
    find([1])
    assert find([1], **change)[1]
    assert len(json.loads(checksums.read(tmp_path / "b.fastest"))) == 2
    assert find([1])[1] == find([1], **change)[1] == []


def test_a_damaged_file_is_searched_anew(find, tmp_path):
    first, _ = find([1])
    path = tmp_path / "b.fastest"
    path.write_bytes(path.read_bytes().replace(b"batch_sizes", b"batch_sizez"))
    again, started = find([1])
    assert started and again == first


def test_a_smoke_run_searches_nothing_and_keeps_nothing(find, tmp_path):
    best, started = find([1], smoke=True)
    assert started == [] and list(tmp_path.iterdir()) == []
    assert best == {1: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}}}


def test_two_searches_at_once_keep_what_both_found(find, monkeypatch):
    search = fastest._search

    def beside(*arguments):
        monkeypatch.setattr(fastest, "_search", search)
        theirs.append(
            find([1, 8])[0]
        )  # another script has searched and is done before this one ends
        medians = search(*arguments)
        return {
            size: {name: 2 * each for name, each in engines.items()}
            for size, engines in medians.items()
        }

    theirs = []
    monkeypatch.setattr(fastest, "_search", beside)
    ours, _ = find([1, 16])
    assert ours[1] == theirs[0][1]  # whoever was first decides
    again, started = find([1, 8, 16])
    assert started == [] and again == theirs[0] | ours
