"""AlexNet, FP32: fine-tune for cats and dogs, save, measure. Every quantized AlexNet starts from this checkpoint.

    python models/alexnet_fp32.py --data PATH

Layers that the starting weights do not provide (the last one; with convolution-only weights all three linear layers) learn at
head_lr, the others at backbone_lr. The epoch with the best validation accuracy is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli

RUN = cli.Run(model="alexnet", method="fp32", dtype="fp32")
RECIPE = {
    "pretrained": dict(
        epochs=12, batch_size=32, patience=6,  # epochs without a better validation accuracy
        backbone_lr=3e-5, head_lr=3e-4, schedule="cosine", warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1,
        amp=True,
    ),
    "scratch": dict(
        epochs=10, batch_size=32, patience=0,  # the first epochs look like chance: never stop early
        backbone_lr=2e-4, head_lr=2e-4, schedule="cosine", warmup_epochs=1,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=dict(crop=0.8, degrees=10),
        bn_momentum=0.1,
        amp=True,
    ),
}  # fmt: skip


def main(args):
    from utils import architectures, backends, checkpoints, data, measure, train  # torch: after --help has answered

    images = data.load(args)
    recipe = RECIPE["scratch" if args.init == "scratch" else "pretrained"]
    model, pretrained, init = architectures.initialize(RUN.model, args.init, args.seed)
    train.run(RUN, model, pretrained, init, images, recipe, args)
    baseline = checkpoints.load(RUN, images, args)
    for backend in backends.select(args):
        measure.run(RUN, recipe, backend.deploy(baseline), images, baseline, args)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
