"""Benchmark of INT8 on every engine: against FP32, and against the tools' default recipes."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paired
import pictures
import torch
from torch import nn

from utils import architectures
from utils.backends import registry
from utils.backends.tool_defaults import TOOL_DEFAULTS
from utils.catalog import BACKENDS, MODELS
from utils.data.dataset import Split
from utils.measure import footprint
from utils.timing import fastest, rounds
from utils.timing.worker import Worker
from utils.training import checkpoints, initial_weights

POINTS = ((paired.THREADS, 1), (1, 1), (paired.THREADS, 32))  # (threads, batch size)
CALIBRATION = 64  # images: enough for speed, which hardly depends on the numbers
ROUNDS, LAUNCHES = 5, 2
BASE = "onnxruntime"  # FP32 on it is what all others are compared with
PRODUCTS = (
    BASE,
    "openvino",
    "onednn",
)  # engines that multiply dense matrices, to see what the processor can do
OVER_FP32 = {
    "mobilenetv3": (1.3, 1.5, 1.75)
}  # goals of INT8 over the fastest FP32, at each of POINTS
OVER_DEFAULT = {"mobilenetv3": 1.15}  # goal over the fastest default INT8; of other models 1
OF_PRODUCTS = {
    "alexnet": 0.95,
    "resnet18": 0.95,
}  # goals of the share of the multiply-adds a second of dense products


def engines(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time FP32 and INT8 of each model on all engines, in rounds that alternate between all of them.

    The weights are those of `--init`, or random. INT8 is by the recipe of the model's PTQ script and
    by the default of each tool. A row is the time of FP32 on ONNX Runtime over that of an engine;
    the last ones compare the study's fastest INT8 with the fastest of the tools, with the fastest
    FP32, and at the largest batch its multiply-adds a second with those of dense products in INT8.
    """
    points = POINTS[-1:] if settings.smoke else POINTS
    split = pictures.prepared(settings, 4 if settings.smoke else CALIBRATION)
    torch.set_num_threads(paired.THREADS)
    dense = _dense(split, settings)
    for name in list(MODELS)[-1:] if settings.smoke else MODELS:
        init = settings.init.format(model=name) if settings.init else "scratch"
        model = initial_weights.initialize(name, init, 0).model.eval()
        sides = _fp32(name, model, settings) | _int8(name, model, split, settings)
        for point in dict.fromkeys(points):
            largest = point == POINTS[-1]
            times = _times(sides | dense if largest else sides, split, point, settings.smoke)
            yield from _rows(name, point, times)
            if largest and dense:
                yield _of_products(name, model, point, times)


def _fp32(
    name: str, model: nn.Module, settings: paired.Settings
) -> dict[tuple[str, str], tuple[str, Path]]:
    """Return the engines of FP32, as (backend, file) by (kind, label), but for those that compile in every launch."""
    path = settings.folder / f"{name}.pt"
    checkpoints.export(path, model)
    names = (
        ["native", BASE]
        if settings.smoke
        else [name for name in fastest.ENGINES if not BACKENDS[name].compiles]
    )
    able = [
        each
        for each in names
        if "cpu" in BACKENDS[each].devices and not registry.problem(each, "cpu")
    ]
    return {("FP32", each): (each, path) for each in able}


def _int8(
    name: str, model: nn.Module, split: Split, settings: paired.Settings
) -> dict[tuple[str, str], tuple[str, Path]]:
    """Write INT8 of `model` for every engine, by the study's recipe and by each tool's."""
    images, sides = split.calibration(len(split)), {}
    recipe = importlib.import_module(f"quantization.ptq.{name}_ptq_int8").RECIPE | {
        "reconstruct": False
    }  # no faster
    for backend, entry in BACKENDS.items():
        serves = ("ptq", "int8") in entry.serves and "cpu" in entry.devices
        if (
            serves
            and not registry.problem(backend, "cpu")
            and (not settings.smoke or backend == BASE)
        ):
            sides["INT8", backend] = _written(
                model, images, recipe, backend, settings.folder / name
            )
    for label, tool in TOOL_DEFAULTS.items():
        if (
            not tool.missing
            and not registry.problem(tool.backend, "cpu")
            and (not settings.smoke or tool.backend == BASE)
        ):
            path = settings.folder / f"{name}_default_{tool.backend}{tool.suffix}"
            tool.write(model, images, path)
            sides["default INT8", label] = tool.backend, path
    return sides


