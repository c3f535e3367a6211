"""Parts that several tests share: small splits and networks, FP32 checkpoints, fake workers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils import architectures, checksums, metrics
from utils.backends import registry
from utils.backends.base import Deployed
from utils.data.dataset import Data, Split
from utils.quantize.methods import ptq
from utils.recipes import Int8, Int16, Recipe
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoint


def split_of(folder, pixels, labels, names=None, index=None) -> Split:
    """Store `pixels`, uint8 (n, h, w, 3), in `folder`; return the split of `index` or of all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "images.npy"
    np.save(file, pixels)
    images = np.load(file, mmap_mode="r")
    names = tuple(names or (f"{number}.jpg" for number in range(len(pixels))))
    index = np.arange(len(pixels)) if index is None else np.asarray(index)
    return Split(images, np.asarray(labels, np.int64), names, index.astype(np.int64))


def numbered_split(folder, labels, index=None, side=4) -> Split:
    """Make a split whose image `i` has the single colour `i`, which identifies it in a batch."""
    count = len(labels)
    colours = np.arange(count, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(colours, (count, side, side, 3))
    return split_of(folder, pixels, labels, index=index)


def bright_and_dark(folder, count=48, side=16, seed=0) -> Data:
    """Make data for a tiny network: noise around dark grey (class 0) or light grey (class 1)."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % 2)
    pixels = generator.integers(0, 200, (count, side, side, 3)) + 50 * labels[:, None, None, None]
    whole = split_of(folder, pixels.astype(np.uint8), labels)
    parts = np.split(np.arange(count), [count // 2, 3 * count // 4])
    train, validation, test = (
        Split(whole.images, whole.labels, whole.names, part) for part in parts
    )
    return Data("tiny", ("dark", "light"), "0" * 64, train, validation, test, 0)


class SmallDepthwise(nn.Module):
    """A convolution, a depthwise one, both with BatchNorm, a pointwise one and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.Hardswish())
        self.pointwise, self.pool = nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.pointwise(self.depthwise(self.stem(x)))), 1))


class Everything(nn.Module):
    """A network with every operator of the study's networks.

    It has BatchNorm with and without ReLU, max pooling, a residual sum, hardswish, a depthwise
    convolution, squeeze and excitation, dropout and two linear layers.
    """

    architecture = "everything"

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.relu, self.shrink = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.swish = nn.Hardswish(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.depth_norm = nn.BatchNorm2d(8)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate, self.project = nn.Hardsigmoid(), nn.Conv2d(8, 8, 1)
        self.fc, self.dropout, self.head = nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 2)

    def forward(self, x):
        x = self.shrink(self.relu(self.stem_norm(self.stem(x))))
        y = self.norm(self.conv(x))
        y += x
        y = self.swish(self.depth_norm(self.depthwise(self.swish(y))))
        y = self.gate(self.excite(self.relu(self.reduce(self.squeeze(y))))) * y
        y = torch.flatten(self.squeeze(self.project(y)), 1)
        return self.head(self.dropout(self.swish(self.fc(y))))


class Outlier(nn.Module):
    """A network whose stem has a channel 1,000 times too large, which the next layer undoes."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.Hardswish()
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)
        with torch.no_grad():
            self.stem.weight[0] *= 1e3
            self.depthwise.weight[0] /= 1e3
            for layer in (self.depthwise, self.pointwise, self.fc):
                layer.bias.zero_()  # a constant part of the logits would hide the noise

    def forward(self, x):
        return self.fc(
            torch.flatten(self.pool(self.pointwise(self.depthwise(self.act(self.stem(x))))), 1)
        )


def sqnr_db(fp32: torch.Tensor, quantized: torch.Tensor) -> float:
    """Compute `metrics.sqnr_db` of tensors; infinite without noise."""
    value = metrics.sqnr_db(fp32.numpy(), quantized.numpy())
    return math.inf if value is None else value


def small(kind: type[nn.Module]) -> nn.Module:
    """Make a network in evaluation mode; folding its BatchNorm changes the weights."""
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def small_depthwise() -> nn.Module:
    return small(SmallDepthwise)


def noise(count: int, side: int, seed: int = 1) -> torch.Tensor:
    """Draw normal noise, float32 (count, 3, side, side)."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def uneven_images(count=40) -> torch.Tensor:
    """Draw noise with uneven spreads and means, float32 (count, 3, 64, 64), channels last."""
    generator = torch.Generator().manual_seed(1)
    strength = 0.3 + 1.5 * torch.rand(count, 1, 1, 1, generator=generator)
    shift = torch.randn(count, 3, 1, 1, generator=generator)
    noise = torch.randn(count, 3, 64, 64, generator=generator)
    return (strength * noise + shift).to(memory_format=torch.channels_last)


class NoData:
    """A stand-in for the `Data` of a checkpoint whose images do not matter."""

    def describe(self) -> dict:
        return {"sha256": "none"}


def mobilenet_checkpoint(path: Path) -> Checkpoint:
    """Save a MobileNetV3-Small with random weights at `path`."""
    torch.manual_seed(0)
    model = architectures.build("mobilenetv3")
    # BatchNorm gets the statistics of noise. With its initial ones, logits are about 1e-15.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, 3, 224, 224))
    return saved(path, model.eval())


def saved(path: Path, model: nn.Module) -> Checkpoint:
    """Save `model`, in evaluation mode, at `path` as if it were the FP32 MobileNetV3-Small."""
    checkpoints.save(path, "mobilenetv3", model, NoData(), {"fingerprint": ""})
    return Checkpoint(path, model, checksums.sha256_of(path), {"fingerprint": ""})


def deployed_on(name: str, model: nn.Module, images: torch.Tensor, recipe: Recipe) -> Deployed:
    """Quantize `model` by PTQ, or convert it to 16-bit floats, for the engine `name`."""
    engine = registry.get(name)
    if isinstance(recipe, Int8 | Int16):
        return engine.deploy(ptq(model, images, recipe, engine.qdq_config(recipe)))
    return engine.deploy_half(model)


class FakeWorker:
    """A `Worker` that logs its calls and computes nothing.

    A run takes 10 ms for the candidate on fbgemm, 30 ms for eager FP32, 20 ms for other engines.
    """

    log: list = []  # noqa: RUF012

    def __init__(self, backend, path, device, threads, cuda_graph=False):
        self.name, self.waiting = backend, None
        self.log.append((backend, "start", path, device, threads, cuda_graph))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append((self.name, "end"))

    def send(self, name, *arguments):
        self.waiting = name, arguments
        self.log.append((self.name, name, *arguments))

    def receive(self):
        (name, arguments), self.waiting = self.waiting, None
        if name == "time":
            return [{"fbgemm": 0.01, "native": 0.03}.get(self.name, 0.02)] * arguments[0]
        if name == "cost":
            return {"load_s": 0.5, "cold_start_s": 0.75, "peak_memory_mb": 300}
        return None

    def call(self, name, *arguments):
        self.send(name, *arguments)
        return self.receive()


def torchrun(processes: int, *command, cwd: Path) -> subprocess.CompletedProcess:
    """Run a Python file with options in `processes` processes that train together."""
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    # Tests share the CPUs: with threads that spin while they wait, a step takes ten times as long.
    alone["OMP_WAIT_POLICY"] = "passive"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), *map(str, command)],
        cwd=cwd,
        env=alone,
        capture_output=True,
        text=True,
        timeout=600,
    )
