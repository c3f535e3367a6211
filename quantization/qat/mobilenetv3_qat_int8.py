"""MobileNetV3-Small, INT8 by quantization-aware training: fine-tune, convert, measure.

    python quantization/qat/mobilenetv3_qat_int8.py --data PATH --backend fbgemm
    python quantization/qat/mobilenetv3_qat_int8.py --data PATH --backend native

Training starts where PTQ ends, with INT8 rounding in the forward pass. Weights, biases and ranges
learn to give the logits of the FP32 network. Backends that round alike share one training.
`native` is the control: the same schedule without rounding, to tell QAT from more training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Augmentation, FineTuning, Int8QAT

RUN = Run(model="mobilenetv3", method="qat", dtype="int8")
RECIPE = Int8QAT(
    training=FineTuning(
        epochs=1, batch_size=32, keep="last", patience=0,
        backbone_lr=3e-4, head_lr=3e-4, warmup_epochs=0.1,
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # learn only to compensate for rounding
        augment=Augmentation(crop=0.7, degrees=15),
        amp=False,  # depthwise convolutions are slower in BF16 than in FP32
    ),
    ranges="mse", calibration_images=512, equalize=True, reconstruct=True,
    overflow_fix="weights",  # coarser activations would cost this network more
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
