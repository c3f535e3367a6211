"""Inductor: packages that agree with exact execution, and the kernels counted in their code."""

import importlib.util
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from small_networks import RECIPE, Mixed, Sum, images, quantized

from utils import architectures, cpus, paths
from utils.backends.inductor import ENGINES, FloatQDQ, for_inductor, kernels
from utils.errors import UserError
from utils.metrics import sqnr_db
from utils.quantize.exact import execute
from utils.quantize.modules import QDQ
from utils.training import checkpoints

pytest.importorskip("torchao")
ENGINE = ENGINES["inductor"]


@pytest.fixture(scope="module")
def artifact(integers, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / f"mixed{ENGINE.suffix}"
    threads, freezing = torch.get_num_threads(), torch._inductor.config.freezing
    try:
        torch.set_num_threads(1)
        ENGINE.lower(integers, path)
        assert (torch.get_num_threads(), torch._inductor.config.freezing) == (1, freezing)
    finally:
        torch.set_num_threads(threads)
    return path


def test_it_answers_as_exact_execution_for_any_batch_size_in_any_order(integers, artifact):
    predict, x = ENGINE.load(artifact, "cpu"), images(20)
    exact = execute(integers, x)
    for count in (1, 20, 3, 16, 1):
        logits = predict(x[:count])
        assert logits.shape == (count, 2) and logits.dtype == torch.float32
        assert sqnr_db(exact[:count].numpy(), logits.numpy()) > 35


def test_the_memory_layout_of_the_images_does_not_matter(artifact):
    predict, x = ENGINE.load(artifact, "cpu"), images(3)
    assert torch.equal(predict(x.to(memory_format=torch.channels_last)), predict(x))


def test_all_layers_except_the_depthwise_one_run_on_integers(artifact):
    counts = ENGINE.kernels(artifact)
    assert counts == kernels(artifact)
    assert (counts["layers"], counts["integer_layers"]) == (Mixed.LAYERS, Mixed.LAYERS - 1)
    assert sum(counts["kernels"].values()) == Mixed.LAYERS
    assert counts["kernels"]["_qconv_pointwise_tensor"] == 3
    assert counts["kernels"]["_qlinear_pointwise_tensor"] == 3


def test_the_file_holds_depthwise_weights_in_fp32(integers, artifact):
    stored = {entry.layer: entry.bits for entry in ENGINE.deploy(integers).stored if entry.layer}
    counts = ENGINE.kernels(artifact)
    assert {name for name, bits in stored.items() if bits == 32} == {"depthwise.0"}
    assert sum(bits == 8 for bits in stored.values()) == counts["integer_layers"]
    with zipfile.ZipFile(artifact) as package:
        content = b"".join(package.read(name) for name in package.namelist())
    layer = for_inductor(integers).get_submodule("depthwise.0")
    assert layer.weight.detach().numpy().tobytes()[:64] in content


def test_the_code_takes_the_number_of_threads_of_the_process_that_runs_it(artifact):
    """It was compiled with one thread; by default, that leaves no parallel loops."""
    with zipfile.ZipFile(artifact) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".kernel.cpp"))
        kernel = package.read(name).decode()
    assert "#pragma omp parallel" in kernel and "num_threads(" not in kernel


FRESH = """
import sys
sys.modules["torchao"] = None  # importing it fails
import torch
from pathlib import Path
from utils.backends.inductor import ENGINES
torch.set_num_threads(2)
folder = Path(sys.argv[1])
predict = ENGINES["inductor"].load(folder / sys.argv[2], "cpu")
assert torch.get_num_threads() == 2
with torch.inference_mode():
    torch.save(predict(torch.load(folder / "images.pt")), folder / "logits.pt")
assert torch.get_num_threads() == 2
"""


def test_a_fresh_process_runs_the_file_without_torchao_with_other_threads(artifact):
    torch.save(images(3), artifact.with_name("images.pt"))
    command = [sys.executable, "-c", FRESH, str(artifact.parent), artifact.name]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits = torch.load(artifact.with_name("logits.pt"))
    expected = ENGINE.load(artifact, "cpu")(images(3))
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("overflow_fix", ["activations", "weights"])
def test_no_sum_overflows_on_this_cpu(tmp_path, overflow_fix):
    """All products are the largest: without VNNI, factors of 8 bits give half the answer."""
    x = torch.full((1, 3, 224, 224), 2.0)
    path = tmp_path / f"sum{ENGINE.suffix}"
    config = ENGINE.qdq_config(RECIPE.replace(overflow_fix=overflow_fix))
    ENGINE.lower(quantized(Sum(), config, x), path)
    logits = ENGINE.load(path, "cpu")(x)
    torch.testing.assert_close(logits, torch.full((1, 2), 128.0), rtol=1e-3, atol=0)
    assert ENGINE.kernels(path)["integer_layers"] == 2


def test_an_fp32_checkpoint_answers_as_eager_fp32_for_any_batch_size(model, tmp_path, monkeypatch):
    (path := tmp_path / "mixed.pt").write_bytes(b"weights")
    monkeypatch.setattr(checkpoints, "read", lambda path: None)
    monkeypatch.setattr(architectures, "rebuild", lambda content: model)
    predict = ENGINE.load(path, "cpu")
    for count in (1, 3):
        expected = model(images(count))
        torch.testing.assert_close(predict(images(count)), expected, rtol=0, atol=1e-4)
    (package,) = tmp_path.glob(f"mixed.*{ENGINE.suffix}")
    before = package.stat().st_mtime_ns
    counts = ENGINE.kernels(path)
    assert (counts["layers"], counts["integer_layers"]) == (Mixed.LAYERS, 0)
    assert package.stat().st_mtime_ns == before
    monkeypatch.setattr("utils.environment.cpu", lambda: ("another processor", ()))
    ENGINE.kernels(path)
    assert len([*tmp_path.glob(f"mixed.*{ENGINE.suffix}")]) == 2


