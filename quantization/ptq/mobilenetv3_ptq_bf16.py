"""MobileNetV3-Small, BF16 by post-training quantization: convert, measure.

    python quantization/ptq/mobilenetv3_ptq_bf16.py --data PATH --backend all

Every backend starts from the FP32 checkpoint. `bfloat16` stores and computes everything in BF16.
`amp_bf16` keeps FP32 weights and leaves the choice to autocast. `openvino_bf16` is OpenVINO. All of
them need a CPU with BF16 arithmetic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Bf16

RUN = Run(model="mobilenetv3", method="ptq", dtype="bf16")
RECIPE = Bf16()


def main(options):
    from utils import data, engines, measure, training

    images = data.load_images(options)
    fp32 = training.load_fp32(RUN, images, options)
    experiment = Experiment(RUN, options, images, fp32)
    for backend, recipe in engines.select(experiment, RECIPE):
        deployed = backend.deploy_half(fp32.model)
        measure.run(experiment, recipe, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
