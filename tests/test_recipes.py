"""Recipes: the mistakes that they refuse, their messages, and their descriptions."""

import copy
import dataclasses
import importlib
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils import recipes
from utils.errors import UserError
from utils.recipes import (
    Augmentation,
    Bf16,
    Budget,
    FineTuning,
    Fp16,
    Fp16QAT,
    Fp32,
    Int8,
    Int8QAT,
    Int16,
    Int16QAT,
    Recipe,
    RecipeError,
    Schedule,
    SmallImages,
    Training,
)

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("alexnet", "resnet18", "mobilenetv3")

# ---- legal and illegal values of every field

AUGMENTATION = Augmentation(crop=0.7, degrees=15)
SCHEDULE = dict(
    epochs=2, batch_size=32, backbone_lr=1e-3, head_lr=1e-2, warmup_epochs=0.5, weight_decay=0.01,
    clip_norm=1.0, augment=AUGMENTATION, amp=False, patience=0,
)  # fmt: skip
TRAINING = Training(**SCHEDULE, bn_momentum=0.1)
FINE_TUNING = FineTuning(**SCHEDULE, distill=False)
INTEGERS = dict(ranges="minmax", calibration_images=16)
EXAMPLES = {
    Augmentation: AUGMENTATION,
    SmallImages: SmallImages(epochs=1, size=128),
    Schedule: Schedule(**SCHEDULE),
    Training: TRAINING,
    FineTuning: FINE_TUNING,
    Fp32: Fp32(pretrained=TRAINING, scratch=TRAINING),
    Fp16: Fp16(),
    Bf16: Bf16(),
    Fp16QAT: Fp16QAT(training=FINE_TUNING, calibration_images=16),
    Budget: Budget(accuracy_drop=0.01, sqnr_db=20.0),
    Int8: Int8(**INTEGERS),
    Int16: Int16(**INTEGERS),
    Int8QAT: Int8QAT(**INTEGERS, training=FINE_TUNING),
    Int16QAT: Int16QAT(**INTEGERS, training=FINE_TUNING),
}
ALTERNATIVES = {  # legal, and different from the values of EXAMPLES; () where there is none
    "accuracy_drop": (None, -1, 0.0, 1),
    "activation_scales": ("tensor",),
    "adaround": (True,),
    "amp": (True,),
    "augment": (None, Augmentation(crop=0.7, degrees=0)),
    "backbone_lr": (0, 0.5),
    "batch_size": (1, 33),
    "bias_correction": (True,),
    "bits": (),
    "bn_momentum": (0, 0.2, 1),
    "budget": (Budget(sqnr_db=10),),
    "calibration_images": (1, 512),
    "clip_norm": (0, 2.5),
    "crop": (0.05, 1),
    "degrees": (0, 180),
    "distill": (True,),
    "engines": ({"threads": 1},),
    "epochs": (3, 100),
    "equalize": (True,),
    "formats": ("auto",),
    "head_lr": (0, 0.5),
    "headroom": (1.5, 4),
    "keep": ("last",),
    "keep_fp32": (("features.0",), ("a", "b")),
    "label_smoothing": (0.1, 1),
    "overflow_fix": ("none", "weights"),
    "patience": (1, 10),
    "portable": (True,),
    "pretrained": (TRAINING.replace(epochs=9),),
    "ranges": ("percentile", "mse"),
    "reconstruct": (True,),
    "scratch": (TRAINING.replace(epochs=9),),
    "silent_branches": (True,),
    "size": (32, 224),
    "small": (SmallImages(epochs=1, size=64),),
    "sqnr_db": (None, -10.0, 60),
    "training": (FINE_TUNING.replace(epochs=9),),
    "trials": ({"threads": 1},),
    "warmup_epochs": (0, 1),
    "weight_decay": (0, 0.5),
    "weight_scales": ("tensor",),
}
# A wrong type first, then values out of range.
NO_NUMBER, NO_FLAG = ("0.1", True, math.nan, math.inf), (1, "yes", None)
ILLEGAL = {
    "accuracy_drop": (*NO_NUMBER, -1.1, 1.1),
    "adaround": NO_FLAG,
    "amp": NO_FLAG,
    "augment": ({"crop": 0.7, "degrees": 15}, True),
    "backbone_lr": (*NO_NUMBER, -1e-3),
    "batch_size": (32.0, True, 0, -1),
    "bias_correction": NO_FLAG,
    "bits": ("8", 8.0, 16.0, True, 4, 32),
    "bn_momentum": (*NO_NUMBER, -0.1, 1.1),
    "budget": ({"accuracy_drop": 0.003}, None),
    "calibration_images": (16.0, True, None, 0),
    "clip_norm": (*NO_NUMBER, -1.0),
    "crop": (*NO_NUMBER, 0, 1.1),
    "degrees": (*NO_NUMBER, -1, 181),
    "distill": NO_FLAG,
    "engines": ([], "all"),
    "epochs": (1.0, True, 0, -1),
    "equalize": NO_FLAG,
    "formats": (True, None, "int8"),
    "head_lr": (*NO_NUMBER, -1e-3),
    "headroom": (*NO_NUMBER, 0.99),
    "keep": (True, "first"),
    "keep_fp32": (["features.0"], "features.0", ("features.0", 1), None),
    "label_smoothing": (*NO_NUMBER, -0.1, 1.1),
    "overflow_fix": (True, None, "both"),
    "patience": (3.0, False, -1),
    "portable": NO_FLAG,
    "pretrained": ({"epochs": 1}, None, FINE_TUNING),
    "ranges": (None, 1, "median"),
    "reconstruct": NO_FLAG,
    "scratch": ({"epochs": 1}, None, FINE_TUNING),
    "silent_branches": NO_FLAG,
    "size": (64.0, True, 31),
    "small": ((1, 128), False),
    "sqnr_db": NO_NUMBER,
    "training": ({"epochs": 1}, None, TRAINING),
    "trials": ([], "all"),
    "warmup_epochs": (*NO_NUMBER, -1),
    "weight_decay": (*NO_NUMBER, -0.01),
    "weight_scales": (True, "row"),
    "activation_scales": (True, "channel"),
}


