"""MobileNetV3-Small, INT8 by quantization-aware training: fine-tune, convert, measure.

    python quantization/qat/mobilenetv3_qat_int8.py --data PATH --backend fbgemm
    python quantization/qat/mobilenetv3_qat_int8.py --data PATH --backend native

Training goes on where PTQ ends, with the INT8 rounding in the forward pass: weights, biases and the
ranges of activations learn to give the logits of the FP32 network. Every convolution and linear layer is quantized.
Backends that round alike share one training. `native` is the control: the same schedule, data order
and seed without rounding. It separates the effect of QAT from that of more training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli, experiments, measure, timing, training
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="qat", dtype="int8")
RECIPE = dict(
    training=dict(
        epochs=1, batch_size=32, keep="last", patience=0,  # no early stopping: all runs train alike
        backbone_lr=3e-4, head_lr=3e-4, warmup_epochs=0.1,  # in the units of utils/quantize/qat.py
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # match the FP32 network, not the labels: adapt to the rounding only
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        amp=False,  # depthwise convolutions are slower in BF16 than in FP32
    ),
    bits=8,
    activations="mse",  # the starting ranges are those of PTQ
    calibration_images=512,
    equalize=True,
    bias_correction=False,  # biases learn as well
    reconstruct=True,
    seven_bits="weights",  # where products of 8 bits overflow: rounding activations costs this network more
    keep_fp32=(),
)  # fmt: skip


def main(options):
    experiment = experiments.begin(RUN, options)
    model = experiment.baseline.model
    calibration = experiment.data.train.calibration(RECIPE["calibration_images"])
    for backend, recipe in timing.plans(experiment, calibration, RECIPE):
        prepared = backend.prepare(model, calibration, recipe)
        trained = training.finetune(experiment, backend, prepared, recipe)
        deployed = backend.convert(trained, model, calibration, recipe)
        measure.run(experiment, recipe, deployed, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
