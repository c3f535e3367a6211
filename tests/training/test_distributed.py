"""Two processes under torchrun train the same network as one process."""

import json

import pytest
import torch
from helpers import torchrun

from utils import environment, paths
from utils.errors import UserError
from utils.training import distributed

DRIVER = """
import json, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
from torch import nn
from helpers import bright_and_dark
from utils.recipes import Augmentation, Training
from utils.training import distributed, loop

folder = Path(sys.argv[1])
data = bright_and_dark(folder / f"images{{distributed.rank()}}")
recipe = Training(
    epochs=2, batch_size=8, patience=0, backbone_lr=1e-2, head_lr=1e-2, warmup_epochs=0.5,
    weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
    augment=Augmentation(crop=0.7, degrees=15), bn_momentum=0.1, amp=False,
)
distributed.join("cpu", 2, recipe.batch_size)
torch.manual_seed(0)
norm = nn.BatchNorm2d(4) if {norm} else nn.Identity()
head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), *head)
setup, resume = loop.Setup(set(), 0, "cpu"), loop.Resume(folder / "x.resume", "x")
facts = loop.fit(model, data, recipe, setup, resume)
torch.save(model.state_dict(), folder / f"weights{{distributed.rank()}}.pt")
if distributed.rank() == 0:
    (folder / "history.json").write_text(json.dumps(facts["history"]))
"""


def trained(home, processes, norm=False):
    """Train in a group of processes; returns the weights of each process, and the history."""
    home.mkdir()
    root, tests = str(paths.ROOT), str(paths.ROOT / "tests")
    (home / "driver.py").write_text(DRIVER.format(root=root, tests=tests, norm=norm))
    done = torchrun(processes, home / "driver.py", home, cwd=home)
    assert done.returncode == 0, done.stderr
    weights = [torch.load(home / f"weights{rank}.pt") for rank in range(processes)]
    return weights, json.loads((home / "history.json").read_text())


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    (alone,), history = trained(tmp_path / "one", 1)
    pair, together = trained(tmp_path / "two", 2)
    for name in alone:
        # The order of sums differs, so the last bits do.
        assert torch.allclose(alone[name], pair[0][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(pair[0][name], pair[1][name])
    for one, two in zip(history, together, strict=True):
        for name in ("train_loss", "validation_loss", "validation_accuracy"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_both_processes_end_with_the_same_batchnorm_statistics(tmp_path):
    pair, _ = trained(tmp_path / "two", 2, norm=True)
    assert all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_a_single_process_is_a_group_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")  # some schedulers set this for other purposes
    assert environment.group() == (0, 1)
    assert distributed.total([1.5, 2.0], "cpu") == [1.5, 2.0]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment.group() == (3, 4)


def test_batches_must_divide_evenly_among_the_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share batches of 32"):
        distributed.join("cpu", 2, 32)
