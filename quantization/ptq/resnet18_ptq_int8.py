"""ResNet-18, INT8 by post-training quantization: calibrate, convert, measure.

    python quantization/ptq/resnet18_ptq_int8.py --data PATH --backend all

The FP32 checkpoint is calibrated on training images. Every convolution and the linear layer are
quantized. Weights have one scale for each output channel. Activations have one for each tensor,
from the histogram range with the smallest squared error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli, experiments, measure, timing
from utils.catalog import Run

RUN = Run(model="resnet18", method="ptq", dtype="int8")
RECIPE = dict(
    bits=8,
    activations="mse",
    calibration_images=256,
    bias_correction=False,
    keep_fp32=(),
)


def main(options):
    experiment = experiments.begin(RUN, options)
    model = experiment.baseline.model
    calibration = experiment.data.train.calibration(RECIPE["calibration_images"])
    for backend, recipe in timing.plans(experiment, calibration, RECIPE):
        deployed = backend.quantize(model, calibration, recipe)
        measure.run(experiment, recipe, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
