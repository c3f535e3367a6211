"""How every figure looks and where it goes: colour = dtype, marker = model, fill = method. No torch.

The colours differ in lightness (0, 46, 70 and 82 of 100), so a figure printed in grey keeps its meaning; the darker three are
told apart with any kind of colour vision. Every marker has a black edge.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli, paths
from utils.errors import UserError

MODELS = {"alexnet": "AlexNet", "resnet18": "ResNet-18", "mobilenetv3": "MobileNetV3-Small"}
DTYPES = {"fp32": "FP32", "fp16": "FP16", "int16": "INT16", "int8": "INT8"}
METHODS = {"fp32": "baseline", "control": "control", "ptq": "PTQ", "qat": "QAT"}
COLOUR = {"fp32": "#000000", "int8": "#c1440e", "fp16": "#56b4e9", "int16": "#f0c808"}
MARKER = {"alexnet": "s", "resnet18": "o", "mobilenetv3": "^"}
METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}  # same data, same bytes

sns.set_theme(context="paper", style="whitegrid", rc={"axes.edgecolor": "0.3", "pdf.fonttype": 42, "savefig.dpi": 200})


def load(doc: str) -> tuple[pd.DataFrame, argparse.Namespace]:
    """Parse a figure's command line and read results.csv of its study; a user's mistake ends the script with one line."""
    parser = cli.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="drawn", help="folder in --results to read (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=paths.RESULTS, metavar="DIR", help="default: results/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures go (default: figures/STUDY/)")
    args = parser.parse_args()
    args.out = args.out or paths.FIGURES / args.study
    try:
        return read(args.results / args.study / "results.csv"), args
    except UserError as error:
        sys.exit(f"error: {error}")


def read(path: Path) -> pd.DataFrame:
    """results.csv as a frame in the order of MODELS, with `series`, a label such as "INT8 PTQ fbgemm"."""
    if not path.exists():
        studies = ", ".join(sorted(own.parent.name for own in path.parents[1].glob("*/results.csv"))) or "none yet"
        raise UserError(f"there is no {path}. Run the scripts first, or give --study; studies there: {studies}.")
    frame = pd.read_csv(path, dtype={"batch_size": "Int64"})  # empty where nothing was timed
    frame["model"] = pd.Categorical(frame["model"], list(MODELS), ordered=True)
    methods = frame["method"].map({**METHODS, "fp32": ""})
    frame["method"] = pd.Categorical(frame["method"], list(METHODS), ordered=True)
    names = (frame["dtype"].map(DTYPES) + " " + methods + " " + frame["backend"]).str.split().str.join(" ")
    unsaid = frame["simulated"] & (frame["backend"] != "simulated")
    frame["series"] = names + unsaid.map({True: " (simulated)", False: ""})
    return frame.sort_values(["model", "method", "dtype", "backend"], kind="stable")


def one_batch(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """One row a run: of the smallest batch size, which is returned too, timed on all threads; or of a run without timing."""
    batch = frame["batch_size"].min()
    own = frame[(frame["batch_size"] == batch) | frame["batch_size"].isna()]
    return own[own["threads"] == own["threads"].max()], batch


def title(frame: pd.DataFrame, text: str) -> str:
    """A title that says on which images and which processor."""
    row = frame.sort_values("threads").iloc[-1]
    images = "drawn images" if row["study"].startswith("drawn") else row["study"].replace("_", " ")
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{text}\n{row['n_test']} test images ({images}), {row['cpu']}, {threads}"


def save(figure: plt.Figure, out: Path, name: str) -> None:
    """Write NAME.png and NAME.pdf, the same bytes for the same data, and say where."""
    for kind, metadata in METADATA.items():
        path = out / f"{name}.{kind}"
        with paths.atomic(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata, bbox_inches="tight")
        print(f"written: {path}")
    plt.close(figure)