def fields(kind: type[Recipe]) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}


def named(kind: type[Recipe], value: object = None) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


FIELDS = [(kind, name) for kind in EXAMPLES for name in fields(kind)]
WRONG = [(kind, name, value) for kind, name in FIELDS for value in ILLEGAL[name]]


def refused(match: str):
    """Expect a `RecipeError` of one line."""
    return pytest.raises(RecipeError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def test_every_recipe_and_every_field_is_tried():
    public = {
        kind
        for name, kind in inspect.getmembers(recipes, inspect.isclass)
        if issubclass(kind, Recipe) and kind is not Recipe and not name.startswith("_")
    }
    assert set(EXAMPLES) == public
    assert set(ILLEGAL) == set(ALTERNATIVES) == {name for _, name in FIELDS}


@pytest.mark.parametrize(("kind", "name", "value"), WRONG, ids=str)
def test_an_illegal_value_is_an_error_that_names_the_field_and_its_values(kind, name, value):
    given = vars(EXAMPLES[kind]) | {name: value}
    rule = fields(kind)[name].metadata["rule"]
    with refused(re.escape(f"{kind.__name__}: {name}={value!r}: give {rule.words}.")):
        kind(**given)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=str)
def test_a_legal_value_is_kept(kind, name):
    for value in ALTERNATIVES[name]:
        if (kind, name) == (Int8QAT, "adaround"):
            continue  # a conflict, see below
        recipe = EXAMPLES[kind].replace(**{name: value})
        assert getattr(recipe, name) is value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ranges", "'minmax', 'percentile' or 'mse'"),
        ("calibration_images", "a whole number from 1"),
        ("headroom", "a number from 1"),
        ("reconstruct", "True or False"),
        ("keep_fp32", "a tuple of module names, such as ('features.0',)"),
        ("bits", "8"),
        ("budget", "Budget(...)"),
        ("trials", "dict(...), or None"),
    ],
)
def test_the_legal_values_are_said_in_words(name, words):
    assert fields(Int8)[name].metadata["rule"].words == words


# ---- fields that are misspelt, missing or not named


