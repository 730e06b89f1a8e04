"""Tests on simulated machines run only when asked for; otherwise the summary says how."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "cluster" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="on simulated machines: `make test-cluster`, or -m cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)
