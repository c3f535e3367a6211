"""AlexNet, INT8 by post-training quantization: calibrate the FP32 checkpoint on training images, convert, measure.

    python quantization/ptq/alexnet_ptq_int8.py --data PATH --backend all

Every convolution and linear layer is quantized.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli

RUN = cli.Run(model="alexnet", method="ptq", dtype="int8")
RECIPE = dict(
    weights="per_channel_symmetric",
    activations="histogram",
    calibration_images=256,
    bias_correction=False,
    keep_fp32=(),
)


def main(args):
    from utils import backends, checkpoints, data, measure, sensitivity  # torch: after --help has answered

    images = data.load(args)
    baseline = checkpoints.load(RUN, images, args)
    calibration = images.train.calibration(RECIPE["calibration_images"])
    for backend in backends.select(args):
        recipe = sensitivity.resolve(backend, baseline.model, calibration, images.validation, RECIPE)
        deployed = backend.quantize(baseline.model, calibration, recipe)
        measure.run(RUN, recipe, deployed, images, baseline, args)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
