"""Training: architectures, checkpoints, the one training loop and distributed processes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "architectures": ["initialize"],
        "checkpoints": ["Checkpoint"],
        "sessions": ["Experiment", "finetune", "train"],
    },
)
