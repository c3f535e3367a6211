"""The scripts as a user runs them: from another folder, with --smoke, --help and mistakes."""

import ast
import csv
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import environment, recipes
from utils.backends.fp16 import NATIVE_BF16

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("alexnet", "resnet18", "mobilenetv3")
FP32 = [f"models/{model}_fp32.py" for model in MODELS]
QUANTIZED = {
    f"{method}_{dtype}": [f"quantization/{method}/{model}_{method}_{dtype}.py" for model in MODELS]
    for method in ("ptq", "qat")
    for dtype in ("int8", "fp16", "int16")
}
QUANTIZED["ptq_bf16"] = [f"quantization/ptq/{model}_ptq_bf16.py" for model in MODELS]
PTQ_INT8 = QUANTIZED["ptq_int8"]
KINDS = {"fp32": FP32, **QUANTIZED}
SCRIPTS = [script for scripts in KINDS.values() for script in scripts]
CONTROL = f"{QUANTIZED['qat_int8'][2]} --backend native"
AMP = f"{QUANTIZED['ptq_fp16'][2]} --backend amp"
COMMANDS = [*(script for script in SCRIPTS if "bf16" not in script), CONTROL, AMP]
if NATIVE_BF16 & set(environment.cpu()[1]):  # on other CPUs, these do not run
    COMMANDS.append(QUANTIZED["ptq_bf16"][2])
OPTIONS = ("--smoke", "--threads", "1", "--batch-sizes", "1")


def run(script, *options, cwd, check=True):
    """Run a script of the repository from another folder; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    # Scripts that run at the same time share the CPUs.
    environ = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=600
    )
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The scripts, run once with --smoke from another folder: baselines first, two at a time."""
    home, outputs = tmp_path_factory.mktemp("smoke"), {}

    def output(command):
        script, *backend = command.split()
        # Folders are relative on purpose.
        return run(
            script, *backend, *OPTIONS, "--results", "out", "--checkpoints", "weights", cwd=home
        ).stdout

    with ThreadPoolExecutor(2) as pool:
        for commands in (FP32, [command for command in COMMANDS if command not in FP32]):
            outputs |= zip(commands, pool.map(output, commands), strict=True)
    return home, outputs


def rows(home):
    with (home / "out/drawn_smoke/results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", COMMANDS)
def test_smoke_runs_the_whole_path_from_another_folder(smoke, command):
    _, outputs = smoke
    written = re.search(r"written: (.*\.json)", outputs[command])
    record = json.loads(Path(written[1]).read_text())
    assert record["run"]["study"] == "drawn_smoke"  # never among real results
    timed = [None] if "int16" in command else [1]  # simulated: no speed is claimed
    assert [entry["batch_size"] for entry in record["timing"]] == timed
    assert Path(written[1]).with_suffix(".npz").exists()
    assert shlex.split(record["command"])[1] == command.split()[0]
    assert bool(record["layers"]) == (record["run"]["dtype"] != "fp32")


def test_results_csv_has_a_row_for_each_run(smoke):
    found = rows(smoke[0])
    simulated = [row for row in found if row["simulated"] == "true"]
    assert {(row["method"], row["dtype"]) for row in simulated} == {
        ("ptq", "int16"),
        ("qat", "int16"),
    }
    assert all(
        row["latency_ms_p50"] == row["batch_size"] == row["speedup_vs_eager_fp32"] == ""
        for row in simulated
    )
    timed = [row for row in found if row["simulated"] == "false"]
    assert len(timed) == len(COMMANDS) - len(simulated)
    for row in timed:
        assert row["n_test"] == "8"
        assert float(row["latency_ms_p50"]) > 0
        assert float(row["throughput_ips"]) > 0
        assert (
            float(row["peak_memory_mb"]) > 50
        )  # no network runs in less, so this is a peak and no difference
    whole = {row["model"]: row for row in found if row["method"] == "fp32"}
    assert {model: int(row["parameters"]) for model, row in whole.items()} == {
        "alexnet": 57_012_034,
        "resnet18": 11_177_538,
        "mobilenetv3": 1_519_906,
    }


