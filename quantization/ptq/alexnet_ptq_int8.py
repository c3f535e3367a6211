"""AlexNet, INT8 by post-training quantization: calibrate, lower, measure.

    python quantization/ptq/alexnet_ptq_int8.py --data PATH --backend all

The FP32 checkpoint is calibrated on training images. Every convolution and linear layer is
quantized: weights with one scale per output channel, activations with one per tensor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Int8

RUN = Run(model="alexnet", method="ptq", dtype="int8")
RECIPE = Int8(ranges="mse", calibration_images=256)


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
