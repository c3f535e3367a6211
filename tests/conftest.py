"""Tests of minutes run with --slow only, and the trial at full length with --long; the longest files start first."""

import os

import hypothesis
import pytest

# Before torch is imported. Tests and the scripts that they run share the CPUs: threads must not spin
# while they wait for others, and each of several workers of pytest has one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = (
    "test_scripts.py",
    "test_adding.py",
    "test_xnnpack.py",
    "test_benchmarks.py",
    "test_study.py",
)
# How many examples a property is tried on. Without --long, they are the same every time.
hypothesis.settings.register_profile("quick", max_examples=20, derandomize=True, deadline=None)
hypothesis.settings.register_profile(
    "long", max_examples=2000, database=None, deadline=None, print_blob=True
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption(
        "--long", action="store_true", help="run tests/trial at full length: more than an hour"
    )


def pytest_configure(config):
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "quick")


def pytest_collection_modifyitems(config, items):
    # Several workers share the files. These take a minute or more; the last of them would end alone.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
