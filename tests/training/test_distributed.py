"""Two processes under torchrun train the same network as one process."""

import copy
import json

import pytest
import torch
from helpers import torchrun

from utils import environment, paths
from utils.errors import UserError
from utils.training import distributed, loop
from utils.training.sync_batchnorm import synchronize

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
# A bias before BatchNorm has no gradient but noise, which AdamW would blow up.
model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=not {norm}), norm, nn.ReLU(), *head)
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


@pytest.mark.parametrize("norm", [False, True])
def test_two_processes_take_the_same_steps_as_one(tmp_path, norm):
    """With BatchNorm as well: statistics of half a batch would train another network."""
    (alone,), history = trained(tmp_path / "one", 1, norm)
    pair, together = trained(tmp_path / "two", 2, norm)
    assert alone.keys() == pair[0].keys()
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


def test_no_process_draws_dropout_from_the_seed_of_the_shuffle():
    seeds = [loop.dropout_seed(7, epoch, rank) for epoch in range(3) for rank in range(4)]
    seeds += [loop.shuffle_seed(7, epoch) for epoch in range(3)]
    assert len(set(seeds)) == len(seeds)


def test_the_seeds_of_a_single_process_are_those_of_earlier_checkpoints():
    assert loop.dropout_seed(0, 3, 0) == loop._seed(0, 3)
    assert loop.shuffle_seed(0, 3) == loop._seed(0, 3, 1)


def test_batchnorm_of_a_group_has_the_state_dict_of_plain_batchnorm_and_evaluates_alike():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    plain(torch.randn(8, 3, 6, 6))
    group = copy.deepcopy(plain)
    synchronize(group)
    assert isinstance(group[1], torch.nn.BatchNorm2d)
    assert group.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(group.eval()(x), plain.eval()(x))
