"""The one training loop: every model, every method and every data set is trained by `fit`.

A run that is killed goes on from its last finished epoch to the same weights. That is cheap to promise because nothing
random outlives an epoch: order, augmentation and dropout are drawn from (seed, epoch), so no generator needs to be stored.
"""

import contextlib
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import architectures, checkpoints, cli, distributed, paths, progress
from utils.checkpoints import Checkpoint
from utils.data import Data, Split
from utils.environment import cpu
from utils.errors import UserError

EVAL_BATCH = 64
SMOKE = {"epochs": 1, "batch_size": 8}


def autocast(device: str, wanted: bool | str) -> tuple[contextlib.AbstractContextManager, str]:
    """Mixed precision, and the name of its format: fp16, bf16 or fp32 (none).

    CUDA: FP16 with loss scaling. CPU: BF16, which needs no loss scaling, if the processor multiplies it natively; emulated, it
    is slower than FP32 and used only if `wanted` is "always".
    """
    if wanted and device == "cuda":
        return torch.autocast("cuda", torch.float16), "fp16"
    if wanted == "always" or (wanted and {"avx512_bf16", "amx_bf16"} & set(cpu()[1])):
        return torch.autocast("cpu", torch.bfloat16), "bf16"
    return contextlib.nullcontext(), "fp32"


def parameter_groups(model: nn.Module, head: set[str], recipe: dict) -> list[dict]:
    """AdamW groups: `head` parameters and the rest with their own rates; no decay on biases and normalisation."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = recipe["head_lr"] if name in head else recipe["backbone_lr"]
        decay = recipe["weight_decay"] if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


def schedule(optimizer: torch.optim.Optimizer, recipe: dict, steps_per_epoch: int):
    """Learning rates over a run: (called after each step, called with the validation loss after each epoch).

    "cosine": linear warm-up over `warmup_epochs`, then half a cosine down to zero (Loshchilov and Hutter 2017, without
    restarts). "plateau": a tenth of the rates on the third epoch in a row without a lower validation loss.
    """
    if recipe["schedule"] == "plateau":
        return None, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    warmup, total = recipe["warmup_epochs"] * steps_per_epoch, recipe["epochs"] * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return min(1.0, (step + 1) / warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), None


@torch.inference_mode()
def predict(model: nn.Module, split: Split, device: str = "cpu") -> np.ndarray:
    """FP32 logits of a split in order, float32 (len(split), 2); the model is put into evaluation mode."""
    model.eval()
    return np.concatenate([model(x).float().cpu().numpy() for x, _ in split.batches(EVAL_BATCH, device)])


def validate(model: nn.Module, split: Split, device: str) -> tuple[float, float]:
    """Cross-entropy in nats and accuracy (0 to 1) on a split, of which each process of a group computes a part."""
    part = split.part(distributed.rank(), distributed.size())
    logits, y = torch.from_numpy(predict(model, part, device)), torch.from_numpy(part.y)
    sums = [F.cross_entropy(logits, y, reduction="sum").item(), float((logits.argmax(1) == y).sum()), float(len(part))]
    loss, right, count = distributed.total(sums, device)
    return loss / count, right / count


def freeze(model: nn.Module, recipe: dict, epoch: int) -> None:
    """Stop estimating what the recipe's schedule says is settled: `freeze_bn` and `freeze_observers` name the first epochs.

    BatchNorm then normalises with its running statistics, as it will when deployed (Krishnamoorthi 2018, arXiv:1806.08342,
    section 3.2.1); quantization ranges stay as they are. With `dropout=False` no layer drops anything from the start.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not recipe.get("dropout", True):
            module.eval()
        if isinstance(module, nn.BatchNorm2d) and epoch >= recipe.get("freeze_bn", math.inf):
            module.eval()
        if hasattr(module, "freeze") and epoch >= recipe.get("freeze_observers", math.inf):
            module.freeze()


