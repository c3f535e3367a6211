"""MobileNetV3-Small, FP16 by quantization-aware training: fine-tune, convert, measure.

    python quantization/qat/mobilenetv3_qat_fp16.py --data PATH --backend all

The FP32 checkpoint is fine-tuned with weights, biases, and what layers read and write rounded to
FP16; sums stay in FP32, so any processor can train it. `half` then runs everything in FP16 (the
dissertation's "direct"); `amp` runs the FP32 weights under autocast.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import backends, cli, experiments, measure, training
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="qat", dtype="fp16")
RECIPE = dict(
    training=dict(
        epochs=1, batch_size=32, keep="last", patience=0,  # no early stopping: all runs train alike
        backbone_lr=3e-4, head_lr=3e-4, warmup_epochs=0.1,  # in the units of utils/quantize/qat.py
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # match the FP32 network, not the labels: adapt to the rounding only
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        amp=False,
    ),
    calibration_images=256,  # these say how widely outputs spread, the unit in which biases learn
)  # fmt: skip


def main(options):
    experiment = experiments.begin(RUN, options)
    model = experiment.baseline.model
    calibration = experiment.data.train.calibration(RECIPE["calibration_images"])
    for backend in backends.select(options):
        prepared = backend.prepare(model, calibration, RECIPE)
        trained = training.finetune(experiment, backend, prepared, RECIPE)
        deployed = backend.convert(trained, model, calibration, RECIPE)
        measure.run(experiment, RECIPE, deployed, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
