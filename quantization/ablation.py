"""Ablation of INT8: what each step of the method adds, alone and on top of the others.

    python quantization/ablation.py --data PATH --models mobilenetv3 --backend fbgemm

The default recipes of other tools come first, each on the tool's engine. Then come the study's
networks on the engine of `--backend`, and last its PTQ recipe with fewer and with more images, and
with the remedy for processors without VNNI. With VNNI, no sum overflows with or without the remedy,
so this step shows only what 7 bits cost; the column `overflow` says what could overflow where a
step was measured. FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 before the command keeps
all engines except ONNX Runtime from VNNI.

The FP32 checkpoints must exist; QAT is trained unless its script was run before. Reconstruction and
training depend on the number of threads, so a step gives the network of its script only with the
same number. `study_agreement_fp32` is what the script's run reached with the same recipe. Each step
is measured on the validation images, which steps are chosen by, and on the test images, which
nothing is chosen by; layer by layer, in exact arithmetic, on a few validation images. Finished
steps are skipped. The results are `results/STUDY/ablation.csv` and
`ablation_layers.csv`; `figures/ablation.py` and `figures/ablation_layers.py` draw them.
"""

import argparse
import csv
import dataclasses
import importlib
import importlib.metadata
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import catalog, cli, environment, paths, progress, results
from utils.catalog import MODELS, Run
from utils.experiment import Experiment
from utils.recipes import Int8, Int8QAT, Recipe

if TYPE_CHECKING:
    import numpy as np

SCRIPT = "quantization/ablation.py"
BACKENDS = tuple(
    name for name, backend in catalog.BACKENDS.items() if ("ptq", "int8") in backend.serves
)
CALIBRATION_IMAGES = 256
CHANNELS = "a weight scale for each channel"
STACKED = {  # the further steps, in the order in which they are stacked
    "MSE ranges": dict(ranges="mse"),
    "equalization": dict(equalize=True),
    "bias correction": dict(bias_correction=True),
    "AdaRound": dict(adaround=True),
    # Biases and weights learn.
    "reconstruction": dict(bias_correction=False, adaround=False, reconstruct=True),
    "first blocks in FP32": None,  # the first FLOATS of them, whose names depend on the model
}
FLOATS = 2
TENSOR = "one scale per activation"
CAUSES = {  # without a scale per channel: of activations alone, and of weights as well
    TENSOR: dict(activation_scales="tensor"),
    f"{TENSOR} and per layer's weights": dict(activation_scales="tensor", weight_scales="tensor"),
}
VARIATIONS = {  # of the PTQ recipe, whose number of images was chosen on a processor with VNNI
    "the study's recipe": {},
    "with 100 calibration images": dict(calibration_images=100),
    "with 2,000 calibration images": dict(calibration_images=2000),
    "for processors without VNNI": dict(portable=True),
}
OF_SCRIPTS = {"the study's recipe": "ptq", "QAT": "qat"}  # steps by the recipe of a script
LAYER_IMAGES = 64  # validation images for the errors layer by layer
QUALITY = (  # columns of one part of the images
    "images", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "accuracy_fp32", "agreement_fp32",
    "sqnr_db",
)  # fmt: skip
COLUMNS = (
    "model", "backend", "rung", "kind", "place", "seconds",
    *(f"{part}_{name}" for part in ("validation", "test") for name in QUALITY),
    "study_agreement_fp32", "threads", "overflow", "method_code",
)  # fmt: skip
LAYER_COLUMNS = ("model", "backend", "rung", "kind", "place", "layer", "sqnr_db")


@dataclass(frozen=True)
class Step:
    """A network to measure: by the default of a tool, or by a recipe of the study."""

    name: str
    kind: str  # "tool"; "stacked" on those before it; "trained" and stacked; "alone"; ...
    recipe: Recipe | None  # None for a tool
    facts: dict  # what decides the network besides the FP32 checkpoint, JSON-serializable


def of_recipe(name: str, kind: str, recipe: Recipe) -> Step:
    """Return the step that `recipe` makes."""
    return Step(name, kind, recipe, recipe.describe())


def tools() -> list[Step]:
    """List the tools whose default can run here; say which cannot."""
    from utils.backends import registry
    from utils.backends.tool_defaults import TOOL_DEFAULTS

    able = []
    for name, tool in TOOL_DEFAULTS.items():
        reason = registry.problem(tool.backend, "cpu")
        if tool.missing:
            reason = f"not installed: {tool.package} (pip install {tool.package})"
        if reason:
            progress.say(f"default of {name} left out: {reason}")
            continue
        facts = {
            "package": tool.package,
            "version": importlib.metadata.version(tool.package),
            "calibration_images": CALIBRATION_IMAGES,
        }
        able.append(Step(name, "tool", None, facts))
    return able


