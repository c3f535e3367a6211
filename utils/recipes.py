"""Recipes: every decision of a script, as dataclasses that check themselves. No torch.

A recipe says *what* is done; the command line says where and how. Each field has its unit, its
legal values and its source. An unknown field, an illegal value, or a combination that a later step
would ignore in part ends a script with one line, before any work.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass

from utils.errors import UserError


class RecipeError(UserError, SystemExit):
    """A recipe that cannot be run as written.

    A script makes its recipe at import, where nothing catches this. Python then prints the message
    and exits with status 1.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = f"error: RECIPE: {message}"


@dataclass(frozen=True)
class Rule:
    """The legal values of a field."""

    allows: Callable[[object], bool]
    words: str  # completes "give ..."


def one_of(*values: object) -> Rule:
    """Allow only `values`, not numbers of another type that equal one."""
    *first, last = map(repr, values)

    def allows(value: object) -> bool:
        return any(type(value) is type(legal) and value == legal for legal in values)

    return Rule(allows, f"{', '.join(first)} or {last}" if first else last)


def whole(low: int) -> Rule:
    """Allow whole numbers from `low`."""
    return Rule(lambda value: type(value) is int and value >= low, f"a whole number from {low}")


def number(low: float, high: float = math.inf) -> Rule:
    """Allow finite numbers from `low` to `high`."""

    def allows(value: object) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    least = f" from {low:g}" if math.isfinite(low) else ""
    most = f" to {high:g}" if math.isfinite(high) else ""
    return Rule(allows, f"a number{least}{most}")


def instance(kind: type) -> Rule:
    """Allow instances of `kind`."""
    return Rule(lambda value: isinstance(value, kind), f"{kind.__name__}(...)")


def maybe(rule: Rule) -> Rule:
    """Allow None as well."""
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.words}, or None")


FLAG = Rule(lambda value: type(value) is bool, "True or False")
NAMES = Rule(
    lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    "a tuple of module names, such as ('features.0',)",
)


def field(rule: Rule, default: object = MISSING, trains: bool = True):
    """Declare a field. `trains` is False where it cannot change the network that QAT trains."""
    return dataclasses.field(default=default, metadata={"rule": rule, "trains": trains})


class Recipe:
    """The checks and the description that all recipes share."""

    def __new__(cls, *positional, **given):
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if positional:
            example = f"such as {next(iter(fields))}=..." if fields else "but it has none"
            raise RecipeError(f"{cls.__name__}: name each field, {example}")
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                known = ", ".join(fields) or "none"
                raise RecipeError(f"{cls.__name__} has no field {name!r}{hint} (fields: {known})")
        for name, field in fields.items():
            if field.default is MISSING and name not in given:
                raise RecipeError(
                    f"{cls.__name__} needs {name}: give {field.metadata['rule'].words}."
                )
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        """Return the arguments with which `copy` and `pickle` call `__new__`."""
        return (), vars(self)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if not rule.allows(value):
                raise RecipeError(
                    f"{type(self).__name__}: {field.name}={value!r}: give {rule.words}."
                )
        for first, second, why in self.conflicts():
            pair = f"{first}={getattr(self, first)!r} with {second}={getattr(self, second)!r}"
            raise RecipeError(f"{type(self).__name__}: {pair}: {why}.")

    def conflicts(self) -> list[tuple[str, str, str]]:
        """Return pairs of fields that cannot go together here, each with the reason."""
        return []

    def describe(self) -> dict:
        """Return all fields by name, JSON-serializable."""
        return _plain(dataclasses.asdict(self))

    def decisive(self) -> dict:
        """Return the fields that decide the trained network, JSON-serializable."""
        later = {field.name for field in dataclasses.fields(self) if not field.metadata["trains"]}
        return {name: value for name, value in self.describe().items() if name not in later}

    def replace(self, **changes):
        """Return a copy with `changes`, which are checked as well."""
        return dataclasses.replace(self, **changes)


