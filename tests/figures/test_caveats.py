"""`utils.caveats`: one definition for the terminal, the tables and the report."""

import pandas as pd
import pytest

from figures.shared import cells
from utils import caveats

ROW = dict(
    study="pets", tier="quick", method="ptq", backend="fbgemm", simulated=False, latency_ms_p50=5.0,
    contended=False, native_fp16=None, isa="avx2 avx512f", cpu="a", n_test=2000, accuracy=0.96,
    accuracy_difference=-0.01, margin=0.005, tn=960, fp=40, fn=40, tp=960,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(), []),
        (dict(study="pets_smoke"), ["smoke"]),
        (dict(study="pets_smoke_1a2b3c4d"), ["smoke"]),  # an earlier smoke run has other images
        (dict(tier="smoke"), ["smoke"]),
        (dict(study="no_smoke_without_fire"), []),
        (dict(tier="brief", contended=True), ["brief", "contended"]),
        (dict(simulated=True, latency_ms_p50=None, tier=None), ["simulated"]),
        (dict(latency_ms_p50=None), ["timed otherwise"]),
        (dict(contended=True, native_fp16=False), ["contended", "FP16 emulated"]),
        (dict(contended=None, native_fp16=True), []),
        (dict(backend="qnnpack"), ["qnnpack off ARM"]),
        (dict(backend="qnnpack", isa=["asimd"]), []),
        (dict(backend="qnnpack", isa=None), []),
        (dict(processor="a", fp32_processor="b"), ["other processor"]),
        (dict(processor="a", fp32_processor="a"), []),
        (dict(processor="a", fp32_processor=None), []),
        (dict(n_test=400, tn=200, fp=0, fn=0, tp=200), ["too few images"]),
        (dict(n_test=401, tn=200, fp=0, fn=0, tp=201), []),
        (dict(n_test=200, margin=None, tn=100, fp=0, fn=0, tp=100), []),
        (dict(accuracy=0.5, accuracy_difference=None), ["FP32 at chance"]),
        (dict(accuracy=0.5, accuracy_difference=-0.4), []),  # FP32 has 90 %
        (  # 90 % are negative
            dict(accuracy=0.91, accuracy_difference=0.0, tn=1800, fp=0, fn=180, tp=20),
            ["FP32 at chance"],
        ),
        (dict(accuracy=0.5, tn=None), []),  # a network before conversion
    ],
)
def test_the_caveats_of_a_row(changes, words):
    assert caveats.of(ROW | changes) == words


def test_every_caveat_is_explained_once_and_in_order():
    said = caveats.explained(["too few images", "contended", "contended", ""], 0.005)
    too_few = caveats.MEANING["too few images"].format(fewest=401)
    assert said == [caveats.MEANING["contended"], too_few]
    assert set(caveats.ACCURACY) < set(caveats.MEANING)


def test_missing_values_of_pandas_become_none():
    row = dict(a=float("nan"), b=pd.NA, c=0, d="", e=False, f=None)
    assert cells.plain(row) == dict(a=None, b=None, c=0, d="", e=False, f=None)
