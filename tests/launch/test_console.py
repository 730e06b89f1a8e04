"""A bar on a terminal, lines elsewhere."""

import fcntl
import os
import struct
import sys
import termios

import pytest

from launch.console import Console


@pytest.mark.parametrize(("columns", "bar"), [(80, True), (0, False)])
def test_a_terminal_without_columns_gets_lines(monkeypatch, columns, bar):
    """mpirun gives its processes one when its own output goes to a file; a bar would be empty there."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        console = Console(10)
        console.step(5)
        console.metrics(5, {"loss": 1.0, "bpc": 1.5, "k": 4, "tokens_per_second": 100.0}, 3.0)
        console.close()
        written = os.read(reader, 10_000).decode()
    os.close(reader)
    assert ("%|" in written) == bar and ("step 5/10  loss 1.000" in written) != bar
