"""Tests of minutes run with --slow only; the longest file of the others starts first."""

import os

import pytest

# Before torch is imported. Tests and the scripts that they run share the CPUs: threads must not spin
# while they wait for others, and each of several workers of pytest has one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    # Several workers share the files. This one takes longer than many others, which run beside it.
    items.sort(key=lambda item: item.path.name != "test_scripts.py")
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
