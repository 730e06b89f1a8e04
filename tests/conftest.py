"""Which tests run, and which of them stay together when several processes share them out (tests/README.md)."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if "cluster" not in config.option.markexpr:
        _skip_clusters(items)
    for item in items:  # a file's tests share what it made once, so they stay in one process
        if item.get_closest_marker("xdist_group") is None:
            name = item.path.relative_to(ROOT).with_suffix("").as_posix()
            item.add_marker(pytest.mark.xdist_group(name))


def _skip_clusters(items):
    """Tests on simulated machines run only when asked for; otherwise the summary says how."""
    skip = pytest.mark.skip(reason="on simulated machines: `make test-cluster`, or -m cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)
