"""Benchmark of INT8 on every engine, against FP32 and against the tools' defaults."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paired
import pictures
import torch
from torch import nn

from utils import stats
from utils.backends import registry
from utils.backends.tool_defaults import TOOL_DEFAULTS
from utils.catalog import BACKENDS, MODELS
from utils.data.dataset import Split
from utils.errors import UserError
from utils.measure import footprint
from utils.quantize.methods import ptq
from utils.recipes import Int8
from utils.timing import fastest, rounds
from utils.timing.worker import Worker
from utils.training import checkpoints, initial_weights

Point = tuple[int, int]  # threads and batch size
Side = tuple[str, str]  # kind ("FP32", "INT8", "default INT8" or "product") and engine or tool
Artifact = tuple[str, Path]  # backend and file
Times = dict[Side, np.ndarray]  # seconds of each round, (launches, rounds)

POINTS: tuple[Point, ...] = ((paired.THREADS, 1), (1, 1), (paired.THREADS, 32))
CALIBRATION = 64  # images: enough for speed, which hardly depends on the numbers
ROUNDS, LAUNCHES = 3, stats.FEWEST_LAUNCHES  # as many as an interval needs
BASE = "onnxruntime"  # every side is compared with its FP32
# Engines that multiply dense matrices, to measure the limit of the processor.
PRODUCTS = (BASE, "openvino", "onednn")
# Goals for INT8: over the fastest FP32 at each of POINTS, over the fastest default INT8 (1 for the
# other models), and for its multiply-adds per second over dense products.
OVER_FP32 = {"mobilenetv3": dict(zip(POINTS, (1.3, 1.5, 1.75), strict=True))}
OVER_DEFAULT = {"mobilenetv3": 1.15}
OVER_PRODUCTS = {"alexnet": 0.95, "resnet18": 0.95}


def engines(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time FP32 and INT8 of each model on all engines, in rounds that alternate between them.

    INT8 is made by the recipe of the model's PTQ script and by the default of each tool. A row is
    the time of FP32 on ONNX Runtime over the time of an engine. The last rows compare the study's
    fastest INT8 with the fastest tool and the fastest FP32, and at the largest batch its
    multiply-adds per second with dense products in INT8.
    """
    points = POINTS[-1:] if settings.smoke else POINTS
    split = pictures.prepared(settings, 4 if settings.smoke else CALIBRATION)
    torch.set_num_threads(paired.THREADS)
    dense = _dense(split, settings)
    for name in list(MODELS)[-1:] if settings.smoke else MODELS:
        init = settings.init.format(model=name) if settings.init else "scratch"
        model = initial_weights.initialize(name, init, 0).model
        if init == "scratch":
            settle(model, split.calibration(len(split)))
        model.eval()
        sides = _fp32(name, model, settings) | _int8(name, model, split, settings)
        for point in dict.fromkeys(points):
            largest = point == POINTS[-1]
            times = _times(sides | dense if largest else sides, split, point, settings.smoke)
            yield from _rows(name, point, times)
            if largest and dense:
                yield _of_products(name, model, point, times)


