"""Digests of code: which files decide a result, and what a change in one of them changes."""

import ast
import sys
from operator import attrgetter

import pytest

from utils import environment, paths

TREE = {
    "utils/__init__.py": "",
    "utils/cli/__init__.py": "from utils.cli.options import Options",
    "utils/cli/options.py": "from utils import behind_cli",
    "utils/behind_cli.py": "",
    "utils/room/__init__.py": "from utils.room.exported import verb",
    "utils/room/exported.py": "def verb(): pass",
    "utils/room/sibling.py": "",
    "utils/start.py": "import numpy\nfrom utils import cli, middle",
    "utils/middle.py": '"""Middle."""\nfrom utils.far import VALUE\ndef f():\n    """Work."""\n',
    "utils/far.py": "VALUE = 1",
}
PACKAGE = attrgetter("parent.name")
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"


def plant(monkeypatch, root, **changes):
    """Make `root` the repository: TREE, with `changes` to start.py, middle.py or far.py."""
    for path, text in TREE.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(changes.get(file.stem, text))
    monkeypatch.setattr(paths, "ROOT", root)


def code_after(monkeypatch, tmp_path, text, name="start"):
    plant(monkeypatch, tmp_path / "changed", **{name: text})
    return environment.code_of("utils.start")


# ---- what libraries may use of the processor


@pytest.fixture
def processor(monkeypatch):
    """A function that makes this a processor with these instruction sets and variables."""

    def become(flags, **variables):
        monkeypatch.setattr(environment, "cpu", lambda: ("a processor", tuple(flags.split())))
        for name in environment.ISA_LIMITS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


SKYLAKE, ZEN4, ALDER_LAKE = "avx2 avx512f", "avx2 avx512f avx512_vnni", "avx2 avx_vnni"
ALL = {"fbgemm", "onednn", "mlas"}


@pytest.mark.parametrize(
    ("flags", "variables", "with_vnni"),
    [
        ("avx2", {}, set()),
        (SKYLAKE, {}, set()),
        (ZEN4, {}, ALL),
        (ALDER_LAKE, {}, {"onednn", "mlas"}),
        ("asimd asimddp", {}, ALL),
        ("asimd", {}, set()),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"fbgemm", "mlas"}),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "avx512_core"}, {"fbgemm", "mlas"}),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, ALL),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, ALL),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, {"fbgemm", "mlas"}),
        (ALDER_LAKE, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, {"onednn", "mlas"}),
        (ZEN4, {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}, {"onednn", "mlas"}),
        (ZEN4, {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX512_E1"}, ALL),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "avx2"}, ALL),  # not the kernels that multiply integers
    ],
)
def test_vnni_is_what_a_library_may_use(processor, flags, variables, with_vnni):
    processor(flags, **variables)
    assert {name for name in ALL if environment.has_vnni(name)} == with_vnni
    assert environment.has_vnni(*ALL) == (with_vnni == ALL)
    given = " ".join(f"{name}={value}" for name, value in variables.items())
    assert environment.describe(2)["isa_limits"] == environment.isa_limits() == (given or "none")
    assert environment.describe(2)["isa"] == flags.split()


# ---- what belongs to the code


def test_a_module_reached_through_two_imports_counts(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path)
    assert set(environment.code_of("utils.start")) == {
        "utils/start.py",
        "utils/middle.py",
        "utils/far.py",
    }


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("import utils.far", "utils/far.py"),
        ("import utils.far as f", "utils/far.py"),
        ("from utils import far", "utils/far.py"),
        ("from utils.far import *", "utils/far.py"),
        ("from .far import VALUE", "utils/far.py"),
        ("from . import far", "utils/far.py"),
        ("def f():\n    from utils import far", "utils/far.py"),
        ("class C:\n    def f(self):\n        import utils.far", "utils/far.py"),
        ("try:\n    import torch\nexcept ImportError:\n    import utils.far", "utils/far.py"),
        ("from utils.room import sibling", "utils/room/sibling.py"),
        ("from utils.room import verb", "utils/room/exported.py"),
        ("from utils import room", "utils/room/exported.py"),
        (f"{TYPES_ONLY}    pass\nelse:\n    import utils.far", "utils/far.py"),
    ],
)
def test_every_form_of_import_is_followed(monkeypatch, tmp_path, text, reached):
    assert set(code_after(monkeypatch, tmp_path, text)) == {"utils/start.py", reached}


