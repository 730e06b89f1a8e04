"""What a process does with signals, and at a meeting point that is taken."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from foreroute.launch.start.process import STOPS, StopSignal
from foreroute.launch.testing import runs as testing


def test_a_signal_that_a_launcher_repeats_does_not_hinder_the_checkpoint():
    """In a process of its own, which a later signal ends."""
    code = """
import os, signal, sys, time
from foreroute.launch.start import process
stop = process.StopSignal()
with stop.deferred():
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    print(stop.exit_code, flush=True)
    process.GRACE_S = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "143\n"), done.stderr


def test_a_signal_behind_an_error_does_not_hide_it():
    handlers = {number: signal.getsignal(number) for number in STOPS}
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


def test_ctrl_c_while_a_program_is_loaded_is_one_line(tmp_path):
    """At the first import of PyTorch, by a package of that name that sends it."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def heed():  # a job in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for start, code in ((["-m", "launch.train"], 130), (["-c", "import foreroute.launch.train"], -signal.SIGINT)):
        done = subprocess.run(
            [sys.executable, *start], env=environ, capture_output=True, text=True, timeout=600, preexec_fn=heed
        )
        assert done.returncode == code  # an import leaves the signal to who imports
        assert (done.stderr == "foreroute: stopped before it began\n") == (code == 130)


@pytest.mark.parametrize("ignored", [False, True])
def test_every_signal_that_would_end_the_process_waits_for_the_trainer(ignored):
    """Also the end of a terminal, unless nohup has it ignored; each in a process of its own."""
    code = f"""
import os, signal
from foreroute.launch.start.process import STOPS, StopSignal
signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)
for number in STOPS:
    stop = StopSignal()
    with stop.deferred():
        os.kill(os.getpid(), number)
    print(stop.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    codes = {
        "INT": 130,
        "TERM": 143,
        "HUP": 128 if ignored else 129,
        "QUIT": 131,
        "XCPU": 152,
        "USR1": 143,
        "USR2": 140,
    }
    assert list(map(int, done.stdout.split())) == list(codes.values())


ENDS = """
import atexit, os, sys
from torch import distributed as dist
from foreroute.launch.start.process import leaving_at_once
class Late:
    def __del__(self, abort=os.abort):
        abort()
late = Late()
atexit.register(print, "at exit")
def main():
    if {group}:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("done")
    {end}
with leaving_at_once():
    main()
"""


@pytest.mark.parametrize(
    ("group", "end", "code"),
    [
        (True, "sys.exit(5)", 5),
        (False, "sys.exit(5)", -signal.SIGABRT),
        pytest.param(True, "", 0, marks=pytest.mark.slow),
        pytest.param(True, "sys.exit('bad')", -signal.SIGABRT, marks=pytest.mark.slow),
    ],
)
def test_a_process_with_a_group_leaves_before_the_interpreter_ends(group, end, code):
    """What the interpreter destroys at its end aborts, as a thread of gloo may; all else that belongs to an end was
    done."""
    command = [sys.executable, "-c", ENDS.format(group=group, end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (code, "done\nat exit\n"), done.stderr


IN_FLIGHT = """
import atexit, ctypes, sys, time
from contextlib import nullcontext
rank, store, leave = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if rank == 0:  # the last thing before the interpreter ends; holds it, so that gloo's thread waits
    atexit.register(ctypes.PyDLL(None).usleep, 3_000_000)
import torch
from torch import distributed as dist
from foreroute.launch.start.process import leaving_at_once
def main():
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.barrier()
    if rank == 0:  # keeps neither the tensor nor the work: gloo's thread will be the last to hold them
        dist.all_reduce(torch.zeros(9), async_op=True)
    else:
        time.sleep(0.3)
        dist.all_reduce(torch.zeros(9))
        time.sleep(3)
with leaving_at_once() if leave else nullcontext():
    main()
"""


@pytest.mark.dist
@pytest.mark.parametrize(("leave", "code"), [(True, 0), pytest.param(False, -signal.SIGABRT, marks=pytest.mark.slow)])
def test_what_gloo_lets_go_at_the_end_aborts_nothing(tmp_path, leave, code):
    """And what happens to a process that ends otherwise."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", IN_FLIGHT, rank, str(tmp_path / "store"), str(leave)])
        for rank in ("0", "1")
    ]
    assert [process.wait(100) for process in ranks] == [code, 0]


REFUSED = {"0": "failed to listen", "1": "^foreroute: rank 1 is at .* already: another run meets there; give"}


@pytest.mark.dist
@pytest.mark.slow
def test_a_second_run_at_the_same_port_is_refused(tmp_path):
    """As when deepspeed is started twice on one machine; the first run does not notice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    long = [*testing.small_run(tmp_path), "parallel.expert_ranks=2", "train.steps=100000"]

    def start(rank, folder):
        command = [sys.executable, "-m", "launch.train", *long, f"train.runs_dir={folder}"]
        environ = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    with ExitStack() as stack:
        ranks = [start(number, tmp_path) for number in ("0", "1")]
        for process in ranks:
            stack.callback(process.kill)
        testing.wait_until(lambda: testing.last_step(tmp_path) > 0)
        others = {number: start(number, tmp_path / "second") for number in REFUSED}
        for number, process in others.items():
            stack.callback(process.kill)
            err = process.communicate(timeout=600)[1]
            (line,) = (line for line in err.splitlines() if line.startswith("foreroute:"))
            assert process.returncode == 2 and re.search(REFUSED[number], line), line
        ranks[0].send_signal(signal.SIGTERM)
        for process in ranks:
            process.communicate(timeout=600)
            assert process.returncode == 143
