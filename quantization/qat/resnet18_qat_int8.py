"""ResNet-18, INT8 by quantization-aware training: fine-tune the FP32 checkpoint with INT8 rounding, convert, measure.

    python quantization/qat/resnet18_qat_int8.py --data PATH --backend fbgemm
    python quantization/qat/resnet18_qat_int8.py --data PATH --backend native

Every convolution and the linear layer are quantized. Engines that round alike share one training. `native` is the
control: the same schedule, data order and seed without any rounding, so that what QAT gains is not just more training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli

RUN = cli.Run(model="resnet18", method="qat", dtype="int8")
RECIPE = dict(
    training=dict(
        epochs=2, batch_size=32, keep="last", patience=0,  # no early stop: the schedule is the point
        backbone_lr=1e-5, head_lr=1e-5, schedule="cosine", warmup_epochs=0.5,
        weight_decay=0.01, label_smoothing=0.0, clip_norm=1.0,
        distill=True,  # learn the answers of the FP32 network, not the labels: nothing but living with the rounding
        dropout=False,  # as the teacher answers
        augment=dict(crop=0.7, degrees=15),  # smallest crop as a share of the side; rotation
        bn_momentum=0.1, freeze_bn=1, freeze_observers=0,  # from which epoch on, counted from 0
        amp=False,
    ),
    weights="per_channel_symmetric",
    activations="histogram",  # where ranges start, as PTQ would have them
    calibration_images=256,
    keep_fp32=(),
)  # fmt: skip


def main(args):
    from utils import backends, checkpoints, data, measure, train  # torch: after --help has answered

    images = data.load(args)
    baseline = checkpoints.load(RUN, images, args)
    calibration = images.train.calibration(RECIPE["calibration_images"])
    for backend in backends.select(args):
        prepared = backend.prepare(baseline.model, calibration, RECIPE)
        trained = train.finetune(RUN, backend, prepared, baseline, images, RECIPE, args)
        deployed = backend.convert(trained, baseline.model, calibration, RECIPE)
        measure.run(RUN, RECIPE, deployed, images, baseline, args, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
