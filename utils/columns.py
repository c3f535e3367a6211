"""Columns of results.csv: name, section in a run's JSON, values, unit and meaning. No torch.

results.csv, the schema of a run's JSON, the table in results/README.md and the report's tooltips
derive from `COLUMNS`. `python -m utils.columns` prints the table for results/README.md.
"""

from dataclasses import dataclass
from itertools import groupby

from utils import catalog

# JSON Schema rules. A value that a run may lack is null.
SHARE = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
SIGNED_SHARE = {"type": ["number", "null"], "minimum": -1, "maximum": 1}
COSINE = {"type": ["number", "null"], "minimum": -1.000001, "maximum": 1.000001}  # rounding errors
COUNT = {"type": ["integer", "null"], "minimum": 0}
NATURAL = {"type": ["integer", "null"], "minimum": 1}
AMOUNT = {"type": ["number", "null"], "minimum": 0}
NUMBER = {"type": ["number", "null"]}
FLAG = {"type": ["boolean", "null"]}
TEXT = {"type": ["string", "null"]}
NAME = {"type": "string"}
NAMES = {"type": "array", "items": NAME}
STUDY = {"type": "string", "minLength": 1}
MODEL = {"enum": list(catalog.MODELS)}
METHOD = {"enum": sorted({method for method, _ in catalog.kinds()} | {"control"})}
DTYPE = {"enum": sorted({dtype for _, dtype in catalog.kinds()})}
BACKEND = {"enum": list(catalog.BACKENDS)}
FP32_BACKEND = {"enum": [*catalog.BACKENDS, None]}
DEVICE = {"enum": ["cpu", "cuda"]}
SIMULATED = {"type": "boolean"}
SEED = {"type": "integer", "minimum": 0}
DIGEST = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


@dataclass(frozen=True)
class Column:
    """A column of results.csv, which is also a key in one section of a run's JSON."""

    name: str
    section: str
    rule: dict  # JSON Schema of its values
    unit: str  # empty if it has none
    meaning: str  # in Markdown


def _columns(section: str, *rows: tuple[str, dict, str, str]) -> tuple[Column, ...]:
    """Make the columns of a section; names in one row share a rule, a unit and a meaning."""
    return tuple(
        Column(name, section, rule, unit, meaning)
        for names, rule, unit, meaning in rows
        for name in names.split()
    )


