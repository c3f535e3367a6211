"""MobileNetV3-Small, FP32: fine-tune for cats and dogs, save, measure. Every quantized one starts from this checkpoint.

    python models/mobilenetv3_fp32.py --data PATH

The last layer, and whatever else the starting weights do not provide, learns at head_lr, the rest at backbone_lr. The epoch with
the best validation accuracy is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli

RUN = cli.Run(model="mobilenetv3", method="fp32", dtype="fp32")
RECIPE = {
    "pretrained": dict(
        epochs=10, batch_size=32, patience=6,  # epochs without a better validation accuracy
        backbone_lr=2e-4, head_lr=1e-3, schedule="cosine", warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1,  # torchvision's 0.01 would need thousands of steps to follow
        amp=False,  # its depthwise convolutions are slower in BF16 than in FP32
    ),
    "scratch": dict(
        epochs=10, batch_size=32, patience=0,  # the first epochs look like chance: never stop early
        backbone_lr=2e-3, head_lr=2e-3, schedule="cosine", warmup_epochs=1,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=dict(crop=0.8, degrees=10),
        bn_momentum=0.1,
        amp=False,
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
