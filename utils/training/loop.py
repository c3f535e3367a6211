"""The one training loop: `fit` trains every model, by every method, on every data set.

A killed run continues after its last finished epoch and ends with the same weights. This needs no
stored random generator: each epoch draws order, augmentation and dropout from (seed, epoch).
"""

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import checksums, progress, recipes, torch_file
from utils.data.dataset import Data, Split
from utils.environment import cpu
from utils.errors import UserError
from utils.recipes import Schedule
from utils.training import distributed

EVAL_BATCH = 64
# From images float32 (n, 3, 224, 224), normalised, to logits float32 (n, 2).
Predictor = Callable[[torch.Tensor], torch.Tensor]


def autocast(device: str, wanted: bool) -> tuple[contextlib.AbstractContextManager, str]:
    """Return the context of mixed precision and its format: fp16, bf16 or fp32 (none).

    CUDA uses FP16, with loss scaling. A CPU uses BF16, which needs no loss scaling, if it
    multiplies BF16 natively. Emulated BF16 was 20 times slower than FP32 (ResNet-18 on AVX2).
    """
    if wanted and device == "cuda":
        return torch.autocast("cuda", torch.float16), "fp16"
    if wanted and {"avx512_bf16", "amx_bf16"} & set(cpu()[1]):
        return torch.autocast("cpu", torch.bfloat16), "bf16"
    return contextlib.nullcontext(), "fp32"


def parameter_groups(model: nn.Module, head: set[str], recipe: Schedule) -> list[dict]:
    """Return AdamW's parameter groups: `head` learns at `head_lr`, the rest at `backbone_lr`.

    Frozen parameters are left out. Biases and normalisation parameters have no weight decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = recipe.head_lr if name in head else recipe.backbone_lr
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]


def cosine(
    optimizer: torch.optim.Optimizer, recipe: Schedule, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate schedule: linear warm-up, then half a cosine down to zero.

    Rates change at every step; the warm-up lasts `warmup_epochs`. The cosine comes from Loshchilov
    and Hutter 2017 (arXiv:1608.03983), without restarts.
    """
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.inference_mode()
def predict(network: Predictor, split: Split, device: str = "cpu") -> np.ndarray:
    """Return the logits of a split in its order, float32 (len(split), 2).

    If `network` is a module, it is put into evaluation mode.
    """
    if isinstance(network, nn.Module):
        network.eval()
    batches = split.batches(EVAL_BATCH, device)
    return np.concatenate([network(x).float().cpu().numpy() for x, _ in batches])


def validate(model: nn.Module, split: Split, device: str) -> tuple[float, float]:
    """Compute the cross-entropy in nats and the accuracy (0 to 1) of `model` on a split.

    Each process of a group computes a part of the split.
    """
    part = split.part(distributed.rank(), distributed.size())
    logits, y = torch.from_numpy(predict(model, part, device)), torch.from_numpy(part.y)
    loss = F.cross_entropy(logits, y, reduction="sum").item()
    right = float((logits.argmax(1) == y).sum())
    loss, right, count = distributed.total([loss, right, float(len(part))], device)
    return loss / count, right / count


def augmentation(recipe: Schedule, epoch: int) -> dict | None:
    """Return the arguments of `augment` for `epoch`, from 0; None if images are not augmented.

    The images of the first `small.epochs` epochs have `small.size` x `small.size` pixels.
    """
    if recipe.augment is None:
        return None
    arguments = recipe.augment.describe()
    if isinstance(recipe, recipes.Training) and recipe.small and epoch < recipe.small.epochs:
        arguments["size"] = recipe.small.size
    return arguments


@dataclass(frozen=True)
class Setup:
    """The inputs of a training besides model, data and recipe."""

    head: set[str]  # names of the parameters that learn at `head_lr`
    seed: int
    device: str
    teacher: nn.Module | None = None  # its logits replace the labels


@dataclass(frozen=True)
class Resume:
    """A file with the state of a training after its last finished epoch."""

    path: Path
    fingerprint: str  # identifies the training

    def read(self, device: str) -> dict | None:
        """Return the state; None if the file is missing, damaged or from another training."""
        if (content := checksums.read(self.path)) is None:
            return None
        stored = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        return stored["state"] if stored["fingerprint"] == self.fingerprint else None

    def write(self, state: dict) -> None:
        """Store `state` atomically."""
        content = {"fingerprint": self.fingerprint, "state": state}
        checksums.write(self.path, torch_file.packed(content))


