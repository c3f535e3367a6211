"""MobileNetV3-Small, INT16 by post-training quantization, simulated: calibrate the FP32 checkpoint, round to integers, measure.

    python quantization/ptq/mobilenetv3_ptq_int16.py --data PATH

Weights, activations and biases become exactly the integers that 16-bit hardware would hold (32 bits for biases), carried in FP32.
The file stores the integers; no speed is claimed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli

RUN = cli.Run(model="mobilenetv3", method="ptq", dtype="int16")
RECIPE = dict(
    activations="minmax",  # or percentile, mse, entropy: with 65,536 values there is no need to clip
    headroom=4.0,  # two of the 16 bits, against clipping what calibration did not see
    calibration_images=256,
)


def main(args):
    from utils import backends, checkpoints, data, measure  # torch: after --help has answered

    images = data.load(args)
    baseline = checkpoints.load(RUN, images, args)
    calibration = images.train.calibration(RECIPE["calibration_images"])
    for backend in backends.select(args):
        deployed = backend.quantize(baseline.model, calibration, RECIPE)
        measure.run(RUN, RECIPE, deployed, images, baseline, args)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