class Training:
    """State of a run between two epochs; everything in it is stored after each."""

    def __init__(
        self, model: nn.Module, data: Data, recipe: dict, head: set[str], seed: int, device: str, teacher: nn.Module | None = None
    ):
        self.teacher = teacher and copy.deepcopy(teacher).eval().to(device, memory_format=torch.channels_last)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.network = distributed.parallel(self.model)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = recipe["bn_momentum"]
        self.data, self.recipe, self.seed, self.device = data, recipe, seed, device
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, head, recipe))
        steps = max(1, len(data.train) // recipe["batch_size"])
        self.by_step, self.by_epoch = schedule(self.optimizer, recipe, steps)
        self.autocast, self.amp = autocast(device, recipe["amp"])
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp == "fp16")
        self.history: list[dict] = []
        self.best: dict = {"epoch": -1, "score": (-1.0, 0.0), "weights": None}

    def state(self) -> dict:
        scheduler = self.by_step or self.by_epoch
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best": self.best,
        }

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        (self.by_step or self.by_epoch).load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = state["history"], state["best"]

    def target(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What the network is to answer: the labels int64 (n,), or the teacher's probabilities float32 (n, 2) instead.

        Distillation (Hinton et al. 2015, arXiv:1503.02531, at temperature 1) keeps QAT from learning anything else than to
        live with the rounding (for quantized students: Mishra and Marr 2018, arXiv:1711.05852).
        """
        if self.teacher is None:
            return y
        with torch.no_grad():
            return self.teacher(x).softmax(1)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One optimizer step; returns the loss."""
        y = self.target(x, y)
        with self.autocast:
            loss = F.cross_entropy(self.network(x).float(), y, label_smoothing=self.recipe["label_smoothing"])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe["clip_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.by_step:
            self.by_step.step()
        return loss.item()

    def epoch(self) -> None:
        """Train one epoch, validate, and keep the weights if they are the best so far."""
        number, started = len(self.history), time.perf_counter()
        entropy = [self.seed, number, *[distributed.rank()] * (distributed.rank() > 0)]
        torch.manual_seed(np.random.SeedSequence(entropy).generate_state(1)[0].item())  # dropout
        self.network.train()
        freeze(self.model, self.recipe, number)
        losses = []
        batch_size, augmentation = self.recipe["batch_size"], self.recipe["augment"]
        label = f"epoch {number + 1}/{self.recipe['epochs']}"
        with progress.Bar(label, max(1, len(self.data.train) // batch_size), "steps") as bar:
            seed = np.random.SeedSequence([self.seed, number, 1]).generate_state(1)[0].item()
            part = distributed.rank(), distributed.size()
            for x, y in self.data.train.shuffled(batch_size, seed, self.device, augmentation, part):
                losses.append(self.step(x, y))
                bar.step(note=f"loss {losses[-1]:.3f}")
        distributed.share(self.model)
        train_loss = distributed.total([sum(losses)], self.device)[0] / len(losses) / distributed.size()
        loss, accuracy = validate(self.model, self.data.validation, self.device)
        if not math.isfinite(loss) or not math.isfinite(train_loss):
            raise UserError(f"{label}: the loss is not finite; lower the learning rates in RECIPE.")
        if self.by_epoch:
            self.by_epoch.step(loss)
        seconds = time.perf_counter() - started
        entry = {"epoch": number, "train_loss": train_loss, "validation_loss": loss}
        self.history.append(entry | {"validation_accuracy": accuracy, "seconds": seconds})
        score = (accuracy, -loss) if self.recipe.get("keep", "best") == "best" else (number, 0.0)
        if score > tuple(self.best["score"]):
            self.best = {"epoch": number, "score": score, "weights": copy.deepcopy(self.model.state_dict())}
        progress.say(
            f"{label}: train loss {entry['train_loss']:.4f}, validation loss {loss:.4f}, "
            f"accuracy {100 * accuracy:.2f} % (epoch {self.best['epoch'] + 1} is kept), {seconds:.0f} s"
        )

    @property
    def finished(self) -> bool:
        number = len(self.history)
        return number >= self.recipe["epochs"] or number - 1 - self.best["epoch"] >= self.recipe["patience"] > 0


def run(run: cli.Run, model: nn.Module, pretrained: set[str], init: str, data: Data, recipe: dict, args) -> None:
    """Train the model of `run` from `init` by `recipe` and save it as its checkpoint, unless that has been done already.

    `pretrained` names the parameters that `init` provided; all others, and the last layer, count as head.
    """
    head = {name for name, _ in model.named_parameters() if name not in pretrained or architectures.is_head(run.model, name)}
    _train(run, checkpoints.path_of(run, data.study, args), model, head, {"init": init}, data, recipe, args)


def finetune(run: cli.Run, backend, prepared: nn.Module, baseline: Checkpoint, data: Data, recipe: dict, args) -> Checkpoint:
    """QAT: train what `backend` prepared from `baseline`, by recipe["training"], unless that has been done already.

    Backends that train alike share the result, and so do scripts: the control of the three QAT scripts of a model is one.
    """
    run = run.on(backend.name)
    tag, settings = backend.training(recipe)
    schedule = recipe["training"] | ({"amp": False} if run.method == "control" else {})
    head = {name for name, _ in prepared.named_parameters() if architectures.is_head(run.model, name)}
    start = {"init": baseline.sha256, "backend": settings}
    path = checkpoints.path_of(run, data.study, args, tag)
    teacher = baseline.model if schedule["distill"] else None
    training = _train(run, path, prepared, head, start, data, schedule, args, teacher)
    return Checkpoint(path, prepared.eval(), checkpoints.sha256_of(path), training)


def _train(
    run: cli.Run, path: Path, model: nn.Module, head: set[str], start: dict, data: Data, recipe: dict, args, teacher=None
) -> dict:
    """Train `model` in place, or load what the same training gave before; returns the facts that are stored with it."""
    recipe = recipe | (SMOKE if args.smoke else {})
    distributed.join(args.device, args.threads, recipe["batch_size"])
    facts = {"recipe": recipe, **start, "data": data.digest, "seed": args.seed, "device": args.device}
    fingerprint = checkpoints.fingerprint(**facts)
    distributed.wait()  # before process 0 may write what the others look for
    if path.exists() and (stored := checkpoints.read(path))["training"]["fingerprint"] == fingerprint:
        progress.say(f"training: done before, {path}; delete it to train again")
        distributed.wait()
        model.load_state_dict(stored["state_dict"])
        return stored["training"]
    distributed.wait()
    resume = path.with_suffix(".resume")
    how = dict(seed=args.seed, device=args.device, resume=resume, fingerprint=fingerprint, teacher=teacher)
    trained = fit(model, data, recipe, head=head, **how)
    facts |= trained | {"fingerprint": fingerprint, "processes": distributed.size()}
    if distributed.rank() == 0:
        checkpoints.save(path, run.model, model, data, facts)
        resume.unlink(missing_ok=True)
        progress.say(f"training: saved {path}")
    distributed.wait()
    return facts


def fit(
    model: nn.Module,
    data: Data,
    recipe: dict,
    *,
    head: set[str],
    seed: int,
    device: str,
    resume: Path,
    fingerprint: str,
    teacher: nn.Module | None = None,
) -> dict:
    """Train `model` in place by `recipe` and leave it with the weights of its best validation epoch.

    `head` names the parameters trained at `head_lr`; a `teacher` gives the answers to learn instead of the labels. The state
    after each epoch is written to `resume`; a state with the same `fingerprint` found there is continued. Returns history (one
    entry an epoch), best_epoch and training_dtype.
    """
    training = Training(model, data, recipe, head, seed, device, teacher)
    if resume.exists():
        try:
            stored = torch.load(resume, map_location=device, weights_only=True)
        except Exception:  # a damaged file raises nearly anything, and costs only time
            stored = {}
        if isinstance(stored, dict) and stored.get("fingerprint") == fingerprint:
            training.restore(stored["state"])
            progress.say(f"training goes on after epoch {len(training.history)}")
    while not training.finished:
        training.epoch()
        if distributed.rank() == 0:
            with paths.atomic(resume) as temporary:
                torch.save({"fingerprint": fingerprint, "state": training.state()}, temporary)
    model.load_state_dict(training.best["weights"])
    model.eval()
    return {"history": training.history, "best_epoch": training.best["epoch"], "training_dtype": training.amp}
