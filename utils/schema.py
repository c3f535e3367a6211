"""The schema of a run's JSON: the sections, types, ranges and names that every reader may rely on. No torch.

It is JSON Schema (draft 2020-12). Values that a run may lack are null or not there.
"""

import functools

from utils import catalog

SHARE = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
SIGNED_SHARE = {"type": ["number", "null"], "minimum": -1, "maximum": 1}
COUNT = {"type": ["integer", "null"], "minimum": 0}
NATURAL = {"type": ["integer", "null"], "minimum": 1}
AMOUNT = {"type": ["number", "null"], "minimum": 0}
NUMBER = {"type": ["number", "null"]}
FLAG = {"type": ["boolean", "null"]}
TEXT = {"type": ["string", "null"]}
DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def _values(rule: dict, names: str) -> dict:
    return dict.fromkeys(names.split(), rule)


RUN = {
    "study": {"type": "string", "minLength": 1},
    "model": {"enum": list(catalog.MODELS)},
    "method": {"enum": sorted({method for method, _ in catalog.kinds()} | {"control"})},
    "dtype": {"enum": sorted({dtype for _, dtype in catalog.kinds()})},
    "backend": {"enum": list(catalog.BACKENDS)},
    "device": {"enum": ["cpu", "cuda"]},
    "simulated": {"type": "boolean"},
    "seed": {"type": "integer", "minimum": 0},
}
DATA = {"negative_class": {"type": "string"}, "positive_class": {"type": "string"}}
METRICS = {
    **_values(COUNT, "n_test tn fp fn tp gained lost"),
    **_values(SHARE, """accuracy accuracy_ci_low accuracy_ci_high precision recall specificity f1 balanced_accuracy roc_auc
        average_precision ece agreement_fp32 flip_rate mcnemar_p mcnemar_p_holm margin accuracy_reference agreement_reference
        accuracy_fake_quant agreement_fake_quant"""),
    "logit_cosine": {"type": ["number", "null"], "minimum": -1.000001, "maximum": 1.000001},  # rounding may exceed 1
    **_values(SIGNED_SHARE, "accuracy_difference accuracy_difference_ci_low accuracy_difference_ci_high"),
    **_values(AMOUNT, "log_loss brier"),
    **_values(NUMBER, "sqnr_db kl_mean sqnr_reference_db sqnr_vs_reference_db"),
    "verdict": TEXT,
}  # fmt: skip
TIMING = {
    **_values(NATURAL, "threads batch_size"),
    **_values(COUNT, "n_timed n_launches n_rounds n_repeated"),
    **_values(AMOUNT, """latency_ms_p50 latency_ms_mean latency_ms_std latency_ms_ci_low latency_ms_ci_high latency_ms_p90
        latency_ms_p95 latency_ms_p99 eager_fp32_ms best_fp32_ms single_stream_p90_ms multi_stream_p99_ms throughput_ips
        offline_ips speedup_vs_eager_fp32 speedup_vs_eager_fp32_ci_low speedup_vs_eager_fp32_ci_high speedup_vs_best_fp32
        speedup_vs_best_fp32_ci_low speedup_vs_best_fp32_ci_high load_s cold_start_s peak_memory_mb"""),
    "best_fp32": {"enum": [*catalog.BACKENDS, None]},
    "contended": FLAG,
    "protocol": TEXT,
    "tier": TEXT,
}  # fmt: skip
FOOTPRINT = {
    **_values(AMOUNT, "size_mb theoretical_mb activation_mb"),
    **_values(COUNT, "parameters macs weight_modules quantized_modules"),
    **_values(SHARE, "quantized_share quantized_macs_share"),
}
ENVIRONMENT = {
    **_values(FLAG, "native_fp16 git_dirty"),
    **_values(TEXT, "cpu torch git_commit time_utc"),
    **_values(AMOUNT, "script_s"),
    "isa": {"type": "array", "items": {"type": "string"}},
}
HISTORY = {
    "type": "object",
    "properties": {
        "epoch": COUNT,
        **_values(NUMBER, "train_loss validation_loss validation_accuracy"),
    },
}
TRAINING = {"training_dtype": TEXT, "history": {"type": "array", "items": HISTORY}}
PROVENANCE = _values(DIGEST, "code_sha256 data_sha256 baseline_sha256 artifact_sha256")


SECTIONS = {
    "run": RUN, "data": DATA, "metrics": METRICS, "timing": TIMING, "footprint": FOOTPRINT, "training": TRAINING,
    "environment": ENVIRONMENT, "provenance": PROVENANCE,
}  # fmt: skip
REQUIRED = {
    "run": list(RUN), "data": list(DATA), "metrics": ["accuracy"], "timing": ["threads", "batch_size"],
    "provenance": ["data_sha256"],
}  # fmt: skip


def _schema() -> dict:
    sections = {
        name: {"type": "object", "properties": rules, "required": REQUIRED.get(name, [])}
        for name, rules in SECTIONS.items()
    }
    sections["timing"] = {"type": "array", "minItems": 1, "items": sections["timing"]}
    layer = {"type": "object", "properties": {"layer": {"type": "string"}}, "required": ["layer"]}
    others = {"format": {"type": "integer"}, "layers": {"type": "array", "items": layer}}
    return {"type": "object", "required": ["format", *SECTIONS], "properties": sections | others}


def problem(record: object) -> str | None:
    """Return where and why `record`, read from JSON, breaks the schema, in a few words; None if it does not."""
    import jsonschema  # not at the top: `--help` checks nothing

    error = jsonschema.exceptions.best_match(_validator().iter_errors(record))
    if error is None:
        return None
    where = ".".join(map(str, error.absolute_path)) or "the whole"
    return f"{where}: {error.message if len(error.message) < 100 else f'{error.message[:97]}...'}"


@functools.cache
def _validator():
    import jsonschema

    return jsonschema.Draft202012Validator(_schema())
