"""ResNet-18, FP16 by quantization-aware training: fine-tune, convert, measure.

    python quantization/qat/resnet18_qat_fp16.py --data PATH --backend all

The FP32 checkpoint is fine-tuned with weights, biases, and the inputs and outputs of layers rounded
to FP16. Sums stay in FP32, so any processor can train it. `half` then runs everything in FP16 (the
dissertation's "direct"); `amp` runs the FP32 weights under autocast.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Augmentation, FineTuning, Fp16QAT

RUN = Run(model="resnet18", method="qat", dtype="fp16")
RECIPE = Fp16QAT(
    training=FineTuning(
        epochs=1, batch_size=32, keep="last", patience=0,
        backbone_lr=1e-3, head_lr=1e-3, warmup_epochs=0.1,
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # learn only to compensate for rounding
        augment=Augmentation(crop=0.7, degrees=15),
        amp=False,  # BF16 rounds more coarsely than FP16
    ),
    calibration_images=256,  # they give the spread of outputs, the unit of biases
)  # fmt: skip


def main(options):
    from utils import data, engines, measure, training

    images = data.load_images(options)
    fp32 = training.load_fp32(RUN, images, options)
    calibration = images.train.calibration(RECIPE.calibration_images)
    experiment = Experiment(RUN, options, images, fp32)
    for backend, recipe in engines.select(experiment, RECIPE):
        network = backend.prepare(fp32.model, calibration, recipe)
        trained = training.finetune(experiment, backend, network, recipe)
        deployed = backend.convert(trained.model, fp32.model, recipe)
        measure.run(experiment, recipe, deployed, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
