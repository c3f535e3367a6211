"""INT8 rung by rung: what each step of the method adds, alone and on top of the steps before it.

    python quantization/int8_ladder.py --data PATH --models mobilenetv3 --backend fbgemm

Every network is executed exactly, with the roundings that the engine asks for, so no engine's errors
are part of it. The FP32 checkpoints must be there. Each rung is measured on the validation images,
which steps are chosen by, and on the test images, which nothing is chosen by. What is done already
is not done again. The results are `results/STUDY/ladder.csv`; `figures/int8_ladder.py` draws them.
"""

import argparse
import csv
import importlib
import io
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import backends, catalog, cli, environment, experiments, paths, progress
from utils.catalog import MODELS, Run

SCRIPT = "quantization/int8_ladder.py"
BACKENDS = tuple(name for name, backend in catalog.BACKENDS.items() if ("ptq", "int8") in backend.serves)
START = dict(bits=8, activations="minmax", weights="tensor", calibration_images=256, keep_fp32=())
CHANNELS = "a weight scale for each channel"
STEPS = {  # the further steps, in the order in which they are stacked
    "MSE ranges": dict(activations="mse"),
    "equalization": dict(equalize=True),
    "bias correction": dict(bias_correction=True),
    "adaptive rounding": dict(adaptive_rounding=True),
    "reconstruction": dict(adaptive_rounding=False, reconstruct=True),
    "blocks in FP32": None,  # those of the model's PTQ script
}
COLUMNS = (
    "model", "backend", "rung", "stacked", "place", "seconds",
    *(f"{part}_{name}" for part in ("validation", "test")
      for name in ("images", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "accuracy_fp32", "agreement_fp32", "sqnr_db")),
)  # fmt: skip


def rungs(recipe: dict) -> list[tuple[str, bool, dict]]:
    """List (name, whether stacked, recipe) of all rungs for a model whose PTQ script has `recipe`."""
    start = START | {name: recipe[name] for name in ("seven_bits",) if name in recipe}
    steps = STEPS | {"blocks in FP32": dict(keep_fp32=recipe["keep_fp32"])}
    if not recipe["keep_fp32"]:
        del steps["blocks in FP32"]
    channels = start | dict(weights="channel")
    alone = [(name, False, channels | change) for name, change in steps.items()]
    stacked, total = [], channels
    for name, change in steps.items():
        total = total | change
        stacked.append((name, True, total))
    return [("the plainest", True, start), (CHANNELS, True, channels), *stacked, *alone]


def quality(logits, reference, y) -> dict:
    """Compute the columns of one part of the images from logits, float32 (n, 2), and labels (n,)."""
    from utils import metrics, stats

    right = int((logits.argmax(1) == y).sum())
    low, high = stats.wilson(right, len(y))
    kept = metrics.fidelity(logits, reference)
    return {
        "images": len(y), "accuracy": right / len(y), "accuracy_ci_low": low, "accuracy_ci_high": high,
        "accuracy_fp32": float((reference.argmax(1) == y).mean()),
        "agreement_fp32": kept["agreement_fp32"], "sqnr_db": kept["sqnr_db"],
    }  # fmt: skip


def climb(experiment, backend, recipe: dict, references: dict) -> dict:
    """Quantize by one rung's `recipe` and measure it; `references` has the FP32 logits of each part."""
    from utils.quantize import reference

    started, images = time.perf_counter(), experiment.data
    calibration = images.train.calibration(recipe["calibration_images"])
    quantized = backend.quantized(experiment.baseline.model, calibration, recipe)
    measured = {"seconds": round(time.perf_counter() - started, 1)}
    for part, split in (("validation", images.validation), ("test", images.test)):
        for name, value in quality(reference.logits(quantized, split), references[part], split.y).items():
            measured[f"{part}_{name}"] = value
    return measured


def ladder(experiment, backend, folder: Path) -> None:
    """Climb all rungs of one model that `folder` does not hold, and store each as it is done."""
    from utils.training import loop

    run, images = experiment.run, experiment.data
    recipe = importlib.import_module(f"quantization.ptq.{run.name}").RECIPE
    references = {}
    for place, (name, stacked, settings) in enumerate(rungs(recipe)):
        path = folder / f"{run.model}_{backend.name}_{place:02d}.json"
        facts = {
            "recipe": settings,
            "baseline": experiment.baseline.sha256,
            "data": images.digest,
            "smoke": experiment.options.smoke,
        }
        if is_done(path, facts):
            continue
        parts = {"validation": images.validation, "test": images.test}
        references = references or {part: loop.predict(experiment.baseline.model, split) for part, split in parts.items()}
        progress.say(f"{run.model} on {backend.name}, rung {place + 1}: {name}{'' if stacked else ', alone'}")
        row = {"model": run.model, "backend": backend.name, "rung": name, "stacked": stacked, "place": place}
        row |= climb(experiment, backend, settings, references)
        content = {"row": row, "facts": facts, "code": environment.code(SCRIPT)}
        paths.write_text(path, json.dumps(content, indent=1) + "\n")
        rebuild(folder)
        progress.say(summary(row))


def is_done(path: Path, facts: dict) -> bool:
    """Whether the rung in `path` was measured from the same `facts` by the same code."""
    content = stored(path)
    return content is not None and content["facts"] == json.loads(json.dumps(facts)) and environment.is_code(content["code"])


def stored(path: Path) -> dict | None:
    """Read a rung; None if it is missing or damaged, so that it is climbed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def rebuild(folder: Path) -> None:
    """Write ladder.csv beside `folder` from all rungs in it."""
    rows = [content["row"] for path in sorted(folder.glob("*.json")) if (content := stored(path))]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths.write_text(folder.parent / "ladder.csv", text.getvalue())


def summary(row: dict) -> str:
    """Say in a line what a rung reached."""
    parts = [
        f"{part} {row[f'{part}_accuracy']:.2%} (FP32 {row[f'{part}_accuracy_fp32']:.2%}), agrees on "
        f"{row[f'{part}_agreement_fp32']:.2%}, {row[f'{part}_sqnr_db'] or float('inf'):.1f} dB"
        for part in ("validation", "test")
    ]
    return f"{'; '.join(parts)}; quantized in {row['seconds']:.0f} s"


def parse() -> argparse.Namespace:
    parser = cli.Parser(SCRIPT, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="default: all")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="whose roundings (default: %(default)s)")
    cli.add_options(parser)
    return parser.parse_args()


def main(asked: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(asked).items() if name not in ("models", "backend")}
    options = cli.resolve((asked.backend,), given)
    cli.before_torch(options)
    for model in asked.models:
        experiment = experiments.begin(Run(model, "ptq", "int8"), options)
        folder = options.results / experiment.data.study / "ladder"
        folder.mkdir(parents=True, exist_ok=True)
        for backend in backends.select(options):
            ladder(experiment, backend, folder)


if __name__ == "__main__":
    with cli.reporting(SCRIPT):
        main(parse())