@torch.no_grad()
def settle(model: nn.Module, images: torch.Tensor) -> None:
    """Give the BatchNorm layers of a random `model` the statistics of `images`, in place.

    Without them, activations shrink or grow from layer to layer, until no range can hold them and
    XNNPACK refuses the network. `images` are float32 (n, 3, 224, 224).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a mean over all batches
        norm.reset_running_stats()
    model.train()
    for batch in images.split(16):
        model(batch)


def _runs(backend: str, settings: paired.Settings) -> bool:
    """Whether `backend` takes part: it runs on this CPU, and a smoke run needs only one engine."""
    if settings.smoke and backend not in ("native", BASE):
        return False
    return "cpu" in BACKENDS[backend].devices and not registry.problem(backend, "cpu")


def _fp32(name: str, model: nn.Module, settings: paired.Settings) -> dict[Side, Artifact]:
    """Return FP32 on all engines, except those that compile in every launch."""
    path = settings.folder / f"{name}.pt"
    checkpoints.export(path, model)
    return {
        ("FP32", backend): (backend, path)
        for backend in fastest.ENGINES
        if _runs(backend, settings) and not BACKENDS[backend].compiles
    }


def _int8(
    name: str, model: nn.Module, split: Split, settings: paired.Settings
) -> dict[Side, Artifact]:
    """Write INT8 of `model` for every engine, by the study's recipe and by the tools' defaults."""
    images, sides = split.calibration(len(split)), {}
    recipe = importlib.import_module(f"quantization.ptq.{name}_ptq_int8").RECIPE
    recipe = recipe.replace(reconstruct=False)  # which does not affect the speed
    for backend, entry in BACKENDS.items():
        if ("ptq", "int8") in entry.serves and _runs(backend, settings):
            stem = settings.folder / name
            with _left_out(f"{MODELS[name].label}, INT8 {backend}"):
                sides["INT8", backend] = _written(model, images, recipe, backend, stem)
    for label, tool in TOOL_DEFAULTS.items():
        if not tool.missing and _runs(tool.backend, settings):
            path = settings.folder / f"{name}_default_{tool.backend}{tool.suffix}"
            with _left_out(f"{MODELS[name].label}, default INT8 of {label}"):
                tool.write(model, images, path)
                sides["default INT8", label] = tool.backend, path
    return sides


@contextlib.contextmanager
def _left_out(what: str) -> Iterator[None]:
    """Print one line if an engine refuses a network, and go on without it."""
    try:
        yield
    except UserError as error:
        print(f"{what}: left out: {error}", flush=True)


def _dense(split: Split, settings: paired.Settings) -> dict[Side, Artifact]:
    """Write INT8 of `products()` for the engines PRODUCTS."""
    images, stem = split.calibration(4), settings.folder / "products"
    recipe = Int8(ranges="minmax", calibration_images=4)
    return {
        ("product", backend): _written(products(), images, recipe, backend, stem)
        for backend in PRODUCTS
        if _runs(backend, settings)
    }


def _written(
    model: nn.Module, images: torch.Tensor, recipe: Int8, backend: str, stem: Path
) -> Artifact:
    """Write INT8 of `model` for a backend to a file whose name begins with `stem`."""
    engine = registry.get(backend)
    path = stem.with_name(f"{stem.name}_{backend}{engine.suffix}")
    engine.deploy(ptq(model, images, recipe, engine.qdq_config(recipe))).save(path)
    return backend, path


def products() -> nn.Module:
    """Make a network of eight dense matrix products per image, 256 x 1024 by 1024 x 1024.

    Its first and last layers, for images and classes, have 7 % of its multiply-adds.
    """
    torch.manual_seed(0)
    dense = [nn.Conv2d(1024, 1024, 1) for _ in range(8)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 2)
    return nn.Sequential(nn.Conv2d(3, 1024, 14, 14), *dense, *head).eval()


def _times(sides: dict[Side, Artifact], split: Split, point: Point, smoke: bool) -> Times:
    """Time all `sides` at a point, in several launches."""
    launches, count = (1, 1) if smoke else (LAUNCHES, ROUNDS)
    seconds = [_launch(list(sides.values()), split, point, count) for _ in range(launches)]
    return dict(zip(sides, np.array(seconds).transpose(2, 0, 1), strict=True))


def _launch(artifacts: list[Artifact], split: Split, point: Point, count: int) -> np.ndarray:
    """Start all artifacts once; returns the median seconds of each round, (rounds, artifacts)."""
    threads, batch_size = point
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(*side, "cpu", threads)) for side in artifacts]
        return rounds.compare(workers, split, batch_size, count)


def _rows(name: str, point: Point, times: Times) -> Iterator[paired.Row]:
    """Yield a row for each network of a model, and the rows that compare the fastest ones."""
    where, base = _where(name, point), times["FP32", BASE]
    for (kind, label), seconds in times.items():
        if kind != "product":
            yield _row(f"{where}{kind} {label}", base / seconds)
    ours, default, fp32 = (_fastest(times, kind) for kind in ("INT8", "default INT8", "FP32"))
    goals = {
        default: OVER_DEFAULT.get(name, 1.0),
        fp32: OVER_FP32.get(name, {}).get(point),
    }
    for other, goal in goals.items():
        if other:
            what = f"{where}{' '.join(ours)} over {' '.join(other)}"
            yield _row(what, times[other] / times[ours], goal)


def _of_products(name: str, model: nn.Module, point: Point, times: Times) -> paired.Row:
    """Compare the multiply-adds per second of the fastest INT8 and the fastest dense products."""
    ours, limit = _fastest(times, "INT8"), _fastest(times, "product")
    work = sum(footprint.macs(model).values()) / sum(footprint.macs(products()).values())
    what = f"{_where(name, point)}MACs/s, {' '.join(ours)} over {' '.join(limit)}"
    return _row(what, work * times[limit] / times[ours], OVER_PRODUCTS.get(name))


def _where(name: str, point: Point) -> str:
    threads, batch_size = point
    noun = "thread" if threads == 1 else "threads"
    return f"{MODELS[name].label}, {threads} {noun}, batch {batch_size}: "


def _fastest(times: Times, kind: str) -> Side | None:
    """Return the fastest side of a kind; None if there is none of that kind."""
    sides = [side for side in times if side[0] == kind]
    return min(sides, key=lambda side: np.median(times[side]), default=None)


def _row(what: str, ratios: np.ndarray, goal: float | None = None) -> paired.Row:
    """Make the row of `ratios`, (launches, rounds).

    Rounds of a launch are not independent, so the interval is over launches; see `stats.interval`.
    """
    by_launch, sessions = np.median(ratios, axis=1), [0] * len(ratios)
    low, high = stats.interval(by_launch, sessions)
    return paired.Row(what, stats.grouped_mean(by_launch, sessions), low, high, goal=goal)
