"""MobileNetV3-Small, FP16 by quantization-aware training: fine-tune, convert, measure.

    python quantization/qat/mobilenetv3_qat_fp16.py --data PATH --backend all

The FP32 checkpoint is fine-tuned in mixed precision: on CUDA in FP16 with loss scaling, on a CPU in
BF16 (the column training_dtype of results.csv says which). `half` then runs everything in FP16 (the
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
        epochs=3, batch_size=32, keep="last", patience=0,  # no early stopping: all runs train alike
        backbone_lr=5e-5, head_lr=5e-5, warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.0, clip_norm=1.0,
        distill=True,  # match the FP32 network, not the labels: adapt to the rounding only
        dropout=False,  # as in the teacher
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1, freeze_bn=1,  # epoch, from 0, at which its statistics freeze
        amp="always",
    ),
)  # fmt: skip


def main(options):
    experiment = experiments.begin(RUN, options)
    model = experiment.baseline.model
    for backend in backends.select(options):
        prepared = backend.prepare(model, None, RECIPE)
        trained = training.finetune(experiment, backend, prepared, RECIPE)
        deployed = backend.convert(trained, model, None, RECIPE)
        measure.run(experiment, RECIPE, deployed, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
