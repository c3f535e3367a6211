"""From a deployed network to its record: threads, processes, caches, metrics and the summary."""

import dataclasses
import importlib
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
from utils.experiment import Experiment
from utils.measure import logits, record
from utils.quantize.exact import execute
from utils.quantize.methods import ptq
from utils.recipes import Int8
from utils.training.checkpoints import Checkpoint

RUN = Run("mobilenetv3", "fp32", "fp32")
TRAINING = importlib.import_module("models.mobilenetv3_fp32").RECIPE.scratch
RECIPE = Int8(ranges="minmax", calibration_images=4)


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
    return registry.get("native").deploy_fp32(experiment.baseline)


def watched(deployed, threads):
    """`deployed`, noting in the list `threads` on how many its network computes."""

    def predict(x):
        threads.append(torch.get_num_threads())
        return deployed.predict(x)

    return dataclasses.replace(deployed, predict=predict)


def test_the_process_that_trained_measures_on_all_threads(experiment, deployed, capsys):
    """Processes that train together share the threads, and other threads add in another order."""
    torch.set_num_threads(
        2
    )  # what is left from training; the processes that load the artifact have one
    threads = []
    record.run(experiment, TRAINING, watched(deployed, threads))
    assert threads and set(threads) == {experiment.options.threads}
    path = experiment.options.results / "tiny_smoke/runs/mobilenetv3_fp32_native_cpu_seed0.json"
    written = json.loads(path.read_text())
    assert f"written: {path}" in capsys.readouterr().out
    assert written["recipe"] == TRAINING.describe() and written["layers"] == []
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
    record.run(control, TRAINING, deployed)
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
    record.run(experiment, TRAINING, watched(deployed, threads))
    assert threads == []


def test_an_artifact_that_answers_differently_from_the_network_is_an_error(experiment, deployed):
    torch.set_num_threads(experiment.options.threads)
    logits.artifact_logits(deployed, experiment.baseline.path, experiment)
    changed = dataclasses.replace(deployed, predict=lambda x: deployed.predict(x) + 0.01)
    with pytest.raises(
        RuntimeError,
        match=r"answers random inputs differently from the network before saving, by 0\.01",
    ):
        logits.artifact_logits(changed, experiment.baseline.path, experiment)


def computed_again(experiment, monkeypatch) -> bool:
    """Whether the FP32 logits would be computed again."""
    with monkeypatch.context() as patch:
        patch.setattr(logits, "Worker", None)
        try:
            logits.fp32_logits(experiment)
        except TypeError:
            return True
    return False


@pytest.mark.parametrize(
    "change", ["nothing", "images", "digest", "weights", "threads", "code", "versions", "cpu"]
)
def test_fp32_logits_are_computed_once_for_what_decides_them(experiment, monkeypatch, change):
    path = experiment.baseline.path.with_suffix(".cpu.logits")
    path.unlink(missing_ok=True)
    computed = logits.fp32_logits(experiment)
    assert computed.shape == (6, 2) and computed.dtype == np.float32
    assert np.array_equal(logits.fp32_logits(experiment), computed)
    data, changed = experiment.data, experiment
    if change == "images":
        fewer = dataclasses.replace(data, test=data.test.part(0, 2))
        changed = dataclasses.replace(experiment, data=fewer)
    elif change == "digest":
        changed = dataclasses.replace(experiment, data=dataclasses.replace(data, digest="1" * 64))
    elif change == "weights":
        other = dataclasses.replace(experiment.baseline, sha256="0" * 64)
        changed = dataclasses.replace(experiment, baseline=other)
    elif change == "threads":
        changed = dataclasses.replace(experiment, options=experiment.options.replace(threads=2))
    elif change == "code":
        monkeypatch.setattr(logits.environment, "code_of", lambda *modules: {"a": "b"})
    elif change == "versions":
        monkeypatch.setattr(logits.environment, "versions", lambda: {"torch": "0.0.1"})
    elif change == "cpu":
        monkeypatch.setattr(logits.environment, "cpu", lambda: ("another processor", ()))
    assert computed_again(changed, monkeypatch) == (change != "nothing")


def test_a_run_without_finite_logits_is_the_users_to_change(experiment, deployed):
    answers = np.full((6, 2), np.nan, np.float32)
    with pytest.raises(
        UserError, match="mobilenetv3_fp32 on native: 6 of 6 images have logits that are not finite"
    ):
        record._metrics(answers, np.zeros((6, 2), np.float32), deployed, experiment, None)