# In the order of results.csv.
COLUMNS = (
    *_columns(
        "run",
        ("study", STUDY, "", "data set"),
        ("model", MODEL, "", "`alexnet`, `resnet18` or `mobilenetv3` (MobileNetV3-Small)"),
        (
            "method", METHOD, "",
            "`fp32` (baseline), `ptq` (post-training quantization), `qat` (quantization-aware "
            "training) or `control` (FP32 fine-tuned with the schedule, data order and seed of "
            "QAT)",
        ),
        (
            "dtype", DTYPE, "",
            "number format of the deployed network: `fp32`, `fp16`, `bf16`, `int16` or `int8`",
        ),
        (
            "backend", BACKEND, "",
            "engine that ran it: `native` is eager FP32 PyTorch; `fbgemm`, `x86`, `onednn` and "
            "`qnnpack` are torch's quantized engines; `half` computes everything in FP16; `amp` "
            "runs FP32 weights under FP16 autocast; `bfloat16` and `amp_bf16` do the same in BF16; "
            "`simulated` carries 16-bit integers in FP32; `onnxruntime`, `openvino`, `xnnpack`, "
            "`inductor` and `tensorrt` are the engines of that name, and a suffix names the float "
            "format that they compute in",
        ),
        ("device", DEVICE, "", "`cpu` or `cuda`"),
        (
            "simulated", SIMULATED, "",
            "`true` if the arithmetic is emulated: the accuracy is valid, the speed is not",
        ),
        ("seed", SEED, "", "training seed"),
    ),
    *_columns(
        "data",
        (
            "negative_class positive_class", NAME, "",
            "names of the two classes, label 0 and label 1, as in the data",
        ),
        (
            "near_duplicates", COUNT, "images",
            "test images that are also, resized or compressed again, among the images to learn "
            "from; the JSON names them; empty for runs from before December 2026",
        ),
    ),
    *_columns(
        "timing",
        (
            "threads", NATURAL, "",
            "CPU threads: all threads of the run and, at the smallest batch size, also one thread",
        ),
        (
            "batch_size", NATURAL, "images",
            "timed batch size; empty for simulated runs, which are not timed",
        ),
    ),
    *_columns(
        "metrics",
        ("n_test", COUNT, "images", "test images that the metrics are computed on"),
        ("accuracy", SHARE, "share", "correct decisions"),
        (
            "accuracy_without_near_duplicates", SHARE, "share",
            "correct decisions among the test images without near-duplicates; empty if all are",
        ),
        ("accuracy_ci_low accuracy_ci_high", SHARE, "share", "95 % Wilson interval of `accuracy`"),
        (
            "precision recall specificity f1 balanced_accuracy", SHARE, "share",
            "quality of the decision for the more likely class",
        ),
        (
            "roc_auc average_precision", SHARE, "share",
            "area under the ROC curve and under the precision-recall curve",
        ),
        ("log_loss", AMOUNT, "nats", "mean negative log probability of the correct class"),
        ("brier", AMOUNT, "", "mean squared error of the positive class's probability"),
        ("ece", SHARE, "share", "expected calibration error over 15 equal-width bins"),
        (
            "tn fp fn tp", COUNT, "images",
            "confusion matrix: negative class correct, negative class wrong, positive class wrong, "
            "positive class correct",
        ),
        ("agreement_fp32", SHARE, "share", "images with the same decision as the FP32 baseline"),
        ("logit_cosine", COSINE, "", "mean cosine between the logits and the baseline's logits"),
        (
            "sqnr_db", NUMBER, "dB",
            "power of the baseline's logits over the power of the difference from them; empty if "
            "nothing differs",
        ),
        ("kl_mean", NUMBER, "nats", "mean KL divergence from the baseline's class probabilities"),
        (
            "accuracy_difference", SIGNED_SHARE, "share",
            "accuracy minus the FP32 baseline's accuracy on the same images",
        ),
        (
            "accuracy_difference_ci_low accuracy_difference_ci_high", SIGNED_SHARE, "share",
            "95 % paired bootstrap interval of `accuracy_difference`",
        ),
        (
            "gained lost", COUNT, "images",
            "images that only this network, or only the baseline, classifies correctly",
        ),
        ("flip_rate", SHARE, "share", "images with another decision: `gained` and `lost` together"),
        ("mcnemar_p", SHARE, "", "two-sided exact McNemar test against the baseline"),
        (
            "mcnemar_p_holm", SHARE, "",
            "`mcnemar_p` adjusted by Holm's method for the number of variants in the study; "
            "changes when variants are added",
        ),
        ("margin", SHARE, "share", "largest acceptable loss, declared before the reported runs"),
        (
            "verdict", TEXT, "",
            "`held`: not worse by more than the margin; `lost`: worse by more; `undecided`: the "
            "interval contains the margin",
        ),
        (
            "accuracy_reference", SHARE, "share",
            "accuracy of the method: the quantized network executed on exact integers, without an "
            "engine; empty, like the next three columns, if the run was not lowered from one",
        ),
        (
            "sqnr_reference_db", NUMBER, "dB",
            "error of the method: power of the baseline's logits over the power of the difference "
            "between them and the exact logits",
        ),
        (
            "sqnr_vs_reference_db", NUMBER, "dB",
            "error of the engine: power of the exact logits over the power of the difference "
            "between them and the engine's logits",
        ),
        (
            "agreement_reference", SHARE, "share",
            "images on which the engine and the exact execution decide alike",
        ),
        (
            "accuracy_fake_quant", SHARE, "share",
            "accuracy before conversion: the network that QAT trained, which rounds in FP32",
        ),
        (
            "agreement_fake_quant", SHARE, "share",
            "images with the same decision before and after conversion",
        ),
    ),
    *_columns(
        "timing",
        (
            "latency_ms_p50", AMOUNT, "ms",
            "time of one batch: median over rounds, geometric mean over launches and sessions",
        ),
        (
            "latency_ms_mean latency_ms_std", AMOUNT, "ms",
            "mean and standard deviation over all timed runs, disturbed rounds included",
        ),
        (
            "latency_ms_ci_low latency_ms_ci_high", AMOUNT, "ms",
            "95 % interval of `latency_ms_p50`: over sessions, or over the launches of a single "
            "session (see `n_sessions`); empty with fewer than 4 launches of one session",
        ),
        (
            "latency_ms_p90 latency_ms_p95 latency_ms_p99", AMOUNT, "ms",
            "percentiles over all timed runs, disturbed rounds included: on a shared machine they "
            "also show its neighbours. Empty with fewer than 10, 20 and 100 runs, where they would "
            "equal the maximum",
        ),
        (
            "eager_fp32_ms best_fp32_ms same_engine_fp32_ms", AMOUNT, "ms",
            "`latency_ms_p50` of eager FP32, of the fastest FP32 and of FP32 on the same engine in "
            "the same rounds: multiples of them compare between runs, milliseconds do not",
        ),
        (
            "single_stream_p90_ms", AMOUNT, "ms",
            "at batch 1: upper bound of the p90, with 99 % confidence (MLPerf's early-stopping "
            "estimate; not an MLPerf result)",
        ),
        (
            "multi_stream_p99_ms", AMOUNT, "ms",
            "at batch 8: the same bound of the p99; empty with fewer than 662 runs",
        ),
        ("throughput_ips", AMOUNT, "images/s", "batch size over mean latency"),
        (
            "offline_ips", AMOUNT, "images/s",
            "`throughput_ips`, only in the row of the batch size where it is highest",
        ),
        (
            "speedup_vs_eager_fp32", AMOUNT, "ratio",
            "latency of eager FP32 over this latency: median of the ratios within rounds, "
            "geometric mean over launches and sessions, on the same machine",
        ),
        (
            "speedup_vs_eager_fp32_ci_low speedup_vs_eager_fp32_ci_high", AMOUNT, "ratio",
            "95 % interval of `speedup_vs_eager_fp32`, like the interval of the latency",
        ),
        (
            "speedup_vs_best_fp32", AMOUNT, "ratio",
            "the same against the fastest FP32 engine of the machine, `best_fp32`",
        ),
        (
            "speedup_vs_best_fp32_ci_low speedup_vs_best_fp32_ci_high", AMOUNT, "ratio",
            "95 % interval of `speedup_vs_best_fp32`, like the interval of the latency",
        ),
        (
            "best_fp32", FP32_BACKEND, "",
            "fastest FP32 engine for these threads and this batch size, one for all rows of a "
            "model on a processor (`fp32_engines.csv` compares all): `native` (eager), `frozen` "
            "(TorchScript), `compile` (torch.compile), `onnxruntime`, `openvino`, `xnnpack`, "
            "`inductor` or, on a GPU, `tensorrt`",
        ),
        (
            "best_fp32_converted", FLAG, "",
            "`true` if the row was timed against another engine: `best_fp32_ms` and the columns "
            "`speedup_vs_best_fp32*` are then converted by the measured ratio of the two engines, "
            "and their interval does not cover that ratio's error. The JSON has them as measured",
        ),
        (
            "speedup_vs_same_engine_fp32", AMOUNT, "ratio",
            "the same against FP32 on the engine that ran this network, `same_engine_fp32`: the "
            "speed-up that most tools publish",
        ),
        (
            "speedup_vs_same_engine_fp32_ci_low speedup_vs_same_engine_fp32_ci_high", AMOUNT,
            "ratio", "95 % interval of `speedup_vs_same_engine_fp32`, like that of the latency",
        ),
        (
            "same_engine_fp32", FP32_BACKEND, "",
            "backend that runs FP32 on the engine of this row; empty if it cannot run here",
        ),
        ("n_timed", COUNT, "runs", "timed runs that the latencies are computed from"),
        (
            "n_sessions", COUNT, "",
            "timing sessions, hours or restarts apart; with 1, the intervals cover the launches of "
            "one session, and another day may differ by more",
        ),
        ("n_launches", COUNT, "", "how often all processes were started anew"),
        ("n_rounds", COUNT, "rounds", "rounds that were kept, over all launches"),
        (
            "n_repeated", COUNT, "rounds",
            "rounds repeated because two turns of one side differed by a factor of more than 1.2",
        ),
        (
            "contended", FLAG, "",
            "`true` if a launch had so many disturbed rounds that some had to be kept, or if eager "
            "FP32 took more than 1.3 times the least time that the study knows for it on this "
            "processor",
        ),
        (
            "load_s", AMOUNT, "s",
            "time to load the artifact in a fresh process that has imported its modules; median "
            "over launches",
        ),
        ("cold_start_s", AMOUNT, "s", "`load_s` and the first run, at the smallest batch size"),
        (
            "peak_memory_mb", AMOUNT, "MiB",
            "peak memory of the fresh timing process so far (batch sizes ascend): resident set on "
            "a CPU, allocated by torch on a GPU",
        ),
        (
            "protocol", TEXT, "",
            "name of the timing protocol, described in `utils/timing/protocol.py`; `/5` counted "
            "the first runs of a turn, left disturbed rounds out of the percentiles and searched "
            "for the fastest FP32 in each script; `/4` also left the choice of the CPU to the "
            "scheduler; `+cuda-graph`: all "
            "sides ran as CUDA graphs, including eager FP32",
        ),
        (
            "tier", TEXT, "",
            "how long a row was timed: `brief`, `quick`, `standard` or `mlperf` (3, 10, 60 or "
            "600 s), or `smoke`, whose times are not reliable",
        ),
    ),
    *_columns(
        "footprint",
        ("size_mb", AMOUNT, "MiB", "size of the file to deploy"),
        (
            "theoretical_mb", AMOUNT, "MiB",
            "size of the weights and biases alone, each in its number format in the file",
        ),
        (
            "activation_mb", AMOUNT, "MiB",
            "peak size of the activations that are alive at once for one image, without copies of "
            "weights in another format and scratch space inside operators",
        ),
        (
            "parameters", COUNT, "numbers",
            "weights and biases, including packed ones; BatchNorm is folded into INT8 networks",
        ),
        ("macs", COUNT, "operations", "multiply-accumulates for one image"),
        (
            "weight_modules quantized_modules", COUNT, "modules",
            "convolutions and linear layers, and how many of them have weights with fewer than 32 "
            "bits in the file",
        ),
        (
            "integer_layers", COUNT, "modules",
            "of `weight_modules`: convolutions and linear layers that the engine computes on "
            "integers, read from its compiled graph; empty if the engine does not say",
        ),
        (
            "quantized_share", SHARE, "share",
            "parameters with fewer than 32 bits in the file; 0 for `amp` and `amp_bf16`, whose "
            "files are FP32",
        ),
        (
            "quantized_macs_share", SHARE, "share",
            "multiply-accumulates in layers whose weights have fewer than 32 bits in the file; "
            "below 1 if the network keeps some layers in FP32",
        ),
    ),
    *_columns(
        "training",
        (
            "training_dtype", TEXT, "",
            "format that the weights were trained in: `fp32`, or mixed precision with `bf16` or "
            "`fp16`",
        ),
    ),
    *_columns(
        "environment",
        (
            "native_fp16", FLAG, "",
            "only for FP16 runs: `true` if the device has FP16 arithmetic; `false` if FP16 is "
            "emulated, up to a hundred times slower than FP32, or computed in FP32",
        ),
        ("cpu", TEXT, "", "processor"),
        (
            "isa", NAMES, "",
            "instruction sets of the processor that matter here, whether or not libraries may use "
            "them; see `isa_limits`",
        ),
        (
            "isa_limits", TEXT, "",
            "environment variables that keep libraries from instruction sets of the processor, for "
            "example `ONEDNN_MAX_CPU_ISA=AVX2`, or `none`; empty in runs before this column",
        ),
        ("torch", TEXT, "", "version and build of PyTorch"),
        ("git_commit", TEXT, "", "commit of the code"),
        ("git_dirty", FLAG, "", "`true` if the code differed from the commit"),
        ("time_utc", TEXT, "", "date and time of the run, in UTC"),
    ),
    *_columns(
        "provenance",
        (
            "code_sha256", DIGEST, "",
            "hash of what the script and the participating modules of `utils/` do: their syntax "
            "without docstrings and comments; the JSON has the hash of each file",
        ),
        ("data_sha256", DIGEST, "", "hash of all image bytes, names, labels and splits"),
        (
            "baseline_sha256 artifact_sha256", DIGEST, "",
            "hashes of the FP32 checkpoint that the run is compared with, and of the deployed file",
        ),
    ),
)  # fmt: skip


def markdown() -> str:
    """Render the columns as a Markdown table; neighbours with one unit and meaning share a row."""
    lines = ["| column | unit | meaning |", "|---|---|---|"]
    for (unit, meaning), same in groupby(COLUMNS, lambda column: (column.unit, column.meaning)):
        names = ", ".join(f"`{column.name}`" for column in same)
        lines.append(f"| {names} | {unit} | {meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
