"""Made-up runs, in the form that `utils.results` stores."""

import csv

import numpy as np

from utils import metrics, results, schema, stats

LOGITS, Y = np.array([[0.5, -1], [2, 3]], np.float32), np.array([0, 1])
CLASSES = ("cat", "dog")


def made_up(section, numbers):
    """Make a value that fits the schema for every key of a section, each from another number."""
    return {name: fitting(rule, next(numbers)) for name, rule in schema.SECTIONS[section].items()}


def fitting(rule, number):
    """Make a value that fits a rule of the schema from a number."""
    kinds = rule.get("type", ())
    if "enum" in rule:
        return rule["enum"][0]
    if kinds == "array":
        return []
    if "pattern" in rule:
        return f"{number:064x}"
    if "number" in kinds:
        return number / 10_000 if "maximum" in rule else number + 0.25
    if "integer" in kinds:
        return number
    return True if "boolean" in kinds else f"text {number}"


def record(seed=0, model="resnet18", backend="fbgemm", batches=(1, 8), **metrics):
    """Make a whole record in which no two numbers are equal."""
    numbers = iter(range(10 * seed + 1, 10_000))
    content = {section: made_up(section, numbers) for section in schema.SECTIONS}
    content["run"] = dict(
        study="drawn",
        model=model,
        method="ptq",
        dtype="int8",
        backend=backend,
        device="cpu",
        simulated=False,
        seed=seed,
    )
    content["timing"] = [
        content["timing"] | {"batch_size": batch, "contended": True} for batch in batches
    ]
    content["data"] = {
        "classes": list(CLASSES),
        "negative_class": CLASSES[0],
        "positive_class": CLASSES[1],
        "near_duplicates": 3,
    }
    content["metrics"] |= {"sqnr_db": None} | metrics
    content["environment"] |= {"isa": ["avx2", "avx512_vnni"], "git_dirty": None}
    content["provenance"] |= {"data_sha256": "a" * 64}
    return content


def write_run(
    folder,
    model,
    method,
    dtype,
    backend,
    study="cats_and_dogs",
    *,
    seed=0,
    threads=(1, 2),
    classes=CLASSES,
    cpu="a processor",
    images=80,
):
    """Write a small run whose numbers follow from its names; its baseline is always right."""
    rng = np.random.default_rng([len(model), len(method), len(backend), seed])
    y = np.arange(images) % 2
    logits = rng.normal(0, 1, (images, 2)).astype(np.float32) + 3 * np.eye(2, dtype=np.float32)[y]
    fast = {"fp32": 10.0, "int8": 4.0, "fp16": 60.0, "int16": 1.0}[dtype]
    simulated = backend == "simulated"
    if simulated:
        timing = [{"batch_size": None, "threads": max(threads)}]
    else:
        timing = [timed(rng, batch, n, fast) for n in threads for batch in (1, 8)]
    content = {
        "run": dict(
            study=study,
            model=model,
            method=method,
            dtype=dtype,
            backend=backend,
            device="cpu",
            simulated=simulated,
            seed=seed,
        ),
        "metrics": quality(method, logits, y),
        "data": {
            "classes": list(classes),
            "negative_class": classes[0],
            "positive_class": classes[1],
        },
        "footprint": {"size_mb": fast, "theoretical_mb": 0.9 * fast},
        "training": {"history": history(), "best_epoch": 1},
        "environment": {
            "cpu": cpu,
            "isa": ["avx2"],
            "torch": "2.13.0",
            "git_commit": "c" * 40,
            "git_dirty": False,
            "time_utc": "2026-01-02T03:04:05",
        },
        "provenance": {"data_sha256": "a" * 64},
        "layers": [layer("conv1", seed, None), layer("fc", seed, 20.0)],
        "timing": timing,
    }
    if dtype == "int8":
        content["profile"] = profile(backend)
    return results.write(content, logits, y, folder)


