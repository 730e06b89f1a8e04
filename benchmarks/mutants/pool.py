"""Workers and their trees: each has a copy of the repository of its own, in which a mutant can be tried.

A worker is two processes (worker.py), started when they are first asked: in one Triton's kernels run in its
interpreter, which must be chosen before Triton is imported.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TypeVar

from benchmarks.mutants.worker import Answer, Job

HEAVY = (
    "numpy",
    "torch",
    "torch.distributed",
    "deepspeed",
    "triton",
    "omegaconf",
    "hydra",
    "safetensors.torch",
    "torch._inductor.compile_fx",
    "torch._dynamo.testing",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
)
"""Modules that take seconds to import."""
_LEFT = (
    ".git",
    ".venv",
    ".cache",
    ".*_cache",
    "runs",
    "certificates",
    "multirun",
    "outputs",
    "wandb",
    "*.egg-info",
    "__pycache__",
)
_HERE = Path(__file__).resolve().parents[2]
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def copy_tree(root: Path, target: Path) -> None:
    """Copy a repository without the files that runs have left in it."""
    shutil.copytree(root, target, symlinks=True, ignore=shutil.ignore_patterns(*_LEFT))


class Worker:
    """One tree, and the processes that run tests in it."""

    def __init__(self, root: Path, folder: Path, heavy: Iterable[str]) -> None:
        self.tree, self._scratch, self._heavy = folder / "tree", folder / "scratch", list(heavy)
        copy_tree(root, self.tree)
        self._processes: dict[bool, subprocess.Popen[str]] = {}
        # Byte code is made once, of what nothing has changed; in a run none is written.
        subprocess.run([sys.executable, "-m", "compileall", "-q", self.tree], check=False, capture_output=True)

    def run(self, job: Job, *, interpreted: bool) -> Answer:
        """Run tests in the tree; files that another run kept are removed first."""
        for kept in (self._scratch, self.tree / ".cache", self.tree / "runs"):
            shutil.rmtree(kept, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        environment = {"TMPDIR": str(self._scratch), **job.environment}
        job = replace(job, tree=str(self.tree), scratch=str(self._scratch), environment=environment)
        process = self._process(interpreted)
        _pipe(process.stdin).write(json.dumps(asdict(job)) + "\n")
        _pipe(process.stdin).flush()
        return Answer(**json.loads(_pipe(process.stdout).readline()))

    def told(self) -> list[dict[str, object]]:
        """Return the reports of the last run, and the files it wrote."""
        return [json.loads(line) for line in (self._scratch / "told").read_text().splitlines()]

    def log(self) -> str:
        """Return the output of pytest in the last run."""
        return (self._scratch / "log").read_text(errors="replace")

    @contextlib.contextmanager
    def changed(self, file: str, source: str) -> Iterator[None]:
        """Put this source into a file of the tree until the block ends; its byte code, which goes by date and size, is
        away meanwhile."""
        path = self.tree / file
        before = path.read_text()
        for code in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            code.unlink()
        path.write_text(source)
        try:
            yield
        finally:
            path.write_text(before)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes.values():
            with process:
                _pipe(process.stdin).close()

    def _process(self, interpreted: bool) -> subprocess.Popen[str]:
        if interpreted not in self._processes:
            own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
            if interpreted:
                own["TRITON_INTERPRET"] = "1"
            self._processes[interpreted] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.mutants.worker", *self._heavy],
                cwd=_HERE,
                env={**os.environ, **own},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._processes[interpreted]


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def over_workers(
    workers: list[Worker], tasks: Iterable[_Task], do: Callable[[Worker, _Task], _Result]
) -> list[_Result]:
    """Do every task with a worker that is free; return the results in the tasks' order."""
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(task: _Task) -> _Result:
        worker = free.get()
        try:
            return do(worker, task)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(one, tasks))
