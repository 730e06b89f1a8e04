"""Plugins of pytest for one run of chosen tests: the tests, their order, and the reports that are written as they run.

Each writes lines of JSON to a file: `start` and `end` of a test, and for a recording its fixtures too.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


class Teller:
    """Reports the start of every test, and its outcome."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._failed = False

    def tell(self, **what: Any) -> None:
        """Write a line."""
        self._file.write(json.dumps({**what, "at": time.monotonic()}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._failed = False
        self.tell(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed
        if report.when == "teardown":
            self.tell(end=report.nodeid, failed=self._failed)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(end=report.nodeid, failed=True)


class Chosen:
    """Keeps these tests only, in this order; one that is not there is left out."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self._place]
        items[:] = sorted(kept, key=lambda item: self._place[item.nodeid])


class Fixtures:
    """Names the runs of a fixture that several tests share, and reports which tests use it."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._shared: dict[Any, str] = {}  # by fixture definition, while it is set up

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before = os.environ.get("PYTEST_CURRENT_TEST")
        name = f"{request.node.nodeid}::@{fixturedef.argname}[{getattr(request, 'param_index', 0)}]"
        os.environ["PYTEST_CURRENT_TEST"] = name
        begin = time.monotonic()
        try:
            return (yield)
        finally:
            self._shared[fixturedef] = name
            self._teller.tell(fixture=name, seconds=time.monotonic() - begin)
            os.environ.pop("PYTEST_CURRENT_TEST", None)
            if before is not None:
                os.environ["PYTEST_CURRENT_TEST"] = before

    def pytest_fixture_post_finalizer(self, fixturedef: Any) -> None:
        self._shared.pop(fixturedef, None)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_call(self, item: Any) -> None:
        definitions = item._fixtureinfo.name2fixturedefs
        used = [self._shared.get(one) for name in item.fixturenames for one in definitions.get(name, ())]
        self._teller.tell(uses=item.nodeid, fixtures=[name for name in used if name])