def test_metrics_compare_with_the_baseline(experiment, deployed):
    fp32 = np.array(
        [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]], np.float32
    )  # one of six is wrong
    answers = fp32.copy()
    answers[0] = [0, 1]
    quality = record._metrics(answers, fp32, deployed, experiment, None)
    assert quality["accuracy"] == pytest.approx(4 / 6) and quality[
        "agreement_fp32"
    ] == pytest.approx(5 / 6)
    assert quality["accuracy_ci_low"] < 4 / 6 < quality["accuracy_ci_high"]
    assert quality["accuracy_difference"] == pytest.approx(-1 / 6)
    assert quality["sqnr_db"] == pytest.approx(metrics.sqnr_db(fp32, answers))
    assert "accuracy_fake_quant" not in quality and "accuracy_reference" not in quality


def test_metrics_tell_the_methods_error_from_the_engines(experiment, lowered, monkeypatch):
    fp32 = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    exact, answers = 1.1 * fp32, 1.1 * fp32
    answers[0] = [0, 1.1]  # the engine gives another class
    monkeypatch.setattr(record, "exact_logits", lambda *_: exact)
    quality = record._metrics(answers, fp32, lowered, experiment, None)
    assert quality["accuracy_reference"] == 1 and quality["accuracy"] == pytest.approx(5 / 6)
    assert quality["sqnr_reference_db"] == pytest.approx(20, abs=1e-4)
    assert quality["sqnr_vs_reference_db"] == pytest.approx(10 * np.log10(6 / 2), abs=1e-4)
    assert quality["agreement_reference"] == pytest.approx(5 / 6)
    assert "accuracy_fake_quant" not in quality


def test_metrics_of_qat_compare_with_the_network_before_conversion(
    experiment, lowered, monkeypatch
):
    fp32 = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    monkeypatch.setattr(record, "exact_logits", lambda *_: fp32)
    monkeypatch.setattr(record.loop, "predict", lambda *_: fp32[::-1])
    trained = Checkpoint(experiment.baseline.path, torch.nn.Identity(), "0" * 64, {})
    quality = record._metrics(fp32, fp32.copy(), lowered, experiment, trained)
    assert quality["accuracy_fake_quant"] == quality["agreement_fake_quant"] == 0


def quantized(experiment, engine, **changes):
    """The network of the experiment, quantized and deployed on `engine`."""
    backend, recipe = registry.get(engine), RECIPE.replace(**changes)
    images = experiment.data.train.calibration(recipe.calibration_images)
    config = backend.qdq_config(recipe)
    return backend.deploy(ptq(experiment.baseline.model, images, recipe, config))


@pytest.fixture
def lowered(experiment):
    """A network that torch does not run: the file alone answers."""
    return quantized(experiment, "onnxruntime")


@pytest.mark.parametrize("change", ["nothing", "network", "digest", "code", "versions", "cpu"])
def test_exact_logits_are_computed_once_for_what_decides_them(
    experiment, lowered, monkeypatch, change
):
    network = lowered.quantized
    computed = logits.exact_logits(network, experiment)
    assert computed.shape == (6, 2) and computed.dtype == np.float32
    changed = experiment
    if change == "network":
        network = quantized(experiment, "onnxruntime", headroom=2.0).quantized
    elif change == "digest":
        data = dataclasses.replace(experiment.data, digest="1" * 64)
        changed = dataclasses.replace(experiment, data=data)
    elif change == "code":
        monkeypatch.setattr(logits.environment, "code_of", lambda *modules: {"a": "b"})
    elif change == "versions":
        monkeypatch.setattr(logits.environment, "versions", lambda: {"torch": "0.0.1"})
    elif change == "cpu":
        monkeypatch.setattr(logits.environment, "cpu", lambda: ("another processor", ()))
    monkeypatch.setattr(logits, "exact", None)
    if change == "nothing":
        assert np.array_equal(logits.exact_logits(network, changed), computed)
    else:
        with pytest.raises(AttributeError):
            logits.exact_logits(network, changed)  # would have to be computed


class Answers:
    """A worker that answers every call, and keeps the names of the calls."""

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


def test_without_a_network_in_torch_the_file_alone_answers(experiment, lowered, monkeypatch):
    monkeypatch.setattr(logits, "Worker", Answers)
    assert logits.artifact_logits(lowered, experiment.baseline.path, experiment) == ("logits", {})
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


def test_exact_logits_are_the_answers_of_exact_execution_to_the_test_images(experiment, lowered):
    images = torch.cat([x for x, _ in experiment.data.test.batches(6)])
    expected = execute(lowered.quantized, images).float().numpy()
    assert np.array_equal(logits.exact_logits(lowered.quantized, experiment), expected)
    assert list((experiment.baseline.path.parent / "exact").glob(f"{RUN.name}_*.logits"))


def test_logits_that_were_damaged_are_computed_again(experiment, capsys):
    computed = logits.fp32_logits(experiment)
    path = experiment.baseline.path.with_suffix(".cpu.logits")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    assert np.array_equal(logits.fp32_logits(experiment), computed)
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