@pytest.mark.parametrize("vnni", [True, False])
def test_sums_overflow_without_vnni(monkeypatch, vnni):
    monkeypatch.setattr("utils.environment.has_vnni", lambda *names: vnni)
    assert ENGINE.default_config(8).overflow == ("none" if vnni else "all")


def test_a_float_pair_gives_the_same_numbers_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    qdq = QDQ(torch.uint8)
    qdq.assign(torch.tensor([0.1, 0.003, 2.0]), torch.tensor([0, 17, 255]))
    x = 40 * torch.randn(2, 3, 50, 50, generator=generator)
    x[:, 2] = torch.round(x[:, 2]) + 1.0  # half of them in the middle between two numbers
    rounded = FloatQDQ(qdq)(x)
    assert torch.equal(rounded, qdq(x))
    assert rounded[:, 0].min() == 0
    assert rounded[:, 1].max() == torch.tensor(238) * torch.tensor(0.003)


def test_the_network_for_inductor_has_the_same_answers_and_the_quantized_one_stays(integers):
    before = {name: value.clone() for name, value in integers.network.state_dict().items()}
    network = for_inductor(integers)
    assert sum(isinstance(module, FloatQDQ) for module in network.modules()) == 1
    with torch.no_grad():
        expected = integers.network(images())
        torch.testing.assert_close(network(images()), expected, rtol=1e-5, atol=1e-6)
    after = integers.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_missing_is_named(monkeypatch):
    assert ENGINE.problem() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert ENGINE.problem() == "Inductor needs a C++ compiler"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else object()
    )
    assert ENGINE.problem() == "not installed: torchao (pip install -r requirements-torchao.txt)"


@pytest.mark.slow
def test_layers_kept_in_fp32_are_not_counted_as_integer(model, tmp_path):
    path = tmp_path / f"mixed{ENGINE.suffix}"
    config, keep_fp32 = ENGINE.qdq_config(RECIPE), ("project", "head.4")
    network = quantized(model, config, images(), keep_fp32=keep_fp32)
    ENGINE.lower(network, path)
    counts = ENGINE.kernels(path)
    assert (counts["layers"], counts["integer_layers"]) == (Mixed.LAYERS, Mixed.LAYERS - 3)
    exact, logits = execute(network, images()), ENGINE.load(path, "cpu")(images())
    assert sqnr_db(exact.numpy(), logits.numpy()) > 35


# All layers, and those that are not depthwise.
LAYERS = {"alexnet": (8, 8), "resnet18": (21, 21), "mobilenetv3": (54, 43)}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_networks_of_the_study_have_integer_kernels_and_every_weight_once(name, tmp_path):
    torch.manual_seed(0)
    network = architectures.build(name)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    x = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        network(x)
    integers = quantized(network.eval(), ENGINE.qdq_config(RECIPE), x)
    path = tmp_path / f"{name}{ENGINE.suffix}"
    ENGINE.lower(integers, path)
    counts = ENGINE.kernels(path)
    assert (counts["layers"], counts["integer_layers"]) == LAYERS[name]
    assert sqnr_db(execute(integers, x).numpy(), ENGINE.load(path, "cpu")(x).numpy()) > 20
    weights = sum(layer.weight.numel() for layer in integers.layers.values())
    assert weights < path.stat().st_size < 1.2 * weights + 3.5e6  # code takes 2 to 3 MB


def test_a_compiler_without_room_is_told_in_a_line(integers, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        'echo "ld: error: no space left" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    message = r"compiler failed.*no space left.*has room"
    settings = {"cpp.cxx": (None, str(compiler))}
    with torch._inductor.config.patch(settings), pytest.raises(UserError, match=message):
        ENGINE.lower(integers, tmp_path / "network.pt2")
    assert not (tmp_path / "network.pt2").exists()


REORDERED = """
import sys, torch
from pathlib import Path
from utils.backends.inductor import ENGINES
torch.set_num_threads(1)
predict = ENGINES["inductor"].load(Path(sys.argv[1]), "cpu")
for _ in range(3):
    predict(torch.zeros(1, 3, 224, 224))
"""


class Wide(torch.nn.Module):
    """A network with the second convolution of AlexNet."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 11, stride=8), torch.nn.ReLU())
        self.wide = torch.nn.Sequential(torch.nn.Conv2d(64, 192, 5, padding=2), torch.nn.ReLU())
        self.pool, self.head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(192, 2)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.wide(self.stem(x))), 1))


@pytest.mark.slow
@pytest.mark.skipif(cpus.usable() < 2, reason="needs two threads")
def test_weights_are_packed_for_the_number_of_threads_that_compiles(tmp_path):
    """Why AlexNet with one thread is slow: its weights are arranged anew in every answer."""
    threads, counts = torch.get_num_threads(), {}
    integers = quantized(Wide().eval(), ENGINE.qdq_config(RECIPE), images())
    try:
        for compiled_with in (1, 2):
            torch.set_num_threads(compiled_with)
            path = tmp_path / f"{compiled_with}{ENGINE.suffix}"
            ENGINE.lower(integers, path)
            done = subprocess.run(
                [sys.executable, "-c", REORDERED, path], cwd=paths.ROOT, capture_output=True,
                text=True, env=os.environ | {"ONEDNN_VERBOSE": "1"}, check=True,
            )  # fmt: skip
            lines = [line for line in done.stdout.splitlines() if ",exec,cpu,reorder," in line]
            counts[compiled_with] = sum("192x64x5x5" in line for line in lines)
    finally:
        torch.set_num_threads(threads)
    assert counts[2] > counts[1], counts
