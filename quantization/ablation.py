"""INT8 rung by rung: what each step of the method adds, alone and on top of the steps before it.

    python quantization/ablation.py --data PATH --models mobilenetv3 --backend fbgemm

First come the default recipes of other tools, each on that tool's engine, then the study's networks
on the engine of `--backend`, and last its recipe of PTQ with fewer and more images and with the 7 bits
of processors without VNNI. The FP32 checkpoints must be there; QAT is trained unless its script was run
before. Each rung is measured on the validation images, which steps are chosen by, and on the test
images, which nothing is chosen by; layer by layer, in exact arithmetic, on a few validation images.
What is done already is not done again. The results are `results/STUDY/ablation.csv` and
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import backends, catalog, cli, environment, experiments, paths, progress
from utils.catalog import MODELS, Run

SCRIPT = "quantization/ablation.py"
BACKENDS = tuple(
    name for name, backend in catalog.BACKENDS.items() if ("ptq", "int8") in backend.serves
)
START = dict(bits=8, activations="minmax", weights="tensor", calibration_images=256, keep_fp32=())
CHANNELS = "a weight scale for each channel"
STEPS = {  # the further steps, in the order in which they are stacked
    "MSE ranges": dict(activations="mse"),
    "equalization": dict(equalize=True),
    "bias correction": dict(bias_correction=True),
    "adaptive rounding": dict(adaround=True),
    "reconstruction": dict(
        bias_correction=False, adaround=False, reconstruct=True
    ),  # biases and weights learn
    "first blocks in FP32": None,  # the first FLOATS of them, whose names depend on the model
}
FLOATS = 2
VARIATIONS = {  # of the recipe of PTQ, which was chosen with its number of images on a processor with VNNI
    "the study's recipe": {},
    "with 100 calibration images": dict(calibration_images=100),
    "with 2,000 calibration images": dict(calibration_images=2000),
    "for processors without VNNI": dict(narrow=True),
}
LAYER_IMAGES = 64  # validation images for the errors layer by layer
COLUMNS = (
    "model", "backend", "rung", "kind", "place", "seconds",
    *(f"{part}_{name}" for part in ("validation", "test")
      for name in ("images", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "accuracy_fp32", "agreement_fp32", "sqnr_db")),
)  # fmt: skip
LAYER_COLUMNS = ("model", "backend", "rung", "kind", "place", "layer", "sqnr_db")


@dataclass(frozen=True)
class Rung:
    """A network to measure: by the default of a tool, or by a recipe of the study."""

    name: str
    kind: str  # "tool"; "stacked" on those before it; "trained", which is stacked, too; "alone"; "varied"
    recipe: dict


def tools() -> list[Rung]:
    """List the tools whose default can run here; says which cannot."""
    from utils.backends import registry
    from utils.backends.tool_defaults import TOOL_DEFAULTS

    able = []
    for name, tool in TOOL_DEFAULTS.items():
        missing = (
            f"not installed: {tool.package} (pip install {tool.package})" if tool.missing else None
        )
        reason = missing or registry.problem(tool.backend, "cpu")
        if reason:
            progress.say(f"default of {name} left out: {reason}")
        else:
            recipe = {"package": tool.package, "version": importlib.metadata.version(tool.package)}
            able.append(
                Rung(name, "tool", recipe | {"calibration_images": START["calibration_images"]})
            )
    return able


def steps(ptq: dict, qat: dict, floats: tuple[str, ...]) -> list[Rung]:
    """List the study's rungs for a model with the recipes `ptq` and `qat`; `floats` are its first blocks."""
    start = START | {name: ptq[name] for name in ("seven_bits",) if name in ptq}
    changes = STEPS | {"first blocks in FP32": dict(keep_fp32=floats)}
    total = channels = start | dict(weights="channel")
    rungs = [Rung("the plainest", "stacked", start), Rung(CHANNELS, "stacked", channels)]
    for name, change in changes.items():
        total = total | change
        rungs.append(Rung(name, "stacked", total))
    rungs.append(Rung("QAT", "trained", qat))
    rungs += [Rung(name, "alone", channels | change) for name, change in changes.items()]
    return rungs + [Rung(name, "varied", ptq | change) for name, change in VARIATIONS.items()]


def quality(logits, fp32, y) -> dict:
    """Compute the columns of one part of the images from logits, float32 (n, 2), and labels (n,)."""
    from utils import metrics, stats

    right = int((logits.argmax(1) == y).sum())
    low, high = stats.wilson(right, len(y))
    kept = metrics.fidelity(logits, fp32)
    return {
        "images": len(y), "accuracy": right / len(y), "accuracy_ci_low": low, "accuracy_ci_high": high,
        "accuracy_fp32": float((fp32.argmax(1) == y).mean()),
        "agreement_fp32": kept["agreement_fp32"], "sqnr_db": kept["sqnr_db"],
    }  # fmt: skip


