"""Tests of minutes run with --slow only; the longest files of the others start first."""

import os

import pytest

# Before torch is imported. Tests and the scripts that they run share the CPUs: threads must not spin
# while they wait for others, and each of several workers of pytest has one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = ("test_scripts.py", "test_adding.py", "test_xnnpack.py", "test_benchmarks.py", "test_study.py")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    # Several workers share the files. These take a minute or more; the last of them would end alone.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
