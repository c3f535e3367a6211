"""MobileNetV3-Small, FP32: fine-tune on two classes, save the checkpoint, measure it.

    python models/mobilenetv3_fp32.py --data PATH

Every quantized MobileNetV3-Small starts here. The last layer and whatever the starting weights lack
learn at head_lr, the others at backbone_lr. The epoch with the best validation accuracy is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Augmentation, Fp32, SmallImages, Training

RUN = Run(model="mobilenetv3", method="fp32", dtype="fp32")
RECIPE = Fp32(
    pretrained=Training(
        epochs=10, batch_size=32, patience=6,
        backbone_lr=2e-4, head_lr=1e-3, warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        augment=Augmentation(crop=0.7, degrees=15), amp=False,  # BF16 is slower in depthwise layers
        bn_momentum=0.1,  # torchvision's 0.01 would need thousands of steps to adapt
    ),
    scratch=Training(
        epochs=10, batch_size=32, patience=0,  # never stop early: the first epochs are near chance
        backbone_lr=2e-3, head_lr=2e-3, warmup_epochs=1,
        weight_decay=0.01, label_smoothing=0.05, clip_norm=1.0,
        silent_branches=True, small=SmallImages(epochs=5, size=160),
        augment=Augmentation(crop=0.8, degrees=10), bn_momentum=0.1, amp=False,
    ),
)  # fmt: skip


def main(options):
    from utils import data, engines, measure, training

    images = data.load_images(options)
    recipe = RECIPE.starting_from(options.init)
    start = training.initialize(RUN.model, options.init, options.seed, options.init_partial)
    fp32 = training.train(RUN, start, images, recipe, options)
    experiment = Experiment(RUN, options, images, fp32)
    for backend, _ in engines.select(experiment, recipe):
        measure.run(experiment, recipe, backend.deploy_fp32(fp32))


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
