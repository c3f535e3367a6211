"""From a deployed network to its record: on how many threads, by which process, and only if saving changed nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import mobilenet_checkpoint, split_of
from records import record as made_up

from utils import metrics, results
from utils.backends import registry
from utils.catalog import Run
from utils.cli import Options
from utils.data.dataset import Data
from utils.errors import UserError
from utils.measure import record
from utils.quantize.exact import execute
from utils.training.sessions import Experiment

RUN = Run("mobilenetv3", "fp32", "fp32")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    home = tmp_path_factory.mktemp("record")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), np.uint8)
    parts = [
        split_of(home / name, pixels, np.arange(6) % 2) for name in ("train", "validation", "test")
    ]
    data = Data("tiny_smoke", ("dark", "light"), "0" * 64, *parts, 0)
    options = Options(
        ("native",),
        threads=1,
        batch_sizes=(1,),
        smoke=True,
        checkpoints=home / "checkpoints",
        results=home / "results",
    )
    return Experiment(
        RUN,
        options,
        data,
        mobilenet_checkpoint(home / "checkpoints/tiny_smoke/mobilenetv3_fp32_seed0.pt"),
    )


@pytest.fixture(autouse=True)
def threads():
    """The number of threads is the process's, and measuring sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deployed(experiment):
    return registry.get("native").deploy(experiment.baseline)


def watched(deployed, threads):
    """`deployed`, noting in the list `threads` on how many its network computes."""

    def predict(x):
        threads.append(torch.get_num_threads())
        return deployed.predict(x)

    return dataclasses.replace(deployed, predict=predict)


def test_the_process_that_trained_measures_on_all_threads(experiment, deployed, capsys):
    """Processes that train together share the threads; on another number of them, sums are added in another order."""
    torch.set_num_threads(
        2
    )  # what is left from training; the processes that load the artifact have one
    threads = []
    record.run(experiment, {"epochs": 1}, watched(deployed, threads))
    assert threads and set(threads) == {experiment.options.threads}
    path = experiment.options.results / "tiny_smoke/runs/mobilenetv3_fp32_native_cpu_seed0.json"
    written = json.loads(path.read_text())
    assert f"written: {path}" in capsys.readouterr().out
    assert written["recipe"] == {"epochs": 1} and written["layers"] == []
    assert written["data"]["negative_class"] == "dark" and written["environment"]["threads"] == 1
    assert [
        (entry["threads"], entry["batch_size"], entry["tier"]) for entry in written["timing"]
    ] == [(1, 1, "smoke")]
    assert (
        written["footprint"]["parameters"] == 1_519_906
        and written["footprint"]["quantized_share"] == 0
    )
    assert (
        written["provenance"]["artifact_sha256"]
        == written["provenance"]["baseline_sha256"]
        == experiment.baseline.sha256
    )
    assert (
        written["metrics"]["agreement_fp32"] == 1 and "verdict" not in written["metrics"]
    )  # it is the baseline itself


def test_the_control_is_named_as_such_and_repeated_by_the_command_that_made_it(
    experiment, deployed
):
    control = dataclasses.replace(experiment, run=Run("mobilenetv3", "qat", "int8"))
    record.run(control, {}, deployed)
    path = (
        experiment.options.results
        / "tiny_smoke/runs/mobilenetv3_control_fp32_native_cpu_seed0.json"
    )
    command = json.loads(path.read_text())["command"]
    assert command.startswith("python quantization/qat/mobilenetv3_qat_int8.py --backend native")


def test_only_the_first_of_several_processes_measures(experiment, deployed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    threads = []
    record.run(experiment, {}, watched(deployed, threads))
    assert threads == []


def test_an_artifact_that_answers_differently_from_the_network_is_an_error(experiment, deployed):
    torch.set_num_threads(experiment.options.threads)
    record.artifact_logits(deployed, experiment.baseline.path, experiment)
    changed = dataclasses.replace(deployed, predict=lambda x: deployed.predict(x) + 0.01)
    with pytest.raises(
        RuntimeError,
        match=r"answers random inputs differently from the network before saving, by 0\.01",
    ):
        record.artifact_logits(changed, experiment.baseline.path, experiment)


def test_logits_of_the_baseline_are_computed_once_for_the_same_images(
    experiment, deployed, monkeypatch
):
    experiment.baseline.path.with_suffix(".cpu.logits").unlink(missing_ok=True)
    computed = record.baseline_logits(experiment)
    assert computed.shape == (6, 2) and computed.dtype == np.float32
    monkeypatch.setattr(record, "Worker", None)
    assert np.array_equal(record.baseline_logits(experiment), computed)
    fewer = dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, test=experiment.data.test.part(0, 2))
    )
    with pytest.raises(TypeError):
        record.baseline_logits(fewer)  # would have to be computed


def test_a_run_without_finite_logits_is_the_users_to_change(experiment, deployed):
    logits = np.full((6, 2), np.nan, np.float32)
    with pytest.raises(
        UserError, match="mobilenetv3_fp32 on native: 6 of 6 images have logits that are not finite"
    ):
        record._metrics(logits, np.zeros((6, 2), np.float32), None, deployed, experiment)


def test_metrics_compare_with_the_baseline(experiment, deployed):
    fp32 = np.array(
        [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]], np.float32
    )  # one of six is wrong
    logits = fp32.copy()
    logits[0] = [0, 1]
    quality = record._metrics(logits, fp32, None, deployed, experiment)
    assert quality["accuracy"] == pytest.approx(4 / 6) and quality[
        "agreement_fp32"
    ] == pytest.approx(5 / 6)
    assert quality["accuracy_ci_low"] < 4 / 6 < quality["accuracy_ci_high"]
    assert quality["accuracy_difference"] == pytest.approx(-1 / 6)
    assert quality["sqnr_db"] == pytest.approx(metrics.sqnr_db(fp32, logits))
    assert "accuracy_fake_quant" not in quality and "accuracy_reference" not in quality


