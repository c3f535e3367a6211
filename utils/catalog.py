"""The models, methods, number formats and backends of the study, each listed once. No torch.

Scripts, command lines, tables and figures take their lists, labels, order, colours and markers from
here. README.md, "Adding a model, a method, a backend or a figure", says what else a new one needs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A network architecture."""

    label: str
    torchvision: str  # name of its builder in torchvision.models
    head: str  # name of its last layer
    marker: str  # in figures


@dataclass(frozen=True)
class Method:
    """A way to get from the pretrained network to the deployed one."""

    label: str
    title: str  # of its table
    script: str  # path from the repository root, with {model} and {dtype}
    compared_with: tuple[str, ...] = ()  # methods in its tables and panels
    native: str | None = None  # method of its runs on the backend `native`, which quantizes nothing
    filled: bool = True  # markers in figures: filled or hollow

    @property
    def quantizes(self) -> bool:
        """Whether its scripts deploy number formats other than FP32."""
        return "{dtype}" in self.script


@dataclass(frozen=True)
class Format:
    """A number format of the deployed network, called `dtype` in results.csv."""

    label: str
    bits: int
    colour: str  # lightness 0, 30, 46, 70 and 82 of 100, readable in grey
    shape: str = "o"  # marker in panels of a single model
    dashes: str | tuple = "-"  # line style in these panels


@dataclass(frozen=True)
class Backend:
    """An engine that runs a deployed network, implemented in utils/backends/MODULE.py."""

    module: str
    serves: tuple[tuple[str, str], ...] = ()  # (method, dtype) pairs whose scripts offer it
    devices: tuple[str, ...] = ("cpu",)
    package: str = "torch"  # package that contains the engine
    fp32: bool = False  # whether it competes for the fastest FP32, to which speed-ups refer
    same_engine: str = "native"  # backend that runs FP32 on the same engine
    compiles: bool = False  # whether it takes about half a minute to load
    simulated: tuple[str, ...] = ()  # formats that it emulates in float, so its speed is not valid
    dashes: str | tuple = "-"  # line style in figures


MODELS = {
    "alexnet": Model("AlexNet", "alexnet", "classifier.6", "s"),
    "resnet18": Model("ResNet-18", "resnet18", "fc", "o"),
    "mobilenetv3": Model("MobileNetV3-Small", "mobilenet_v3_small", "classifier.3", "^"),
}
METHODS = {
    "fp32": Method("baseline", "FP32", "models/{model}_fp32.py"),
    "control": Method(
        "control", "FP32, fine-tuned like QAT", "quantization/qat/{model}_qat_int8.py"
    ),
    "ptq": Method(
        "PTQ", "post-training quantization", "quantization/ptq/{model}_ptq_{dtype}.py",
        compared_with=("fp32",),
    ),
    "qat": Method(
        "QAT", "quantization-aware training", "quantization/qat/{model}_qat_{dtype}.py",
        compared_with=("fp32", "control"), native="control", filled=False,
    ),
}  # fmt: skip
FORMATS = {
    "fp32": Format("FP32", 32, "#000000"),
    "fp16": Format("FP16", 16, "#56b4e9", "v", (0, (5, 1.5))),
    "bf16": Format("BF16", 16, "#3d3a8c", "P", (0, (3, 1, 1, 1))),
    "int16": Format("INT16", 16, "#f0c808", "D", (0, (1, 1))),
    "int8": Format("INT8", 8, "#c1440e", "o", "-"),
}
INT8 = (("ptq", "int8"), ("qat", "int8"))
FP16 = (("ptq", "fp16"), ("qat", "fp16"))
BF16 = (("ptq", "bf16"),)
INT16 = (("ptq", "int16"), ("qat", "int16"))
ANYWHERE = ("cpu", "cuda")
BACKENDS = {  # the first one that serves a script is its default
    "fbgemm": Backend("torch_ao", INT8, same_engine="frozen"),
    "x86": Backend("torch_ao", INT8, same_engine="frozen", dashes="--"),
    "onednn": Backend("torch_ao", INT8, same_engine="frozen", dashes="-."),
    "qnnpack": Backend("torch_ao", INT8, same_engine="frozen", dashes=":"),
    "half": Backend("fp16", FP16, ANYWHERE),
    "amp": Backend("fp16", FP16, ANYWHERE, dashes="--"),
    "bfloat16": Backend("fp16", BF16),
    "amp_bf16": Backend("fp16", BF16, dashes="--"),
    "simulated": Backend("simulated", INT16, ANYWHERE, simulated=("int16",)),
    "onnxruntime": Backend(
        "onnxruntime",
        (*INT8, *FP16, *INT16),
        package="onnxruntime",
        fp32=True,
        same_engine="onnxruntime",
        simulated=("int16",),
        dashes=(0, (3, 1, 1, 1)),
    ),
    "openvino": Backend(
        "openvino", INT8, package="openvino", same_engine="openvino", fp32=True, dashes=(0, (5, 1))
    ),
    "openvino_fp16": Backend(
        "openvino", FP16, package="openvino", same_engine="openvino", dashes=(0, (5, 1))
    ),
    "openvino_bf16": Backend(
        "openvino", BF16, package="openvino", same_engine="openvino", dashes=(0, (5, 1))
    ),
    "xnnpack": Backend(
        "xnnpack", INT8, package="executorch", fp32=True, same_engine="xnnpack", dashes=(0, (1, 1))
    ),
    "inductor": Backend(
        "inductor",
        INT8,
        package="torchao",
        fp32=True,
        same_engine="inductor",
        compiles=True,
        dashes=(0, (3, 1)),
    ),
    "tensorrt": Backend(
        "tensorrt",
        INT8,
        ("cuda",),
        package="tensorrt",
        fp32=True,
        same_engine="tensorrt",
        dashes=(0, (7, 2)),
    ),
    "tensorrt_fp16": Backend(
        "tensorrt",
        (*INT8, *FP16),
        ("cuda",),
        package="tensorrt",
        same_engine="tensorrt",
        dashes=(0, (7, 2, 1, 2)),
    ),
    "native": Backend("fp32", (("fp32", "fp32"), ("qat", "int8")), ANYWHERE, fp32=True),
    "frozen": Backend("fp32", devices=ANYWHERE, fp32=True, same_engine="frozen"),
    "compile": Backend("fp32", devices=ANYWHERE, fp32=True, same_engine="compile", compiles=True),
}


