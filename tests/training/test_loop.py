"""`fit`: a killed run goes on to the same weights, the best epoch is kept, rates follow their schedule."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import bright_and_dark
from torch import nn

from utils.data import dataset
from utils.errors import UserError
from utils.training import loop
from utils.training.loop import Resume, Setup, Training

RECIPE = dict(
    epochs=4,
    batch_size=8,
    backbone_lr=0.01,
    head_lr=0.03,
    weight_decay=0.01,
    warmup_epochs=1,
    label_smoothing=0.05,
    clip_norm=1.0,
    patience=0,
    bn_momentum=0.1,
    amp=False,
    augment=dict(crop=0.8, degrees=10),
)
HEAD = {"head.weight", "head.bias"}
SETUP = Setup(head=HEAD, seed=0, device="cpu")


class Tiny(nn.Module):
    """Everything that could make a resumed run differ: BatchNorm has buffers, dropout draws."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def images(tmp_path):
    return bright_and_dark(tmp_path / "images")  # 24 to train on, 12 to validate


def fit(images, resume, *, model=None, seed=0, fingerprint="f", **changes):
    """Train a fresh network; return it and what `fit` returned."""
    model = model or Tiny()
    facts = loop.fit(
        model, images, RECIPE | changes, Setup(HEAD, seed, "cpu"), Resume(resume, fingerprint)
    )
    return model, facts


