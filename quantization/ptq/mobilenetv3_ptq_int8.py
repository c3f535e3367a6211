"""MobileNetV3-Small, INT8 by post-training quantization: calibrate, convert, measure.

    python quantization/ptq/mobilenetv3_ptq_int8.py --data PATH --backend all

The FP32 checkpoint is calibrated on training images. Calibration alone brings this network down to
chance (published: 58 %), because of its first layers: a channel with large outliers leaves the
others almost no resolution in an activation tensor that has one scale. Equalization gives the
channels one range, without changing the network. Then block after block learns to answer as the FP32
block does, which makes INT8 hold in every convolution and linear layer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli, experiments, measure, timing
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="ptq", dtype="int8")
RECIPE = dict(
    bits=8,
    activations="mse",
    calibration_images=512,
    equalize=True,
    bias_correction=False,  # biases learn as well
    reconstruct=True,
    seven_bits="weights",  # where products of 8 bits overflow: rounding activations costs this network more
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
