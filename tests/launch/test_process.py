"""What a process does with signals."""

import os
import signal

import pytest

from launch.process import StopSignal


def test_a_signal_behind_an_error_does_not_hide_it():
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        stop = StopSignal()
        with pytest.raises(KeyError), stop.deferred():
            raise KeyError
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does when another rank is gone
        assert stop() and stop.exit_code == 143
        stop = StopSignal()
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop() and stop.exit_code == 143
        stop = StopSignal()
        with stop.deferred():
            pass
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
