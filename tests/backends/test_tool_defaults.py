"""The default recipes of other tools: their files run on their engines, near FP32."""

import pytest
import torch

from utils import architectures
from utils.backends import registry
from utils.backends.tool_defaults import TOOL_DEFAULTS
from utils.metrics import sqnr_db


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOL_DEFAULTS)
def test_the_file_of_a_tool_runs_on_its_engine_near_fp32(tool, tmp_path):
    torch.manual_seed(0)
    model, images = architectures.build("alexnet").eval(), torch.randn(8, 3, 224, 224)
    tool, path = TOOL_DEFAULTS[tool], tmp_path / f"network{TOOL_DEFAULTS[tool].suffix}"
    assert not tool.missing
    tool.write(model, images, path)
    with torch.inference_mode():
        answers = registry.get(tool.backend).load(path, "cpu")(images)
        assert sqnr_db(model(images).numpy(), answers.numpy()) > 15
