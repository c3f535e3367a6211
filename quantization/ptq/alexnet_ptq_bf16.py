"""AlexNet, BF16 by post-training quantization: convert to bfloat16, measure.

    python quantization/ptq/alexnet_ptq_bf16.py --data PATH --backend all

All backends start from the FP32 checkpoint. `bfloat16` stores and computes everything in BF16;
`amp_bf16` keeps FP32 weights and lets autocast choose; `openvino_bf16` is OpenVINO. They run only on
a CPU with BF16 arithmetic.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import backends, cli, experiments, measure
from utils.catalog import Run

RUN = Run(model="alexnet", method="ptq", dtype="bf16")
RECIPE = dict()  # rounding to the nearest BF16 number has no settings


def main(options):
    experiment = experiments.begin(RUN, options)
    for backend in backends.select(options):
        deployed = backend.quantize(experiment.baseline.model, None, RECIPE)
        measure.run(experiment, RECIPE, deployed)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