def same(one, other):
    """Whether two networks hold the same bits, BatchNorm's statistics included."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def interrupt(monkeypatch, at_step):
    """Make the training die in this step, counted from 0 over all epochs, until `monkeypatch.undo`."""
    taken, step = [], Training.step

    def dying(self, x, y):
        if len(taken) == at_step:
            raise KeyboardInterrupt
        taken.append(None)
        return step(self, x, y)

    monkeypatch.setattr(Training, "step", dying)


# ---- resuming


@pytest.mark.parametrize("at_step", [1, 3, 8, 11])  # of three steps an epoch
def test_killed_and_resumed_ends_with_the_same_bits_as_uninterrupted(
    tmp_path, monkeypatch, images, at_step
):
    whole, expected = fit(images, tmp_path / "whole")
    interrupt(monkeypatch, at_step)
    with pytest.raises(KeyboardInterrupt):
        fit(images, tmp_path / "part")
    monkeypatch.undo()
    assert (tmp_path / "part").exists() == (at_step >= 3)
    torch.manual_seed(99)  # another process has other random numbers
    resumed, facts = fit(images, tmp_path / "part", model=Tiny(seed=0 if at_step < 3 else 7))
    assert facts == expected
    assert same(resumed, whole)


def test_killed_twice_is_no_different(tmp_path, monkeypatch, images, capsys):
    whole, expected = fit(images, tmp_path / "whole")
    for at_step in (4, 5):
        interrupt(monkeypatch, at_step)
        with pytest.raises(KeyboardInterrupt):
            fit(images, tmp_path / "part")
        monkeypatch.undo()
    resumed, facts = fit(images, tmp_path / "part")
    assert facts == expected and same(resumed, whole)
    said = capsys.readouterr().out
    assert "training goes on after epoch 1\n" in said and "training goes on after epoch 2\n" in said


def test_a_run_killed_after_its_last_epoch_has_nothing_left_to_train(tmp_path, monkeypatch, images):
    whole, expected = fit(images, tmp_path / "state")
    interrupt(monkeypatch, 0)
    resumed, facts = fit(images, tmp_path / "state", model=Tiny(seed=7))
    assert facts == expected and same(resumed, whole)


def test_another_seed_is_another_run(tmp_path, images):
    assert not same(fit(images, tmp_path / "a", seed=0)[0], fit(images, tmp_path / "b", seed=1)[0])


def test_dropout_and_order_are_drawn_anew_each_epoch(tmp_path, monkeypatch, images):
    seeds, drawn = [], []
    shuffled = dataset.Split.shuffled

    def recorded(self, batch_size, seed, device, augmentation, part):
        seeds.append(seed)
        drawn.append(torch.get_rng_state())
        return shuffled(self, batch_size, seed, device, augmentation, part)

    monkeypatch.setattr(dataset.Split, "shuffled", recorded)
    fit(images, tmp_path / "state", seed=0, epochs=3)
    fit(images, tmp_path / "other", seed=1, epochs=3)
    assert len(set(seeds)) == 6
    assert len({state.numpy().tobytes() for state in drawn}) == 6


def test_the_first_epochs_see_small_images(tmp_path, monkeypatch, images):
    seen, step = [], loop.Training.step

    def recorded(self, x, y):
        seen.append(tuple(x.shape[2:]))
        return step(self, x, y)

    monkeypatch.setattr(loop.Training, "step", recorded)
    fit(images, tmp_path / "state", epochs=3, small=dict(epochs=2, size=16))
    side = images.train.batch([0]).shape[2:]
    assert seen == [(16, 16)] * 6 + [tuple(side)] * 3  # 3 steps an epoch


@pytest.mark.parametrize("damage", ["other fingerprint", "cut off", "no bytes", "not torch's"])
def test_a_state_that_cannot_be_used_is_ignored(tmp_path, images, damage):
    whole, expected = fit(images, tmp_path / "whole")
    resume = tmp_path / "part"
    # Two epochs of another run, which would show.
    fit(
        images,
        resume,
        seed=5,
        epochs=2,
        fingerprint="other" if damage == "other fingerprint" else "f",
    )
    if damage != "other fingerprint":
        content = {
            "cut off": resume.read_bytes()[:-1000],
            "no bytes": b"",
            "not torch's": b"something else",
        }[damage]
        resume.write_bytes(content)
    model, facts = fit(images, resume)
    assert facts == expected and same(model, whole)


# ---- the best epoch


def scripted(monkeypatch, *validations):
    """Make the epochs validate with these (loss, accuracy); return a list that gets the weights of each."""
    weights, answers = [], iter(validations)

    def validate(model, _split, _device):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(answers)

    monkeypatch.setattr(loop, "validate", validate)
    return weights


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        (
            [(0.9, 0.5), (0.5, 0.8), (0.4, 0.7), (0.6, 0.6)],
            1,
        ),  # the highest accuracy, not the lowest loss
        (
            [(0.9, 0.5), (0.5, 0.8), (0.4, 0.8), (0.6, 0.8)],
            2,
        ),  # among equal accuracies the lowest loss
        ([(0.5, 0.8), (0.5, 0.8), (0.5, 0.8), (0.5, 0.8)], 0),  # among equals the first
        ([(9.0, 0.0), (9.5, 0.0), (9.9, 0.0), (8.0, 0.0)], 3),
    ],
)
def test_the_weights_of_the_best_epoch_are_kept(tmp_path, monkeypatch, images, validations, best):
    weights = scripted(monkeypatch, *validations)
    model, facts = fit(images, tmp_path / "state")
    assert facts["best_epoch"] == best
    state = model.state_dict()
    assert all(torch.equal(state[name], weights[best][name]) for name in state)
    others = weights[:best] + weights[best + 1 :]
    assert not any(torch.equal(state["head.weight"], other["head.weight"]) for other in others)
    assert not model.training
    assert [
        (entry["validation_loss"], entry["validation_accuracy"]) for entry in facts["history"]
    ] == validations
    assert [entry["epoch"] for entry in facts["history"]] == [0, 1, 2, 3]


def test_the_best_epoch_survives_a_kill(tmp_path, monkeypatch, images):
    before = scripted(monkeypatch, (0.5, 0.9), (0.6, 0.8))
    with pytest.raises(StopIteration):
        fit(images, tmp_path / "state")  # dies at the end of the third epoch
    scripted(monkeypatch, (0.7, 0.7), (0.7, 0.7))
    model, facts = fit(images, tmp_path / "state", model=Tiny(seed=7))
    assert facts["best_epoch"] == 0 and len(facts["history"]) == 4
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (0, 8)])
def test_training_stops_after_as_many_epochs_without_a_better_one(
    tmp_path, monkeypatch, images, patience, epochs
):
    accuracies = (0.6, 0.5, 0.7, 0.6, 0.7, 0.5, 0.6, 0.5)
    scripted(monkeypatch, *((0.5, accuracy) for accuracy in accuracies))
    _, facts = fit(images, tmp_path / "state", epochs=8, patience=patience)
    assert len(facts["history"]) == epochs
    assert facts["best_epoch"] == (0 if epochs == 2 else 2)


# ---- rates


def rates(recipe, steps, calls, base=1.0):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = loop.cosine(optimizer, recipe, steps)
    taken = []
    for _ in range(calls):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_cosine_warms_up_in_equal_steps_and_falls_to_zero():
    taken = rates(dict(warmup_epochs=2, epochs=6), 3, 19)
    assert taken[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert taken[9] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert taken[12] == pytest.approx(0.5)
    assert taken[18] == pytest.approx(0, abs=1e-12) and 0 < taken[17] < 0.02
    assert all(later < earlier for earlier, later in itertools.pairwise(taken[6:]))


def test_cosine_without_warm_up_starts_at_the_full_rate():
    assert rates(dict(warmup_epochs=0, epochs=2), 2, 3) == pytest.approx(
        [1, 0.5 * (1 + 0.5**0.5), 0.5]
    )


@pytest.mark.parametrize(("warmup", "steps"), [(0.5, 1), (0.5, 3), (0.5, 53), (1.5, 7)])
def test_a_warm_up_that_ends_within_a_step_never_exceeds_the_rate(warmup, steps):
    taken = rates(dict(warmup_epochs=warmup, epochs=4), steps, 4 * steps)
    assert max(taken) <= 1 and all(rate > 0 for rate in taken)


def test_both_groups_follow_the_schedule():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.001)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = loop.cosine(optimizer, dict(warmup_epochs=0, epochs=2), 1)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.0005])


def test_rates_change_with_each_step_of_an_epoch(images):
    training = Training(Tiny(), images, RECIPE | dict(epochs=2), SETUP)
    seen, step = [], training.step
    training.step = lambda x, y: (
        seen.append(training.optimizer.param_groups[0]["lr"]),
        step(x, y),
    )[1]
    training.epoch()
    training.epoch()
    assert seen == pytest.approx([0.01 * factor for factor in (1 / 3, 2 / 3, 1, 1, 0.75, 0.25)])


def test_what_does_not_learn_is_in_no_group():
    model = Tiny()
    model.body.requires_grad_(False)
    groups = loop.parameter_groups(model, HEAD, RECIPE)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.head.parameters()
    }


def test_biases_and_normalisation_do_not_decay_and_the_head_has_its_rate():
    model = Tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = loop.parameter_groups(model, HEAD, RECIPE)
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert settings == {
        "body.0.weight": (0.01, 0.01),
        "body.0.bias": (0.01, 0),
        "body.1.weight": (0.01, 0),
        "body.1.bias": (0.01, 0),
        "head.weight": (0.03, 0.01),
        "head.bias": (0.03, 0),
    }
    assert sum(len(group["params"]) for group in groups) == 6


# ---- learning


def test_training_lowers_the_loss_and_finds_the_classes(tmp_path, images):
    model = Tiny()
    before, _ = loop.validate(model, images.test, "cpu")
    _, facts = fit(images, tmp_path / "state", model=model, epochs=12)
    after, accuracy = loop.validate(model, images.test, "cpu")
    assert after < 0.6 * before and accuracy > 0.9
    assert facts["history"][-1]["train_loss"] < 0.8 * facts["history"][0]["train_loss"]


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path, monkeypatch, images, where):
    monkeypatch.setattr(
        loop, "validate", lambda *_: (math.nan if where == "validation" else 1.0, 0.5)
    )
    changes = dict(backbone_lr=1e30, clip_norm=1e30) if where == "training" else {}
    told = {
        "training": r"epoch 1/4, step \d: the loss is (nan|inf); lower",
        "validation": "on the validation images is nan; lower",
    }
    with pytest.raises(UserError, match=told[where]):
        fit(images, tmp_path / "state", **changes)
    assert not (tmp_path / "state").exists()


def test_gradients_are_clipped(images):
    training = Training(Tiny(), images, RECIPE | dict(clip_norm=1e-3), SETUP)
    x, y = next(images.train.batches(8))
    training.step(100 * x, y)
    gradients = torch.cat([parameter.grad.flatten() for parameter in training.model.parameters()])
    assert gradients.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_steps_loss_is_smoothed_cross_entropy(images):
    model = Tiny().eval()
    x, y = next(images.train.batches(8))
    logs = F.log_softmax(model(x), 1)
    expected = -(0.95 * logs[range(8), y] + 0.05 * logs.mean(1)).mean().item()
    training = Training(model, images, RECIPE, SETUP)
    assert training.step(x, y) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_takes_the_place_of_the_labels(images):
    torch.manual_seed(1)
    teacher = Tiny()
    training = Training(Tiny(), images, RECIPE, dataclasses.replace(SETUP, teacher=teacher))
    x, y = next(images.train.batches(8))
    training.model.eval()
    with torch.no_grad():
        expected = (training.model(x) - teacher.eval()(x)).square().mean()
        assert torch.allclose(training.loss(x, y), expected)
        assert torch.equal(training.loss(x, 1 - y), training.loss(x, y))


def test_what_the_teacher_is_has_nothing_to_learn(images):
    teacher = Tiny().eval()
    training = Training(
        copy.deepcopy(teacher), images, RECIPE, dataclasses.replace(SETUP, teacher=teacher)
    )
    training.model.eval()
    x, y = next(images.train.batches(8))
    assert training.step(x, y) < 1e-12
    assert max(parameter.grad.abs().max() for parameter in training.model.parameters()) < 1e-6


def test_the_memory_layout_of_training_does_not_outlive_it(tmp_path, images):
    assert not Training(Tiny(), images, RECIPE, SETUP).model.body[0].weight.is_contiguous()
    model, _ = fit(images, tmp_path / "state", epochs=1)
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_batchnorms_momentum_is_the_recipes(images):
    training = Training(Tiny(), images, RECIPE | dict(bn_momentum=0.03), SETUP)
    assert training.model.body[1].momentum == 0.03


def test_predict_gives_the_logits_in_order_in_evaluation_mode(images):
    model = Tiny().train()
    logits = loop.predict(model, images.test)
    with torch.no_grad():
        expected = Tiny().eval()(torch.cat([x for x, _ in images.test.batches(5)]))
    assert logits.dtype == np.float32 and np.allclose(logits, expected, atol=1e-6)
    loss, accuracy = loop.validate(model, images.test, "cpu")
    y = torch.from_numpy(images.test.y)
    assert loss == pytest.approx(F.cross_entropy(expected, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((expected.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize(
    ("isa", "device", "wanted", "name"),
    [
        (("avx512_bf16",), "cpu", True, "bf16"),
        (("amx_bf16",), "cpu", True, "bf16"),
        (("avx2", "avx512_vnni"), "cpu", True, "fp32"),
        (("avx512_bf16",), "cpu", False, "fp32"),
        ((), "cuda", True, "fp16"),
        ((), "cuda", False, "fp32"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_mixed_precision_is_used_where_it_is_native(monkeypatch, isa, device, wanted, name):
    monkeypatch.setattr(loop, "cpu", lambda: ("some processor", isa))
    assert loop.autocast(device, wanted)[1] == name
