"""FP16 and BF16: what is stored, what is computed, and on which processors it is native."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from utils import architectures, environment, metrics
from utils.backends import fp16, registry


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.act(self.bn(self.conv(x)))), 1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Small().eval()
    model.architecture = "small"
    return model


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def answers(predict):
    with torch.inference_mode():
        return predict(IMAGES)


def test_half_stores_every_number_in_fp16_and_rounds_to_nearest(model, tmp_path):
    deployed = registry.get("half").deploy_half(model)
    deployed.save(tmp_path / "artifact")
    stored = torch.load(tmp_path / "artifact", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert stored[name].dtype == torch.float16
            assert np.array_equal(stored[name].numpy(), value.numpy().astype(np.float16))


def test_amp_stores_fp32(model, tmp_path):
    deployed = registry.get("amp").deploy_half(model)
    deployed.save(tmp_path / "artifact")
    stored = torch.load(tmp_path / "artifact", weights_only=True)["state_dict"]
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["half", "amp"])
def test_answers_are_fp32_rounded_to_ten_bits_on_the_way(model, name):
    rounded, fp32 = answers(registry.get(name).deploy_half(model).predict), answers(model)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, fp32)
    assert metrics.sqnr_db(fp32.numpy(), rounded.numpy()) > 50


@pytest.mark.parametrize("name", ["half", "amp"])
def test_the_float_model_is_left_alone(model, name):
    before = copy.deepcopy(model.state_dict())
    registry.get(name).deploy_half(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["half", "amp"])
def test_the_loaded_file_answers_as_before(name, tmp_path):
    torch.manual_seed(0)
    model = architectures.build("mobilenetv3").eval()
    backend = registry.get(name)
    deployed = backend.convert(model, model, None)
    deployed.save(tmp_path / "artifact")
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(deployed.predict(x), backend.load(tmp_path / "artifact", "cpu")(x))


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        (("avx512_bf16", "avx2"), False),
        (("avx2", "avx512_fp16"), True),
        (("asimd", "asimdhp"), True),
    ],
)
def test_a_cpu_has_fp16_arithmetic_or_not(monkeypatch, flags, native):
    monkeypatch.setattr(environment, "cpu", lambda: ("a processor", flags))
    assert fp16.native("cpu") is native


@pytest.mark.parametrize("name", ["half", "amp"])
def test_what_is_watched_for_overflow_is_the_network_without_its_wrapper(model, name):
    deployed = registry.get(name).deploy_half(model)
    assert registry.get(name).watched and deployed.predict.network is deployed.network
    assert list(deployed.layers) == ["conv", "fc"]


# ---- BF16


@pytest.mark.parametrize(
    ("flags", "native"),
    [(("avx512_bf16",), True), (("asimd", "bf16"), True), (("avx2", "avx512_fp16"), False)],
)
@pytest.mark.parametrize("name", ["bfloat16", "amp_bf16"])
def test_bf16_runs_where_the_cpu_has_its_arithmetic(monkeypatch, name, flags, native):
    monkeypatch.setattr(environment, "cpu", lambda: ("a processor", flags))
    assert registry.get(name).problem() == (None if native else "this CPU has no BF16 arithmetic")


def test_bfloat16_stores_the_nearest_numbers_in_half_the_bytes(model, tmp_path):
    backend = registry.get("bfloat16")
    deployed = backend.deploy_half(model)
    deployed.save(tmp_path / "artifact")
    stored = torch.load(tmp_path / "artifact", weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        assert torch.equal(stored[key], value.bfloat16() if value.is_floating_point() else value)
    assert {numbers.bits for numbers in deployed.stored} == {16} and not backend.watched
    assert metrics.sqnr_db(answers(model).numpy(), answers(deployed.predict).numpy()) > 30


def test_autocast_to_bf16_keeps_the_weights_and_rounds_what_it_computes(model):
    deployed = registry.get("amp_bf16").deploy_half(model)
    assert {numbers.bits for numbers in deployed.stored} == {32}
    sqnr = metrics.sqnr_db(answers(model).numpy(), answers(deployed.predict).numpy())
    assert 30 < sqnr < 70  # FP16 would be above 70
