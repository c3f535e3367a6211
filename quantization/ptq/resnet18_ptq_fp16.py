"""ResNet-18, FP16 by post-training quantization: convert to half precision, measure.

    python quantization/ptq/resnet18_ptq_fp16.py --data PATH --backend all

Both backends start from the FP32 checkpoint. `half` stores and computes everything in FP16; `amp`
keeps FP32 weights and lets autocast choose. Every layer's output is checked for overflow (beyond
65,504) on all test images. A CPU without FP16 arithmetic emulates it, many times slower than FP32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import backends, cli, experiments, measure
from utils.catalog import Run

RUN = Run(model="resnet18", method="ptq", dtype="fp16")
RECIPE = dict()  # rounding to the nearest FP16 number has no settings


def main(options):
    experiment = experiments.begin(RUN, options)
    for backend in backends.select(options):
        deployed = backend.quantize(experiment.baseline.model, None, RECIPE)
        measure.run(experiment, RECIPE, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
