"""Training: initial weights, the one training loop, groups of processes, checkpoints."""

from utils.training.baseline import load_fp32
from utils.training.initial_weights import initialize
from utils.training.trainings import finetune, train

__all__ = ["finetune", "initialize", "load_fp32", "train"]