@pytest.mark.parametrize(
    "text",
    [
        f"{TYPES_ONLY}    from utils import far",
        "import typing\nif typing.TYPE_CHECKING:\n    from utils import far",
        "import numpy.linalg\nfrom os import path",
        "import utils.cli\nfrom utils.cli import Options\nfrom utils.cli.options import Options",
        "from utils import cli",
    ],
)
def test_types_other_packages_and_uninvolved_modules_are_left_out(monkeypatch, tmp_path, text):
    assert set(code_after(monkeypatch, tmp_path, text)) == {"utils/start.py"}


def test_modules_that_import_each_other_end(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, far="from utils import start\nVALUE = 1")
    assert len(environment.code_of("utils.start")) == 3


def test_several_modules_are_joined(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path)
    assert set(environment.code_of("utils.far", "utils.room")) == {
        "utils/far.py",
        "utils/room/exported.py",
    }


def test_a_misspelt_module_is_an_error(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"utils\.strat"):
        environment.code_of("utils.strat")


# ---- what a change does


@pytest.mark.parametrize(
    "text",
    [
        TREE["utils/middle.py"].replace("Work.", "Work hard."),
        TREE["utils/middle.py"].replace("Middle.", "The middle."),
        TREE["utils/middle.py"] + "  # a comment",
        TREE["utils/middle.py"].replace("\ndef", "\n\n\ndef"),
    ],
)
def test_docstrings_comments_and_layout_change_nothing(monkeypatch, tmp_path, text):
    plant(monkeypatch, tmp_path / "before")
    before = environment.code_of("utils.start")
    assert code_after(monkeypatch, tmp_path, text, "middle") == before


@pytest.mark.parametrize(
    ("name", "text"), [("far", "VALUE = 2"), ("middle", "from utils.far import VALUE")]
)
def test_another_statement_in_an_imported_module_changes_the_code(
    monkeypatch, tmp_path, name, text
):
    plant(monkeypatch, tmp_path / "before")
    before = environment.code_of("utils.start")
    after = code_after(monkeypatch, tmp_path, text, name)
    assert {path for path in before if before[path] != after[path]} == {f"utils/{name}.py"}
    assert environment.code_sha256(before) != environment.code_sha256(after)


# ---- of the study


def test_what_only_names_prints_parses_or_stores_is_not_code():
    code = environment.code_of("utils.training.trainings", "utils.backends.registry")
    stems = {path.removeprefix("utils/").partition("/")[0].removesuffix(".py") for path in code}
    assert stems.isdisjoint({"cli", "paths", "progress", "errors", "catalog", "results"})


def test_every_module_that_trains_is_code_of_a_training():
    files = {f"utils/training/{file.name}" for file in paths.ROOT.glob("utils/training/[!_]*.py")}
    trainings = environment.code_of("utils.training.trainings")
    assert files - {"utils/training/baseline.py"} <= set(trainings)  # that one only loads
    loop = environment.code_of("utils.training.loop")
    assert {"utils/data/augmentation.py", "utils/training/distributed.py"} <= set(loop)


def test_uninvolved_modules_exist():
    uninvolved = set(environment.UNINVOLVED)
    assert uninvolved <= {f"utils.{path.stem}" for path in paths.ROOT.glob("utils/*")}


@pytest.mark.parametrize("file", sorted(paths.ROOT.glob("utils/**/__init__.py")), ids=PACKAGE)
def test_the_init_of_a_package_defines_nothing_that_computes(file):
    tree = ast.parse(file.read_bytes())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_the_code_of_a_process_is_what_it_has_loaded(monkeypatch):
    import utils.metrics

    assert sys.modules["utils.metrics"] is utils.metrics
    code = environment.code("reproduce.py")
    assert {"reproduce.py", "utils/metrics.py"} <= set(code)
    assert set(code).isdisjoint({"utils/paths.py", "utils/catalog.py", "utils/__init__.py"})
    assert environment.is_code(code)
    assert not environment.is_code(code | {"reproduce.py": "0" * 64})
    assert not environment.is_code(code | {"utils/removed.py": "0" * 64})
