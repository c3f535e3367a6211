"""Options of pytest: --slow for tests that take minutes, --long for trials at full length."""

import os

import hypothesis
import pytest

# This has to precede the import of torch. Tests and their scripts share the CPUs: threads must not
# spin while they wait for others, and each of pytest's workers has one thread.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = (  # files that take a minute or more
    "test_scripts.py",
    "test_adding.py",
    "test_xnnpack.py",
    "test_benchmarks.py",
    "test_study.py",
)
# The number of examples for a property. Without --long, the examples are always the same.
hypothesis.settings.register_profile("quick", max_examples=20, derandomize=True, deadline=None)
hypothesis.settings.register_profile(
    "long", max_examples=2000, database=None, deadline=None, print_blob=True
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption(
        "--long", action="store_true", help="run tests/trial at full length: more than an hour"
    )


def pytest_configure(config):
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "quick")


def pytest_collection_modifyitems(config, items):
    # Several workers share the files. The longest start first, so that all workers end together.
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
