"""MobileNetV3-Small, INT8 by post-training quantization: calibrate, lower, measure.

    python quantization/ptq/mobilenetv3_ptq_int8.py --data PATH --backend all

Calibration alone brings this network down to chance (published: 58 %), because of its first layers:
a channel with large outliers leaves the others almost no resolution in a tensor with one scale.
Equalization gives the channels equal ranges without changing the network. Then one block after the
other learns to answer as the FP32 block does. Every convolution and linear layer is quantized.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Int8

RUN = Run(model="mobilenetv3", method="ptq", dtype="int8")
RECIPE = Int8(
    ranges="mse",
    calibration_images=512,
    equalize=True,
    reconstruct=True,
    overflow_fix="weights",  # coarser activations would cost this network more
)


def main(options):
    from utils import data, engines, measure, quantize, training

    images = data.load_images(options)
    fp32 = training.load_fp32(RUN, images, options)
    calibration = images.train.calibration(RECIPE.calibration_images)
    experiment = Experiment(RUN, options, images, fp32)
    for backend, recipe in engines.select(experiment, RECIPE):
        config = backend.qdq_config(recipe)
        quantized = quantize.ptq(fp32.model, calibration, recipe, config)
        deployed = backend.deploy(quantized)
        measure.run(experiment, recipe, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