def test_int8_rows_are_smaller_and_all_quantized(smoke):
    found = {(row["model"], row["method"], row["dtype"]): row for row in rows(smoke[0])}
    for model, method in itertools.product(MODELS, ("ptq", "qat")):
        fp32, int8 = found[model, "fp32", "fp32"], found[model, method, "int8"]
        assert fp32["quantized_modules"] == fp32["integer_layers"] == "0"
        assert int8["quantized_modules"] == int8["integer_layers"] == int8["weight_modules"]
        assert float(int8["quantized_share"]) > 0.98  # biases stay in 32 bits
        assert float(int8["size_mb"]) < 0.31 * float(fp32["size_mb"])
        assert int8["baseline_sha256"] == fp32["artifact_sha256"]  # one baseline


def test_sixteen_bits_take_half_the_file(smoke):
    found = {
        (row["model"], row["method"], row["dtype"], row["backend"]): row for row in rows(smoke[0])
    }
    for (model, _, dtype, backend), row in found.items():
        share = float(row["size_mb"]) / float(found[model, "fp32", "fp32", "native"]["size_mb"])
        if dtype == "int16" or backend == "half":
            assert 0.49 < share < 0.56
        if backend in ("amp", "native"):
            assert 0.99 < share < 1.01


def test_rows_say_what_they_were_trained_and_computed_in(smoke):
    for row in rows(smoke[0]):
        assert row["native_fp16"] in (("true", "false") if row["dtype"] == "fp16" else ("",))
        if row["method"] == "qat":
            mixed = (
                row["dtype"] == "int8"
                and row["model"] != "mobilenetv3"
                and NATIVE_BF16 & set(environment.cpu()[1])
            )
            assert row["training_dtype"] == ("bf16" if mixed else "fp32")
        assert (row["accuracy_fake_quant"] != "") == (
            row["method"] == "qat" and row["dtype"] in ("int8", "int16")
        )


def test_the_control_is_a_row_of_its_own(smoke):
    (row, *_), home = [row for row in rows(smoke[0]) if row["method"] == "control"], smoke[0]
    assert (row["model"], row["dtype"], row["backend"]) == ("mobilenetv3", "fp32", "native")
    record = json.loads(
        (home / "out/drawn_smoke/runs/mobilenetv3_control_fp32_native_cpu_seed0.json").read_text()
    )
    quantized = json.loads(
        (home / "out/drawn_smoke/runs/mobilenetv3_qat_int8_fbgemm_cpu_seed0.json").read_text()
    )
    assert record["training"]["recipe"] == quantized["training"]["recipe"]
    assert record["training"]["init"] == quantized["training"]["init"]
    assert record["command"].startswith(
        "python quantization/qat/mobilenetv3_qat_int8.py --backend native"
    )


def test_logits_beside_the_json_give_the_metrics_in_it(smoke):
    for path in (smoke[0] / "out/drawn_smoke/runs").glob("*.json"):
        record, content = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        assert record["metrics"]["accuracy"] == pytest.approx(
            (content["logits"].argmax(1) == content["y"]).mean()
        )


def test_a_second_run_does_not_train_again_and_has_a_row_for_each_batch_size(smoke):
    home, _ = smoke
    script, folders = FP32[2], ("--results", "again", "--checkpoints", "weights")
    path = home / "weights/drawn_smoke/mobilenetv3_fp32_seed0.pt"
    before = path.read_bytes()
    output = run(script, *OPTIONS[:-1], "1,3", *folders, cwd=home).stdout
    assert "training: reusing" in output
    assert path.read_bytes() == before
    with (home / "again/drawn_smoke/results.csv").open() as file:
        assert [row["batch_size"] for row in csv.DictReader(file)] == ["1", "3"]


