"""MobileNetV3-Small, FP16 by post-training quantization: round the FP32 checkpoint to half precision, measure.

    python quantization/ptq/mobilenetv3_ptq_fp16.py --data PATH --backend all

`half` stores and computes everything in FP16; `amp` keeps FP32 weights and lets autocast choose. Every layer's output is checked
for overflow (beyond 65,504) on all test images. A CPU without FP16 arithmetic emulates it, many times slower than FP32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli

RUN = cli.Run(model="mobilenetv3", method="ptq", dtype="fp16")
RECIPE = dict()  # rounding to the nearest FP16 number leaves nothing to choose


def main(args):
    from utils import backends, checkpoints, data, measure  # torch: after --help has answered

    images = data.load(args)
    baseline = checkpoints.load(RUN, images, args)
    for backend in backends.select(args):
        deployed = backend.quantize(baseline.model, None, RECIPE)
        measure.run(RUN, RECIPE, deployed, images, baseline, args)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
