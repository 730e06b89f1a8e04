"""A small run for the tests of launchers, and what it gives as one process."""

import subprocess
import sys

import pytest

from foreroute.launch.testing import runs as testing


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    return testing.small_run(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def alone(small_run, tmp_path_factory):
    """Losses by step."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "launch.train", *small_run, f"train.runs_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return testing.read_losses(folder)
