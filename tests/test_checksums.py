"""Cached values are read unchanged or not at all."""

import hashlib

import pytest

from utils import checksums
from utils.errors import UserError


def test_written_content_is_read(tmp_path):
    for content in (b"", b"value", b"two\nlines\n", bytes(range(256))):
        checksums.write(tmp_path / "a", content)
        assert checksums.read(tmp_path / "a") == content


def test_a_file_is_its_digest_and_its_content(tmp_path):
    checksums.write(tmp_path / "a", memoryview(b"abc"))
    digest = b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of FIPS 180-2
    assert (tmp_path / "a").read_bytes() == digest + b"\nabc"


def test_a_missing_file_reads_as_nothing(tmp_path, capsys):
    assert checksums.read(tmp_path / "a") is None and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content.replace(b"v", b"w"),
        lambda content: b"",
        lambda content: content[64:],
        lambda content: b"0" * 64 + content[64:],
    ],
)
def test_a_damaged_file_is_reported_and_not_used(damage, tmp_path, capsys):
    path = tmp_path / "a"
    checksums.write(path, b"value")
    path.write_bytes(damage(path.read_bytes()))
    assert checksums.read(path) is None
    assert capsys.readouterr().out == f"cache: {path} is damaged and is made again\n"


def test_a_file_that_was_replaced_is_refused(tmp_path):
    path = tmp_path / "artifact"
    path.write_bytes(b"ours")
    checksums.check(path)  # not noted yet
    assert checksums.note(path) == checksums.sha256_of(path) == hashlib.sha256(b"ours").hexdigest()
    checksums.check(path)
    path.write_bytes(b"theirs")
    with pytest.raises(UserError, match="artifact was replaced while this run used it"):
        checksums.check(path)
    checksums.note(path)
    checksums.check(path)