def steps(ptq: Int8, qat: Int8QAT, floats: tuple[str, ...]) -> list[Step]:
    """List the steps of a model with these recipes; `floats` are its first blocks."""
    start = Int8(
        ranges="minmax",
        weight_scales="tensor",
        calibration_images=CALIBRATION_IMAGES,
        overflow_fix=ptq.overflow_fix,
    )
    changes = STACKED | {"first blocks in FP32": dict(keep_fp32=floats)}
    total = channels = start.replace(weight_scales="channel")
    listed = [of_recipe("the plainest", "stacked", start), of_recipe(CHANNELS, "stacked", channels)]
    for name, change in changes.items():
        total = total.replace(**change)
        listed.append(of_recipe(name, "stacked", total))
    listed.append(of_recipe("QAT", "trained", qat))
    for name, change in changes.items():
        listed.append(of_recipe(name, "alone", channels.replace(**change)))
    for name, change in VARIATIONS.items():
        listed.append(of_recipe(name, "varied", ptq.replace(**change)))
    for name, change in CAUSES.items():
        listed.append(of_recipe(name, "cause", channels.replace(**change)))
    return listed


def quality(logits, fp32, y) -> dict:
    """Compute the columns of one part of the images from logits, float32 (n, 2), and labels."""
    from utils import metrics, stats

    right = int((logits.argmax(1) == y).sum())
    low, high = stats.wilson(right, len(y))
    kept = metrics.fidelity(logits, fp32)
    accuracy_fp32 = float((fp32.argmax(1) == y).mean())
    values = (
        len(y),
        right / len(y),
        low,
        high,
        accuracy_fp32,
        kept["agreement_fp32"],
        kept["sqnr_db"],
    )
    return dict(zip(QUALITY, values, strict=True))


def answering(experiment: Experiment, backend, step: Step) -> tuple[Callable, list[dict]]:
    """Make the network of `step`; return it on its engine, and its errors by layer."""
    from utils import quantize, training
    from utils.backends import registry
    from utils.backends.tool_defaults import TOOL_DEFAULTS
    from utils.measure import layer_errors

    model, images, recipe = experiment.baseline.model, experiment.data, step.recipe
    calibration = images.train.calibration(step.facts["calibration_images"])
    if step.kind == "tool":
        tool = TOOL_DEFAULTS[step.name]
        engine, write = registry.get(tool.backend), partial(tool.write, model, calibration)
        return _loaded(engine, write, tool.suffix, calibration[:1]), []
    if step.kind == "trained":
        run = Run(experiment.run.model, "qat", "int8")
        network = backend.prepare(model, calibration, recipe)
        trained = training.finetune(
            dataclasses.replace(experiment, run=run), backend, network, recipe
        )
        deployed = backend.convert(trained.model, model, recipe)
    else:
        config = backend.qdq_config(recipe)
        deployed = backend.deploy(quantize.ptq(model, calibration, recipe, config))
    errors = layer_errors.errors(deployed, images.validation.calibration(LAYER_IMAGES))
    return _loaded(backend, deployed.save, backend.suffix, calibration[:1]), errors


def _loaded(engine, save: Callable[[Path], None], suffix: str, example) -> Callable:
    """Write a file with `save` and load it with `engine`; return what answers images.

    `example` is an image, (1, 3, 224, 224).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{suffix}"
        save(path)
        predict = engine.load(path, "cpu")
        predict(example)  # some engines read the file only now
    return predict


def measure(
    experiment: Experiment, backend, step: Step, fp32: dict[str, "np.ndarray"]
) -> tuple[dict, list[dict]]:
    """Make and measure one network; `fp32` has the FP32 logits per part of the images."""
    from utils.training import loop

    started, images = time.perf_counter(), experiment.data
    predict, errors = answering(experiment, backend, step)
    measured = {"seconds": round(time.perf_counter() - started, 1)}
    for part, split in (("validation", images.validation), ("test", images.test)):
        columns = quality(loop.predict(predict, split), fp32[part], split.y)
        measured |= {f"{part}_{name}": value for name, value in columns.items()}
    layers = [{"layer": row["layer"], "sqnr_db": row["output_sqnr_db"]} for row in errors]
    return measured, layers


def run(experiment: Experiment, backend, folder: Path, steps: list[Step]) -> None:
    """Measure the `steps` that `folder` does not hold, and store each as it is done."""
    from utils.training import loop

    model, images, fp32 = experiment.run.model, experiment.data, {}
    for place, step in enumerate(steps):
        path = folder / f"{model}_{backend.name}_{place:02d}.json"
        facts = {
            "recipe": step.facts,
            "baseline": experiment.baseline.sha256,
            "data": images.digest,
            "smoke": experiment.options.smoke,
            "versions": environment.versions(),
            "cpu": environment.cpu(),
            "isa_limits": environment.isa_limits(),
            "threads": experiment.options.threads,
        }
        if is_done(path, facts):
            continue
        for part, split in (("validation", images.validation), ("test", images.test)):
            if part not in fp32:
                fp32[part] = loop.predict(experiment.baseline.model, split)
        where = f"{model} on {backend.name}, step {place + 1} of {len(steps)}"
        progress.say(f"{where}: {step.name} ({step.kind})")
        measured, layers = measure(experiment, backend, step, fp32)
        row = {"model": model, "backend": backend.name, "rung": step.name, "kind": step.kind}
        row |= {"place": place, **measured}
        if step.recipe is not None:
            row["overflow"] = backend.default_config(step.recipe.bits).overflow
        content = {"row": row, "layers": layers, "facts": facts, "code": environment.code(SCRIPT)}
        paths.write_text(path, json.dumps(content, indent=1) + "\n")
        rebuild(folder)
        progress.say(summary(row))


def is_done(path: Path, facts: dict) -> bool:
    """Whether the step in `path` was measured from the same `facts` by the same code."""
    content = stored(path)
    if content is None or content["facts"] != json.loads(json.dumps(facts)):
        return False
    return environment.is_code(content["code"])


def stored(path: Path) -> dict | None:
    """Read a step; None if it is missing or damaged, so that it is measured again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rebuild(folder: Path) -> None:
    """Write ablation.csv and ablation_layers.csv next to `folder` from all steps in it.

    Steps that were stored before a column existed have no value there.
    """
    steps = [content for path in sorted(folder.glob("*.json")) if (content := stored(path))]
    _write(folder.parent / "ablation.csv", COLUMNS, [row_of(content, folder) for content in steps])
    layers = [content["row"] | layer for content in steps for layer in content["layers"]]
    _write(folder.parent / "ablation_layers.csv", LAYER_COLUMNS, layers)