def _dense(split: Split, settings: paired.Settings) -> dict[tuple[str, str], tuple[str, Path]]:
    """Write INT8 of `products()` for the engines PRODUCTS."""
    images, sides = split.calibration(4), {}
    recipe = dict(bits=8, activations="minmax", bias_correction=False, keep_fp32=())
    for backend in PRODUCTS[:1] if settings.smoke else PRODUCTS:
        if not registry.problem(backend, "cpu"):
            sides["product", backend] = _written(
                products(), images, recipe, backend, settings.folder / "products"
            )
    return sides


def _written(
    model: nn.Module, images: torch.Tensor, recipe: dict, backend: str, stem: Path
) -> tuple[str, Path]:
    """Write INT8 of `model` for a backend to a file whose name begins with `stem`; returns both."""
    deployed = registry.get(backend).quantize(model, images, recipe)
    path = stem.with_name(f"{stem.name}_{backend}{deployed.backend.suffix}")
    deployed.save(path)
    return backend, path


def products() -> nn.Module:
    """Make a network of dense matrix products: of 256 positions an image by 1024 x 1024 weights, eight times.

    Its first and last layers, for images and classes, have 7 % of its multiply-adds.
    """
    torch.manual_seed(0)
    dense = [nn.Conv2d(1024, 1024, 1) for _ in range(8)]
    return nn.Sequential(
        nn.Conv2d(3, 1024, 14, 14),
        *dense,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1024, 2),
    ).eval()


def _times(
    sides: dict, split: Split, point: tuple[int, int], smoke: bool
) -> dict[tuple[str, str], np.ndarray]:
    """Time all `sides` at a point of POINTS; returns the seconds of each, (rounds,)."""
    by_launch = [
        _launch(list(sides.values()), split, point, 1 if smoke else ROUNDS)
        for _ in range(1 if smoke else LAUNCHES)
    ]
    return dict(zip(sides, np.concatenate(by_launch, axis=1), strict=True))


def _rows(
    name: str, point: tuple[int, int], times: dict[tuple[str, str], np.ndarray]
) -> Iterator[paired.Row]:
    """Yield a row for each network of a model, and those that compare the fastest ones."""
    where, fp32 = _where(name, point), times["FP32", BASE]
    for (kind, label), seconds in times.items():
        if kind != "product":
            yield _row(f"{where}{kind} {label}", fp32 / seconds)
    ours, default, fp32 = (_fastest(times, kind) for kind in ("INT8", "default INT8", "FP32"))
    goals = {
        default: OVER_DEFAULT.get(name, 1.0),
        fp32: dict(zip(POINTS, OVER_FP32.get(name, ()), strict=False)).get(point),
    }
    for other, goal in goals.items():
        if other:
            yield _row(
                f"{where}{' '.join(ours)} over {' '.join(other)}", times[other] / times[ours], goal
            )


def _of_products(
    name: str, model: nn.Module, point: tuple[int, int], times: dict[tuple[str, str], np.ndarray]
) -> paired.Row:
    """Compare the multiply-adds a second of the fastest INT8 with those of the fastest dense products."""
    ours, limit = _fastest(times, "INT8"), _fastest(times, "product")
    work = sum(footprint.macs(model).values()) / sum(footprint.macs(products()).values())
    what = f"{_where(name, point)}MACs/s, {' '.join(ours)} over {' '.join(limit)}"
    return _row(what, work * times[limit] / times[ours], OF_PRODUCTS.get(name))


def _where(name: str, point: tuple[int, int]) -> str:
    threads, batch_size = point
    return f"{MODELS[name].label}, {threads} thread{'s' * (threads > 1)}, batch {batch_size}: "


def _fastest(times: dict[tuple[str, str], np.ndarray], kind: str) -> tuple[str, str] | None:
    """Return the fastest side of a kind, or None if there is none of that kind."""
    return min(
        (side for side in times if side[0] == kind),
        key=lambda side: np.median(times[side]),
        default=None,
    )


def _launch(
    sides: list[tuple[str, Path]], split: Split, point: tuple[int, int], count: int
) -> np.ndarray:
    """Start all sides once; returns the median seconds of each in each round, (sides, rounds)."""
    threads, batch_size = point
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(*side, "cpu", threads)) for side in sides]
        return rounds.compare(workers, split, batch_size, count).T


def _row(what: str, ratios: np.ndarray, goal: float | None = None) -> paired.Row:
    return paired.Row(what, float(np.median(ratios)), *paired.interval(ratios), goal=goal)
