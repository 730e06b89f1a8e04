"""A real Slurm of one machine: the job script trains, is preempted and goes on; what srun tells its processes."""

import re
import sys

import pytest

from benchmarks.machines.slurm import SlurmError, one_slurm, why_not
from foreroute.launch.testing.runs import last_step, processes_of, read_losses, wait_until

REASON = why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.dist, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SAY = """
import sys
from foreroute.launch.start.rank_variables import find_place
p = find_place()
sys.stdout.write(f"{p.rank} {p.ranks} {p.local_rank} {p.launcher.name}\\n")  # in one piece, also with PYTHONUNBUFFERED
"""
FAIL = """
import foreroute.launch.train
from foreroute.engine.train.trainer import Trainer
run = Trainer.run
def fail(trainer, *arguments):
    assert trainer.world.mesh.rank != 1, "planted"
    return run(trainer, *arguments)
Trainer.run = fail
foreroute.launch.train.main()
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Job:
    """The recipe with two ranks, as a user submits it."""

    def __init__(self, slurm, folder, options):
        self.slurm, self.folder = slurm, folder
        folder.mkdir()
        command = [
            "sbatch",
            "--parsable",
            "--ntasks=2",
            f"--output={folder}/log",
            f"--export=ALL,PYTHON={sys.executable}",
            "launch/recipes/slurm.sbatch",
            *options,
            "parallel.expert_ranks=2",
            f"train.runs_dir={folder}",
        ]
        self.number = slurm.run(*command).strip()

    def log(self):
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def wait(self):
        """Until it has ended; gives its state."""
        wait_until(lambda: self.slurm.state(self.number) in ("COMPLETED", "FAILED", "CANCELLED"))
        return self.slurm.state(self.number)


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm, small_run, tmp_path):
    """Put back by an administrator or for another job (requeue), and by its own script after a SIGTERM."""
    options = [*small_run, "train.steps=200", "train.log_every=1"]
    undisturbed = Job(slurm, tmp_path / "undisturbed", options)
    assert undisturbed.wait() == "COMPLETED", undisturbed.log()
    job = Job(slurm, tmp_path / "preempted", options)
    wait_until(lambda: last_step(job.folder) >= 10)
    slurm.run("scontrol", "requeue", job.number)
    wait_until(lambda: "stopped at step" in job.log(), 30)
    wait_until(lambda: last_step(job.folder) >= 80)
    slurm.run("scancel", "--signal=TERM", job.number)
    wait_until(lambda: "goes back into the queue" in job.log(), 30)
    assert job.wait() == "COMPLETED", job.log()
    stops = re.findall(r"stopped at step (\d+);", job.log())
    assert re.findall(r"resumed at step (\d+) ", job.log()) == stops and len(stops) == 2
    assert "Exited with exit code 143" in job.log()
    assert "started 3 times" in job.log()
    assert read_losses(job.folder) == read_losses(undisturbed.folder)
    assert len(read_losses(job.folder)) == 200


def test_a_failed_job_stays_failed(slurm, small_run, tmp_path):
    job = Job(slurm, tmp_path / "failed", [*small_run, "train.steps=none"])
    assert job.wait() == "FAILED"
    assert job.log().count("foreroute: ") == 1 and "train.steps" in job.log()
    assert "goes back" not in job.log()


def test_an_exception_under_srun_ends_all(slurm, small_run, tmp_path):
    options = [*small_run, "parallel.expert_ranks=2", f"train.runs_dir={tmp_path}"]
    with pytest.raises(SlurmError, match=r"AssertionError: planted\n.*This was rank 1 of 2\."):
        slurm.run("srun", "--ntasks=2", sys.executable, "-c", FAIL, *options)
    wait_until(lambda: not processes_of(tmp_path), 30)


def test_places_under_srun(slurm):
    """Of srun's own processes; of torchrun's, started by srun or in a shell of one task."""
    say = [sys.executable, "-c", SAY]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", *say]
    by_srun = slurm.run("srun", "--ntasks=2", *say)
    assert sorted(by_srun.splitlines()) == ["0 2 0 Slurm", "1 2 1 Slurm"]
    by_torchrun = slurm.run("srun", "--ntasks=1", *torchrun)
    assert sorted(by_torchrun.splitlines()) == ["0 2 0 torchrun or deepspeed", "1 2 1 torchrun or deepspeed"]
    with pytest.raises(SlurmError, match="RANK=0: Slurm started this process as rank 1 of 2; unset RANK"):
        slurm.run("env", "RANK=0", "WORLD_SIZE=2", "srun", "--ntasks=2", *say)
