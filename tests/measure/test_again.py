"""Another session of a finished run: what it times, and when it refuses."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from records import record as made_up

from utils import checksums, environment, measure, results
from utils.catalog import Run
from utils.cli import PROTOCOL, Options
from utils.errors import UserError
from utils.experiment import Experiment
from utils.timing import protocol

CPU = ("a processor", ("avx2", "avx512_vnni"))
LOGITS, Y = np.array([[0.5, -1], [2, 3]], np.float32), np.array([0, 1])
NAME = "resnet18_ptq_int8_fbgemm_seed0.torchscript"


def hours_ago(hours):
    return (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Store a finished run and time it again; returns the new record."""
    monkeypatch.setattr(environment, "cpu", lambda: CPU)
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "2.13.0"})
    monkeypatch.setattr(environment, "session", lambda: {"time_utc": hours_ago(0), "boot": "now"})
    folder = tmp_path / "weights" / "drawn"
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"the artifact")
    options = Options(
        ("fbgemm",), again=True, results=tmp_path / "out", checkpoints=tmp_path / "weights"
    )
    data, baseline = SimpleNamespace(study="drawn"), SimpleNamespace(sha256="b" * 64)
    experiment = Experiment(Run("resnet18", "ptq", "int8"), options, data, baseline)

    def timed_again(candidate, experiment, entries):
        asked.append(candidate)
        return [
            entry | {"n_sessions": 2, "sessions": [*entry["sessions"], environment.session()]}
            for entry in entries
        ]

    asked = []
    monkeypatch.setattr(protocol, "again", timed_again)

    def run(session=None, store=True, **changes):
        content = made_up(batches=(1,))
        content["environment"] |= dict(
            cpu=CPU[0],
            isa=list(CPU[1]),
            versions={"torch": "2.13.0"},
            gpu=None,
            isa_limits=environment.isa_limits(),
        )
        content["provenance"] |= dict(
            artifact=NAME, artifact_sha256=checksums.sha256_of(folder / NAME),
            baseline_sha256="b" * 64,
        )  # fmt: skip
        session = session or {"time_utc": hours_ago(2), "boot": "now"}
        content["timing"] = [
            entry | dict(protocol=PROTOCOL, tier="quick", n_sessions=1, sessions=[session])
            for entry in content["timing"]
        ]
        for section, values in changes.items():
            if section == "timing":
                content["timing"] = [entry | values for entry in content["timing"]]
            else:
                content[section] |= values
        if store:
            results.write(content, LOGITS, Y, options.results)
        measure.again(experiment, SimpleNamespace(name="fbgemm"))
        path = options.results / "drawn/runs/resnet18_ptq_int8_fbgemm_cpu_seed0.json"
        return json.loads(path.read_text()), asked, path

    return run


def test_the_artifact_is_timed_and_the_session_added(run, capsys):
    record, asked, path = run()
    assert [entry["n_sessions"] for entry in record["timing"]] == [2]
    assert [(name, file.name) for name, file in asked] == [("fbgemm", NAME)]
    with np.load(path.with_suffix(".npz")) as stored:
        assert np.array_equal(stored["logits"], LOGITS)  # the answers stay
    assert "over 2 sessions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("session", "timed"),
    [
        ({"time_utc": hours_ago(0.5), "boot": "now"}, False),
        ({"time_utc": hours_ago(1.1), "boot": "now"}, True),
        ({"time_utc": hours_ago(0.5), "boot": "before"}, True),  # restarted in the meantime
    ],
)
def test_sessions_are_an_hour_or_a_restart_apart(run, session, timed, capsys):
    _, asked, _ = run(session)
    assert len(asked) == timed
    assert ("less than an hour ago" in capsys.readouterr().out) != timed


CHANGES = {
    "another processor": dict(environment={"cpu": "another"}),
    "held to other instruction sets": dict(environment={"isa_limits": "avx2"}),
    "other versions": dict(environment={"versions": {"torch": "2.12.0"}}),
    "another protocol": dict(timing={"protocol": "palindromic-rounds/9"}),
    "FP32 network is another": dict(provenance={"baseline_sha256": "c" * 64}),
    "is missing or another": dict(provenance={"artifact_sha256": "c" * 64}),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_run_that_differs_is_refused_in_one_line(run, reason):
    with pytest.raises(UserError, match=f"--again: .*{reason}.*without --again") as caught:
        run(**CHANGES[reason])
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_that_is_not_finished_is_refused(run):
    with pytest.raises(UserError, match="has no finished run"):
        run(store=False)
