"""The search for the fastest FP32: what it times, and when its stored result is used again."""

import json

import pytest
import torch
from helpers import FakeWorker

from utils import checksums, environment
from utils.backends import registry
from utils.catalog import BACKENDS
from utils.cli import Options
from utils.timing import fastest, rounds
from utils.training.checkpoints import Checkpoint

OPTIONS = Options(("native",), threads=2)


def problem(name, device):
    return "no compiler" if name == "compile" else None


def problem_of_xnnpack(name, device):
    return "not installed" if name == "xnnpack" else problem(name, device)


@pytest.fixture
def find(monkeypatch, tmp_path):
    """Search with fake processes; returns the result of `find` and the engines it started."""
    monkeypatch.setattr(fastest, "Worker", FakeWorker)
    monkeypatch.setattr(rounds, "WARMUP_S", 0)
    monkeypatch.setattr(registry, "problem", problem)
    monkeypatch.setattr(environment, "cpu", lambda: ("a processor", ("avx2", "avx512_vnni")))
    monkeypatch.setattr(environment, "code_of", lambda *modules: {"code": "as it is"})

    def find(batch_sizes, sha256="abc", **changes):
        FakeWorker.log.clear()
        baseline = Checkpoint(tmp_path / "b.pt", None, sha256, {})
        best = fastest.find(baseline, "images", batch_sizes, OPTIONS.replace(**changes))
        return best, [call[0] for call in FakeWorker.log if call[1] == "start"]

    return find


def test_every_engine_that_can_run_is_timed_and_the_fastest_is_named(find):
    best, started = find([1, 8])
    able = ("native", "onnxruntime", "openvino", "xnnpack", "inductor", "frozen")
    assert started == [*able]
    for size in (1, 8):
        assert best[size]["fp32_ms"] == pytest.approx(
            {name: 30 if name == "native" else 20 for name in able}
        )
        assert best[size]["best_fp32"] in able[1:]
        assert best[size]["fp32_missing"] == {"compile": "no compiler"}


def test_brief_timing_leaves_out_engines_that_compile(find, monkeypatch):
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    assert "compile" in find([1])[1]
    best, started = find([1], timing="brief")
    assert started and "compile" not in started and "brief" in best[1]["fp32_missing"]["compile"]


def test_brief_timing_also_says_why_an_engine_cannot_run(find):
    missing = find([1], timing="brief")[0][1]["fp32_missing"]
    assert missing == {"compile": "no compiler", "inductor": fastest.TOO_SLOW}


def test_a_batch_size_is_searched_once(find):
    first, _ = find([1])
    again, started = find([1])
    assert again == first and started == []
    both, started = find([1, 8])
    assert started and both[1] == first[1]
    assert {call[3] for call in FakeWorker.log if call[1] == "hold"} == {8}


@pytest.mark.parametrize(
    "change",
    [{"threads": 1}, {"sha256": "other weights"}, {"cuda_graph": True}, {"timing": "brief"}],
)
def test_other_options_or_weights_start_a_new_search_and_keep_the_old(
    find, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(registry, "problem", lambda name, device: None)
    find([1])
    assert find([1], **change)[1]
    assert len(json.loads(checksums.read(tmp_path / "b.fastest"))) == 2
    assert find([1])[1] == find([1], **change)[1] == []


CHANGES = {
    "processor": (environment, "cpu", lambda: ("another", ("avx2", "avx512_vnni"))),
    "instruction sets": (environment, "cpu", lambda: ("a processor", ("avx2",))),
    "versions": (environment, "versions", lambda: {"torch": "0.1"}),
    "engines": (registry, "problem", problem_of_xnnpack),
    "duration": (rounds, "SEARCH_S", 0.5),
    "code": (environment, "code_of", lambda *modules: {"code": "changed"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_machine_or_other_code_starts_a_new_search_and_keeps_the_old(
    find, tmp_path, monkeypatch, name
):
    find([1])
    with monkeypatch.context() as patch:
        patch.setattr(*CHANGES[name])
        assert find([1])[1]
        assert find([1])[1] == []
    assert len(json.loads(checksums.read(tmp_path / "b.fastest"))) == 2
    assert find([1])[1] == []


def test_another_device_or_gpu_starts_a_new_search(find, monkeypatch):
    find([1])
    for gpu in ("one GPU", "another GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        assert find([1], device="cuda")[1]
        assert find([1], device="cuda")[1] == []
    assert find([1])[1] == []


def test_the_code_of_the_search_includes_the_engines(find, monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "code_of", lambda *modules: asked.append(set(modules)) or {})
    find([1])
    engines = {"native", "onnxruntime", "openvino", "xnnpack", "inductor", "frozen"}
    modules = {f"utils.backends.{BACKENDS[name].module}" for name in engines}
    assert asked == [{"utils.timing.fastest"} | modules]


def test_a_damaged_file_starts_a_new_search(find, tmp_path):
    first, _ = find([1])
    path = tmp_path / "b.fastest"
    path.write_bytes(path.read_bytes().replace(b"batch_sizes", b"batch_sizez"))
    again, started = find([1])
    assert started and again == first


def test_a_smoke_run_searches_nothing_and_keeps_nothing(find, tmp_path):
    best, started = find([1], smoke=True)
    assert started == [] and list(tmp_path.iterdir()) == []
    assert best == {1: {"best_fp32": "native", "fp32_ms": {}, "fp32_missing": {}}}


def test_two_searches_at_once_keep_both_results(find, monkeypatch):
    search = fastest._search

    def overtaken(*arguments):
        """Search while another script searches and ends first; twice its milliseconds."""
        monkeypatch.setattr(fastest, "_search", search)
        theirs.append(find([1, 8])[0])
        medians = search(*arguments)
        for engines in medians.values():
            engines.update({name: 2 * ms for name, ms in engines.items()})
        return medians

    theirs = []
    monkeypatch.setattr(fastest, "_search", overtaken)
    ours, _ = find([1, 16])
    assert ours[1] == theirs[0][1]  # the first result counts
    again, started = find([1, 8, 16])
    assert started == [] and again == theirs[0] | ours
