"""Seconds until all processes of a run have ended when a rank is killed before the ranks have met, by launcher.

    python -m benchmarks.machines.bench_meeting

Two ranks of experiment=debug; rank 1 kills itself (SIGKILL) before it looks for the others, or as soon as it has come
to them. The seconds are from there to the end of the launcher and of every process of the run. `by hand` are two
processes without a launcher, which nobody tells anything: there `parallel.meet_s` counts. srun runs as
launch/recipes/slurm.sbatch has it, without --kill-on-bad-exit; it needs root and Slurm's programs
(benchmarks/machines/slurm.py), and is left out where they are missing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness import environment, positive, print_result, print_table
from benchmarks.machines import slurm
from benchmarks.machines.cluster import ROOT, free_port
from foreroute.launch.testing.runs import processes_of, small_run

MOMENTS = "before it comes", "once it has come"
_RANK = "RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"
_HOOK = """
import importlib.machinery, os, pathlib, signal, sys
rank = next((os.environ[name] for name in {variables} if name in os.environ), "")

def die(*_):
    pathlib.Path({mark!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)

class Killer:
    def find_spec(self, name, path=None, target=None):
        if name != "foreroute.launch.start.meeting":
            return None
        if {early}:
            die()
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            take = module._take_place
            module._take_place = lambda *arguments: die(take(*arguments))
        spec.loader.exec_module = exec_module
        return spec

if rank == "1" and "launch.train" in sys.orig_argv:
    sys.meta_path.insert(0, Killer())
"""


def commands(launcher: str, port: str) -> list[list[str]]:
    """Return the commands of each launcher, to which the options are added; several processes where there is no
    launcher."""
    python = sys.executable
    hosted = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return {
        "by hand": [[python, "-m", "launch.train"]] * 2,
        "torchrun": [[python, "-m", "torch.distributed.run", "--nproc_per_node=2", *hosted, "-m", "launch.train"]],
        "deepspeed": [
            [
                python,
                "-m",
                "deepspeed.launcher.runner",
                "--num_gpus=2",
                *hosted,
                "--module",
                "--no_local_rank",
                "launch.train",
            ]
        ],
        "mpirun": [
            [
                f"{sys.prefix}/bin/mpirun",
                "--allow-run-as-root",
                "--oversubscribe",
                "--bind-to",
                "none",
                "-np",
                "2",
                python,
                "-m",
                "mpi4py",
                "-m",
                "launch.train",
            ]
        ],
        "srun": [["srun", "--ntasks=2", "--kill-on-bad-exit=0", "--wait=180", python, "-m", "launch.train"]],
    }[launcher]


def seconds_to_end(launcher: str, moment: str, meet_s: float, here: "slurm.Slurm | None") -> float:
    """Start the run; return the seconds from the death of rank 1 to the end of all processes.

    Raises:
        SystemExit: rank 1 did not die, or the run did not fail.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        mark = folder / "killed"
        (folder / "sitecustomize.py").write_text(
            _HOOK.format(variables=_RANK, mark=str(mark), early=moment == MOMENTS[0])
        )
        options = [*small_run(folder), f"train.runs_dir={folder}", f"parallel.meet_s={meet_s}"]
        port = str(free_port())
        base = os.environ if here is None else here.environ
        environ = {**base, "PYTHONPATH": name, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        started = []
        for rank, command in enumerate(commands(launcher, port)):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            own = {**environ, **(place if launcher == "by hand" else {})}
            process = subprocess.Popen(
                [*command, *options], cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.callback(process.kill)
            started.append(process)
        while not mark.exists():
            if all(process.poll() is not None for process in started):
                raise SystemExit(f"{launcher}: rank 1 did not come to its end: {started[0].communicate()[0][-500:]}")
            time.sleep(0.02)
        begun = time.monotonic()
        codes = [process.wait(timeout=600) for process in started]
        while processes_of(folder):
            time.sleep(0.02)
        if not any(codes):
            raise SystemExit(f"{launcher}: the run went well without rank 1")
        return time.monotonic() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=2, help="default 2; the longest is given")
    parser.add_argument("--meet-s", type=float, default=30.0, help="parallel.meet_s, default 30")
    args = parser.parse_args()
    launchers = ["by hand", "torchrun", "deepspeed", "mpirun"]
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        here = None
        if slurm.why_not() is None:
            launchers.append("srun")
            here = stack.enter_context(slurm.one_slurm(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for launcher in launchers:
            cluster = here if launcher == "srun" else None
            found[launcher] = {
                moment: max(seconds_to_end(launcher, moment, args.meet_s, cluster) for _ in range(args.rounds))
                for moment in MOMENTS
            }
    print(environment())
    print_table(["launcher", *MOMENTS], [[name, *row.values()] for name, row in found.items()])
    print_result({"meet_s": args.meet_s, "seconds": found})


if __name__ == "__main__":
    main()