def answering(experiment, backend, rung: Rung) -> tuple[Callable, list[dict]]:
    """Make the network of `rung`; returns it on its engine, and its errors by layer."""
    from utils import training
    from utils.backends import registry
    from utils.backends.tool_defaults import TOOL_DEFAULTS
    from utils.measure import layer_errors

    model, images = experiment.baseline.model, experiment.data
    calibration = images.train.calibration(rung.recipe["calibration_images"])
    if rung.kind == "tool":
        tool = TOOL_DEFAULTS[rung.name]
        return _loaded(
            registry.get(tool.backend),
            partial(tool.write, model, calibration),
            tool.suffix,
            calibration[:1],
        ), []
    if rung.kind == "trained":
        experiment = dataclasses.replace(experiment, run=Run(experiment.run.model, "qat", "int8"))
        prepared = backend.prepare(model, calibration, rung.recipe)
        trained = training.finetune(experiment, backend, prepared, rung.recipe)
        deployed = backend.convert(trained, model, calibration, rung.recipe)
    else:
        deployed = backend.quantize(model, calibration, rung.recipe)
    shown = images.validation.calibration(LAYER_IMAGES)
    return _loaded(backend, deployed.save, backend.suffix, calibration[:1]), layer_errors.errors(
        deployed, shown
    )


def _loaded(engine, save: Callable[[Path], None], suffix: str, example) -> Callable:
    """Write a file by `save` and load it with `engine`; returns a function from images to logits.

    `example` is an image, (1, 3, 224, 224).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{suffix}"
        save(path)
        predict = engine.load(path, "cpu")
        predict(example)  # some engines read the file only now
    return predict


def climb(experiment, backend, rung: Rung, references: dict) -> tuple[dict, list[dict]]:
    """Make and measure one rung; `references` has the FP32 logits of each part."""
    from utils.training import loop

    started, images = time.perf_counter(), experiment.data
    predict, errors = answering(experiment, backend, rung)
    measured = {"seconds": round(time.perf_counter() - started, 1)}
    for part, split in (("validation", images.validation), ("test", images.test)):
        for name, value in quality(loop.predict(predict, split), references[part], split.y).items():
            measured[f"{part}_{name}"] = value
    return measured, [
        {"layer": each["layer"], "sqnr_db": each["output_sqnr_db"]} for each in errors
    ]


def ladder(experiment, backend, folder: Path, rungs: list[Rung]) -> None:
    """Climb those of `rungs` that `folder` does not hold, and store each as it is done."""
    from utils.training import loop

    run, images = experiment.run, experiment.data
    references = {}
    for place, rung in enumerate(rungs):
        path = folder / f"{run.model}_{backend.name}_{place:02d}.json"
        facts = {
            "recipe": rung.recipe,
            "baseline": experiment.baseline.sha256,
            "data": images.digest,
            "smoke": experiment.options.smoke,
        }
        if is_done(path, facts):
            continue
        parts = {"validation": images.validation, "test": images.test}
        references = references or {
            part: loop.predict(experiment.baseline.model, split) for part, split in parts.items()
        }
        progress.say(
            f"{run.model} on {backend.name}, rung {place + 1} of {len(rungs)}: {rung.name} ({rung.kind})"
        )
        measured, errors = climb(experiment, backend, rung, references)
        row = {
            "model": run.model,
            "backend": backend.name,
            "rung": rung.name,
            "kind": rung.kind,
            "place": place,
        } | measured
        content = {"row": row, "layers": errors, "facts": facts, "code": environment.code(SCRIPT)}
        paths.write_text(path, json.dumps(content, indent=1) + "\n")
        rebuild(folder)
        progress.say(summary(row))


def is_done(path: Path, facts: dict) -> bool:
    """Whether the rung in `path` was measured from the same `facts` by the same code."""
    content = stored(path)
    return (
        content is not None
        and content["facts"] == json.loads(json.dumps(facts))
        and environment.is_code(content["code"])
    )


def stored(path: Path) -> dict | None:
    """Read a rung; None if it is missing or damaged, so that it is climbed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rebuild(folder: Path) -> None:
    """Write ablation.csv and ablation_layers.csv beside `folder` from all rungs in it."""
    rungs = [content for path in sorted(folder.glob("*.json")) if (content := stored(path))]
    _write(folder.parent / "ablation.csv", COLUMNS, [content["row"] for content in rungs])
    layers = [content["row"] | layer for content in rungs for layer in content["layers"]]
    _write(folder.parent / "ablation_layers.csv", LAYER_COLUMNS, layers)


def _write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths.write_text(path, text.getvalue())


def summary(row: dict) -> str:
    """Say in a line what a rung reached."""
    parts = [
        f"{part} {row[f'{part}_accuracy']:.2%} (FP32 {row[f'{part}_accuracy_fp32']:.2%}), agrees on "
        f"{row[f'{part}_agreement_fp32']:.2%}, {row[f'{part}_sqnr_db'] or float('inf'):.1f} dB"
        for part in ("validation", "test")
    ]
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
    given = {
        name: value for name, value in vars(asked).items() if name not in ("models", "backend")
    }
    options = cli.resolve((asked.backend,), given)
    cli.before_torch(options)
    from utils.quantize.layers import blocks

    others = tools()
    for model in asked.models:
        experiment = experiments.begin(Run(model, "ptq", "int8"), options)
        folder = options.results / experiment.data.study / "ablation"
        folder.mkdir(parents=True, exist_ok=True)
        recipes = [
            importlib.import_module(f"quantization.{method}.{model}_{method}_int8").RECIPE
            for method in ("ptq", "qat")
        ]
        rungs = others + steps(*recipes, blocks(experiment.baseline.model)[:FLOATS])
        for backend in backends.select(options):
            ladder(experiment, backend, folder, rungs)


if __name__ == "__main__":
    with cli.reporting(SCRIPT):
        main(parse())
