"""Synthetic cats and dogs: reproducible, and only their shapes distinguish the classes."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from utils.data.synthetic import CLASSES, SIZE, draw
from utils.paths import ROOT

TRAIN, TEST = 600, 400


def digest(seed: int, index: int) -> str:
    return hashlib.sha256(draw(seed, index)[0].tobytes()).hexdigest()


def images_and_labels(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (count, 224, 224, 3), and labels, int64 (count,)."""
    drawn = [draw(seed, index) for index in range(count)]
    return np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn])


@pytest.fixture(scope="module")
def simple_views() -> dict[str, np.ndarray]:
    """Colours and coarse pixels of images, float32 (1000, n), and labels, int64 (1000,)."""
    drawn = [draw(3, index) for index in range(TRAIN + TEST)]
    fine = np.stack(
        [np.asarray(Image.fromarray(image).reduce(8), dtype=np.float32) for image, _ in drawn]
    )
    coarse = fine.reshape(len(drawn), 7, 4, 7, 4, 3).mean(axis=(2, 4))
    statistics = np.stack([(image.mean(axis=(0, 1)), image.std(axis=(0, 1))) for image in fine])
    views = {"28x28": fine, "7x7": coarse, "colour statistics": statistics}
    flat = {name: view.reshape(len(drawn), -1) for name, view in views.items()}
    return flat | {"labels": np.array([label for _, label in drawn])}


def linear_accuracy(features: np.ndarray, labels: np.ndarray, ridge: float) -> float:
    """Fit a ridge regression to the first `TRAIN` rows; return its accuracy on the others."""
    x = (features - features[:TRAIN].mean(axis=0)) / (features[:TRAIN].std(axis=0) + 1e-6)
    y = 2.0 * labels - 1
    weights = np.linalg.solve(
        x[:TRAIN].T @ x[:TRAIN] + ridge * np.eye(x.shape[1]), x[:TRAIN].T @ y[:TRAIN]
    )
    return float(np.mean((x[TRAIN:] @ weights > 0) == labels[TRAIN:]))


@pytest.mark.parametrize("index", [0, 1, 7, 1234])
def test_image_and_label(index):
    image, label = draw(0, index)
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5  # not blank
    assert CLASSES[label] == ("cat", "dog")[index % 2]


def test_same_in_another_process():
    code = (
        "import hashlib; from utils.data.synthetic import draw; "
        "print(*(hashlib.sha256(draw(5, i)[0].tobytes()).hexdigest() for i in range(12)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    here = [digest(5, i) for i in reversed(range(12))]  # in another order, which must not matter
    assert other.stdout.split() == here[::-1]


def test_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    before = digest(0, 3)
    untouched = np.random.random()
    np.random.seed(1)
    assert np.random.random() == untouched
    assert digest(0, 3) == before


def test_every_seed_and_index_gives_a_different_image():
    assert len({digest(seed, index) for seed in range(5) for index in range(8)}) == 40


@pytest.mark.parametrize(
    ("view", "ridge"), [("28x28", 1000.0), ("7x7", 200.0), ("colour statistics", 1.0)]
)
def test_linear_model_cannot_tell_the_class(simple_views, view, ridge):
    assert linear_accuracy(simple_views[view], simple_views["labels"], ridge) <= 0.65


@pytest.mark.slow
def test_small_network_learns_the_class():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    def tensors(seed: int, count: int):
        images, labels = images_and_labels(seed, count)
        blocks = images.reshape(count, SIZE // 2, 2, SIZE // 2, 2, 3)
        halves = torch.from_numpy(blocks.mean(axis=(2, 4), dtype=np.float32))
        return halves.permute(0, 3, 1, 2).contiguous() / 128 - 1, torch.from_numpy(labels)

    layers, wide = [], 3
    for width in (16, 32, 64, 96, 128):
        convolution = torch.nn.Conv2d(
            wide, width, 3, stride=2 if wide == 3 else 1, padding=1, bias=False
        )
        layers += [convolution, torch.nn.BatchNorm2d(width), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        wide = width
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(wide, 2)]
    network = torch.nn.Sequential(*layers[:-1], *head)

    (x, y), (held_x, held_y) = tensors(0, 1700), tensors(1, 500)
    epochs, batch, peak = 12, 32, 3e-3
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=epochs * (len(x) // batch)
    )
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            chosen = order[start : start + batch]
            views = x[chosen].flip(3) if torch.rand(()) < 0.5 else x[chosen]
            loss = torch.nn.functional.cross_entropy(network(views), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(held_x).argmax(1) == held_y).float().mean().item()
    assert accuracy >= 0.85
