"""How PyTorch's threads wait at their barriers, as the OpenMP runtime reports it when it is loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOON = 5000
OF_THE_USER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"


def spins(*command, **variables):
    """Rounds that a thread of a child process spins before it sleeps."""
    environment = {k: v for k, v in os.environ.items() if k not in OF_THE_USER}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment, **variables, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not found:
        pytest.skip("PyTorch's threads are not those of libgomp here")
    return int(found[-1])


@pytest.fixture(scope="module")
def load():
    """Python that loads PyTorch's OpenMP runtime alone, which says at once what it has read."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [path for path in paths if "/torch" in path and "gomp" in path]
    if len(runtimes) != 1:
        pytest.skip("PyTorch's threads are not those of libgomp here")
    return f"ctypes.CDLL({runtimes[0]!r})"


@pytest.mark.parametrize("start", [["-m"], pytest.param(["-m", "mpi4py", "-m"], marks=pytest.mark.slow)], ids=" ".join)
def test_a_programs_threads_soon_sleep(start, load):
    assert spins("-c", f"import ctypes; {load}") > 10 * SOON  # control
    assert spins(*start, "launch.prepare", "--help") == SOON


def test_a_process_that_a_program_starts_does_the_same(load):
    inside = f"import ctypes; {load}"
    assert (
        spins("-c", f"import foreroute.launch, subprocess, sys; subprocess.run([sys.executable, '-c', {inside!r}])")
        == SOON
    )


@pytest.mark.parametrize(
    ("name", "value", "rounds"),
    [("GOMP_SPINCOUNT", "77", 77), ("OMP_WAIT_POLICY", "ACTIVE", None), ("KMP_BLOCKTIME", "1", None)],
)
def test_what_the_user_set_wins(load, name, value, rounds):
    with_launch, without = (
        spins("-c", f"import ctypes{x}; {load}", **{name: value}) for x in (", foreroute.launch", "")
    )
    assert with_launch == without != SOON
    assert rounds in (None, with_launch)