@pytest.mark.parametrize("kind", EXAMPLES, ids=named)
def test_a_misspelt_field_is_an_error_that_lists_the_fields(kind):
    known = ", ".join(fields(kind)) or "none"
    with refused(re.escape(f"{kind.__name__} has no field 'zzz' (fields: {known})")):
        kind(**vars(EXAMPLES[kind]), zzz=1)
    for name in fields(kind):
        misspelt = f"{name}x"
        hint = f"{kind.__name__} has no field {misspelt!r}; did you mean {name!r}?"
        with refused(re.escape(hint)):
            kind(**vars(EXAMPLES[kind]), **{misspelt: True})


def test_fields_of_other_formats_are_unknown_to_16_bits():
    for name in ("equalize", "adaround", "reconstruct", "portable", "overflow_fix", "formats"):
        with refused(f"Int16 has no field '{name}'"):
            Int16(**INTEGERS, **{name: False})


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=str)
def test_a_field_without_default_must_be_given(kind, name):
    given = {key: value for key, value in vars(EXAMPLES[kind]).items() if key != name}
    field = fields(kind)[name]
    if field.default is dataclasses.MISSING:
        words = field.metadata["rule"].words
        with refused(re.escape(f"{kind.__name__} needs {name}: give {words}.")):
            kind(**given)
    else:
        assert getattr(kind(**given), name) == field.default


@pytest.mark.parametrize("kind", EXAMPLES, ids=named)
def test_a_value_without_its_field_is_an_error(kind):
    first = next(iter(fields(kind)), None)
    example = f"such as {first}=..." if first else "but it has none"
    with refused(re.escape(f"{kind.__name__}: name each field, {example}")):
        kind(1)
    with refused(re.escape(f"{kind.__name__}: name each field")):
        kind(1, **vars(EXAMPLES[kind]))


# ---- conflicts

CONFLICTS = [
    (Schedule, dict(keep="last", patience=3), "patience=3 with keep='last'"),
    (Training, dict(keep="last", patience=1), "patience=1 with keep='last'"),
    (FineTuning, dict(keep="last", patience=1), "patience=1 with keep='last'"),
    (
        FineTuning,
        dict(distill=True, label_smoothing=0.1),
        "label_smoothing=0.1 with distill=True",
    ),
    (Budget, dict(accuracy_drop=None, sqnr_db=None), "accuracy_drop=None with sqnr_db=None"),
    *(
        (kind, changes, words)
        for kind in (Int8, Int8QAT)
        for changes, words in [
            (dict(reconstruct=True, adaround=True), "adaround=True with reconstruct=True"),
            (
                dict(reconstruct=True, bias_correction=True),
                "bias_correction=True with reconstruct=True",
            ),
            (dict(formats="auto", keep_fp32=("a",)), "keep_fp32=('a',) with formats='auto'"),
            (dict(portable=True, overflow_fix="none"), "portable=True with overflow_fix='none'"),
        ]
    ),
    (Int8QAT, dict(adaround=True), "adaround=True with training=FineTuning(epochs=2"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), CONFLICTS, ids=named)
def test_values_of_which_one_would_be_ignored_are_an_error(kind, changes, words):
    with refused(re.escape(f"{kind.__name__}: {words}")) as caught:
        kind(**vars(EXAMPLES[kind]) | changes)
    assert str(caught.value).endswith(".")
    for name in changes:
        if (kind, name) in ((Int8QAT, "reconstruct"), (Int8QAT, "adaround")):
            continue  # AdaRound and QAT never go together
        others = changes | {name: getattr(EXAMPLES[kind], name)}
        assert EXAMPLES[kind].replace(**others).conflicts() == []


# ---- descriptions


@pytest.mark.parametrize("kind", EXAMPLES, ids=named)
def test_a_description_has_all_fields_and_fits_into_json(kind):
    described = EXAMPLES[kind].describe()
    assert list(described) == list(fields(kind))
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_descriptions_reach_into_recipes_and_tuples():
    recipe = Int8QAT(**INTEGERS, training=FINE_TUNING, keep_fp32=("a", "b"))
    described = recipe.describe()
    assert described["keep_fp32"] == ["a", "b"]
    assert described["training"]["augment"] == {"crop": 0.7, "degrees": 15}
    assert described["budget"] == {"accuracy_drop": 0.003, "sqnr_db": None}


