"""ResNet-18, FP16 by quantization-aware training: fine-tune the FP32 checkpoint in mixed precision, convert, measure.

    python quantization/qat/resnet18_qat_fp16.py --data PATH --backend all

On CUDA autocast trains in FP16 with loss scaling; on a CPU in BF16, its 16-bit format for training (results.csv says which under
training_dtype). Deployed are `half`, all of it in FP16 (the dissertation's "direct"), and `amp`, FP32 weights run by autocast.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli

RUN = cli.Run(model="resnet18", method="qat", dtype="fp16")
RECIPE = dict(
    training=dict(
        epochs=2, batch_size=32, keep="last", patience=0,  # no early stop: the schedule is the point
        backbone_lr=1e-5, head_lr=1e-5, schedule="cosine", warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.0, clip_norm=1.0,
        distill=True,  # learn the answers of the FP32 network, not the labels: nothing but living with the rounding
        dropout=False,  # as the teacher answers
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1, freeze_bn=1, freeze_observers=0,  # from which epoch on, counted from 0
        amp="always",
    ),
)  # fmt: skip


def main(args):
    from utils import backends, checkpoints, data, measure, train  # torch: after --help has answered

    images = data.load(args)
    baseline = checkpoints.load(RUN, images, args)
    for backend in backends.select(args):
        prepared = backend.prepare(baseline.model, None, RECIPE)
        trained = train.finetune(RUN, backend, prepared, baseline, images, RECIPE, args)
        deployed = backend.convert(trained, baseline.model, None, RECIPE)
        measure.run(RUN, RECIPE, deployed, images, baseline, args, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