def test_metrics_tell_the_methods_error_from_the_engines(experiment, deployed):
    baseline = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    method, logits = 1.1 * baseline, 1.1 * baseline
    logits[0] = [0, 1.1]  # the engine decides otherwise
    quality = record._metrics(logits, baseline, method, deployed, experiment)
    assert quality["accuracy_reference"] == 1 and quality["accuracy"] == pytest.approx(5 / 6)
    assert quality["sqnr_reference_db"] == pytest.approx(20, abs=1e-4)
    assert quality["sqnr_vs_reference_db"] == pytest.approx(10 * np.log10(6 / 2), abs=1e-4)
    assert quality["agreement_reference"] == pytest.approx(5 / 6)


def test_the_reference_is_executed_once_for_the_same_network(experiment, monkeypatch):
    recipe = dict(bits=8, ranges="minmax")
    images = experiment.data.train.calibration(4)
    lowered = registry.get("simulated").quantize(experiment.baseline.model, images, recipe)
    computed = record.exact_logits(lowered, experiment)
    assert computed.shape == (6, 2) and computed.dtype == np.float32
    monkeypatch.setattr(record, "execution", None)
    assert np.array_equal(record.exact_logits(lowered, experiment), computed)
    other = registry.get("simulated").quantize(
        experiment.baseline.model, images, recipe | {"headroom": 2.0}
    )
    with pytest.raises(AttributeError):
        record.exact_logits(other, experiment)  # would have to be computed


@pytest.fixture
def lowered(experiment):
    """A network that torch does not run: the file alone answers."""
    recipe = dict(bits=8, ranges="minmax")
    return registry.get("onnxruntime").quantize(
        experiment.baseline.model, experiment.data.train.calibration(2), recipe
    )


def test_without_a_network_in_torch_the_file_alone_answers(experiment, lowered, monkeypatch):
    class Answers:
        calls: list = []  # noqa: RUF012

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, name, *_):
            self.calls.append(name)
            return "logits"

    monkeypatch.setattr(record, "Worker", Answers)
    assert record.artifact_logits(lowered, experiment.baseline.path, experiment) == ("logits", {})
    assert Answers.calls == ["logits"]  # nothing to compare with


def test_activations_are_counted_where_torch_runs_the_network(experiment, deployed, lowered):
    path = experiment.baseline.path
    alone, run = (record._footprint(which, path, experiment) for which in (lowered, deployed))
    assert alone["activation_mb"] is None and run["activation_mb"] > 1
    assert alone["size_mb"] == run["size_mb"] and alone["macs"] == run["macs"]
    assert (
        alone["quantized_modules"] == alone["weight_modules"] == 54
        and run["quantized_modules"] == 0
    )


def test_nothing_was_lowered_of_a_float_network(experiment, deployed):
    assert record.exact_logits(deployed, experiment) is None


def test_reference_logits_are_those_of_exact_execution_of_the_test_images(experiment, lowered):
    images = torch.cat([x for x, _ in experiment.data.test.batches(6)])
    assert np.array_equal(
        record.exact_logits(lowered, experiment), execute(lowered.quantized, images).float().numpy()
    )
    assert list((experiment.baseline.path.parent / "references").glob(f"{RUN.name}_*.logits"))


def test_logits_that_were_damaged_are_computed_again(experiment, capsys):
    computed, path = (
        record.baseline_logits(experiment),
        experiment.baseline.path.with_suffix(".cpu.logits"),
    )
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    assert np.array_equal(record.baseline_logits(experiment), computed)
    assert f"cache: {path} is damaged and is made again" in capsys.readouterr().out


# ---- the summary


@pytest.fixture
def entry():
    """A made-up record of two batch sizes; nothing is wrong with it."""
    counts = dict(n_test=10_000, tn=4500, fp=500, fn=500, tp=4500)
    content = made_up(
        batches=(1, 8),
        **counts,
        accuracy=0.9,
        accuracy_difference=-0.01,
        margin=0.005,
        accuracy_fake_quant=None,
    )
    content["backend"] = {}
    for timing in content["timing"]:
        timing |= {"threads": 2, "tier": "quick", "best_fp32": "onnxruntime", "contended": False}
    content["environment"] |= {"native_fp16": None}
    return content


def test_the_summary_is_of_the_smallest_batch_on_the_most_threads(entry):
    entry["timing"].insert(0, entry["timing"][0] | {"threads": 1, "latency_ms_p50": 99.0})
    entry["timing"][1]["latency_ms_p50"] = 12.345
    text = record.summary(entry)
    assert "12.35 ms at batch 1 (" in text and "99.00" not in text
    assert "the fastest FP32, onnxruntime" in text
    assert text.startswith(results.run_id(entry["run"]))


def test_the_summary_says_what_to_know_before_relying_on_it(entry):
    entry["timing"][1]["contended"] = True
    notes = [line for line in record.summary(entry).splitlines() if line.startswith("note: ")]
    assert any("ontended" in note and "batch 8 on 2 threads" in note for note in notes)
    assert any("qnnpack" in note for note in notes) == (entry["run"]["backend"] == "qnnpack")
    entry["timing"][1]["contended"] = False
    assert "ontended" not in record.summary(entry)


def test_the_summary_tells_overflow(entry):
    entry["backend"] = {"extremes": {"nonfinite": 3, "largest": 65504.0, "largest_in": "conv"}}
    assert (
        "layer outputs on the test images: 3 not finite; largest 6.55e+04, in conv"
        in record.summary(entry)
    )
