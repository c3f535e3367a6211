"""How every figure looks and where it goes: colour = dtype, marker = model, fill = method. No torch.

The colours differ in lightness (0, 46, 70 and 82 of 100), so a figure printed in grey keeps its meaning; the darker three are
told apart with any kind of colour vision. Every marker has a black edge.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli, paths, results
from utils.errors import UserError

MODELS = {"alexnet": "AlexNet", "resnet18": "ResNet-18", "mobilenetv3": "MobileNetV3-Small"}
DTYPES = {"fp32": "FP32", "fp16": "FP16", "int16": "INT16", "int8": "INT8"}
METHODS = {"fp32": "baseline", "control": "control", "ptq": "PTQ", "qat": "QAT"}
COLOUR = {"fp32": "#000000", "int8": "#c1440e", "fp16": "#56b4e9", "int16": "#f0c808"}
MARKER = {"alexnet": "s", "resnet18": "o", "mobilenetv3": "^"}
DASHES = {"native": "-", "half": "-", "amp": "--", "fbgemm": "-", "x86": "--", "onednn": "-.", "qnnpack": ":", "simulated": "-"}
OUTLINE = [Stroke(linewidth=2.2, foreground="0.25"), withStroke(linewidth=0)]  # light lines stay visible in grey
BESIDE = dict(fontsize=6.5, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4, title_fontsize=7)  # of a legend
OFFSETS = [(x, y) for far in (9, 16, 23, 30) for y in (far, -far) for x in (0, -16, 16, -32, 32)]  # of texts, in points
RUN = ["model", "method", "dtype", "backend", "device", "seed"]
TIMING = [name for section, names in results.SECTIONS if section == "timing" for name in names if name != "threads"]
METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}  # same data, same bytes

sns.set_theme(context="paper", style="whitegrid", rc={"axes.edgecolor": "0.3", "pdf.fonttype": 42, "savefig.dpi": 200})
plt.rcParams["pdf.compression"] = 0  # by the zlib of the system, of which there are several: the bytes would depend on it


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
    frame["series"] = names + unsaid.map({True: " (simulated)", False: ""}) + frame["device"].map({"cuda": " on GPU"}).fillna("")
    return frame.sort_values(["model", "method", "dtype", "backend"], kind="stable")


def one_batch(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """One row a run: of the smallest batch size, which is returned too, on all threads; untimed where a run has no such."""
    batch = frame["batch_size"].min()
    timed = frame["threads"].eq(frame["threads"].max()) & frame["batch_size"].eq(batch).fillna(False)
    frame = frame.assign(timed=timed).sort_values("timed", ascending=False, kind="stable").drop_duplicates(RUN)
    empty = {name: frame[name].where(frame["timed"]) for name in frame.columns.intersection(TIMING)}
    return frame.assign(**empty).drop(columns="timed").sort_values(RUN[:4], kind="stable"), batch


def first_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each model and series, of its lowest seed: for figures with room for one run."""
    return frame.sort_values("seed", kind="stable").drop_duplicates(["model", "series"]).sort_values(RUN[:4], kind="stable")


def present(frame: pd.DataFrame) -> list[str]:
    """The models of a frame, in the order of MODELS."""
    return [name for name in MODELS if name in set(frame["model"])]


def labels(frame: pd.DataFrame, column: str = "series") -> list[str]:
    """The rows of a dot plot: whatever any model was run with, so that what another model lacks is seen."""
    return list(frame.sort_values(["method", "dtype", "backend"], kind="stable")[column].unique())


def look(row: pd.Series) -> dict:
    """Marker of a run: QAT's is empty, a ring of its colour between black lines."""
    if row["method"] != "qat":
        return dict(marker=MARKER[row["model"]], color=COLOUR[row["dtype"]], markeredgecolor="black", ms=7)
    ring = [withStroke(linewidth=2.4, foreground="black")]
    return dict(
        marker=MARKER[row["model"]], color="white", markeredgecolor=COLOUR[row["dtype"]], mew=1.3, ms=6, path_effects=ring
    )


def panels(
    frame: pd.DataFrame, rows: list[str], width: float = 1.9
) -> tuple[plt.Figure, list[tuple[plt.Axes, str, pd.DataFrame]]]:
    """Empty dot plots side by side, one a model, with the same rows; each with its model's name and part of the frame."""
    models = present(frame)
    size = (2.2 + width * len(models), 1.3 + 0.27 * max(4, len(rows)))
    figure, found = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, model in zip(found[0], models, strict=True):
        axes.set_title(MODELS[model], fontsize=9)
        axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
    found[0][0].set_yticklabels(rows)
    return figure, [(axes, model, frame[frame["model"] == model]) for axes, model in zip(found[0], models, strict=True)]