@pytest.mark.parametrize("kind", EXAMPLES, ids=named)
def test_what_decides_a_training_is_all_but_the_fields_that_matter_later(kind):
    recipe = EXAMPLES[kind]
    later = {name for name, field in fields(kind).items() if not field.metadata["trains"]}
    assert later == ({"formats", "budget", "trials", "engines"} & set(fields(kind)))
    assert set(recipe.decisive()) == set(fields(kind)) - later
    for name in fields(kind):
        for value in ALTERNATIVES[name]:
            if (kind, name) == (Int8QAT, "adaround"):
                continue
            changed = recipe.replace(**{name: value})
            assert changed.describe() != recipe.describe()
            assert (changed.decisive() == recipe.decisive()) == (name in later), name


def test_a_changed_copy_is_checked_as_well():
    recipe = EXAMPLES[Int8]
    assert recipe.replace(ranges="mse") == Int8(ranges="mse", calibration_images=16)
    assert recipe.ranges == "minmax"
    with refused("Int8: ranges='median': give"):
        recipe.replace(ranges="median")
    with refused("Int8 has no field 'equalise'; did you mean 'equalize'"):
        recipe.replace(equalise=True)
    with refused("adaround=True with reconstruct=True"):
        recipe.replace(adaround=True, reconstruct=True)


@pytest.mark.parametrize("kind", EXAMPLES, ids=named)
def test_recipes_do_not_change_but_can_be_copied(kind):
    recipe = EXAMPLES[kind]
    for name in fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(recipe, name, getattr(recipe, name))
    for other in (copy.copy(recipe), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert type(other) is kind and other == recipe


def test_an_error_is_the_users_and_ends_a_script_that_does_not_catch_it():
    with pytest.raises(RecipeError) as caught:
        Int8(ranges="mse")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, SystemExit)
    assert caught.value.code == f"error: RECIPE: {caught.value}"


# ---- the recipes of the scripts

KINDS = {
    ("fp32", "fp32"): Fp32,
    ("ptq", "int8"): Int8,
    ("ptq", "int16"): Int16,
    ("ptq", "fp16"): Fp16,
    ("ptq", "bf16"): Bf16,
    ("qat", "int8"): Int8QAT,
    ("qat", "int16"): Int16QAT,
    ("qat", "fp16"): Fp16QAT,
}


def script(model: str, method: str, dtype: str) -> str:
    """Return the path of a script, relative to the repository."""
    if method == "fp32":
        return f"models/{model}_fp32.py"
    return f"quantization/{method}/{model}_{method}_{dtype}.py"


SCRIPTS = [(model, *kind) for kind in KINDS for model in MODELS]


def recipe_of(model: str, method: str, dtype: str) -> Recipe:
    name = script(model, method, dtype).removesuffix(".py").replace("/", ".")
    return importlib.import_module(name).RECIPE


@pytest.mark.parametrize(("model", "method", "dtype"), SCRIPTS)
def test_every_script_has_the_recipe_of_its_kind(model, method, dtype):
    assert type(recipe_of(model, method, dtype)) is KINDS[method, dtype]


def test_there_are_24_scripts():
    written = [*ROOT.glob("models/*.py"), *ROOT.glob("quantization/*/*.py")]
    assert {str(path.relative_to(ROOT)) for path in written} == {script(*case) for case in SCRIPTS}
    assert len(SCRIPTS) == 24


# Bias correction is for ONNX Runtime, which has no QAT of 16 bits.
DIFFERENT = {("mobilenetv3", "int16"): {"bias_correction"}}


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("model", MODELS)
def test_qat_starts_from_the_recipe_of_ptq(model, dtype):
    ptq, qat = recipe_of(model, "ptq", dtype).describe(), recipe_of(model, "qat", dtype).describe()
    assert set(qat) - set(ptq) == {"training"} and set(ptq) < set(qat)
    different = {name for name in ptq if ptq[name] != qat[name]}
    assert different == DIFFERENT.get((model, dtype), set())


# ---- scripts with mistakes, in processes

