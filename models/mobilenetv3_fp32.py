"""MobileNetV3-Small, FP32: fine-tune on two classes, save the checkpoint, measure it.

    python models/mobilenetv3_fp32.py --data PATH

Every quantized MobileNetV3-Small starts from this checkpoint. The last layer and all other
parameters that the starting weights do not provide learn at head_lr, the rest at backbone_lr. The
epoch with the best validation accuracy is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import backends, cli, data, measure, training
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="fp32", dtype="fp32")
RECIPE = {
    "pretrained": dict(
        epochs=10, batch_size=32, patience=6,  # stop after this many epochs without a better one
        backbone_lr=2e-4, head_lr=1e-3, warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1,  # torchvision's 0.01 would need thousands of steps to adapt
        amp=False,  # depthwise convolutions are slower in BF16 than in FP32
    ),
    "scratch": dict(
        epochs=10, batch_size=32, patience=0,  # never stop early: the first epochs are near chance
        backbone_lr=2e-3, head_lr=2e-3, warmup_epochs=1,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        silent_branches=True,  # the blocks with a shortcut start as it, so the network learns from the first steps
        small=dict(epochs=5, size=160),  # the first epochs, at 0.6 times the time of the others
        augment=dict(crop=0.8, degrees=10),
        bn_momentum=0.1,
        amp=False,
    ),
}  # fmt: skip


def main(options):
    images = data.load(options)
    recipe = RECIPE["scratch" if options.init == "scratch" else "pretrained"]
    start = training.initialize(RUN.model, options.init, options.seed)
    baseline = training.train(RUN, start, images, recipe, options)
    experiment = training.Experiment(RUN, options, images, baseline)
    for backend in backends.select(options):
        measure.run(experiment, recipe, backend.deploy(baseline))


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
