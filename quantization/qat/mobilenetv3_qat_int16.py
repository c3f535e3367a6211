"""MobileNetV3-Small, INT16 by quantization-aware training: fine-tune, simulate, measure.

    python quantization/qat/mobilenetv3_qat_int16.py --data PATH

Training goes on where PTQ ends, with weights and activations rounded as 16-bit hardware would hold
them; gradients pass straight through the rounding. The file stores the integers. The schedule is
that of the control (mobilenetv3_qat_int8.py --backend native), so the two can be compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import backends, cli, experiments, measure, training
from utils.catalog import Run

RUN = Run(model="mobilenetv3", method="qat", dtype="int16")
RECIPE = dict(
    training=dict(
        epochs=1, batch_size=32, keep="last", patience=0,  # no early stopping: all runs train alike
        backbone_lr=3e-4, head_lr=3e-4, warmup_epochs=0.1,  # in the units of utils/quantize/qat.py
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # match the FP32 network, not the labels: adapt to the rounding only
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        amp=False,
    ),
    bits=16,
    activations="minmax",  # or "percentile", "mse"; with 65,536 levels there is no need to clip
    headroom=4.0,  # 2 of the 16 bits, so that values beyond the calibrated range do not clip
    calibration_images=256,
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
