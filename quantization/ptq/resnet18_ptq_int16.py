"""ResNet-18, INT16 by post-training quantization: calibrate, simulate, measure.

    python quantization/ptq/resnet18_ptq_int16.py --data PATH

The FP32 checkpoint is calibrated on training images. Weights, activations and biases become the
integers that 16-bit hardware would hold (32 bits for biases), carried in FP32. The file stores the
integers. The accuracy of a simulation is valid, its speed is not, so none is measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Int16

RUN = Run(model="resnet18", method="ptq", dtype="int16")
RECIPE = Int16(
    ranges="minmax",  # 65,536 integers leave no need to clip
    headroom=4.0,  # 2 of the 16 bits, for values beyond the calibrated range
    calibration_images=256,
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
