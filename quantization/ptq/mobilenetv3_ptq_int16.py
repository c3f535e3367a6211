"""MobileNetV3-Small, INT16 by post-training quantization: calibrate, simulate, measure.

    python quantization/ptq/mobilenetv3_ptq_int16.py --data PATH

The FP32 checkpoint is calibrated on training images. Weights, activations and biases then become
exactly the integers that 16-bit hardware would hold (32 bits for biases), carried in FP32. The file
stores the integers. A simulation says nothing about speed, so none is measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import backends, cli, experiments, measure
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="ptq", dtype="int16")
RECIPE = dict(
    bits=16,
    activations="minmax",  # or "percentile", "mse"; with 65,536 levels there is no need to clip
    headroom=4.0,  # 2 of the 16 bits, so that values beyond the calibrated range do not clip
    calibration_images=256,
    bias_correction=True,  # for ONNX Runtime, whose weights have 8 bits: 23.4 instead of 19.0 dB (validation)
)


def main(options):
    experiment = experiments.begin(RUN, options)
    calibration = experiment.data.train.calibration(RECIPE["calibration_images"])
    for backend in backends.select(options):
        deployed = backend.quantize(experiment.baseline.model, calibration, RECIPE)
        measure.run(experiment, RECIPE, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