def _plain(value):
    """Return `value` with lists in place of tuples, as JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class Augmentation(Recipe):
    """Random changes to each training image; see `utils.data.augmentation.augment`."""

    crop: float = field(number(0.05, 1))  # smallest crop, as a share of the image's side
    degrees: float = field(number(0, 180))  # largest rotation, to either side


@dataclass(frozen=True, kw_only=True)
class SmallImages(Recipe):
    """Smaller images in the first epochs, which take less time.

    Progressive resizing: Tan and Le 2021, "EfficientNetV2" (arXiv:2104.00298), section 4.
    """

    epochs: int = field(whole(1))  # from the first
    size: int = field(whole(32))  # pixels, each side


@dataclass(frozen=True, kw_only=True)
class Schedule(Recipe):
    """The part of a training that FP32 and QAT share: AdamW, warm-up, then half a cosine."""

    epochs: int = field(whole(1))
    batch_size: int = field(whole(1))  # images
    backbone_lr: float = field(number(0))  # at the end of the warm-up
    head_lr: float = field(number(0))  # the same, of the last layer and of layers drawn at random
    warmup_epochs: float = field(number(0))  # linear (Goyal et al. 2017, arXiv:1706.02677)
    weight_decay: float = field(
        number(0)
    )  # decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101)
    label_smoothing: float = field(number(0, 1), 0.0)  # Szegedy et al. 2016, arXiv:1512.00567
    clip_norm: float = field(number(0))  # largest norm of all gradients together
    augment: Augmentation | None = field(maybe(instance(Augmentation)))
    amp: bool = field(FLAG)  # mixed precision: BF16 on CPUs that multiply it, FP16 on GPUs
    keep: str = field(one_of("best", "last"), "best")  # the epoch whose weights are kept
    patience: int = field(whole(0))  # epochs without a better one before it stops; 0: never

    def conflicts(self) -> list[tuple[str, str, str]]:
        if self.keep == "last" and self.patience:
            return [
                ("patience", "keep", "the last epoch always counts as the best: it never stops")
            ]
        return []


@dataclass(frozen=True, kw_only=True)
class Training(Schedule):
    """The training of an FP32 network."""

    bn_momentum: float = field(number(0, 1))  # of BatchNorm's running statistics
    small: SmallImages | None = field(maybe(instance(SmallImages)), None)
    # The last BatchNorm gain of residual branches starts at 0 (Goyal et al. 2017, section 5.1).
    silent_branches: bool = field(FLAG, False)


@dataclass(frozen=True, kw_only=True)
class FineTuning(Schedule):
    """The training of a network with fake quantization, and of its control without it.

    Rates are in the units of `utils.quantize.fake_quant`.
    """

    distill: bool = field(FLAG)  # match the logits of the FP32 network, not the labels

    def conflicts(self) -> list[tuple[str, str, str]]:
        conflicts = super().conflicts()
        if self.distill and self.label_smoothing:
            conflicts.append(("label_smoothing", "distill", "distillation reads no labels"))
        return conflicts


@dataclass(frozen=True, kw_only=True)
class Fp32(Recipe):
    """An FP32 baseline, by the weights that it starts from."""

    pretrained: Training = field(instance(Training))
    scratch: Training = field(instance(Training))

    def starting_from(self, init: str) -> Training:
        """Return the training for the value of `--init`."""
        return self.scratch if init == "scratch" else self.pretrained


@dataclass(frozen=True, kw_only=True)
class Fp16(Recipe):
    """FP16 by PTQ: each number becomes the nearest of FP16, which leaves nothing to decide."""


@dataclass(frozen=True, kw_only=True)
class Bf16(Recipe):
    """BF16 by PTQ: each number becomes the nearest of BF16, which leaves nothing to decide."""


@dataclass(frozen=True, kw_only=True)
class Fp16QAT(Recipe):
    """FP16 by QAT."""

    training: FineTuning = field(instance(FineTuning))
    calibration_images: int = field(whole(1))  # they give the spread of outputs, the unit of biases


@dataclass(frozen=True, kw_only=True)
class Budget(Recipe):
    """The error that a network may have on validation images, relative to FP32."""

    accuracy_drop: float | None = field(
        maybe(number(-1, 1)), None
    )  # at most, as a share of the images
    sqnr_db: float | None = field(maybe(number(-math.inf)), None)  # at least, of the logits

    def conflicts(self) -> list[tuple[str, str, str]]:
        if self.accuracy_drop is None and self.sqnr_db is None:
            return [("accuracy_drop", "sqnr_db", "give a number for at least one of them")]
        return []


@dataclass(frozen=True, kw_only=True)
class _Integers(Recipe):
    """The decisions of INT8 and INT16: scale x (integer - zero-point), as in arXiv:1712.05877."""

    # The range of an activation over the calibration images: from its least to its largest value,
    # the central 99.999 %, or the range with the least squared error of clipping and rounding
    # (Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv:2106.08295,
    # section 3.1).
    ranges: str = field(one_of("minmax", "percentile", "mse"))
    calibration_images: int = field(whole(1))  # training images, without labels
    headroom: float = field(number(1), 1.0)  # factor on all ranges, against values beyond them
    # One scale per output channel, or one per layer (Krishnamoorthi 2018, arXiv:1806.08342,
    # section 3.1).
    weight_scales: str = field(one_of("channel", "tensor"), "channel")
    # One scale per channel of an activation where the engine can use it, or one per tensor.
    activation_scales: str = field(one_of("engine", "tensor"), "engine")
    bias_correction: bool = field(FLAG, False)  # empirical (arXiv:1906.04721, section 4.2)
    keep_fp32: tuple[str, ...] = field(NAMES, ())  # modules that stay in FP32


@dataclass(frozen=True, kw_only=True)
class Int8(_Integers):
    """INT8 by PTQ."""

    bits: int = field(one_of(8), 8)
    # Equal ranges for the channels that a depthwise convolution reads (arXiv:1906.04721,
    # section 4.1).
    equalize: bool = field(FLAG, False)
    adaround: bool = field(FLAG, False)  # AdaRound: weights up or down (arXiv:2004.10568)
    # Block by block, weights, biases and ranges learn the answers of FP32 (BRECQ,
    # arXiv:2102.05426).
    reconstruct: bool = field(FLAG, False)
    # The factor with 7 bits where sums of two products of 8 bits overflow 16 bits: without VNNI.
    # "activations" as reduce_range in torch, but also clipped to 7 bits; "weights" as in ONNX
    # Runtime and NNCF's OverflowFix.
    overflow_fix: str = field(one_of("none", "activations", "weights"), "activations")
    # The fix on every processor, for a file that serves all. Engines that never overflow ignore it.
    portable: bool = field(FLAG, False)
    # "auto" keeps in FP32 the blocks that are faster there, and more until `budget` is met; see
    # utils/mixed_precision.py.
    formats: str = field(one_of("given", "auto"), "given", trains=False)
    budget: Budget = field(instance(Budget), Budget(accuracy_drop=0.003), trains=False)
    # Filled in where modules in FP32 or the engine were chosen by measurement: what was compared.
    trials: dict | None = field(maybe(instance(dict)), None, trains=False)
    engines: dict | None = field(maybe(instance(dict)), None, trains=False)

    def conflicts(self) -> list[tuple[str, str, str]]:
        conflicts = []
        if self.reconstruct and self.adaround:
            why = "reconstruction learns the weights, and would discard their rounding"
            conflicts.append(("adaround", "reconstruct", why))
        if self.reconstruct and self.bias_correction:
            why = "reconstruction learns the biases, and would discard the correction"
            conflicts.append(("bias_correction", "reconstruct", why))
        if self.formats == "auto" and self.keep_fp32:
            why = "the modules in FP32 are chosen, and these would be discarded"
            conflicts.append(("keep_fp32", "formats", why))
        if self.portable and self.overflow_fix == "none":
            conflicts.append(("portable", "overflow_fix", "there is no fix to apply everywhere"))
        return conflicts


@dataclass(frozen=True, kw_only=True)
class Int16(_Integers):
    """INT16 by PTQ. With 65,536 integers, most remedies of INT8 are not needed."""

    bits: int = field(one_of(16), 16)
    equalize = adaround = reconstruct = portable = False
    overflow_fix, formats = "none", "given"


@dataclass(frozen=True, kw_only=True)
class Int8QAT(Int8):
    """INT8 by QAT, which starts from the ranges, factors and biases of PTQ."""

    training: FineTuning = field(instance(FineTuning))

    def conflicts(self) -> list[tuple[str, str, str]]:
        conflicts = super().conflicts()
        if self.adaround:
            why = "training changes the weights, and would discard their rounding"
            return [*conflicts, ("adaround", "training", why)]
        return conflicts


@dataclass(frozen=True, kw_only=True)
class Int16QAT(Int16):
    """INT16 by QAT."""

    training: FineTuning = field(instance(FineTuning))
