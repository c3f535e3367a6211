"""Errors of a disk: one line reports them, and the files from before stay intact."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import cli, paths
from utils.catalog import Run
from utils.errors import UserError

LIMIT = 2_000  # bytes that a file may have; each writer, like the scripts, needs more
WRITERS = {
    "text": "paths.write_text(target, 'new' * 10_000)",
    "run": "results.write({'run': RUN}, np.zeros((5000, 2)), np.zeros(5000), folder)",
    "checkpoint": "checkpoints.save(target, 'alexnet', model, data, {'fingerprint': 'f'})",
    "export": "checkpoints.derived(source, '.pt', export, (), ())",
    "resume": "loop.Resume(target, 'f').write({'model': model.state_dict()})",
    "torchscript": "save(lambda path: path.write_bytes(torch_ao.torchscript(traced)))",
    "onnx": "save(lambda path: onnx_export.export(model, path))",
}
PROGRAM = """
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from torch import fx, nn
from utils import cli, paths, results
from utils.backends import onnx_export, torch_ao
from utils.training import checkpoints, loop

folder = Path(sys.argv[1])
target, source = folder / "target", folder / "source.pt"
RUN = {"study": "s", "model": "m", "method": "ptq", "dtype": "int8", "backend": "b"}
RUN |= {"device": "cpu", "seed": 0}
model = nn.Sequential(nn.Conv2d(3, 40, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 2))
traced = fx.symbolic_trace(model)
model.architecture = "none"
data = SimpleNamespace(describe=dict)

def save(write):
    with paths.atomic(target) as temporary:
        write(temporary)

def export(path):
    checkpoints.export(path, model)

with cli.reporting("program"):
    if int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    exec(sys.argv[3])
"""


def run(folder, limit, writer):
    """Run one of WRITERS in a process whose files are limited to `limit` bytes; 0 is no limit."""
    command = [sys.executable, "-c", PROGRAM, folder, str(limit), writer]
    return subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_is_reported_in_one_line(name, tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "source.pt").write_bytes(b"weights")
    before = contents(tmp_path)
    done = run(tmp_path, LIMIT, WRITERS[name])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: program: cannot write ")
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr and str(tmp_path) in done.stderr
    assert contents(tmp_path).items() >= before.items() and not list(tmp_path.rglob(".*.tmp"))


def test_the_same_writers_succeed_without_a_limit(tmp_path):
    (tmp_path / "source.pt").write_bytes(b"weights")
    writers = [
        f"target = folder / {name!r}; {writer}" for name, writer in WRITERS.items() if name != "run"
    ]
    done = run(tmp_path, 0, "\n".join(writers))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()} - {"source.pt"}
    assert {name.split(".")[0] for name in names} == {*WRITERS, "source"} - {"run", "export"}


def test_equal_networks_make_equal_files(tmp_path):
    """Checkpoints and TorchScript contain neither temporary names nor times."""
    program = "for weight in model.parameters(): nn.init.constant_(weight, 0.5)\n"
    program += "\n".join(
        f"target = folder / {name!r}; {WRITERS[name]}" for name in ("checkpoint", "torchscript")
    )
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, 0, program).returncode == 0
        time.sleep(1.1)
    assert contents(tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "another")


def disk(folder, options="size=64k"):
    """Return the prefix of a command that runs with an empty disk mounted at `folder`.

    None if mounting is not allowed here.
    """
    mount = f'mount -t tmpfs -o {options} none "{folder}" && "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None:
        return None
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else None


def test_a_read_only_disk_is_reported_in_one_line(tmp_path):
    words = disk(tmp_path, "ro")
    if words is None:
        pytest.skip("mounting a disk is not allowed here")
    command = [*words, sys.executable, "-c", PROGRAM, tmp_path, "0", WRITERS["text"]]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    expected = f"cannot write {tmp_path}/target: Read-only file system."
    assert f"{expected} Give a folder that you may write to." in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_disk_with_errors_is_reported_and_keeps_the_old_file(call, tmp_path, monkeypatch):
    """The system raises EIO when the data is flushed, moved or written."""
    paths.write_text(tmp_path / "target", "old")

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    if call == "write":
        monkeypatch.setattr(Path, "write_text", broken)
    elif call == "replace":
        monkeypatch.setattr(Path, "replace", broken)
    else:
        monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(
        UserError, match=r"cannot write .*target: Input/output error\. Check the disk"
    ):
        paths.write_text(tmp_path / "target", "new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target").read_text() == "old"


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    words = disk(tmp_path)
    if words is None:
        pytest.skip("mounting a small disk is not allowed here")
    writer = (
        "(folder / 'full').write_bytes(bytes(60_000)); paths.write_text(target, 'new' * 10_000)"
    )
    command = [*words, sys.executable, "-c", PROGRAM, tmp_path, "0", writer]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path}/target: No space left on device. Make room" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_gives_no_traceback():
    program = "from utils import cli\nwith cli.reporting('program'):\n"
    program += "    print('x' * 100_000, flush=True)"
    with Path("/dev/full").open("w") as full:
        pipes = dict(stdout=full, stderr=subprocess.PIPE, text=True)
        done = subprocess.run([sys.executable, "-c", program], cwd=paths.ROOT, **pipes)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        "error: program: cannot write the output: No space left on device."
    )


def test_nobody_listens_to_the_output():
    program = "from utils import cli\nwith cli.reporting('program'):\n    print('x' * 1_000_000)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=paths.ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


# ---- folders


def test_a_file_in_the_way_of_a_folder_is_reported(tmp_path):
    (tmp_path / "results").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*runs.*Move what is in the way"):
        paths.write_text(tmp_path / "results" / "runs" / "a.json", "x")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*a\.json: Is a directory"):
        paths.write_text(tmp_path / "a.json", "x")
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_path_that_is_too_long_is_shortened_in_the_message(tmp_path):
    with pytest.raises(UserError, match=r"File name too long\. Give a shorter path") as told:
        paths.write_text(tmp_path.joinpath(*["folder"] * 800) / "a.json", "x")
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("option", ["--results", "--checkpoints"])
def test_folders_are_tried_before_the_work(option, tmp_path):
    """If a study's folder cannot be written to, its script ends before it decodes an image."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "drawn_smoke").write_text("a file where the study's folder should be")
    folders = {
        "--results": tmp_path / "r",
        "--checkpoints": tmp_path / "c",
        option: tmp_path / "blocked",
    }
    words = [str(word) for pair in folders.items() for word in pair]
    command = [sys.executable, "quantization/ptq/alexnet_ptq_int8.py", "--smoke", *words]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"cannot write {tmp_path}/blocked/drawn_smoke" in done.stderr
    assert not list(tmp_path.rglob("images.npy"))


