"""The programs run inside the test process, and a small text for them."""

import logging
import signal
import sys
from types import SimpleNamespace

import pytest

from foreroute.launch.start.process import STOPS
from foreroute.launch.testing.runs import program_module


@pytest.fixture(autouse=True)
def loggers():
    """Hydra switches off every logger that there is; other tests of this process want them."""
    yield
    for logger in logging.root.manager.loggerDict.values():
        logger.disabled = False


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a program in this process, as `python -m launch.PROGRAM ARGS` would; gives exit code, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in STOPS}

    def run(program, *args):
        monkeypatch.setattr(sys, "argv", [program, *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            program_module(program).main()
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 500)
    return path
