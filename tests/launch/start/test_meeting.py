"""How ranks meet: who does not come, or is gone before all have come, is waited for no longer than parallel.meet_s."""

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from foreroute.engine.config import Collectives
from foreroute.engine.testing.ranks import Program, rank_environments
from foreroute.launch.start.meeting import _backend
from foreroute.launch.testing.runs import TRAIN_CODE, small_run, wait_until

GONE = (
    "import os, foreroute.launch.start.meeting as m; m._take_place = lambda store, place, _:"
    " (store.add(f'came/{place.rank}', 1), os._exit(9))"
)
"""A rank that dies when it has come."""


@contextmanager
def ranks(tmp_path, *code, of=None, meet_s=3, start=Program):
    """As many ranks as there is code to run before them, of a world that may have more."""
    environments = rank_environments(of or len(code))[: len(code)]
    options = [*small_run(tmp_path), f"train.runs_dir={tmp_path}", f"parallel.meet_s={meet_s}"]
    found = [
        start(f"{before}\n{TRAIN_CODE}", options, environ) for before, environ in zip(code, environments, strict=True)
    ]
    try:
        yield found
    finally:
        for process in found:
            process.__exit__(None, None, None)


def line_of(err):
    (line,) = (line for line in err.splitlines() if line.startswith("foreroute:"))
    return line


@pytest.mark.dist
def test_ranks_that_never_come_are_named(tmp_path):
    with ranks(tmp_path, "", "", of=8) as both:
        ended = [process.wait() for process in both]
    assert [code for code, *_ in ended] == [2, 2]
    lines = [line_of(err) for *_, err in ended]
    assert any(
        re.search(
            r"^foreroute: rank [01] of 8 did not meet the others at \S+ within 3 s: ranks 2, 3, 4, 5 and 2 more have"
            r" not come; "
            r"parallel.meet_s=SECONDS waits longer$",
            line,
        )
        for line in lines
    ), lines
    assert not (tmp_path / "debug").exists()


@pytest.mark.dist
def test_a_missing_rank_0_is_named(tmp_path):
    with ranks(tmp_path, "import os; os._exit(9)", "") as both:
        code, _, err = both[1].wait()
    assert code == 2 and "did not meet the others" in line_of(err) and "rank 0 has not come" in err


@pytest.mark.parametrize(
    ("gpus", "collectives", "backend"),
    [
        (True, Collectives.nccl, "cpu:gloo,cuda:nccl"),
        (True, Collectives.gloo, "gloo"),
        (False, Collectives.nccl, "gloo"),
    ],
)
def test_what_tensors_travel_through(monkeypatch, gpus, collectives, backend):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus)
    assert _backend(collectives) == backend


@pytest.mark.parametrize("port", ["99999", "0", "http"])
def test_what_is_no_port_is_one_line(run, tmp_path, monkeypatch, port):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = run("train", *small_run(tmp_path), f"train.runs_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"foreroute: MASTER_PORT={port}: must be a port, 1 .. 65535\n"


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_came_and_is_gone(tmp_path):
    with ranks(tmp_path, "", GONE, "") as three:
        codes = [process.wait()[0] for process in three]
    assert codes == [2, 9, 2]


@pytest.mark.dist
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda n: n.name
)
def test_a_signal_ends_the_wait_at_once(tmp_path, number):
    """Inside PyTorch's calls no handler would run until they give up."""
    environ = rank_environments(2)[0]
    port = int(environ["MASTER_PORT"])
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{TRAIN_CODE}"
    command = [sys.executable, "-c", code, *small_run(tmp_path), f"train.runs_dir={tmp_path}", "parallel.meet_s=100000"]

    def listens():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as rank:
        try:
            wait_until(listens)
            time.sleep(0.5)
            rank.send_signal(number)
            _, err = rank.communicate(timeout=600)
        finally:
            rank.kill()
    assert rank.returncode == 128 + number, err
    assert "Traceback" not in err