def test_reproduce_skips_what_is_there_and_runs_what_is_not(smoke):
    home, _ = smoke
    options = (
        *OPTIONS,
        "--models",
        "mobilenetv3",
        "--methods",
        "fp32",
        "ptq",
        "--backends",
        "native",
        "fbgemm",
    )
    output = run(
        "reproduce.py", *options, "--results", "out", "--checkpoints", "weights", cwd=home
    ).stdout
    assert output.count("skipped: done before") == 2
    output = run(
        "reproduce.py", *options, "--results", "elsewhere", "--checkpoints", "weights", cwd=home
    ).stdout
    assert "skipped" not in output
    assert output.count("  ok") == 2


@pytest.mark.parametrize(
    "name", ["accuracy_vs_latency", "accuracy_by_dtype", "layer_sqnr", "tables"]
)
def test_figures_are_made_from_results_alone(smoke, name, tmp_path):
    home, _ = smoke
    options = ("--study", "drawn_smoke", "--results", home / "out", "--out", tmp_path)
    run(f"figures/{name}.py", *options, cwd=tmp_path)
    made = {path.suffix for path in tmp_path.iterdir()}
    assert made == ({".md", ""} if name == "tables" else {".png", ".pdf"})


def test_smoke_on_a_folder_of_images_makes_its_own_baseline(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("training_set", 12), ("test_set", 6)):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / f"{label}s"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{label}.{number}.jpg")
    (tmp_path / "pets/training_set/cats/cat.99.jpg").write_bytes(b"\xff\xd8 not all of it")
    options = (
        "--data",
        "pets",
        "--results",
        "out",
        "--checkpoints",
        "weights",
        "--smoke",
        "--batch-sizes",
        "1",
    )
    output = run(PTQ_INT8[2], *options, cwd=tmp_path).stdout
    said = re.search(r"smoke: no baseline yet, making it: (.*)", output)[1]
    assert said.endswith("--smoke") and "--batch-sizes 1" in said
    written = json.loads(
        (
            tmp_path / "out/cats_and_dogs_smoke/runs/mobilenetv3_fp32_native_cpu_seed0.json"
        ).read_text()
    )
    published = shlex.split(written["command"])  # with names instead of paths
    assert [Path(word).name for word in shlex.split(said)] == [
        Path(word).name for word in published
    ]
    assert "1 broken" in output and "cat.99.jpg" in output
    names = sorted(path.name for path in (tmp_path / "out/cats_and_dogs_smoke/runs").glob("*.json"))
    assert names == [
        "mobilenetv3_fp32_native_cpu_seed0.json",
        "mobilenetv3_ptq_int8_fbgemm_cpu_seed0.json",
    ]


@pytest.mark.parametrize("script", [*SCRIPTS, "reproduce.py", "figures/tables.py"])
def test_help_answers(script, tmp_path):
    output = run(script, "--help", cwd=tmp_path).stdout
    assert "--results" in output
    documented = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert documented.splitlines()[0] in output


