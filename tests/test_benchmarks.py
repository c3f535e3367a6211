"""Each benchmark runs and prints its rows; on a busy machine, what it measures is not checked."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import architectures, paths, stats

NAMES = [
    "data_loading",
    "training_step",
    "qat_step",
    "evaluation",
    "engines",
    "results_csv",
    "help",
]
ROW = re.compile(
    r"(\S.*\S) +(\d+\.\d\d)(?: \[(\d+\.\d\d), (\d+\.\d\d)\])?"
    r"(?: +(>=|<=) [\d.]+ +(yes|no|unclear))?"
)


def run(*words):
    command = [sys.executable, "tests/benchmarks/run.py", *map(str, words)]
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=1200)


def test_the_names_are_listed():
    done = run("--list")
    assert done.returncode == 0 and done.stdout.split() == NAMES


@pytest.mark.parametrize("words", [("no_such",), ("data_loading", "--data", "no/such/folder")])
def test_a_mistake_is_one_line_and_status_2(words):
    done = run(*words, "--smoke")
    assert done.returncode == 2 and re.fullmatch(r"error: .*no.such.*\n", done.stderr)


def test_each_runs_and_prints_its_rows():
    done = run("--smoke")
    assert (done.returncode, done.stderr) == (0, "")
    # A slow machine also gets progress lines.
    head, *rows = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("test images: ", "calibrating: "))
    ]
    assert head.split() == ["what", "ratio", "[95", "%", "interval]", "goal", "met"]
    kinds = (
        "ImageFolder",
        "training",
        "QAT",
        "evaluation",
        "FP32 native",
        "default INT8 ONNX",
        "MACs/s",
        ".csv",
        "--help",
    )
    assert [sum(kind in row for row in rows) for kind in kinds] == [3, 1, 1, 2, 1, 2, 1, 2, 2]
    for row in rows:
        values = ROW.fullmatch(row)
        assert values, row
        if values[3]:  # a smoke run of engines is one launch, which gives no interval
            assert float(values[3]) <= float(values[2]) <= float(values[4])
        if values[5]:
            assert row.index(values[5]) == head.index("goal") and row.index(
                values[6], values.start(6)
            ) == head.index("met")


def test_real_images_are_taken_from_any_layout(tmp_path):
    from PIL import Image

    for number in range(96):
        path = tmp_path / "train" / f"{'cat' if number % 2 else 'dog'}.{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), (number, 0, 0)).save(path)
    (tmp_path / "train" / "cat.broken.jpg").write_bytes(b"no image")
    done = run("--smoke", "data_loading", "--data", tmp_path)
    assert done.returncode == 0, done.stderr


def test_goals_are_met_if_all_of_the_interval_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(paths.ROOT / "tests/benchmarks"))
    import paired

    met = [
        paired.Row("", middle, middle - 1, middle + 1, sign, 8).met
        for sign in (">=", "<=")
        for middle in (10, 8, 5)
    ]
    assert met == ["yes", "unclear", "no", "no", "unclear", "yes"]
    times = iter(range(1, 100))
    row = paired.faster("twice", lambda: [1.0], lambda: [2.0 + 0 * next(times)], 1.5, 3)
    assert (row.ratio, row.low, row.high, row.met) == (2, 2, 2, "yes")
    assert paired.cost("half", lambda: [1.0], lambda: [2.0], 1.1, 3).ratio == 0.5
    assert paired.Row("", 2.0, None, None, ">=", 1).met == "unclear"


def test_engines_are_compared_over_launches_because_rounds_of_one_are_not_independent(monkeypatch):
    """Many equal rounds in four launches that differ: the interval shows the launches."""
    monkeypatch.syspath_prepend(str(paths.ROOT / "tests/benchmarks"))
    import bench_engines

    by_launch = np.array([1.0, 1.2, 1.1, 1.3])
    ratios = np.repeat(by_launch[:, None], 100, axis=1)
    row = bench_engines._row("", ratios)
    assert (row.low, row.high) == stats.interval(by_launch, [0] * 4)
    assert row.high - row.low > 0.3
    assert bench_engines._row("", ratios[:2]).low is None


def test_random_networks_keep_their_activations_in_range(monkeypatch):
    """Else XNNPACK refuses MobileNetV3-Small, and its benchmark has no row of it."""
    monkeypatch.syspath_prepend(str(paths.ROOT / "tests/benchmarks"))
    import bench_engines

    model = architectures.build("mobilenetv3")
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    bench_engines.settle(model, images)
    spreads = []
    for module in model.features:
        module.register_forward_hook(lambda module, x, y: spreads.append(y.std().item()))
    with torch.no_grad():
        model.eval()(images)
    assert len(spreads) == 13 and min(spreads) > 0.05 and max(spreads) < 20