TRAP = """
from pathlib import Path
Path(__file__).with_name("torch-was-imported").touch()
raise ImportError("the trap")
"""


@pytest.fixture
def run_changed(tmp_path):
    """Run a script after a replacement in its text, from another folder; returns the process.

    A `torch` that fails takes the place of the real one, and says so in a file.
    """
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    (tmp_path / "torch.py").write_text(TRAP)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(name: str, before: str, after: str) -> subprocess.CompletedProcess:
        text = (ROOT / name).read_text()
        assert text.count(before) == 1
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text.replace(before, after))
        environ = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, str(path), "--smoke"],
            cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert list(elsewhere.iterdir()) == []  # no work was begun
        return done

    return run


def assert_refused(done: subprocess.CompletedProcess, folder: Path, *words: str) -> None:
    """Check that a script ended with one line that has all `words`, before any work."""
    assert done.returncode not in (0, None) and done.stdout == ""
    assert re.fullmatch(r"error: RECIPE: [^\n]+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (folder / "torch-was-imported").exists()
    assert {path.name for path in folder.iterdir()} <= {
        "elsewhere", "models", "quantization", "torch.py", "utils",
    }  # fmt: skip


@pytest.mark.parametrize("case", SCRIPTS, ids="-".join)
def test_a_misspelt_field_ends_every_script_at_once(case, run_changed, tmp_path):
    kind = KINDS[case[1:]]
    call = f"RECIPE = {kind.__name__}("
    done = run_changed(script(*case), call, f"{call}equalise=True, ")
    assert_refused(
        done,
        tmp_path,
        f"{kind.__name__} has no field 'equalise'",
        *fields(kind) or ("fields: none",),
    )


MOBILENET_PTQ, MOBILENET_QAT = script("mobilenetv3", "ptq", "int8"), script(*SCRIPTS[17])
RESNET_FP32 = script("resnet18", "fp32", "fp32")
MISTAKES = [  # script, its text before and after, and what the line must say
    (MOBILENET_PTQ, "equalize=True", "equalise=True", ("'equalise'", "did you mean 'equalize'?")),
    (MOBILENET_PTQ, 'ranges="mse"', 'ranges="median"', ("ranges='median'", "'percentile'")),
    (MOBILENET_PTQ, "=512", "=0", ("calibration_images=0", "a whole number from 1")),
    (MOBILENET_PTQ, '"weights"', '"both"', ("overflow_fix='both'", "'none', 'activations'")),
    (
        MOBILENET_PTQ,
        "reconstruct=True",
        "reconstruct=True, adaround=True",
        ("adaround=True with reconstruct=True",),
    ),
    (
        MOBILENET_PTQ,
        "reconstruct=True",
        "reconstruct=True, bias_correction=True",
        ("bias_correction=True with reconstruct=True",),
    ),
    (MOBILENET_QAT, "distill=True", "destill=True", ("FineTuning", "did you mean 'distill'?")),
    (MOBILENET_QAT, "crop=0.7", "crop=7", ("Augmentation", "crop=7", "a number from 0.05 to 1")),
    (
        MOBILENET_QAT,
        "reconstruct=True",
        "adaround=True",
        ("adaround=True with training=FineTuning(",),
    ),
    (RESNET_FP32, "patience=3", "patience=True", ("Training", "patience=True", "from 0")),
    (RESNET_FP32, "patience=3", "patience=3, keep='last'", ("patience=3 with keep='last'",)),
    (RESNET_FP32, "scratch=", "scratsh=", ("Fp32", "'scratsh'", "did you mean 'scratch'?")),
]


@pytest.mark.parametrize(("name", "before", "after", "words"), MISTAKES)
def test_a_mistake_in_a_recipe_ends_its_script_before_any_work(
    name, before, after, words, run_changed, tmp_path
):
    assert_refused(run_changed(name, before, after), tmp_path, *words)


def test_a_script_without_mistakes_goes_on_to_import_torch(run_changed, tmp_path):
    done = run_changed(MOBILENET_PTQ, "equalize=True", "equalize=False")
    assert "RECIPE" not in done.stderr
    assert (tmp_path / "torch-was-imported").exists()