@pytest.mark.parametrize("script", [*SCRIPTS, "reproduce.py"])
def test_help_needs_no_package(script, tmp_path):
    """Without `site`, Python has its standard library only."""
    command = [sys.executable, "-S", ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--results" in done.stdout


MISTAKES = {
    ("--data", "nowhere"): "nowhere",
    ("--init", "nowhere.pth"): "nowhere.pth",
    ("--batch-sizes", "0"): "batch-sizes",
    ("--batch-sizes", "1,x"): "'x'",
    ("--seed", "-1"): "seed",
    ("--threads", "0"): "threads",
    ("--threads", "1000"): "threads",
    ("--backend", "tensorflow"): "tensorflow",
    ("--device", "tpu"): "tpu",
    ("--device", "cuda"): "cuda",
    ("--classes", "cat", "dog"): "classes",
    ("--results", "a_file"): "a_file",
    ("--unheard-of",): "unheard-of",
}


@pytest.mark.parametrize("options", MISTAKES, ids=" ".join)
@pytest.mark.parametrize("script", [FP32[2], PTQ_INT8[2]])
def test_a_mistake_is_answered_in_one_line(script, options, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU, wherever this runs
    (tmp_path / "a_file").write_text("")
    folders = () if options[0] == "--results" else ("--results", "out")
    done = run(script, "--checkpoints", "weights", *folders, *options, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert MISTAKES[options] in done.stderr


def test_a_missing_baseline_names_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "images"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / label / f"{number}.png")
    done = run(
        PTQ_INT8[0],
        "--data",
        folder,
        "--checkpoints",
        "weights",
        "--results",
        "out",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert f"python models/alexnet_fp32.py --data {folder}" in done.stderr
    assert "Traceback" not in done.stderr


def is_about_the_experiment(node) -> bool:
    """Whether a statement is RUN or RECIPE, or imports the classes that RECIPE uses."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "utils.recipes"
    return isinstance(node, ast.Assign) and node.targets[0].id in ("RUN", "RECIPE")


@pytest.mark.parametrize("scripts", KINDS.values(), ids=KINDS)
def test_scripts_of_one_kind_differ_only_in_docstring_run_and_recipe(scripts):
    rest = set()
    for script in scripts:
        body = ast.parse((ROOT / script).read_text()).body[1:]
        rest.add(ast.dump(ast.Module([n for n in body if not is_about_the_experiment(n)], [])))
    assert len(rest) == 1


def recipe_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).RECIPE


@pytest.mark.parametrize("model", range(3), ids=MODELS)
def test_the_qat_scripts_of_a_model_share_one_schedule_and_so_one_control(model):
    recipes = [recipe_of(KINDS[kind][model]) for kind in ("qat_int8", "qat_fp16", "qat_int16")]
    # Mixed precision is too coarse for what 16 bits round.
    schedules = {recipe.training.replace(amp=False) for recipe in recipes}
    assert len(schedules) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_fits_a_screen(script):
    assert len((ROOT / script).read_text().splitlines()) <= 50


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_is_a_literal(script):
    """It only calls recipe classes, with names for all fields and constants for all values."""
    tree = ast.parse((ROOT / script).read_text())
    (recipe,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "RECIPE"
    ]
    allowed = ast.Tuple | ast.Constant | ast.Call | ast.keyword | ast.Load | ast.Name
    for node in ast.walk(recipe):
        assert isinstance(node, allowed)
        if isinstance(node, ast.Call):
            assert issubclass(getattr(recipes, node.func.id), recipes.Recipe) and not node.args


# Packages and modules of utils/, from bottom to top; all others are below them.
LAYERS = (
    "data", "training", "quantize", "backends", "timing", "measure", "mixed_precision", "engines",
)  # fmt: skip


def imports(path):
    """Names of the modules of utils/ that a module imports anywhere, except for type checkers."""
    nodes, names = [ast.parse(path.read_text())], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "utils":
            continue
        for alias in node.names:
            place = ROOT / node.module.replace(".", "/") / alias.name
            is_module = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
            names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


def test_imports_go_one_way():
    modules = {}
    for path in (ROOT / "utils").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    graph = {name: imports(path) - {name} for name, path in modules.items()}

    def layer(name):
        package = name.split(".")[1] if "." in name else ""
        return LAYERS.index(package) + 1 if package in LAYERS else 0

    up = [
        (name, other)
        for name, needed in graph.items()
        for other in needed
        if layer(other) > layer(name)
    ]
    assert up == []
    while graph:
        free = sorted(name for name, needed in graph.items() if not needed & graph.keys())
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


LIGHT = """catalog caveats checksums cli columns environment errors experiment metrics paths
    progress recipes results schema stats studies
    data.loading data.layouts data.cache data.partition"""


@pytest.mark.parametrize("module", LIGHT.split())
def test_light_modules_need_no_torch(module):
    code = f"import sys; import utils.{module}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_help_is_instant(tmp_path):
    """Best of five: a loaded machine may be slow, but importing torch alone takes seconds."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run(PTQ_INT8[0], "--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1
