"""7 bits against overflow, on kernels that add products in 16 bits: libraries held to AVX2.

ONNX Runtime cannot be kept from VNNI. Its clipping shows on any processor: beyond the calibrated
range, it answers as exact execution does, which clips.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from narrow_kernels import deviation
from torch import nn

from utils.backends import clipping, registry
from utils.backends.lowering import Lowering
from utils.catalog import BACKENDS
from utils.quantize import ptq
from utils.quantize.modules import QDQ
from utils.quantize.qdq_config import QDQConfig
from utils.recipes import Int8

RECIPE = Int8(ranges="minmax", calibration_images=4)
HELD = {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
EXACT = 1e-3  # a relative difference that rounding explains
ENGINES = [
    "fbgemm",
    "x86",
    "onednn",
    "openvino",
    pytest.param("inductor", marks=pytest.mark.slow),
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def able(name):
    engine = registry.get(name)
    if problem := engine.problem():
        pytest.skip(problem)
    return engine


def held(name, *fixes, **environment):
    command = [sys.executable, str(Path(__file__).with_name("narrow_kernels.py")), name, *fixes]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are variables for x86")
@pytest.mark.parametrize("name", ENGINES)
def test_narrow_kernels_compute_what_the_integers_say_beyond_the_range(name):
    able(name)
    apart = held(name, "none", "activations", "weights", **HELD)
    assert apart["none"] > 0.01  # the kernels do overflow
    assert apart["activations"] < EXACT and apart["weights"] < EXACT


@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
@pytest.mark.parametrize("name", [*ENGINES, "onnxruntime", "qnnpack", "xnnpack"])
def test_every_engine_clips_where_exact_execution_does(name, overflow_fix):
    able(name)
    assert deviation(name, overflow_fix, portable=True) < EXACT


def test_engines_that_never_overflow_ignore_a_portable_fix():
    lowerings = {name: registry.get(name) for name in BACKENDS}
    lowerings = {key: value for key, value in lowerings.items() if isinstance(value, Lowering)}
    never = {name for name, engine in lowerings.items() if not engine.overflows}
    assert never == {"qnnpack", "simulated", "tensorrt", "tensorrt_fp16", "xnnpack"}
    for name in never:
        config = lowerings[name].qdq_config(RECIPE.replace(portable=True))
        assert (config.overflow, config.overflow_fix) == ("none", "none")


@pytest.mark.parametrize("form", [clipping.Integers, clipping.Values])
def test_a_separate_operator_clips_to_the_same_numbers(form):
    pair = QDQ(torch.uint8, (0, 127))
    pair.assign(torch.tensor(0.37), torch.tensor(40))
    x = 60 * torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    assert pair(x).max() == torch.tensor(87) * torch.tensor(0.37)
    assert torch.equal(form(pair)(x), pair(x))


def test_values_are_clipped_channel_by_channel():
    pair = QDQ(torch.uint8, (0, 127))
    pair.assign(torch.tensor([0.1, 2.0, 0.37]), torch.tensor([0, 64, 127]))
    x = 60 * torch.randn(4, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clipping.Values(pair)(x), pair(x))


def test_only_pairs_of_fewer_integers_are_clipped_apart_and_the_network_stays():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()
    images = torch.rand(2, 3, 16, 16)
    for config in (QDQConfig("outputs"), QDQConfig("outputs", overflow="all").fixed("activations")):
        network = ptq(model, images, RECIPE, config).network
        copied = clipping.clipped(network, clipping.Values)
        kinds = [type(module) for module in copied.children()]
        forms = [kind for kind in kinds if kind in (QDQ, clipping.Values)]
        assert forms == [QDQ if config.steps == 255 else clipping.Values] * 3
        assert sum(isinstance(module, QDQ) for module in network.children()) == 3
        with torch.no_grad():
            assert torch.equal(copied(3 * images), network(3 * images))
