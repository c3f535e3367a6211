"""AlexNet, FP16 by post-training quantization: convert, measure.

    python quantization/ptq/alexnet_ptq_fp16.py --data PATH --backend all

Every backend starts from the FP32 checkpoint. `half` stores and computes everything in FP16; `amp`
keeps FP32 weights and leaves the choice to autocast. The outputs of all layers are checked for
overflow (beyond 65,504) on all test images. A CPU without FP16 arithmetic emulates it, many times
slower than FP32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Fp16

RUN = Run(model="alexnet", method="ptq", dtype="fp16")
RECIPE = Fp16()


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