@pytest.mark.parametrize("option", ["results", "checkpoints"])
def test_a_folder_without_a_name_is_refused(option):
    with pytest.raises(UserError, match=f"--{option}: the name is empty"):
        cli.parse("", Run("alexnet", "fp32", "fp32"), [f"--{option}", ""])


def test_images_in_a_folder_without_a_name_are_refused():
    with pytest.raises(UserError, match="no such folder"):
        cli.parse("", Run("alexnet", "fp32", "fp32"), ["--data", ""])


# ---- leftovers of killed runs


KILLED = """
import os, signal, sys
from pathlib import Path
from utils import paths
with paths.atomic(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_removes_the_leftovers_of_a_killed_one(tmp_path):
    target = tmp_path / "runs" / "a.json"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, target], cwd=paths.ROOT)
        assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob(".a.json.*.tmp"))) == 2
    with paths.atomic(target) as ours:  # of a live process
        other = target.with_name(f".a.json.elsewhere.{2**22 + 1}.abc.tmp")  # of another machine
        other.touch()
        paths.probe(tmp_path)
        assert {*tmp_path.rglob("*.tmp")} == {ours, other}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ---- signals


IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
sys.path.insert(0, {folder!r})
from utils import cli
from utils.catalog import Run

def main(options):
    import heavy

cli.run(main, "", Run("alexnet", "fp32", "fp32"))
"""


def test_ctrl_c_while_a_script_imports_prints_no_traceback(tmp_path):
    heavy = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    (tmp_path / "heavy.py").write_text(heavy)
    command = [sys.executable, "-c", IMPORTS.format(folder=str(tmp_path))]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "error: interrupted; run the same command again to continue\n"


def test_the_hook_for_exceptions_is_left_alone():
    program = "import sys\nhook = sys.excepthook\nimport reproduce\nassert sys.excepthook is hook"
    subprocess.run([sys.executable, "-c", program], cwd=paths.ROOT, check=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_let_a_script_clean_up(number, status, tmp_path):
    program = f"""
import os, signal, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
from utils import cli
with cli.reporting("program"):
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(10)
    finally:
        Path({str(tmp_path / "tidied")!r}).touch()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert done.returncode == status and (tmp_path / "tidied").exists()
    assert done.stderr == "error: interrupted; run the same command again to continue\n"
