"""AlexNet, INT16 by quantization-aware training: fine-tune, simulate, measure.

    python quantization/qat/alexnet_qat_int16.py --data PATH

Training starts where PTQ ends, with weights and activations rounded as 16-bit hardware would hold
them. Gradients pass straight through the rounding. The file stores the integers. The control
(alexnet_qat_int8.py --backend native) has the same schedule, so the two can be compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import cli
from utils.catalog import Run
from utils.experiment import Experiment
from utils.recipes import Augmentation, FineTuning, Int16QAT

RUN = Run(model="alexnet", method="qat", dtype="int16")
RECIPE = Int16QAT(
    training=FineTuning(
        epochs=1, batch_size=32, keep="last", patience=0,
        backbone_lr=1e-3, head_lr=1e-3, warmup_epochs=0.1,
        weight_decay=0.0, clip_norm=1.0,
        distill=True,  # learn only to compensate for rounding
        augment=Augmentation(crop=0.7, degrees=15),
        amp=False,  # BF16 rounds more coarsely than INT16
    ),
    ranges="minmax",  # 65,536 integers leave no need to clip
    headroom=4.0,  # 2 of the 16 bits, for values beyond the calibrated range
    calibration_images=256,
)  # fmt: skip


def main(options):
    from utils import data, engines, measure, training

    images = data.load_images(options)
    fp32 = training.load_fp32(RUN, images, options)
    calibration = images.train.calibration(RECIPE.calibration_images)
    experiment = Experiment(RUN, options, images, fp32)
    for backend, recipe in engines.select(experiment, RECIPE):
        network = backend.prepare(fp32.model, calibration, recipe)
        trained = training.finetune(experiment, backend, network, recipe)
        deployed = backend.convert(trained.model, fp32.model, recipe)
        measure.run(experiment, recipe, deployed, trained)


if __name__ == "__main__":
    cli.run(main, __doc__, RUN)
