"""Small networks for the tests of engines.

Images are (n, 3, 224, 224) as in the study, logits (n, 2).
"""

import torch
from torch import nn

from utils.quantize import ptq
from utils.quantize.network import Quantized
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

RECIPE = Int8(ranges="minmax", calibration_images=4)


class Mixed(nn.Module):
    """All operators of the study's networks, in seven layers: one depthwise, three linear."""

    LAYERS, HARDSWISHES = 7, 2

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 8, stride=8, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(16, 16, 1)
        self.head = nn.Sequential(
            nn.Linear(16, 32), nn.Hardswish(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
        )

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = self.depthwise(x)
        x = x + self.project(self.gate(self.squeeze(y)) * y)
        return self.head(torch.flatten(self.squeeze(x), 1))


class Sum(nn.Module):
    """Both logits are the sum of 64 equal channels: the means of the image's first channel."""

    def __init__(self):
        super().__init__()
        self.spread, self.sum = nn.Conv2d(3, 64, 1, bias=False), nn.Conv2d(64, 2, 1, bias=False)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            self.spread.weight.zero_()[:, 0] = 1
            self.sum.weight.fill_(1)

    def forward(self, x):
        return torch.flatten(self.squeeze(self.sum(self.spread(x))), 1)


def mixed() -> Mixed:
    """A `Mixed` in evaluation mode, with BatchNorm statistics and uneven channels as if trained."""
    torch.manual_seed(0)
    model = Mixed()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        model(images())
    return model.eval()


def images(count: int = 4) -> torch.Tensor:
    """Noise around uneven means, in blobs of 8 x 8 pixels: float32 (count, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 3, 28, 28, generator=generator)
    noise = noise.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return noise + torch.randn(count, 3, 1, 1, generator=generator)


def quantized(
    model: nn.Module, config: QDQConfig, calibration: torch.Tensor, **changes
) -> Quantized:
    """The quantized network of `model`, by RECIPE with `changes`."""
    return ptq(model, calibration, RECIPE.replace(**changes), config)