class Trainer:
    """A training in progress; `fit` stores its `state` after every epoch."""

    def __init__(self, model: nn.Module, data: Data, recipe: Schedule, setup: Setup):
        self.data, self.recipe, self.seed, self.device = data, recipe, setup.seed, setup.device
        self.teacher = None
        if setup.teacher is not None:
            teacher = copy.deepcopy(setup.teacher).eval()
            self.teacher = teacher.to(self.device, memory_format=torch.channels_last)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.network = distributed.parallel(self.model)
        if isinstance(recipe, recipes.Training):  # networks for QAT have their BatchNorm folded
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = recipe.bn_momentum
        groups = parameter_groups(self.model, setup.head, recipe)
        # Fused AdamW passes over each tensor once. For AlexNet on one thread, this takes 0.07 s
        # instead of 0.33 s per step.
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.steps = max(1, len(data.train) // recipe.batch_size)  # per epoch
        self.scheduler = cosine(self.optimizer, recipe, self.steps)
        self.autocast, self.amp = autocast(self.device, recipe.amp)
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.amp == "fp16")
        self.history: list[dict] = []
        self.best: dict = {"epoch": -1, "score": (-1.0, 0.0), "weights": None}

    def state(self) -> dict:
        """Return everything that the remaining epochs need."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        """Continue from `state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = state["history"], state["best"]

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch, float32 ().

        Without a teacher, this is the cross-entropy in nats for the labels `y`, int64 (n,). With
        one, it is the mean squared difference to its logits (Ba and Caruana 2014, arXiv:1312.6184).
        QAT then learns only to compensate for rounding: without rounding, the loss is 0 from the
        beginning. Mishra and Marr 2018 (arXiv:1711.05852) also distil quantized networks.
        """
        with self.autocast:
            logits = self.network(x).float()
        if self.teacher is None:
            return F.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
        with self.autocast, torch.no_grad():
            expected = self.teacher(x).float()
        return F.mse_loss(logits, expected)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Take one optimizer step on a batch and return its loss."""
        loss = self.loss(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()

    def epoch(self) -> None:
        """Train one epoch, validate, and keep the weights if they are the best so far.

        Higher validation accuracy is better, then lower validation loss. With `keep="last"` in the
        recipe, the latest weights are kept. Raises `UserError` if a loss is not finite.
        """
        number, started = len(self.history), time.perf_counter()
        label = f"epoch {number + 1}/{self.recipe.epochs}"
        train_loss = self._steps(number, label)
        loss, accuracy = validate(self.model, self.data.validation, self.device)
        if not math.isfinite(loss):
            raise UserError(
                f"{label}: the loss on the validation images is {loss}; "
                "lower the learning rates in RECIPE."
            )
        seconds = time.perf_counter() - started  # not stored: equal trainings make equal files
        self.history.append(
            {
                "epoch": number,
                "train_loss": train_loss,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
            }
        )
        score = (accuracy, -loss) if self.recipe.keep == "best" else (number, 0.0)
        if score > tuple(self.best["score"]):
            weights = copy.deepcopy(self.model.state_dict())
            self.best = {"epoch": number, "score": score, "weights": weights}
        progress.say(
            f"{label}: train loss {train_loss:.4f}, validation loss {loss:.4f}, accuracy "
            f"{100 * accuracy:.2f} % (keeping epoch {self.best['epoch'] + 1}), {seconds:.0f} s"
        )

    def _steps(self, number: int, label: str) -> float:
        """Take the steps of epoch `number`, from 0; return the mean loss over all processes."""
        rank, size = distributed.rank(), distributed.size()
        torch.manual_seed(dropout_seed(self.seed, number, rank))
        self.network.train()
        batches = self.data.train.shuffled(
            self.recipe.batch_size,
            shuffle_seed(self.seed, number),
            self.device,
            augmentation(self.recipe, number),
            (rank, size),
        )
        losses = []
        with progress.Bar(label, self.steps, "steps") as bar:
            for x, y in batches:
                losses.append(self.step(x, y))
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"{label}, step {len(losses)}: the loss is {losses[-1]}; "
                        "lower the learning rates in RECIPE."
                    )
                bar.step(note=f"loss {losses[-1]:.3f}")
        distributed.share(self.model)
        return distributed.total([sum(losses)], self.device)[0] / len(losses) / size

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last `patience` epochs brought no better weights.

        A `patience` of 0 turns early stopping off.
        """
        done = len(self.history)
        since_best = done - 1 - self.best["epoch"]
        return done >= self.recipe.epochs or since_best >= self.recipe.patience > 0


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of the dropout masks of a process, which differ between processes."""
    return _seed(seed, epoch, 2, rank) if rank else _seed(seed, epoch)


def shuffle_seed(seed: int, epoch: int) -> int:
    """Return the seed of order and augmentation, the same for all processes."""
    return _seed(seed, epoch, 1)


def _seed(*entropy: int) -> int:
    return np.random.SeedSequence(entropy).generate_state(1)[0].item()


def fit(model: nn.Module, data: Data, recipe: Schedule, setup: Setup, resume: Resume) -> dict:
    """Train `model` in place by `recipe`, and leave it in evaluation mode with the kept weights.

    All its tensors become contiguous, as after loading a checkpoint. The state after each epoch is
    written to `resume`; if the file already has a state, training continues from it. Returns
    history (one entry per epoch), best_epoch and training_dtype.
    """
    trainer = Trainer(model, data, recipe, setup)
    if state := resume.read(setup.device):
        trainer.restore(state)
        progress.say(f"training continues after epoch {len(trainer.history)}")
    while not trainer.finished:
        trainer.epoch()
        if distributed.rank() == 0:
            resume.write(trainer.state())
    model.load_state_dict(trainer.best["weights"])
    # After QAT, ExecuTorch refuses AlexNet and ResNet-18 in the channels-last order of training.
    model.eval().to(memory_format=torch.contiguous_format)
    return {
        "history": trainer.history,
        "best_epoch": trainer.best["epoch"],
        "training_dtype": trainer.amp,
    }
