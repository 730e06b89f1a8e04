"""The example of a run with an n-gram table, from documents to a sample, as its head says."""

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from examples import ngram_table
from foreroute.engine.testing.ranks import Program
from tests.examples.programs import CODE


class Popen:
    """subprocess.Popen of `python -m MODULE ..`, with a process that has PyTorch imported already."""

    def __init__(self, command, env=os.environ):
        assert command[:2] == [sys.executable, "-m"]
        self._program = Program(CODE, command[2:], {**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})

    def poll(self):
        return None if self._program.runs else self._program.wait()[0]

    def kill(self):
        self._program.send_signal(signal.SIGKILL)

    def wait(self):
        with self._program:
            code, out, err = self._program.wait()
        print(out, flush=True)
        print(err, file=sys.stderr, flush=True)
        return code


def run_to_its_end(command, check):
    assert check and Popen(command).wait() == 0


@pytest.mark.dist
@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ngram_table, "subprocess", SimpleNamespace(Popen=Popen, run=run_to_its_end))
    ngram_table.main(tmp_path)
    printed, errors = capfd.readouterr()
    assert "killing a rank" in printed and "rank 1 is lost" in errors
    commands = [line.split(" launch.")[1].split()[0] for line in printed.splitlines() if line.startswith("$ ")]
    assert commands == ["certify", "train", "certify", "train", "generate"]
    run = tmp_path / "run"
    losses = {row["step"]: row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert losses[24] < losses[4]
    (resumed,) = [line for line in printed.splitlines() if line.startswith("resumed at step ")]
    step = int(resumed.split()[3])
    assert 8 <= step < 24 and f"{24 - step} steps were as certified" in printed
    assert printed.rstrip().splitlines()[-1].startswith("def ") or "\ndef " in printed
    # the table is in the certificate and moved bytes
    certified = json.loads((tmp_path / "certificate-3" / "certificate.json").read_text())["tables"]
    assert certified["tables"][0]["place"] == "layer 1" and certified["rank"]["mean"] > 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["table_bytes"] > 0
