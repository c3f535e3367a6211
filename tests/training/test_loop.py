"""`fit`: killed runs end with the same weights, the best epoch is kept, rates are right."""

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

from utils.data.dataset import Split
from utils.errors import UserError
from utils.recipes import Augmentation, SmallImages, Training
from utils.training import loop
from utils.training.loop import Resume, Setup, Trainer

RECIPE = Training(
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
    augment=Augmentation(crop=0.8, degrees=10),
)
HEAD = {"head.weight", "head.bias"}
SETUP = Setup(head=HEAD, seed=0, device="cpu")


class Tiny(nn.Module):
    """A network whose BatchNorm and dropout could make a resumed run differ."""

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
    """Train a fresh network; return it and the result of `fit`."""
    model, recipe = model or Tiny(), RECIPE.replace(**changes)
    setup, resume = Setup(HEAD, seed, "cpu"), Resume(resume, fingerprint)
    return model, loop.fit(model, images, recipe, setup, resume)


def same(one, other):
    """Whether two networks have the same bits, including BatchNorm's statistics."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def interrupt(monkeypatch, at_step):
    """Make the training die in this step, counted from 0, until `monkeypatch.undo`."""
    taken, step = [], Trainer.step

    def dying(self, x, y):
        if len(taken) == at_step:
            raise KeyboardInterrupt
        taken.append(None)
        return step(self, x, y)

    monkeypatch.setattr(Trainer, "step", dying)


# ---- resuming


@pytest.mark.parametrize("at_step", [1, 3, 8, 11])  # an epoch has three steps
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, images, at_step):
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


def test_a_run_killed_twice_ends_with_the_same_bits(tmp_path, monkeypatch, images, capsys):
    whole, expected = fit(images, tmp_path / "whole")
    for at_step in (4, 5):
        interrupt(monkeypatch, at_step)
        with pytest.raises(KeyboardInterrupt):
            fit(images, tmp_path / "part")
        monkeypatch.undo()
    resumed, facts = fit(images, tmp_path / "part")
    assert facts == expected and same(resumed, whole)
    said = capsys.readouterr().out
    assert "training continues after epoch 1\n" in said
    assert "training continues after epoch 2\n" in said


def test_a_run_killed_after_its_last_epoch_has_nothing_left_to_train(tmp_path, monkeypatch, images):
    whole, expected = fit(images, tmp_path / "state")
    interrupt(monkeypatch, 0)
    resumed, facts = fit(images, tmp_path / "state", model=Tiny(seed=7))
    assert facts == expected and same(resumed, whole)


def test_another_seed_gives_other_weights(tmp_path, images):
    assert not same(fit(images, tmp_path / "a", seed=0)[0], fit(images, tmp_path / "b", seed=1)[0])


def test_each_epoch_draws_another_order_and_dropout(tmp_path, monkeypatch, images):
    seeds, drawn = [], []
    shuffled = Split.shuffled

    def recorded(self, batch_size, seed, device, augmentation, part):
        seeds.append(seed)
        drawn.append(torch.get_rng_state())
        return shuffled(self, batch_size, seed, device, augmentation, part)

    monkeypatch.setattr(Split, "shuffled", recorded)
    fit(images, tmp_path / "state", seed=0, epochs=3)
    fit(images, tmp_path / "other", seed=1, epochs=3)
    assert len(set(seeds)) == 6
    assert len({state.numpy().tobytes() for state in drawn}) == 6


def test_the_first_epochs_see_small_images(tmp_path, monkeypatch):
    seen, step = [], Trainer.step

    def recorded(self, x, y):
        seen.append(tuple(x.shape[2:]))
        return step(self, x, y)

    monkeypatch.setattr(Trainer, "step", recorded)
    images = bright_and_dark(tmp_path / "images", side=40)
    fit(images, tmp_path / "state", epochs=3, small=SmallImages(epochs=2, size=32))
    assert seen == [(32, 32)] * 6 + [(40, 40)] * 3  # an epoch has three steps


@pytest.mark.parametrize("damage", ["other fingerprint", "cut off", "no bytes", "not torch's"])
def test_a_state_that_cannot_be_used_is_ignored(tmp_path, images, damage):
    whole, expected = fit(images, tmp_path / "whole")
    resume = tmp_path / "part"
    # Two epochs of another run, which would change the result.
    fingerprint = "other" if damage == "other fingerprint" else "f"
    fit(images, resume, seed=5, epochs=2, fingerprint=fingerprint)
    match damage:
        case "cut off":
            resume.write_bytes(resume.read_bytes()[:-1000])
        case "no bytes":
            resume.write_bytes(b"")
        case "not torch's":
            resume.write_bytes(b"something else")
    model, facts = fit(images, resume)
    assert facts == expected and same(model, whole)


# ---- the best epoch


def scripted(monkeypatch, *validations):
    """Fake the (loss, accuracy) of each epoch; return a list that receives the epochs' weights."""
    weights, answers = [], iter(validations)

    def validate(model, _split, _device):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(answers)

    monkeypatch.setattr(loop, "validate", validate)
    return weights


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        # The highest accuracy counts first, then the lowest loss, then the earliest epoch.
        ([(0.9, 0.5), (0.5, 0.8), (0.4, 0.7), (0.6, 0.6)], 1),
        ([(0.9, 0.5), (0.5, 0.8), (0.4, 0.8), (0.6, 0.8)], 2),
        ([(0.5, 0.8), (0.5, 0.8), (0.5, 0.8), (0.5, 0.8)], 0),
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
    history = facts["history"]
    kept = [(entry["validation_loss"], entry["validation_accuracy"]) for entry in history]
    assert kept == validations
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3]


