"""Where a process finds itself, from the variables of each launcher."""

import os
import signal
import subprocess
import sys

import pytest

from engine.errors import UserError
from launch.process import Place, StopSignal, find_device, find_place


@pytest.mark.parametrize(
    "environ,place",
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, Place(3, 4, 1, mpi=True)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, Place(1, 2, 1, mpi=True)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, 0, mpi=True)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PMI_RANK": "1"}, Place()),
    ],
)  # fmt: skip
def test_places(environ, place):
    assert find_place(environ) == place


@pytest.mark.parametrize(
    "environ,message",
    [
        ({"RANK": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE=: torchrun or deepspeed sets it"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=one"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2: must be below WORLD_SIZE=2"),
    ],
)
def test_places_that_cannot_be(environ, message):
    with pytest.raises(UserError, match=message):
        find_place(environ)


def test_the_cpu_on_request():
    assert find_device(Place(), {"DS_ACCELERATOR": "cpu"}).type == "cpu"


def test_a_signal_that_a_launcher_repeats_does_not_hinder_the_checkpoint():
    """In a process of its own, which a later signal ends."""
    code = """
import os, signal, sys, time
from launch import process
stop = process.StopSignal()
with stop.deferred():
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    print(stop.exit_code, flush=True)
    process.GRACE_S = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "143\n"), done.stderr


def test_a_signal_behind_an_error_does_not_hide_it():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopSignal()
        with pytest.raises(KeyError), stop.deferred():
            raise KeyError
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does when another rank is gone
        assert stop() and stop.exit_code == 143
        stop = StopSignal()
        with stop.deferred():
            pass
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