def row_of(content: dict, folder: Path) -> dict:
    """Return the row of a step in `folder`, with what tells it from other steps and runs."""
    method = {
        path: digest
        for path, digest in content["code"].items()
        if path.startswith("utils/quantize/")
    }
    return content["row"] | {
        "study_agreement_fp32": of_script(content, folder.parent / "runs"),
        "threads": content["facts"].get("threads"),
        "method_code": environment.code_sha256(method)[:8],
    }


def of_script(content: dict, runs: Path) -> float | None:
    """Return the agreement with FP32 in the script's run by the recipe of a step.

    The run is on the same engine, from the same FP32 network and images. None if there is none.
    """
    row, facts = content["row"], content["facts"]
    name = f"{row['model']}_{OF_SCRIPTS.get(row['rung'])}_int8_{row['backend']}_cpu_seed*.json"
    for path in sorted(runs.glob(name)):
        record = results.readable(path)
        if record is None or record.get("recipe") != facts["recipe"]:
            continue
        known = record["provenance"]
        if (known.get("baseline_sha256"), known["data_sha256"]) == (
            facts["baseline"],
            facts["data"],
        ):
            return record["metrics"].get("agreement_fp32")
    return None


def _write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths.write_text(path, text.getvalue())


def summary(row: dict) -> str:
    """Say in a line what a step reached."""
    parts = []
    for part in ("validation", "test"):
        sqnr = row[f"{part}_sqnr_db"] or float("inf")
        parts.append(
            f"{part} {row[f'{part}_accuracy']:.2%} (FP32 {row[f'{part}_accuracy_fp32']:.2%}), "
            f"agrees on {row[f'{part}_agreement_fp32']:.2%}, {sqnr:.1f} dB"
        )
    return f"{'; '.join(parts)}; quantized in {row['seconds']:.0f} s"


def parse() -> argparse.Namespace:
    parser = cli.Parser(
        SCRIPT, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="default: all"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="whose roundings (default: %(default)s)",
    )
    cli.add_options(parser)
    return parser.parse_args()


def main(asked: argparse.Namespace) -> None:
    given = dict(vars(asked))
    models, backend = given.pop("models"), given.pop("backend")
    options = cli.resolve((backend,), given)
    cli.before_torch(options)
    from utils import data, training
    from utils.backends import registry
    from utils.quantize.layers import blocks

    images, others = data.load_images(options), tools()
    folder = options.results / images.study / "ablation"
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        ptq = Run(model, "ptq", "int8")
        fp32 = training.load_fp32(ptq, images, options)
        experiment = Experiment(ptq, options, images, fp32)
        recipes = [recipe_of(Run(model, method, "int8")) for method in ("ptq", "qat")]
        listed = others + steps(*recipes, blocks(fp32.model)[:FLOATS])
        for engine in registry.select(options):
            run(experiment, engine, folder, listed)


def recipe_of(run: Run) -> Recipe:
    """Return the recipe of the script of `run`."""
    module = run.script.removesuffix(".py").replace("/", ".")
    return importlib.import_module(module).RECIPE


if __name__ == "__main__":
    with cli.reporting(SCRIPT):
        main(parse())
