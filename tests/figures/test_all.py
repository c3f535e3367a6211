"""figures/all.py: everything of a study at once, in order, despite failures."""

import argparse
import base64
import re
import shutil
import subprocess
import sys

import pytest
from records import write_run

from figures import all as everything
from figures.shared import script
from utils import paths

RUNS = (
    ("resnet18", "fp32", "fp32", "native"),
    ("resnet18", "control", "fp32", "native"),
    ("resnet18", "ptq", "int8", "fbgemm"),
    ("resnet18", "qat", "int8", "fbgemm"),
)
COMPARED = {
    "published_vs_reproduced.png",
    "published_vs_reproduced.pdf",
    "published.csv",
    "published.tex",
}


def render(root, folder, study, *options):
    where = ["--results", folder / "results", "--study", study, "--out", folder / "out"]
    command = [sys.executable, root / "figures/all.py", *where, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def code_with_one_figure(tmp_path):
    """Copy the code with size.py as its only figure."""
    root = tmp_path / "code"
    ignore = shutil.ignore_patterns("cats_and_dogs*", "__pycache__")
    for folder in ("figures", "utils"):
        shutil.copytree(paths.ROOT / folder, root / folder, ignore=ignore)
    for path in (root / "figures").glob("*.py"):
        if path.stem not in ("__init__", "all", "tables", "report", "size"):
            path.unlink()
    return root


def write_study(folder, study, **changes):
    for run in RUNS:
        write_run(folder / "results", *run, study=study, **changes)


def test_every_script_is_run_without_a_list():
    scripts = paths.FIGURES.glob("*.py")
    drawn = {path.stem for path in scripts if "style.save(" in path.read_text(encoding="utf-8")}
    assert set(everything.names()) == drawn and {"speedup", "layer_sqnr"} < drawn


def test_make_renders_by_it():
    command = ["make", "--dry-run", "render", "STUDY=pets"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert "figures/all.py --study pets" in done.stdout


@pytest.mark.parametrize(
    ("study", "theirs"),
    [
        ("pets", False),
        ("drawn", False),
        ("cats_and_dogs", True),
        ("cats_and_dogs_1a2b3c4d", True),
        ("cats_and_dogs_smoke", True),
    ],
)
def test_the_dissertation_is_compared_with_its_data_set_only(
    monkeypatch, capsys, tmp_path, study, theirs
):
    monkeypatch.setattr(everything, "names", lambda: ["published_vs_reproduced", "size"])
    write_study(tmp_path, study)
    out = tmp_path / "out"
    out.mkdir()
    pixel = paths.FIGURES / "cats_and_dogs/published_vs_reproduced.png"
    shutil.copy(pixel, out / "published_vs_reproduced.png")  # of an earlier study with this name
    kept = set() if theirs else {"published_vs_reproduced.png"}
    args = argparse.Namespace(results=tmp_path / "results", study=study, out=out)
    everything.make(script.read(args), args)
    said = capsys.readouterr()
    assert said.err == ""
    assert files(out) & COMPARED == (COMPARED if theirs else kept)
    page = (out / "report.html").read_text(encoding="utf-8")
    tables = (out / "tables.md").read_text(encoding="utf-8")
    assert ("issertation" in page) == ("issertation" in tables) == theirs
    written = re.findall(r"^written: (.*)", said.out, re.M)
    assert "tables.md" in written[0] and "size.png" in said.out
    assert written[-1].endswith("report.html")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_script_that_fails_is_named_and_does_not_stop_the_others(tmp_path, context):
    root = code_with_one_figure(tmp_path)
    figures = root / "figures"
    text = (figures / "size.py").read_text()
    (figures / "anew.py").write_text(text.replace('"size"', '"anew"'))
    (figures / "broken.py").write_text("import nothing_like_it\n")
    (figures / "crashes.py").write_text("def make(frame, args):\n    1 / 0\n")
    (figures / "refuses.py").write_text(
        "from utils.errors import UserError\n\n\n"
        "def make(frame, args):\n    raise UserError('nothing to draw.')\n"
    )
    if context == "spawn":  # as on Windows, which cannot fork a process
        script = figures / "all.py"
        text = script.read_text()
        script.write_text(text.replace("multiprocessing.get_all_start_methods()", "['spawn']"))
    write_study(tmp_path, "pets")
    done = render(root, tmp_path, "pets")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: figures/broken.py: ModuleNotFoundError: No module named 'nothing_like_it'",
        "error: figures/crashes.py: ZeroDivisionError: division by zero",
        "error: figures/refuses.py: nothing to draw.",
    ]
    expected = {"size.png", "anew.png", "anew.pdf", "tables.md", "report.html"}
    assert expected <= files(tmp_path / "out")


def test_a_worker_that_dies_is_named(tmp_path):
    root = code_with_one_figure(tmp_path)
    (root / "figures/zombie.py").write_text(
        "import os\n\n\ndef make(frame, args):\n    os._exit(9)\n"
    )
    write_study(tmp_path, "pets")
    done = render(root, tmp_path, "pets")
    assert done.returncode == 1
    assert done.stderr == "error: figures/zombie.py: its process died; is there enough memory?\n"
    assert {"size.png", "tables.md", "report.html"} <= files(tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--standalone",)])
def test_the_report_links_to_the_figures_or_contains_them(tmp_path, options):
    root = code_with_one_figure(tmp_path)
    write_study(tmp_path, "pets")
    assert render(root, tmp_path, "pets", *options).returncode == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    (source,) = re.findall(r'<img src="([^"]*)"', page)
    if options:
        picture = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert picture == (tmp_path / "out/size.png").read_bytes()
    else:
        assert source == "size.png"