def dots(
    axes: plt.Axes, own: pd.DataFrame, rows: list[str], column: str, interval: str = "", *, by: str = "series", scale: float = 1,
    shift: float = 0, **changes,
) -> None:  # fmt: skip
    """Draw `column` of a model's runs into a dot plot, with `interval`_low and _high as bars; seeds of one row lie side by side.

    `shift` moves the marks down, in rows. A star says that something else was running while a time was taken.
    """
    if column in TIMING:
        axes.margins(x=0.1)  # room for a star
    for place, name in enumerate(rows):
        drawn = own[own[by] == name].dropna(subset=column)
        for n, (_, row) in enumerate(drawn.iterrows()):
            x, y = scale * row[column], place + shift + 0.12 * (n - (len(drawn) - 1) / 2)
            low, high = (scale * row[f"{interval}_{end}"] if interval else x for end in ("low", "high"))
            if interval:
                axes.errorbar(x, y, xerr=[[max(0, x - low)], [max(0, high - x)]], ecolor="0.4", capsize=2)
            axes.plot(x, y, ls="", zorder=3, **look(row) | changes)
            if column in TIMING and pd.notna(row["contended"]) and row["contended"]:
                axes.annotate("*", (max(x, high), y), (4, -3), textcoords="offset points", fontsize=9)


def gaps(axes: plt.Axes, own: pd.DataFrame, rows: list[str], column: str, by: str = "series", shift: float = 0, what: str = ""):
    """Write "not run" where a model has no run for a row, "not timed" where none of its runs has a number; `what` goes before."""
    for place, name in enumerate(rows):
        runs = own[own[by] == name]
        if name and runs[column].isna().all():
            text, at = "not run" if runs.empty else "not timed", axes.get_yaxis_transform()
            size = 5.5 if shift else 7
            axes.text(0.5, place + shift, f"{what}{text}", transform=at, ha="center", va="center", color="0.4", fontsize=size)


def baseline(axes: plt.Axes, own: pd.DataFrame, column: str, scale: float = 1) -> None:
    """A dotted line through the panel where the model's FP32 network lies."""
    for value in own[own["method"] == "fp32"][column]:
        axes.axvline(scale * value, color="black", lw=0.8, ls=":", zorder=1)


def sizes(figure: plt.Figure, names: dict[int, str]) -> None:
    """A legend below a figure in which marks of different sizes mean different things: size in points -> what it means."""
    grey = dict(ls="", marker="o", mfc="0.8", mec="black")
    handles = [Line2D([], [], ms=size, label=name, **grey) for size, name in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)


def contended(frame: pd.DataFrame) -> str:
    """What a title says of the stars of `dots`, if there are any."""
    return "; *: something else was running" if frame["contended"].eq(True).any() else ""


def annotate(axes: plt.Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write a text beside each point (x, y, text), where it covers no point and no other text; the layout must be done."""
    points = list(points)
    at = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_extents(*(xy - 6), *(xy + 6)) for xy in at]
    line = dict(arrowstyle="-", lw=0.4, color="0.5", shrinkA=0, shrinkB=3)
    for x, y, text in points:
        for offset in OFFSETS:
            label = axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=6, ha="center", va="center",
                                  arrowprops=line, zorder=4)  # fmt: skip
            label.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(label).padded(1)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y0)
            if (inside and axes.bbox.containsy(box.y1) and not box.count_overlaps(taken)) or offset == OFFSETS[-1]:
                break
            label.remove()
        taken.append(box)


def log_scale(axis: Axis) -> None:
    """Make an axis logarithmic, with as many plain numbers as it is long enough for."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    box = axis.axes.get_window_extent()
    dense = (
        math.log10(high / low) * axis.axes.figure.dpi / (box.width if axis.axis_name == "x" else box.height)
    )  # decades an inch
    steps = (1, 1.5, 2, 3, 5, 7) if dense < 0.5 else (1, 2, 5) if dense < 1.1 else (1, 3) if dense < 1.6 else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def grid(frame: pd.DataFrame, cell: float, columns: int = 8) -> tuple[plt.Figure, list[tuple[plt.Axes, pd.Series]]]:
    """Small square panels, a block of rows for each model, one panel a series; those of runs come back, others say "not run"."""
    rows, models = labels(frame), present(frame)
    columns = min(columns, len(rows))
    deep = -(-len(rows) // columns)
    size = (0.7 + cell * columns, 0.7 + (cell + 0.27) * deep * len(models))
    figure, found = plt.subplots(deep * len(models), columns, figsize=size, squeeze=False, layout="constrained")
    used = []
    for n, model in enumerate(models):
        own = frame[frame["model"] == model].set_index("series", drop=False)
        block = found[n * deep : (n + 1) * deep].ravel()
        block[0].set_ylabel(MODELS[model], fontsize=7.5)
        for axes, name in zip(block, rows, strict=False):
            axes.set(xticks=[], yticks=[], box_aspect=1)
            axes.set_title(name.replace(" simulated", "\nsimulated"), fontsize=5.5, pad=2)
            if name in own.index:
                used.append((axes, own.loc[name]))
            else:
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", va="center", color="0.4", fontsize=6)
        for axes in block[len(rows) :]:
            axes.set_axis_off()
    return figure, used


def record(args: argparse.Namespace, row: pd.Series, ending: str = "json") -> Path:
    """The file of a run's row: all that was written about it, or with "npz" its logits."""
    return args.results / args.study / "runs" / f"{results.run_id(row)}.{ending}"


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
