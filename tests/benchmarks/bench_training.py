"""Benchmarks of training steps: ours against PyTorch's tutorials, QAT against FP32."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator

import paired
import pictures
import torch
import torch.nn.functional as F

from models.resnet18_fp32 import RECIPE
from utils import architectures
from utils.backends import registry
from utils.catalog import MODELS
from utils.training.loop import Setup, Trainer

RATE = 1e-4
SETUP = Setup(set(), 0, "cpu")


def training_step(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time ResNet-18 on one batch, which both sides have ready."""
    torch.set_num_threads(paired.THREADS)
    recipe = RECIPE.pretrained
    if settings.smoke:
        recipe = recipe.replace(batch_size=4)
    split = pictures.prepared(settings, 2 * recipe.batch_size)
    torch.manual_seed(0)
    trainer = Trainer(architectures.build("resnet18"), pictures.as_data(split), recipe, SETUP)
    trainer.network.train()
    augmentation = recipe.augment.describe()
    x, y = next(split.shuffled(recipe.batch_size, 0, augmentation=augmentation))
    ours = paired.turn(functools.partial(trainer.step, x, y))
    plain = paired.turn(plain_step(x.contiguous(), y))
    for turn in (ours, plain):
        turn()  # allocates the optimizer's state
    what = f"training step, batch {len(x)}, {trainer.amp}, times faster than a plain loop"
    yield paired.faster(what, ours, plain, 1.5, 1 if settings.smoke else 3)


def qat_step(settings: paired.Settings) -> Iterator[paired.Row]:
    """Time an INT8 QAT step with its teacher against an FP32 step of the same network and batch."""
    torch.set_num_threads(paired.THREADS)
    for name in list(MODELS)[-1:] if settings.smoke else MODELS:
        int8_recipe = importlib.import_module(f"quantization.qat.{name}_qat_int8").RECIPE
        fp32_recipe = importlib.import_module(f"models.{name}_fp32").RECIPE.pretrained
        batch_size = 4 if settings.smoke else fp32_recipe.batch_size
        split = pictures.prepared(settings, 2 * batch_size)
        torch.manual_seed(0)
        teacher = architectures.build(name).eval()
        network = registry.get("fbgemm").prepare(teacher, split.calibration(8), int8_recipe)
        data, setup = pictures.as_data(split), dataclasses.replace(SETUP, teacher=teacher)
        qat = Trainer(network, data, int8_recipe.training, setup)
        fp32 = Trainer(architectures.build(name), data, fp32_recipe, SETUP)
        augmentation = fp32_recipe.augment.describe()
        x, y = next(split.shuffled(batch_size, 0, augmentation=augmentation))
        turns = []
        for trainer in (qat, fp32):
            trainer.network.train()
            turns.append(paired.turn(functools.partial(trainer.step, x, y)))
            turns[-1]()  # allocates the optimizer's state
        what = f"QAT step of {MODELS[name].label}, batch {len(x)}, over an FP32 step ({fp32.amp})"
        yield paired.cost(what, *turns, 2.0, 1 if settings.smoke else 3)


def plain_step(x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
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