def history():
    """Three epochs of a training."""
    return [
        {
            "epoch": n,
            "train_loss": 1 / (n + 1),
            "validation_loss": 1.1 / (n + 1),
            "validation_accuracy": 0.8 + n / 20,
        }
        for n in range(3)
    ]


def layer(name, seed, output_sqnr_db):
    """Errors of one layer."""
    return {
        "kind": "Conv2d",
        "parameters": 9,
        "weight_sqnr_db": 40.0 + seed,
        "output_sqnr_db": output_sqnr_db,
        "layer": name,
    }


def write_ablation(folder, study="cats_and_dogs"):
    """Write an ablation of four steps on one model; the study's steps have two layers each."""
    names = ("NNCF", "the plainest", "equalization", "equalization")
    kinds = ("tool", "stacked", "stacked", "alone")
    steps, layers = [], []
    for place, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        shared = dict(model="resnet18", backend="fbgemm", rung=name, kind=kind, place=place)
        measured = dict(
            seconds=1.0,
            test_images=80,
            test_accuracy=0.9 + place / 100,
            test_accuracy_ci_low=0.85,
            test_accuracy_ci_high=0.97,
            test_accuracy_fp32=0.95,
            test_sqnr_db=20.0 + place,
        )
        steps.append(shared | measured)
        if kind != "tool":
            layers.append(shared | {"layer": "conv1", "sqnr_db": 30.0})
            layers.append(shared | {"layer": "fc", "sqnr_db": ""})
    for name, content in (("ablation.csv", steps), ("ablation_layers.csv", layers)):
        with (folder / study / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)


def operator(name, kind, dtype, ms):
    """Time of one operator."""
    return {"name": name, "kind": kind, "format": dtype, "ms": ms}


def profile(backend):
    """Times of the operators of a run on `backend` and of FP32."""
    operators = [
        operator("conv1", "convolution", "INT8", 1.0),
        operator("cast", "reorder", "FP32", 0.52),
    ]
    return {
        "batch_size": 1,
        "threads": 2,
        "operators": operators,
        "fp32_backend": "native",
        "fp32": [operator("conv1", "convolution", "FP32", 4.03)],
    }


def quality(method, logits, y):
    """Metrics of a run."""
    content = metrics.classification(logits, y)
    low, high = stats.wilson(round(len(y) * content["accuracy"]), len(y))
    content |= {"accuracy_ci_low": low, "accuracy_ci_high": high, "mcnemar_p": None}
    if method != "fp32":
        content |= stats.against(logits.argmax(1) == y, y == y)
    if method in ("ptq", "qat"):
        content |= {"sqnr_reference_db": 25.0, "sqnr_vs_reference_db": 60.0}
    if method == "qat":
        content["accuracy_fake_quant"] = 0.9
    return content


def timed(rng, batch, threads, fast):
    """Make a timing entry, with times drawn around `fast` ms."""
    samples = fast * batch / threads * (1 + rng.gamma(1, 0.05, (2, 3, 4)))
    p50, p90, p99 = (float(value) for value in np.quantile(samples, [0.5, 0.9, 0.99]))
    entry = {
        "threads": threads,
        "batch_size": batch,
        "contended": threads == 1,
        "best_fp32": "compile",
        "fp32_ms": {"native": 10.0 * batch / threads, "compile": 7.0 * batch / threads},
        "latency_ms_p50": p50,
        "latency_ms_ci_low": 0.98 * p50,
        "latency_ms_ci_high": 1.02 * p50,
        "latency_ms_p90": p90,
        "latency_ms_p99": p99,
        "throughput_ips": 1000 * batch / p50,
        "samples_ms": samples.tolist(),
    }
    for side, value in (("eager", 10 / fast), ("best", 7 / fast)):
        name = f"speedup_vs_{side}_fp32"
        entry |= {name: value, f"{name}_ci_low": 0.95 * value, f"{name}_ci_high": 1.05 * value}
    return entry
