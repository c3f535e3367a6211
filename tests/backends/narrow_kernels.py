"""How far an engine is from exact execution on images beyond the calibrated range.

    python narrow_kernels.py ENGINE OVERFLOW_FIX...

A test runs this with libraries that are kept from VNNI. It prints the largest difference of each
remedy, relative to the largest logit, as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils.backends import registry
from utils.quantize import ptq
from utils.quantize.exact import execute
from utils.recipes import Int8

BEYOND = 1.9  # times the calibrated range


class Positive(nn.Module):
    """Three layers whose weights are positive, so that their sums are large."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 8, stride=8), nn.Conv2d(32, 32, 3, padding=1)
        self.relu, self.pool = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.flatten, self.head = nn.Flatten(), nn.Linear(32, 2)
        for parameter in self.parameters():
            parameter.data.abs_()

    def forward(self, x):
        x = self.relu(self.conv(self.relu(self.stem(x))))
        return self.head(self.flatten(self.pool(x)))


def deviation(name: str, overflow_fix: str, portable: bool = False) -> float:
    """Return the largest difference between an engine and exact execution, relative."""
    torch.manual_seed(0)
    model, images = Positive().eval(), torch.rand(4, 3, 224, 224)
    kept = dict(overflow_fix=overflow_fix, portable=portable)
    recipe, engine = Int8(ranges="minmax", calibration_images=4, **kept), registry.get(name)
    quantized = ptq(model, images, recipe, engine.qdq_config(recipe))
    exact = execute(quantized, BEYOND * images)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / f"network{engine.suffix}"
        engine.deploy(quantized).save(path)
        logits = engine.load(path, "cpu")(BEYOND * images)
    return ((logits.double() - exact).abs().max() / exact.abs().max()).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *fixes = sys.argv[1:]
    print(json.dumps({fix: deviation(name, fix) for fix in fixes}))