@dataclass(frozen=True)
class Run:
    """The experiment of one script: a model, a method and a number format."""

    model: str  # of MODELS
    method: str  # of METHODS
    dtype: str  # of FORMATS

    @property
    def name(self) -> str:
        """Name in file names, such as `resnet18_ptq_int8`, `resnet18_control_fp32`.

        The name of a baseline is `resnet18_fp32`.
        """
        if self.method == "fp32":
            return f"{self.model}_fp32"
        return f"{self.model}_{self.method}_{self.dtype}"

    @property
    def script(self) -> str:
        """Path of its script from the repository root."""
        return METHODS[self.method].script.format(model=self.model, dtype=self.dtype)

    @property
    def baseline(self) -> "Run":
        """FP32 run that this one starts from and is compared with."""
        return Run(self.model, "fp32", "fp32")

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that its script accepts, default first."""
        return tuple(
            name
            for name, backend in BACKENDS.items()
            if (self.method, self.dtype) in backend.serves
        )

    def backends_on(self, device: str) -> tuple[str, ...]:
        """Backends that its script accepts and that run on `device`."""
        return tuple(name for name in self.backends if device in BACKENDS[name].devices)

    def simulated_on(self, backend: str) -> bool:
        """Whether `backend` emulates this run's number format in float."""
        return self.on(backend).dtype in BACKENDS[backend].simulated

    def on(self, backend: str) -> "Run":
        """This run on `backend`, which may be another method.

        QAT on `native` quantizes nothing, so it is the control: FP32 fine-tuned with the same
        recipe.
        """
        method = METHODS[self.method].native
        return Run(self.model, method, "fp32") if method and backend == "native" else self


def kinds() -> tuple[tuple[str, str], ...]:
    """All (method, dtype) pairs that have scripts.

    Baselines come first, then one method after another, with formats in order of bits.
    """
    served = {kind for backend in BACKENDS.values() for kind in backend.serves}
    formats = sorted(FORMATS, key=lambda dtype: FORMATS[dtype].bits)
    return tuple(
        (method, dtype) for method in METHODS for dtype in formats if (method, dtype) in served
    )


def runs() -> tuple[Run, ...]:
    """Runs of all scripts of the study, baselines first."""
    return tuple(Run(model, *kind) for kind in kinds() for model in MODELS)