def test_the_best_epoch_survives_a_kill(tmp_path, monkeypatch, images):
    before = scripted(monkeypatch, (0.5, 0.9), (0.6, 0.8))
    with pytest.raises(StopIteration):
        fit(images, tmp_path / "state")  # ends with the third epoch
    scripted(monkeypatch, (0.7, 0.7), (0.7, 0.7))
    model, facts = fit(images, tmp_path / "state", model=Tiny(seed=7))
    assert facts["best_epoch"] == 0 and len(facts["history"]) == 4
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 5), (3, 6), (0, 8)])
def test_training_stops_after_patience_epochs_without_a_better_one(
    tmp_path, monkeypatch, images, patience, epochs
):
    accuracies = (0.6, 0.5, 0.7, 0.6, 0.7, 0.5, 0.6, 0.5)
    scripted(monkeypatch, *((0.5, accuracy) for accuracy in accuracies))
    _, facts = fit(images, tmp_path / "state", epochs=8, patience=patience)
    assert len(facts["history"]) == epochs
    assert facts["best_epoch"] == (0 if epochs == 2 else 2)


# ---- rates


def rates(warmup_epochs, epochs, steps, calls):
    """The learning rates of the first steps, relative to the highest, with `steps` per epoch."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    recipe = RECIPE.replace(warmup_epochs=warmup_epochs, epochs=epochs)
    scheduler = loop.cosine(optimizer, recipe, steps)
    taken = []
    for _ in range(calls):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_cosine_warms_up_in_equal_steps_and_falls_to_zero():
    taken = rates(2, 6, steps=3, calls=19)
    assert taken[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1])
    assert taken[9] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert taken[12] == pytest.approx(0.5)
    assert taken[18] == pytest.approx(0, abs=1e-12) and 0 < taken[17] < 0.02
    assert all(later < earlier for earlier, later in itertools.pairwise(taken[6:]))


def test_cosine_without_warm_up_starts_at_the_full_rate():
    taken = rates(0, 2, steps=2, calls=3)
    assert taken == pytest.approx([1, 0.5 * (1 + 0.5**0.5), 0.5])


@pytest.mark.parametrize(("warmup", "steps"), [(0.5, 1), (0.5, 3), (0.5, 53), (1.5, 7)])
def test_a_warm_up_that_ends_within_a_step_never_exceeds_the_rate(warmup, steps):
    taken = rates(warmup, 4, steps, calls=4 * steps)
    assert max(taken) <= 1 and all(rate > 0 for rate in taken)


def test_both_groups_follow_the_schedule():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.001)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = loop.cosine(optimizer, RECIPE.replace(warmup_epochs=0, epochs=2), 1)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.0005])


def test_rates_change_with_each_step_of_an_epoch(images):
    trainer = Trainer(Tiny(), images, RECIPE.replace(epochs=2), SETUP)
    seen, step = [], trainer.step

    def recorded(x, y):
        seen.append(trainer.optimizer.param_groups[0]["lr"])
        return step(x, y)

    trainer.step = recorded
    trainer.epoch()
    trainer.epoch()
    assert seen == pytest.approx([0.01 * factor for factor in (1 / 3, 2 / 3, 1, 1, 0.75, 0.25)])


def test_frozen_parameters_are_in_no_group():
    model = Tiny()
    model.body.requires_grad_(False)
    groups = loop.parameter_groups(model, HEAD, RECIPE)
    learning = {id(parameter) for group in groups for parameter in group["params"]}
    assert learning == {id(parameter) for parameter in model.head.parameters()}


def test_biases_and_normalisation_do_not_decay_and_the_head_has_another_rate():
    model = Tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = loop.parameter_groups(model, HEAD, RECIPE)
    settings = {}
    for group in groups:
        for parameter in group["params"]:
            settings[names[id(parameter)]] = (group["lr"], group["weight_decay"])
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


def test_training_lowers_the_loss_and_separates_the_classes(tmp_path, images):
    model = Tiny()
    before, _ = loop.validate(model, images.test, "cpu")
    _, facts = fit(images, tmp_path / "state", model=model, epochs=12)
    after, accuracy = loop.validate(model, images.test, "cpu")
    assert after < 0.6 * before and accuracy > 0.9
    assert facts["history"][-1]["train_loss"] < 0.8 * facts["history"][0]["train_loss"]


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path, monkeypatch, images, where):
    if where == "training":
        validated, changes = 1.0, dict(backbone_lr=1e30, clip_norm=1e30)
        message = r"epoch 1/4, step \d: the loss is (nan|inf); lower"
    else:
        validated, changes = math.nan, {}
        message = "on the validation images is nan; lower"
    monkeypatch.setattr(loop, "validate", lambda *_: (validated, 0.5))
    with pytest.raises(UserError, match=message):
        fit(images, tmp_path / "state", **changes)
    assert not (tmp_path / "state").exists()


def test_gradients_are_clipped(images):
    trainer = Trainer(Tiny(), images, RECIPE.replace(clip_norm=1e-3), SETUP)
    x, y = next(images.train.batches(8))
    trainer.step(100 * x, y)
    gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    assert gradients.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_the_loss_of_a_step_is_smoothed_cross_entropy(images):
    model = Tiny().eval()
    x, y = next(images.train.batches(8))
    logs = F.log_softmax(model(x), 1)
    expected = -(0.95 * logs[range(8), y] + 0.05 * logs.mean(1)).mean().item()
    trainer = Trainer(model, images, RECIPE, SETUP)
    assert trainer.step(x, y) == pytest.approx(expected, rel=1e-5)


def test_a_teacher_replaces_the_labels(images):
    teacher = Tiny(seed=1)
    trainer = Trainer(Tiny(), images, RECIPE, dataclasses.replace(SETUP, teacher=teacher))
    x, y = next(images.train.batches(8))
    trainer.model.eval()
    with torch.no_grad():
        expected = (trainer.model(x) - teacher.eval()(x)).square().mean()
        assert torch.allclose(trainer.loss(x, y), expected)
        assert torch.equal(trainer.loss(x, 1 - y), trainer.loss(x, y))


def test_a_copy_of_the_teacher_has_nothing_to_learn(images):
    teacher = Tiny().eval()
    setup = dataclasses.replace(SETUP, teacher=teacher)
    trainer = Trainer(copy.deepcopy(teacher), images, RECIPE, setup)
    trainer.model.eval()
    x, y = next(images.train.batches(8))
    assert trainer.step(x, y) < 1e-12
    assert max(parameter.grad.abs().max() for parameter in trainer.model.parameters()) < 1e-6


def test_weights_are_channels_last_only_during_training(tmp_path, images):
    assert not Trainer(Tiny(), images, RECIPE, SETUP).model.body[0].weight.is_contiguous()
    model, _ = fit(images, tmp_path / "state", epochs=1)
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_batchnorm_has_the_momentum_of_the_recipe(images):
    trainer = Trainer(Tiny(), images, RECIPE.replace(bn_momentum=0.03), SETUP)
    assert trainer.model.body[1].momentum == 0.03


def test_predict_returns_logits_in_order_and_evaluation_mode(images):
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
