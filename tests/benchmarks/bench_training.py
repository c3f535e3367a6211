"""Benchmarks of training steps: ours against the plain loop of PyTorch's tutorials, QAT against FP32."""

import dataclasses
import functools
import importlib
from collections.abc import Iterator

import paired
import pictures
import torch
import torch.nn.functional as F

from models.resnet18_fp32 import RECIPE
from utils import architectures
from utils.backends import registry
from utils.catalog import MODELS
from utils.training.loop import Setup, Training

RATE = 1e-4


def training_step(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time ResNet-18 on one batch, which both sides have ready."""
    torch.set_num_threads(paired.THREADS)
    recipe = RECIPE["pretrained"] | ({"batch_size": 4} if settings.smoke else {})
    split = pictures.prepared(settings, 2 * recipe["batch_size"])
    torch.manual_seed(0)
    training = Training(
        architectures.build("resnet18"), pictures.as_data(split), recipe, Setup(set(), 0, "cpu")
    )
    training.network.train()
    x, y = next(split.shuffled(recipe["batch_size"], 0, augmentation=recipe["augment"]))
    ours, theirs = paired.turn(lambda: training.step(x, y)), paired.turn(plain(x.contiguous(), y))
    for turn in (ours, theirs):
        turn()  # allocates the optimizer's state
    what = f"training step, batch {len(x)}, {training.amp}, times faster than a plain loop"
    yield paired.faster(what, ours, theirs, 1.5, 1 if settings.smoke else 3)


def qat_step(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time a step of QAT for INT8, with its teacher, against an FP32 step of the same network and batch."""
    torch.set_num_threads(paired.THREADS)
    for name in list(MODELS)[-1:] if settings.smoke else MODELS:
        quantized = importlib.import_module(f"quantization.qat.{name}_qat_int8").RECIPE
        plain = importlib.import_module(f"models.{name}_fp32").RECIPE["pretrained"]
        split = pictures.prepared(settings, 8 if settings.smoke else 2 * plain["batch_size"])
        torch.manual_seed(0)
        model = architectures.build(name).eval()
        network = registry.get("fbgemm").prepare(model, split.calibration(8), quantized)
        data, setup = pictures.as_data(split), Setup(set(), 0, "cpu")
        qat = Training(
            network, data, quantized["training"], dataclasses.replace(setup, teacher=model)
        )
        fp32 = Training(architectures.build(name), data, plain, setup)
        x, y = next(
            split.shuffled(
                4 if settings.smoke else plain["batch_size"], 0, augmentation=plain["augment"]
            )
        )
        sides = [paired.turn(functools.partial(training.step, x, y)) for training in (qat, fp32)]
        for training, turn in zip((qat, fp32), sides, strict=True):
            training.network.train()
            turn()  # allocates the optimizer's state
        what = f"QAT step of {MODELS[name].label}, batch {len(x)}, over an FP32 step ({fp32.amp})"
        yield paired.cost(what, *sides, 2.0, 1 if settings.smoke else 3)


def plain(x: torch.Tensor, y: torch.Tensor):
    """Make a plain step: FP32, contiguous, AdamW with its defaults, the same architecture."""
    model = architectures.build("resnet18").train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
